"""VAE, UNet and noise schedule from a diffusers folder, a hub id or bare configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from oscar.diffusion import NoiseSchedule
from oscar.inference import tiling
from oscar.inference.loading import Change, as_is, fill, from_diffusers, part_files
from oscar.inference.tiling import MemoryBudget
from oscar.models.conv_autoencoder import AutoencoderConv
from oscar.models.modules import drop
from oscar.models.precision import compute_finite
from oscar.registry import AUTOENCODERS, UNETS, Registry
from oscar.utils.errors import hub_reason

PARTS = ("vae", "unet", "scheduler")
# By the `_class_name` of a part's config.json; Stable Diffusion's are the first.
for _vae in (AutoencoderKL, AutoencoderDC, AutoencoderConv):
    AUTOENCODERS.register(_vae.__name__, _vae)
UNETS.register(UNet2DConditionModel.__name__, UNet2DConditionModel)
Components = Literal["both", "encoder", "decoder"]
NoiseSource = Callable[[Tensor], Tensor]  # standard normal noise in the shape of what it is given
SampleRule = Callable[[Tensor], NoiseSource]
VAE = AutoencoderKL | AutoencoderDC | AutoencoderConv  # or a class of `AUTOENCODERS` that has their methods
VAE_ENCODER, VAE_DECODER = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")  # its modules, by half
FACTORS = (8, 16)  # pixels per latent position along each side; the paper's rates are of 8
_SAMPLES = 64  # values of each tensor by which weights are told apart
_UNUSED = {"both": (), "encoder": VAE_DECODER, "decoder": VAE_ENCODER}


WAY_OUT = (f"allowed: a folder with {', '.join(PARTS)}, in training as backbone.source=FOLDER, for the command as "
           "--backbone FOLDER")  # fmt: skip


class BackboneError(ValueError):
    """A backbone that cannot be found, read or used."""


class Backbone(nn.Module):
    """A latent diffusion backbone.

    Args:
        vae: the autoencoder; must reduce each side by 8 or 16. Variational or, as nano's, without a posterior.
        unet: the denoising network; works on the VAE's latent channels. None in the encoder half.
        schedule: the noise schedule.
        source: folder or hub id that it came from, None for one built from configurations.

    Attributes:
        factor: pixels per latent position along each side.
        digests: SHA-256 by part ("encoder" and "decoder" of the VAE, "unet") of what was read from `source`, over an
            evenly spaced sample of each tensor; only parts that were read, none for one built from configurations.
    """

    def __init__(self, vae: VAE, unet: UNet2DConditionModel | None, schedule: NoiseSchedule, source: str | None):
        super().__init__()
        self.factor = tiling.vae_factor(vae)
        if self.factor not in FACTORS:
            allowed = ", ".join(map(str, FACTORS))
            raise BackboneError(f"vae of {source}: reduces each side by {self.factor}; allowed: {allowed}")
        latents = vae.config.latent_channels
        if unet is not None and (unet.config.in_channels != latents or unet.config.out_channels != latents):
            raise BackboneError(
                f"unet of {source}: {unet.config.in_channels} channels in and {unet.config.out_channels} out; "
                f"allowed: the vae's {latents} for both"
            )
        self.vae = vae
        self.unet = unet
        self.schedule = schedule
        self.source = source
        self.digests: dict[str, str] = {}
        self.memory: MemoryBudget | None = None  # for large pictures; changes no result
        self.preview: nn.Module | None = None  # a small autoencoder that decodes in the VAE's place

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        components: Components = "both",
        dtype: torch.dtype = torch.float32,
        adapt: Change = as_is,
    ) -> Backbone:
        """Read a diffusers folder or hub id with `vae/`, `unet/` and `scheduler/`, in evaluation mode.

        Args:
            source: the folder or id.
            components: "encoder" leaves out UNet and VAE decoder, "decoder" the VAE encoder; they are not read at all.
            dtype: of the weights in memory.
            adapt: what becomes of each tensor of the UNet, by its name there, in float32.

        Raises:
            BackboneError: if a part is missing or unreadable, or its weights lack a tensor.
        """
        source, sampler = str(source), _Sampler()
        try:
            vae_class = find_class(AUTOENCODERS, _config(source, "vae"))
            vae = _load(vae_class, source, "vae", dtype, _UNUSED[components], sampler.of_vae)
            unet = None
            if components != "encoder":
                unet_class = find_class(UNETS, _config(source, "unet"))
                unet = _load(unet_class, source, "unet", dtype,
                             change=lambda name, value: adapt(name, sampler.of_unet(name, value)))  # fmt: skip
            schedule = NoiseSchedule(_scheduler_config(source))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise BackboneError(
                f"backbone {source!r} could not be read as a diffusers folder or hub id with "
                f"{', '.join(PARTS)}: {hub_reason(error)}; {WAY_OUT}"
            ) from error
        backbone = cls(vae, unet, schedule, source)
        backbone.digests = sampler.digests()
        return backbone

    @classmethod
    def from_configs(cls, vae: Mapping, unet: Mapping, scheduler: Mapping) -> Backbone:
        """Random weights in the shape of three diffusers configurations (for training from scratch and for tests)."""
        return cls(
            find_class(AUTOENCODERS, vae).from_config(dict(vae)),
            find_class(UNETS, unet).from_config(dict(unet)),
            NoiseSchedule(dict(scheduler)),
            None,
        )

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def unet_multiple(self) -> int:
        """Latents that the UNet sees must have sides that are a multiple of this."""
        return unet_multiple(self.unet)

    def encode(self, images: Tensor, draw: NoiseSource | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], sides multiples of 8 -> scaled posterior mode (B, 4, H/8, W/8); with another
        `factor` in place of 8.

        Args:
            images: the images.
            draw: gives standard normal noise like the mean that it is called with, such as `torch.randn_like`; with it
                a sample takes the mode's place. A VAE without posterior has only its latent.
        """
        return encode(self.vae, images, self.memory, draw)

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return decode(self.vae if self.preview is None else self.preview, latent, self.memory)

    def encode_finite(self, padded: Tensor, images: Tensor, sample: SampleRule | None = None) -> Tensor:
        """`encode` in inference: float32, of numbers that are all finite (`oscar.models.precision`).

        Args:
            padded: the images as the VAE takes them.
            images: as they were.
            sample: gives the noise source of images; with it latents are samples.

        Raises:
            NotFiniteError: if they are not, in float32 either.
        """

        def run(vae: nn.Module, padded: Tensor, images: Tensor) -> Tensor:
            return encode(vae, padded, self.memory, None if sample is None else sample(images))

        return compute_finite("the latent", self.vae, run, padded, images)

    def decode_finite(self, latent: Tensor) -> Tensor:
        """`decode` in inference, likewise."""
        vae = self.vae if self.preview is None else self.preview
        return compute_finite("the decoded image", vae, lambda vae, own: decode(vae, own, self.memory), latent)

    def decoder_modules(self) -> list[nn.Module]:
        """The modules of the VAE that decoding uses."""
        modules = [self.vae.decoder, getattr(self.vae, "post_quant_conv", None)]
        return [module for module in modules if module is not None]

    def vae_modules(self, which: str) -> list[nn.Module]:
        """The modules of the VAE that a stage trains: none where it is "frozen", those of the "decoder", or "all"."""
        return {"frozen": [], "decoder": self.decoder_modules(), "all": [self.vae]}[which]

    def plain_unet(self) -> UNet2DConditionModel:
        """The UNet as it came: itself, or a copy without the adapters that it has."""
        state = self.unet.state_dict()
        if not any("lora_" in name for name in state):
            return self.unet
        unet = type(self.unet).from_config(self.unet.config)
        nn.Module.to(unet, self.unet.device, self.unet.dtype)  # diffusers' own warns of modules that this class lacks
        unet.load_state_dict(
            {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}
        )
        return unet

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vae/`, `unet/` (without adapters) and `scheduler/` as diffusers does."""
        folder = Path(folder)
        self.vae.save_pretrained(folder / "vae")
        self.plain_unet().save_pretrained(folder / "unet")
        for part in ("vae", "unet"):  # diffusers notes the folder that it was read from, which is no one's business
            path = folder / part / "config.json"
            config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
            path.write_text(json.dumps(config, allow_nan=False, indent=2, sort_keys=True) + "\n")
        (folder / "scheduler").mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "DDPMScheduler", **self.schedule.config}
        text = json.dumps(config, allow_nan=False, indent=2, sort_keys=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(text + "\n")


def _load(
    part: type, source: str, subfolder: str, dtype: torch.dtype, unused: tuple[str, ...] = (), change: Change = as_is
) -> nn.Module:
    places = part_files(source, subfolder)
    if places:
        config = _config(source, subfolder)
        with init_empty_weights():
            model = part.from_config(config)
        drop(model, unused)
        fill(model, places, subfolder, dtype, change)
        return model.eval()
    with from_diffusers():  # whatever else there is, such as .bin
        model, report = part.from_pretrained(
            source, subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True
        )
    if report["missing_keys"]:  # diffusers only logs them
        missing = sorted(report["missing_keys"])
        raise ValueError(f"the weights of {subfolder} lack {missing[0]} ({len(missing)} tensors in all)")
    drop(model, unused)
    for name, value in model.state_dict().items():
        value.copy_(change(name, value))
    return model.to(dtype)


def encode(
    vae: nn.Module,
    images: Tensor,
    memory: MemoryBudget | None = None,
    draw: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Encode images with an autoencoder of diffusers; see `Backbone.encode`."""
    if tiling.cuts(vae, *images.shape[-2:]):
        moments, channels = tiling.encode(vae, images, memory), vae.config.latent_channels
        posterior = DiagonalGaussianDistribution(moments) if moments.shape[1] > channels else None
        latent = moments[:, :channels]
    else:
        encoded = vae.encode(images)
        posterior = getattr(encoded, "latent_dist", None)
        latent = encoded.latent if posterior is None else posterior.mode()
    if draw is not None and posterior is not None:
        latent = latent + posterior.std * draw(latent)
    return latent * vae.config.scaling_factor


def decode(vae: nn.Module, latent: Tensor, memory: MemoryBudget | None = None) -> Tensor:
    """Decode a scaled latent (B, 4, h, w) with an autoencoder of diffusers -> images (B, 3, 8h, 8w)."""
    latent = latent / vae.config.scaling_factor
    height, width = (side * tiling.vae_factor(vae) for side in latent.shape[-2:])
    if tiling.cuts(vae, height, width):
        return tiling.decode(vae, latent, memory)
    return vae.decode(latent).sample


def unet_multiple(unet: UNet2DConditionModel) -> int:
    """Latents that a UNet sees must have sides that are a multiple of this."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


def read_configs(source: str | Path) -> dict[str, dict]:
    """The configurations of vae, unet and scheduler of a diffusers folder or hub id, without their weights.

    Raises:
        BackboneError: if one is missing or cannot be read.
    """
    source = str(source)
    try:
        return {
            "vae": _config(source, "vae"),
            "unet": _config(source, "unet"),
            "scheduler": _scheduler_config(source),
        }
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BackboneError(
            f"backbone {source!r}: its configuration cannot be read: {hub_reason(error)}; {WAY_OUT}"
        ) from error


class _Sampler:
    """Takes a sample of each tensor while weights are read."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, bytes]] = {}

    def of_vae(self, name: str, value: Tensor) -> Tensor:
        return self._take("decoder" if name.startswith(VAE_DECODER) else "encoder", name, value)

    def of_unet(self, name: str, value: Tensor) -> Tensor:
        return self._take("unet", name, value)

    def _take(self, part: str, name: str, value: Tensor) -> Tensor:
        flat = value.detach().float().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLES)].cpu().contiguous().numpy().tobytes()
        self.parts.setdefault(part, {})[name] = f"{name}:{tuple(value.shape)};".encode() + sample
        return value

    def digests(self) -> dict[str, str]:
        return {part: hashlib.sha256(b"".join(taken[name] for name in sorted(taken))).hexdigest()
                for part, taken in sorted(self.parts.items())}  # fmt: skip


def find_class(classes: Registry, config: Mapping) -> type:
    """The class of a part by its configuration (BackboneError if there is none such)."""
    name = config.get("_class_name", next(iter(classes)))
    if name not in classes:
        raise BackboneError(f"{classes.field} {name!r} is not supported; allowed: {', '.join(classes)}")
    return classes[name]


def _config(source: str, part: str) -> dict:
    with from_diffusers():
        return dict(AutoencoderKL.load_config(source, subfolder=part))  # of any class


def _scheduler_config(source: str) -> dict:
    path = Path(source) / "scheduler" / "scheduler_config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, "scheduler/scheduler_config.json"))
    return json.loads(path.read_text())
