"""Stage `hyper`: the hyper-encoders alone, on the frozen VAE's latents (paper section 3.4, stage 1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from oscar.codec import OscarCodec
from oscar.config import TrainConfig
from oscar.data.latents import check_latents
from oscar.training.losses import cosine_loss_spatial
from oscar.training.sampling import choose_rates
from oscar.training.stages.base import Pass, Stage, check_posterior, encode_latents
from oscar.training.tables import estimate_frequencies, perplexity


class HyperStage(Stage):
    """Minus the cosine between latent and quantised latent, averaged over positions; one VAE pass serves all rates.

    The loss is the mean over rates, or with `stage.independent_rates` their sum, so that each rate's gradient is that
    of a run of its own.

    With cached latents (`data.latents`) there is no VAE pass: batches are latents (B, 4, h, w) in place of images.
    """

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__()
        self.codec = codec
        self.stage = config.stage
        self.takes_latents = config.data.latents is not None
        if self.takes_latents:
            check_latents(config.data, codec.backbone)
        if config.stage.sample_latents:
            check_posterior(codec.backbone)
        codec.bottleneck.set_training(**config.bottleneck.training_options())
        self.draw_weights = config.stage.draw_weights(codec.rates)
        config.validation.rate_points(codec.rates)  # those of `init_from` are known only here
        names = [f"{name}_{rate.bpp:.4f}" for name in ("loss", "cosine", "perplexity") for rate in codec.rates]
        self.metrics = ("loss", "commitment", *names)
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        return [self.codec.bottleneck]

    def forward(self, images: Tensor, turn: Pass) -> dict[str, Tensor]:
        turn.seed_torch()
        if self.takes_latents:
            latent = images
        else:
            with torch.no_grad():
                (latent,) = encode_latents(self.codec.backbone, images, turn, int(self.stage.sample_latents))
        stage = self.stage
        rates = choose_rates(turn, self.codec.rates, self.draw_weights, stage.rates_per_step, stage.rate_order)
        result: dict[str, Tensor] = {"loss": latent.new_zeros(()), "commitment": latent.new_zeros(())}
        count = 1 if stage.independent_rates else len(rates)
        for rate in rates:
            quantised = self.codec.bottleneck(latent, rate)
            cosine = cosine_loss_spatial(quantised.z_hat, latent)
            loss = stage.cosine * cosine + stage.commitment * quantised.commitment
            result["loss"] = result["loss"] + loss / count
            result["commitment"] = result["commitment"] + quantised.commitment.detach() / len(rates)
            result[f"loss_{rate.bpp:.4f}"] = loss.detach()
            result[f"cosine_{rate.bpp:.4f}"] = cosine.detach()
            result[f"perplexity_{rate.bpp:.4f}"] = perplexity(self.codec.bottleneck.at(rate).usage())
        return result

    def clip_groups(self) -> list[list[nn.Parameter]] | None:
        if not self.stage.independent_rates:
            return None
        return [list(self.codec.bottleneck.at(rate).parameters()) for rate in self.codec.rates]

    def current_codec(self) -> OscarCodec:
        """The codec as it stands."""
        return self.codec

    def finish(self, batches) -> None:
        estimate_frequencies(self.codec, batches, self.stage.table_batches, self.takes_latents)

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        self.codec.provenance = provenance
        self.codec.save_pretrained(folder)
