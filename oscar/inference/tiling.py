"""Large pictures in little memory: without seams, and with the same bits whatever the memory budget.

Stable Diffusion's autoencoder is global: its group normalisations and its attention look at the whole picture, so that
tiles of a picture worked on alone come out different, and blending only hides the seams. Here it runs layer by layer
over blocks of rows instead (`oscar.inference.row_blocks`), as exact as on the whole.

Autoencoders without global layers (nano's, and the small ones for previews) run over strips of rows with a margin at
least as wide as their field of view. The UNet has `oscar.inference.windows`.

Pictures of up to `WHOLE` pixels are not cut.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from oscar.inference.cpu.reuse import nothing_kept
from oscar.inference.memory import available_memory
from oscar.inference.row_blocks import Outline, Stream, spans

logger = logging.getLogger(__name__)

WHOLE = 2**20  # pixels up to which an autoencoder sees the picture whole
STRIP = 2**22  # pixels of a strip, without its margins, for an autoencoder without global layers
AUTO_SHARE = 0.8  # of the free memory, for the budget "auto"

_PREFIXES = " KMGT"


@dataclass(frozen=True)
class MemoryBudget:
    """What the networks may take for the maps between their layers: beyond the weights, the picture and the result.

    Attributes:
        limit: in bytes; None is "auto": a share of what is free on the device when a picture comes.
    """

    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit <= 0:
            raise ValueError(_not_allowed(self.limit))

    @classmethod
    def parse(cls, value: int | str | MemoryBudget | None) -> MemoryBudget | None:
        """From "auto", a number of bytes, or a size such as "4GB" (10^9 bytes each) or "2.5GiB"; None is no limit.

        Raises:
            ValueError: for anything else.
        """
        if value is None or isinstance(value, MemoryBudget):
            return value
        text = str(value).strip()
        if text.lower() == "auto":
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", text.upper())
        if match is None:
            raise ValueError(_not_allowed(value))
        power = _PREFIXES.index(match[2] or " ")
        return cls(int(float(match[1]) * (1024 if match[3] else 1000) ** power))

    def bytes(self, device: torch.device) -> int:
        """The limit, which for "auto" is that of this moment."""
        if self.limit is not None:
            return self.limit
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(AUTO_SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
        return int(AUTO_SHARE * available_memory())


def _not_allowed(value: object) -> str:
    return f"memory is {value!r}; allowed: auto, or a size above 0 such as 4GB or 1500000000"


def _limit(budget: MemoryBudget | None, device: torch.device) -> float:
    return math.inf if budget is None else budget.bytes(device)


class MemoryPlan(NamedTuple):
    """What one half of an autoencoder does under a budget.

    Attributes:
        peak: estimate of the bytes that it takes beyond the weights, the picture and the result.
        recomputed: number of maps that are computed anew each time that they are read.
    """

    peak: int
    recomputed: int


def cuts(vae: nn.Module, height: int, width: int) -> bool:
    """Whether pictures of that many pixels a side are cut: large ones, while nothing is trained.

    Autoencoders with other global layers than Stable Diffusion's see all pictures whole.
    """
    if height * width <= WHOLE or torch.is_grad_enabled():
        return False
    if isinstance(vae, AutoencoderKL):
        return {*vae.config.down_block_types, *vae.config.up_block_types} == {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    return not any("Attention" in type(module).__name__ for module in vae.modules())


def vae_factor(vae: nn.Module) -> int:
    """Pixels per latent position along each side."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: nn.Module, images: Tensor, budget: MemoryBudget | None = None) -> Tensor:
    """Large images (B, 3, H, W), sides multiples of 8 -> the posterior's moments (B, 2C, H/8, W/8), or the latent
    (B, C, H/8, W/8) of an autoencoder without posterior; with another `vae_factor` in place of 8."""
    with nothing_kept():
        return _one_by_one(vae, images, budget, Stream.encode, vae.encoder, vae_factor(vae), 1)


def decode(vae: nn.Module, latent: Tensor, budget: MemoryBudget | None = None) -> Tensor:
    """Large latents (B, C, h, w), as the autoencoder wants them -> images (B, 3, 8h, 8w)."""
    with nothing_kept():
        return _one_by_one(vae, latent, budget, Stream.decode, vae.decoder, 1, vae_factor(vae))


def _one_by_one(
    vae: nn.Module,
    batch: Tensor,
    budget: MemoryBudget | None,
    run: Callable[[Stream, AutoencoderKL, Tensor], Tensor],
    half: nn.Module,
    unit_in: int,
    unit_out: int,
) -> Tensor:
    results = []
    for value in batch.split(1):
        if isinstance(vae, AutoencoderKL):
            height, width = (side * vae_factor(vae) // unit_in for side in value.shape[-2:])
            stream = Stream(_limit(budget, value.device), value.dtype, value.device)
            results.append(run(stream, vae, value))
            if stream.peak > stream.limit:
                logger.warning(
                    "memory budget of %.2g GB is too small for a picture of %dx%d: it took about %.2g GB, which is the "
                    "least", stream.limit / 1e9, width, height, stream.peak / 1e9
                )  # fmt: skip
        else:
            results.append(_by_strips(half, value, unit_in, unit_out))
    return results[0] if len(results) == 1 else torch.cat(results)


def plan(
    vae: AutoencoderKL, height: int, width: int, dtype: torch.dtype, budget: MemoryBudget | None = None
) -> tuple[MemoryPlan, MemoryPlan]:
    """What encoding and decoding a large picture on a CPU would take; nothing is computed.

    Args:
        vae: the autoencoder, of which only the configuration is used.
        height, width: of the picture, multiples of 8.
        dtype: of the networks.
        budget: None is no limit.
    """
    device = torch.device("cpu")
    with torch.device("meta"):
        empty = nn.Module.to(AutoencoderKL.from_config(vae.config), dtype)
        images = torch.empty(1, 3, height, width, dtype=dtype)
        rows, columns = height // vae_factor(vae), width // vae_factor(vae)
        latent = torch.empty(1, vae.config.latent_channels, rows, columns, dtype=dtype)
    plans = []
    for run, value in ((Stream.encode, images), (Stream.decode, latent)):
        outline = Outline(_limit(budget, device), dtype, device)
        with torch.no_grad():
            run(outline, empty, value)
        plans.append(MemoryPlan(outline.peak, outline.recomputed))
    return plans[0], plans[1]


def _by_strips(network: nn.Module, value: Tensor, unit_in: int, unit_out: int) -> Tensor:
    """A network without global layers, over strips of rows; `unit_in` rows of `value` become `unit_out` rows."""
    margin = sum(  # a 3x3 convolution sees one row further, which is at most one of the latent
        isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.kernel_size != (1, 1)
        for module in network.modules()
    )
    height, width = (side // unit_in for side in value.shape[-2:])
    result = None
    for top, bottom in spans(height, max(margin, STRIP // (max(unit_in, unit_out) ** 2 * width))):
        first, last = max(top - margin, 0), min(bottom + margin, height)
        rows = network(value[:, :, first * unit_in : last * unit_in])
        if result is None:
            result = rows.new_empty(*rows.shape[:2], height * unit_out, rows.shape[3])
        rows = rows[:, :, (top - first) * unit_out : (bottom - first) * unit_out]
        result[:, :, top * unit_out : bottom * unit_out] = rows
    return result
