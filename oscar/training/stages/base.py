"""What the stages share: their interface to the loop, and randomness that is a function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from oscar.config import ConfigError
from oscar.models.backbone import Backbone
from oscar.rates import RatePoint
from oscar.utils.provenance import PROVENANCE
from oscar.utils.strict_json import write_json

RATE_STREAM, NOISE_STREAM, LATENT_STREAM = 1, 2, 6


@dataclass(frozen=True)
class Pass:
    """One forward pass of a run: all randomness of a stage follows from it, so that a resumed run repeats it.

    Attributes:
        number: passes before this one (optimiser steps times accumulation, plus the position within).
        seed: of the run.
        rank: of this process.
    """

    number: int
    seed: int
    rank: int = 0

    def shared(self, stream: int) -> np.random.Generator:
        """A generator that is the same on every process, which keeps the rate of a step equal everywhere."""
        return np.random.default_rng((self.seed, stream, self.number))

    def seed_torch(self) -> None:
        """Seed torch's global streams for this pass and process (dropout, dead-code revival, posterior sampling)."""
        torch.manual_seed(int(np.random.SeedSequence((self.seed, 3, self.number, self.rank)).generate_state(1)[0]))

    def latent_noise(self, mean: Tensor, samples: int) -> Tensor:
        """Noise for drawing latents around their mean (B, C, h, w): (samples, B, C, h, w)."""
        generator = self.noise(mean.device, LATENT_STREAM)
        return torch.randn((samples, *mean.shape), generator=generator, device=mean.device).to(mean)

    def noise(self, device: torch.device, stream: int = NOISE_STREAM) -> torch.Generator:
        """A torch generator of this process alone."""
        state = np.random.SeedSequence((self.seed, stream, self.number, self.rank)).generate_state(1)[0]
        return torch.Generator(device=device).manual_seed(int(state))


def draw_rates(turn: Pass, rates: Sequence[RatePoint], weights: Sequence[float], count: int | None) -> list[RatePoint]:
    """`count` distinct rates drawn by weight, the same on every process; all rates of positive weight if None."""
    probability = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    if count is None:
        return [rate for rate, weight in zip(rates, weights, strict=True) if weight > 0]
    count = min(count, int(np.count_nonzero(probability)))
    chosen = turn.shared(RATE_STREAM).choice(len(rates), size=count, replace=False, p=probability)
    return [rates[position] for position in sorted(chosen)]


def encode_latents(backbone: Backbone, images: Tensor, turn: Pass, samples: int) -> list[Tensor]:
    """Latents of images (B, 3, H, W): so many samples of the posterior from one pass of the VAE, or its mode for 0.

    Raises:
        ValueError: if samples are asked for, and the VAE has no posterior.
    """
    if samples == 0:
        return [backbone.encode(images)]
    latents = backbone.encode(images, lambda mean: turn.latent_noise(mean, samples))  # one more axis, by broadcasting
    return list(latents)


def check_posterior(backbone: Backbone) -> None:
    """Refuse to draw latents from a VAE that has no posterior.

    Raises:
        ConfigError: in that case.
    """
    if not isinstance(backbone.vae, AutoencoderKL):
        raise ConfigError(f"stage.sample_latents is true, but {type(backbone.vae).__name__} has no posterior; "
                          "allowed: false")  # fmt: skip


class Stage(nn.Module):
    """A stage of training. Its forward pass maps images (B, 3, H, W) in [-1, 1] to named scalars, among them `loss`.

    Every scalar is a mean over the batch, so that its mean over processes is that of one larger batch.

    Attributes:
        metrics: every name that the forward pass may return, in the order of the log's columns.
        takes_latents: the forward pass gets the VAE's latents (B, 4, h, w), of a cache, in place of images.
        critic: adversary with an optimiser of its own, or None. Not a submodule: the loop wraps it separately.
    """

    metrics: tuple[str, ...] = ("loss",)
    critic: nn.Module | None = None
    takes_latents: bool = False

    def forward(self, images: Tensor, turn: Pass) -> dict[str, Tensor]:
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


def save_backbone(backbone: Backbone, folder: Path, provenance: dict | None) -> None:
    """Write a backbone that a stage made, and how."""
    backbone.save_pretrained(folder)
    path = folder / PROVENANCE
    path.unlink(missing_ok=True)
    if provenance is not None:
        write_json(path, provenance, indent=1)
