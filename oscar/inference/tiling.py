"""Large images in little memory: without seams, and with the same bits whatever the memory budget cuts.

Stable Diffusion's autoencoder is global: its group normalisations and its attention look at the whole image, so that
tiles of an image worked on alone come out different, and blending only hides the seams. Here it runs layer by layer
over blocks of rows instead (`oscar.inference.row_blocks`), as exact as on the whole.

Autoencoders without global layers (nano-vq's, and the small ones for previews) run over strips of rows with a margin at
least as wide as their field of view. The UNet has `oscar.inference.windows`.

Only what does not fit whole is cut, and no image of up to `WHOLE` pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from oscar.inference.fitting import SLACK, device_type, images_at_once, peak_bytes
from oscar.inference.kernels import nothing_kept
from oscar.inference.memory import MemoryBudget
from oscar.inference.row_blocks import Outline, Stream, spans
from oscar.models.backbone import VAE, Backbone, vae_factor

logger = logging.getLogger(__name__)

WHOLE = 2**20  # pixels up to which an autoencoder sees the image whole
STRIP = 2**22  # pixels of a strip, without its margins, for an autoencoder without global layers
_REFERENCE = 512  # side of the image from which a network's memory by pixel is taken


class TiledBackbone(Backbone):
    """A backbone whose autoencoder works on large images in parts, where the whole does not fit: for inference.

    Attributes:
        memory: what it may take beyond weights, image and result; None is no bound.
        preview: a small autoencoder that decodes in the VAE's place, if there is one.
    """

    memory: MemoryBudget | None

    @property
    def decoding_vae(self) -> nn.Module:
        return self._modules.get("preview", self.vae)

    def run_encoder(self, vae: VAE, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self._run(vae, super().run_encoder, encode, images, height * width, (3, _REFERENCE, _REFERENCE))

    def run_decoder(self, vae: VAE, latent: Tensor) -> Tensor:
        factor = vae_factor(vae)
        size, side = latent.shape[-2] * latent.shape[-1] * factor**2, _REFERENCE // factor
        return self._run(vae, super().run_decoder, decode, latent, size, (latent.shape[1], side, side))

    def _run(
        self,
        vae: VAE,
        whole: Callable[[VAE, Tensor], Tensor],
        cut: Callable[[VAE, Tensor, MemoryBudget | None], Tensor],
        batch: Tensor,
        size: int,
        reference: tuple[int, int, int],
    ) -> Tensor:
        if torch.is_grad_enabled() or len(batch) * size <= WHOLE:
            return whole(vae, batch)
        needed = SLACK * size / _REFERENCE**2 * peak_bytes(vae, whole, 1, *reference, dtype=batch.dtype)
        count = images_at_once(device_type(batch), len(batch), size, WHOLE, needed, _limit(self.memory, batch.device))
        if count == 0 and can_be_cut(vae):
            return cut(vae, batch, self.memory)
        return torch.cat([whole(vae, part) for part in batch.split(max(count, 1))])


def _limit(budget: MemoryBudget | None, device: torch.device) -> float:
    return math.inf if budget is None else budget.bytes(device)


class MemoryPlan(NamedTuple):
    """What one half of an autoencoder does under a budget.

    Attributes:
        peak: estimate of the bytes that it takes beyond the weights, the image and the result.
        recomputed: number of maps that are computed anew each time that they are read.
    """

    peak: int
    recomputed: int


def can_be_cut(vae: nn.Module) -> bool:
    """Whether there is a way to work on an image in parts: not for other global layers than Stable Diffusion's."""
    if isinstance(vae, AutoencoderKL):
        return {*vae.config.down_block_types, *vae.config.up_block_types} == {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    return not any("Attention" in type(module).__name__ for module in vae.modules())


def encode(vae: nn.Module, images: Tensor, budget: MemoryBudget | None = None) -> Tensor:
    """Images (B, 3, H, W) in parts, sides multiples of 8 -> the posterior's moments (B, 2C, H/8, W/8), or the latent
    (B, C, H/8, W/8) of an autoencoder without posterior; with another `vae_factor` in place of 8."""
    with nothing_kept():
        return _one_by_one(vae, images, budget, Stream.encode, vae.encoder, vae_factor(vae), 1)


def decode(vae: nn.Module, latent: Tensor, budget: MemoryBudget | None = None) -> Tensor:
    """Latents (B, C, h, w), as the autoencoder wants them, in parts -> images (B, 3, 8h, 8w)."""
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
                    "memory budget of %.2g GB is too small for an image of %dx%d: it took about %.2g GB, which is the "
                    "least",
                    stream.limit / 1e9,
                    width,
                    height,
                    stream.peak / 1e9,
                )
        else:
            results.append(_by_strips(half, value, unit_in, unit_out))
    return results[0] if len(results) == 1 else torch.cat(results)


def plan(
    vae: AutoencoderKL, height: int, width: int, dtype: torch.dtype, budget: MemoryBudget | None = None
) -> tuple[MemoryPlan, MemoryPlan]:
    """What encoding and decoding a large image on a CPU would take; nothing is computed.

    Args:
        vae: the autoencoder, of which only the configuration is used.
        height, width: of the image, multiples of 8.
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
