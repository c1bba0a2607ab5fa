"""Stage `vae`: an autoencoder from photographs, for a small backbone of one's own."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from oscar.config import IMAGE_FIELDS, ConfigError, TrainConfig
from oscar.models.backbone import Backbone
from oscar.registry import STAGES
from oscar.training.losses import ImageLoss
from oscar.training.stages.base import Stage, save_backbone
from oscar.utils.rng import StepRng

SCALE_BATCHES = 32


@STAGES.register("vae")
class VAEStage(Stage):
    """Trains the VAE on image losses and, if it has a posterior, a KL term.

    At the end its scaling factor is set so that latents have unit variance.
    """

    trains_codec = False
    fields = (*IMAGE_FIELDS, "kl")

    def __init__(self, backbone: Backbone, config: TrainConfig):
        super().__init__()
        self.backbone = backbone
        self.image_loss = ImageLoss.of(config.stage)
        self.kl = config.stage.kl
        if self.kl and not isinstance(backbone.vae, AutoencoderKL):
            raise ConfigError(f"stage.kl is {self.kl}, but {type(backbone.vae).__name__} has no posterior; allowed: 0")
        self.metrics = ("loss", *self.image_loss.weights, *(["kl"] if self.kl else []))
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        return [self.backbone.vae]

    def forward(self, images: Tensor, rng: StepRng) -> dict[str, Tensor]:
        rng.seed_torch()
        vae = self.backbone.vae
        if not self.kl:
            loss, terms = self.image_loss(self.backbone.decode(self.backbone.encode(images)), images)
            return {"loss": loss, **terms}
        posterior = vae.encode(images).latent_dist
        loss, terms = self.image_loss(vae.decode(posterior.sample()).sample, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": loss + self.kl * kl, **terms, "kl": kl}

    @torch.no_grad()
    def finish(self, batches) -> None:
        vae = self.backbone.vae
        latents = [self.backbone.encode(batch) for batch in itertools.islice(batches, SCALE_BATCHES)]
        factor = vae.config.scaling_factor / torch.cat(latents).std().item()
        vae.register_to_config(scaling_factor=factor)
        logging.getLogger(__name__).info("scaling_factor = %.5f", factor)

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        save_backbone(self.backbone, folder, provenance)
