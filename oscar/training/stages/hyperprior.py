"""Stages `hyper` and `joint` of a codec with a hyperprior: rate and distortion at qualities drawn at random.

A picture's loss is R + lambda D, bits per pixel and distortion, where the logarithm of lambda is a straight line over
the quality. It is divided by the root of lambda, so that gradients are of one order at all qualities.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.bottlenecks.hyperprior import KNOTS, Coded
from oscar.codec import OscarCodec
from oscar.config import TrainConfig
from oscar.data.latents import check_latents
from oscar.timesteps import CurveMapping
from oscar.training.losses import ImageLoss
from oscar.training.stages.base import Pass, Stage


class _RateStage(Stage):
    """What both share: qualities, lambda, and bits per pixel."""

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__()
        self.codec = codec
        self.stage = config.stage

    def code(self, latent: Tensor, turn: Pass) -> tuple[Coded, Tensor]:
        """The latent through the bottleneck at qualities (B,) drawn evenly, and these."""
        quality = torch.rand(len(latent), device=latent.device, generator=turn.noise(latent.device))
        return self.codec.bottleneck(latent, quality), quality

    def weigh(self, coded: Coded, distortion: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, from distortions (B,), and mean bits per pixel."""
        low, high = self.stage.lambdas
        root = (0.5 * (math.log(low) + quality * math.log(high / low))).exp()
        pixels = coded.z_hat.shape[-2] * coded.z_hat.shape[-1] * self.codec.backbone.factor**2
        bpp = coded.bits / pixels
        return (bpp / root + root * distortion).mean(), bpp.detach().mean()

    def current_codec(self) -> OscarCodec:
        """The codec as it stands, ready to code."""
        self.codec.bottleneck.update()
        self.codec.forget_fingerprint()
        return self.codec

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        self.codec.provenance = provenance
        self.current_codec().save_pretrained(folder)


class HyperpriorHyperStage(_RateStage):
    """The bottleneck alone on the frozen VAE's latents; the distortion is their mean squared error.

    At the end the timesteps are calibrated. With cached latents (`data.latents`) there is no VAE pass.
    """

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__(codec, config)
        self.takes_latents = config.data.latents is not None
        if self.takes_latents:
            check_latents(config.data, codec.backbone)
        self.metrics = ("loss", "bpp", "distortion")
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        return [self.codec.bottleneck]

    def forward(self, images: Tensor, turn: Pass) -> dict[str, Tensor]:
        turn.seed_torch()
        with torch.no_grad():
            latent = images if self.takes_latents else self.codec.backbone.encode(images)
        coded, quality = self.code(latent, turn)
        distortion = (coded.z_hat - latent).square().mean(dim=(1, 2, 3))
        loss, bpp = self.weigh(coded, distortion, quality)
        return {"loss": loss, "bpp": bpp, "distortion": distortion.detach().mean()}

    def finish(self, batches) -> None:
        batches = itertools.islice(batches, self.stage.table_batches)
        if not self.takes_latents:
            batches = (self.codec.backbone.encode(batch) for batch in batches)
        self.codec.set_mapping(calibrate(self.codec, batches))


class HyperpriorJointStage(_RateStage):
    """Bottleneck and denoiser, and of the VAE what `stage.vae` says, on image losses of the reconstruction."""

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__(codec, config)
        if self.stage.vae != "frozen":
            codec.backbone.source = None  # it becomes another backbone, which the checkpoint must bundle
        self.image_loss = ImageLoss.of(self.stage)
        self.metrics = ("loss", "bpp", *self.image_loss.weights)
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        modules: list[nn.Module] = [self.codec.bottleneck]
        if self.stage.denoiser == "trained":
            modules.append(self.codec.denoiser)
        return modules + self.codec.backbone.vae_modules(self.stage.vae)

    def forward(self, images: Tensor, turn: Pass) -> dict[str, Tensor]:
        turn.seed_torch()
        with torch.set_grad_enabled(self.stage.vae == "all"):
            latent = self.codec.backbone.encode(images)
        coded, quality = self.code(latent, turn)
        steps = [self.codec.mapping(value) for value in quality.tolist()]
        timesteps = torch.tensor(steps, device=latent.device)  # never in half precision, which rounds them
        decoded = self.codec.backbone.decode(self.codec.denoiser(coded.z_hat, timesteps))
        distortions, terms = self.image_loss.by_picture(decoded, images)
        loss, bpp = self.weigh(coded, distortions, quality)
        return {"loss": loss, "bpp": bpp, **terms}


@torch.no_grad()
def calibrate(codec: OscarCodec, latents, knots: int = KNOTS) -> CurveMapping:
    """The timesteps whose sqrt(alpha_bar) are nearest to the mean cosine similarity of z_hat and latent, by quality.

    Of whole latents, not of channels as for codebooks: most channels hold little and vanish at low rates, so that their
    mean would ask the denoiser to make anew what the few others say.

    Args:
        codec: the codec.
        latents: batches of them, (B, C, h, w).
        knots: qualities that are measured.
    """
    codec.eval()
    found = []
    for latent in latents:
        qualities = torch.linspace(0, 1, knots, device=latent.device)
        found.append(torch.stack([
            latent_cosine(codec.bottleneck(latent, quality.expand(len(latent))).z_hat, latent) for quality in qualities
        ]))  # fmt: skip
    cosines = torch.stack(found).mean(dim=0)
    timesteps = codec.backbone.schedule.timestep_of_signal(cosines)
    return CurveMapping(tuple(map(float, timesteps)), tuple(round(value, 6) for value in cosines.tolist()))


def latent_cosine(z_hat: Tensor, latent: Tensor) -> Tensor:
    """Cosine similarity of two latents (B, C, h, w), mean over the batch."""
    return F.cosine_similarity(z_hat.float().flatten(1), latent.float().flatten(1)).mean()
