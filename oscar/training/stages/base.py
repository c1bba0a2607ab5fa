"""What the stages share: their interface to the loop, and randomness that is a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oscar.bottlenecks import Bottleneck, Draw, Output, Point
from oscar.codec import OscarCodec
from oscar.config import ConfigError, TrainConfig, ValidationConfig
from oscar.models.backbone import Backbone
from oscar.training.losses import critic_loss
from oscar.utils.provenance import PROVENANCE
from oscar.utils.rng import CRITIC_STREAM, LATENT_STREAM, StepRng
from oscar.utils.strict_json import write_json

WEIGHED = ("cosine", "commitment")  # losses of bottlenecks that have a weight in `StageConfig`


def encode_latents(backbone: Backbone, images: Tensor, rng: StepRng, samples: int) -> list[Tensor]:
    """Latents of images (B, 3, H, W): so many samples of the posterior from one pass of the VAE, or its mode for 0.

    Raises:
        ValueError: if samples are asked for, and the VAE has no posterior.
    """
    if samples == 0:
        return [backbone.encode(images)]
    latents = backbone.encode(images, lambda mean: latent_noise(rng, mean, samples))  # one more axis, by broadcasting
    return list(latents)


def latent_noise(rng: StepRng, mean: Tensor, samples: int) -> Tensor:
    """Noise for drawing latents around their mean (B, C, h, w): (samples, B, C, h, w)."""
    generator = rng.noise(mean.device, LATENT_STREAM)
    return torch.randn((samples, *mean.shape), generator=generator, device=mean.device).to(mean)


def check_posterior(backbone: Backbone) -> None:
    """Refuse to draw latents from a VAE that has no posterior.

    Raises:
        ConfigError: in that case.
    """
    if not isinstance(backbone.vae, AutoencoderKL):
        raise ConfigError(
            f"stage.sample_latents is true, but {type(backbone.vae).__name__} has no posterior; allowed: false"
        )


class Stage(nn.Module):
    """A stage of training. Its forward pass maps images (B, 3, H, W) in [-1, 1] to named scalars, among them `loss`.

    Every scalar is a mean over the batch, so that its mean over processes is that of one larger batch. It is made of a
    codec, or of a backbone, and the run's configuration.

    Attributes:
        trains_codec: whether it is made of a codec.
        works_on_latents: whether no gradient passes VAE and UNet, so that latents of a cache will do (`data.latents`).
        computes_with_unet: whether it is part of the forward pass, or of what is drawn at random after it.
        fields: of `StageConfig` that count in it; None where the bottleneck says so (`Bottleneck.stage_fields`).
        metrics: every name that the forward pass may return, in the order of the log's columns.
        takes_latents: the forward pass gets the VAE's latents (B, 4, h, w), of a cache, in place of images.
        critic: adversary with an optimiser of its own, or None. Not a submodule: the loop wraps it separately.
        build_whole: of a stage whose codec has no UNet: makes the codec with all of its parts, as at the start.
    """

    trains_codec: ClassVar[bool] = True
    works_on_latents: ClassVar[bool] = False
    computes_with_unet: ClassVar[bool] = True
    fields: ClassVar[tuple[str, ...] | None] = None
    metrics: tuple[str, ...] = ("loss",)
    critic: nn.Module | None = None
    takes_latents: bool = False
    build_whole: Callable[[], OscarCodec] | None = None

    def forward(self, images: Tensor, rng: StepRng) -> dict[str, Tensor]:
        raise NotImplementedError

    def clip_groups(self) -> list[list[nn.Parameter]] | None:
        """Groups of trained parameters whose gradients are clipped each by its own norm; None takes all as one."""
        return None

    def critic_inputs(self) -> tuple[Tensor, ...]:
        """Real and fake latents of the last forward pass, detached, and the prompt."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Stage:
        """Only what is trained goes into training mode; frozen parts stay in evaluation mode."""
        super().train(False)
        if mode:
            self.training = True
            for module in self.trained_modules():
                module.train(True)
        return self

    def trained_modules(self) -> list[nn.Module]:
        """The modules whose parameters the main optimiser updates."""
        raise NotImplementedError

    def finish(self, batches) -> None:
        """What is left to do after the last step (scale factors, entropy tables), from an iterator of image batches."""

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        """Write the result that the next stage or a user reads, with how it was made (`oscar.utils.provenance`)."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Let gradients reach the trained modules' parameters only (of an adapted UNet, the adapters alone)."""
        trained = {id(p) for module in self.trained_modules() for p in module.parameters() if p.requires_grad}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)


def critic_pass(critic: Callable[..., Tensor], inputs: tuple[Tensor, ...], rng: StepRng, reduction: str) -> Tensor:
    """The critic's loss on what `Stage.critic_inputs` gave."""
    real, fake, prompt = inputs
    if isinstance(prompt, DTensor):
        prompt = prompt.full_tensor()
    latents = torch.cat([real, fake])
    logits = critic(latents, prompt, rng.noise(latents.device, CRITIC_STREAM))
    return critic_loss(*logits.chunk(2), reduction)


class CodecStage(Stage):
    """What the stages of a codec's bottleneck share, whatever its kind.

    Attributes:
        codec: the codec.
        stage: options of the stage.
    """

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__()
        self.codec, self.stage = codec, config.stage
        codec.bottleneck.configure(config.bottleneck, config.stage, codec.backbone.factor)
        validation_points(config.validation, codec.bottleneck)  # those of `init_from` are known only here

    def weigh(self, output: Output, others: Tensor | float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of other losses, a scalar or (B,), and the bottleneck's, weighed as `Output` says; and what is logged
        of the bottleneck."""
        weights = {name: getattr(self.stage, name) for name in WEIGHED}
        loss = sum((weights.get(name, 1.0) * value for name, value in output.losses.items()), others).mean()
        return loss, {name: value.detach().mean() for name, value in {**output.losses, **output.statistics}.items()}

    def logged(self, common: dict[str, Tensor], draw: Draw, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a pass returns: `common` scalars and those of the draw under its label, as far as there are columns."""
        labelled = {} if draw.label is None else {f"{name}_{draw.label}": value for name, value in own.items()}
        return {name: value for name, value in {**common, **labelled}.items() if name in self.metrics}

    def current_codec(self) -> OscarCodec:
        """The codec as it stands."""
        return self.codec

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        codec = self.current_codec()
        if codec.denoiser is None:
            assert self.build_whole is not None
            trained, codec = codec, self.build_whole()
            codec.bottleneck = trained.bottleneck
            codec.set_mapping(trained.mapping)
        codec.provenance = provenance
        codec.save_pretrained(folder)


def validation_points(options: ValidationConfig, bottleneck: Bottleneck) -> list[Point]:
    """The operating points that are validated.

    Raises:
        ConfigError: for one that the bottleneck does not have.
    """
    name = bottleneck.validation_field
    values = getattr(options, name)
    if values is None:
        return list(bottleneck.validation_points())
    try:
        points = {bottleneck.parse(value) for value in values}
    except ValueError as error:
        raise ConfigError(f"validation.{name}: {error}") from None
    return sorted(points, key=lambda point: point.value)


def save_backbone(backbone: Backbone, folder: Path, provenance: dict | None) -> None:
    """Write a backbone that a stage made, and how."""
    backbone.save_pretrained(folder)
    path = folder / PROVENANCE
    path.unlink(missing_ok=True)
    if provenance is not None:
        write_json(path, provenance, indent=1)
