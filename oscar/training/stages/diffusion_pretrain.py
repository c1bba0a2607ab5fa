"""Stage `diffusion_pretrain`: a diffusion model of a VAE's latents, the prior of a small backbone of one's own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.config import TrainConfig
from oscar.models.backbone import Backbone
from oscar.models.denoiser import predict
from oscar.registry import STAGES
from oscar.training.stages.base import Stage, save_backbone
from oscar.utils.rng import StepRng


@STAGES.register("diffusion_pretrain")
class PriorStage(Stage):
    """Trains the UNet, without a prompt, to the schedule's prediction type at uniformly drawn timesteps."""

    trains_codec = False
    fields = ()

    def __init__(self, backbone: Backbone, config: TrainConfig):
        super().__init__()
        self.backbone = backbone
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        return [self.backbone.unet]

    def forward(self, images: Tensor, rng: StepRng) -> dict[str, Tensor]:
        schedule = self.backbone.schedule
        with torch.no_grad():
            x0 = self.backbone.encode(images)
        generator = rng.noise(x0.device)
        timestep = torch.randint(len(schedule), (len(x0),), generator=generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        output = predict(self.backbone.unet, schedule.add_noise(x0, noise, timestep), timestep, self.blank(x0))
        return {"loss": F.mse_loss(output.float(), schedule.target(x0, noise, timestep).float())}

    def blank(self, x0: Tensor) -> Tensor:
        """A prompt of one zero token, for a UNet with cross-attention."""
        return x0.new_zeros(1, 1, self.backbone.unet.config.cross_attention_dim)

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        save_backbone(self.backbone, folder, provenance)
