"""Stage `hyper`: the hyper-encoders alone, on the frozen VAE's latents (paper section 3.4, stage 1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from oscar.codec import OscarCodec
from oscar.config import TrainConfig
from oscar.training.losses import cosine_loss_spatial
from oscar.training.stage import Pass, Stage, draw_rates
from oscar.training.tables import estimate_frequencies


class HyperStage(Stage):
    """Minus the cosine between latent and quantised latent, averaged over positions; one VAE pass serves all rates."""

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__()
        self.codec = codec
        self.stage = config.stage
        self.draw_weights = config.stage.draw_weights(codec.rates)
        self.metrics = ("loss", *(f"cosine_{rate.bpp:.4f}" for rate in codec.rates), "commitment")
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        return [self.codec.bottleneck]

    def forward(self, images: Tensor, turn: Pass) -> dict[str, Tensor]:
        turn.seed_torch()
        with torch.no_grad():
            latent = self.codec.backbone.encode(images)
        rates = draw_rates(turn, self.codec.rates, self.draw_weights, self.stage.rates_per_step)
        result: dict[str, Tensor] = {"loss": latent.new_zeros(()), "commitment": latent.new_zeros(())}
        for rate in rates:
            quantised = self.codec.bottleneck(latent, rate)
            cosine = cosine_loss_spatial(quantised.z_hat, latent)
            loss = self.stage.cosine * cosine + self.stage.commitment * quantised.commitment
            result["loss"] = result["loss"] + loss / len(rates)
            result["commitment"] = result["commitment"] + quantised.commitment.detach() / len(rates)
            result[f"cosine_{rate.bpp:.4f}"] = cosine.detach()
        return result

    def finish(self, batches) -> None:
        estimate_frequencies(self.codec, batches)

    def save(self, folder: Path) -> None:
        self.codec.save_pretrained(folder)
