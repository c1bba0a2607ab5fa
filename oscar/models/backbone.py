"""VAE, UNet and noise schedule from a diffusers folder, a hub id or bare configurations."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from oscar.diffusion import NoiseSchedule
from oscar.models.conv_autoencoder import AutoencoderConv
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

WAY_OUT = (
    f"allowed: a folder with {', '.join(PARTS)}, in training as backbone.source=FOLDER, for the command as "
    "--backbone FOLDER"
)


class BackboneError(ValueError):
    """A backbone that cannot be found, read or used."""


class Backbone(nn.Module):
    """A latent diffusion backbone.

    Args:
        vae: the autoencoder; must reduce each side by 8 or 16. Variational or, as nano-vq's, without a posterior.
        unet: the denoising network; works on the VAE's latent channels. None where only the encoder is needed.
        schedule: the noise schedule.
        source: folder or hub id that it came from, None for one built from configurations.

    Attributes:
        factor: pixels per latent position along each side.
        digests: SHA-256 by part ("encoder" and "decoder" of the VAE, "unet") of what was read from `source`, over an
            evenly spaced sample of each tensor; only parts that were read, none for one built from configurations.
    """

    def __init__(self, vae: VAE, unet: UNet2DConditionModel | None, schedule: NoiseSchedule, source: str | None):
        super().__init__()
        self.factor = vae_factor(vae)
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

    @classmethod
    def from_pretrained(cls, source: str | Path, unet: bool = True) -> Backbone:
        """Read a diffusers folder or hub id with `vae/`, `unet/` and `scheduler/`: float32, in evaluation mode.

        Args:
            source: the folder or hub id.
            unet: whether to read the UNet's weights too.

        Raises:
            BackboneError: if a part is missing or unreadable, or its weights lack a tensor.
        """
        source = str(source)
        with reading(source):
            vae = _read(find_class(AUTOENCODERS, read_config(source, "vae")), source, "vae")
            network = _read(find_class(UNETS, read_config(source, "unet")), source, "unet") if unet else None
            schedule = NoiseSchedule(read_config(source, "scheduler"))
        backbone, sampler = cls(vae, network, schedule, source), WeightSampler()
        for take, part in ((sampler.of_vae, vae), (sampler.of_unet, network)):
            for name, value in part.state_dict().items() if part is not None else ():
                take(name, value)
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
        return self._encode(self.vae, images, draw)

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self._decode(self.decoding_vae, latent)

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
            return self._encode(vae, padded, None if sample is None else sample(images))

        return compute_finite("the latent", self.vae, run, padded, images)

    def decode_finite(self, latent: Tensor) -> Tensor:
        """`decode` in inference, likewise."""
        return compute_finite("the decoded image", self.decoding_vae, self._decode, latent)

    def _encode(self, vae: VAE, images: Tensor, draw: NoiseSource | None) -> Tensor:
        moments, channels = self.run_encoder(vae, images), vae.config.latent_channels
        latent = moments[:, :channels]
        if draw is not None and moments.shape[1] > channels:
            latent = latent + DiagonalGaussianDistribution(moments).std * draw(latent)
        return latent * vae.config.scaling_factor

    def _decode(self, vae: VAE, latent: Tensor) -> Tensor:
        return self.run_decoder(vae, latent / vae.config.scaling_factor)

    # What `oscar.inference` does in another way.

    @property
    def decoding_vae(self) -> nn.Module:
        """The autoencoder that decodes."""
        return self.vae

    def run_encoder(self, vae: VAE, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the posterior's moments (B, 2C, h, w), or without one the latent (B, C, h, w)."""
        encoded = vae.encode(images)
        return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latent

    def run_decoder(self, vae: VAE, latent: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the autoencoder has them -> images (B, 3, 8h, 8w)."""
        return vae.decode(latent).sample

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


def _read(part: type, source: str, subfolder: str) -> nn.Module:
    with from_diffusers():
        model, report = part.from_pretrained(
            source, subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True
        )
    if report["missing_keys"]:  # diffusers only logs them
        missing = sorted(report["missing_keys"])
        raise ValueError(f"the weights of {subfolder} lack {missing[0]} ({len(missing)} tensors in all)")
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()  # the file is mapped, and with weights that are not aligned kernels round anew
    return model.eval()


@contextlib.contextmanager
def from_diffusers() -> Iterator[None]:
    """While diffusers reads a folder or hub id: it hands the hub an argument of which the hub warns each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
        yield


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """All that fails while a backbone is read becomes a BackboneError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BackboneError(
            f"backbone {source!r} could not be read as a diffusers folder or hub id with "
            f"{', '.join(PARTS)}: {hub_reason(error)}; {WAY_OUT}"
        ) from error


def vae_factor(vae: nn.Module) -> int:
    """Pixels per latent position along each side."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    return 2 ** (len(vae.config.block_out_channels) - 1)


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
        return {part: read_config(source, part) for part in PARTS}
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BackboneError(
            f"backbone {source!r}: its configuration cannot be read: {hub_reason(error)}; {WAY_OUT}"
        ) from error


class WeightSampler:
    """Takes a sample of each tensor of a backbone's networks, by which weights are told apart."""

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
        return {
            part: hashlib.sha256(b"".join(taken[name] for name in sorted(taken))).hexdigest()
            for part, taken in sorted(self.parts.items())
        }


def find_class(classes: Registry, config: Mapping) -> type:
    """The class of a part by its configuration (BackboneError if there is none such)."""
    name = config.get("_class_name", next(iter(classes)))
    if name not in classes:
        raise BackboneError(f"{classes.field} {name!r} is not supported; allowed: {', '.join(classes)}")
    return classes[name]


def read_config(source: str, part: str) -> dict:
    """The configuration of a part of a diffusers folder or hub id."""
    if part != "scheduler":
        with from_diffusers():
            return dict(AutoencoderKL.load_config(source, subfolder=part))  # of any class
    path = Path(source) / "scheduler" / "scheduler_config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, "scheduler/scheduler_config.json"))
    return json.loads(path.read_text())
