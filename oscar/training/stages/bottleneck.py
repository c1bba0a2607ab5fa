"""Stage `bottleneck`: the bottleneck alone, on the frozen VAE's latents (paper section 3.4, stage 1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from oscar.codec import OscarCodec
from oscar.config import TrainConfig
from oscar.data.latents import check_latents
from oscar.registry import STAGES
from oscar.training.stages.base import CodecStage, check_posterior, encode_latents
from oscar.utils.rng import StepRng


@STAGES.register("bottleneck")
class BottleneckStage(CodecStage):
    """The bottleneck's own losses; one VAE pass serves all operating points of a step.

    For the paper's bottleneck that is minus the cosine between latent and quantised latent, averaged over positions;
    for a hyperprior bits per pixel and the latent's squared error. The loss is the mean over operating points, or with
    `stage.independent_rates` their sum, so that each one's gradient is that of a run of its own.

    With cached latents (`data.latents`) there is no VAE pass: batches are latents (B, C, h, w) in place of images.
    """

    works_on_latents = True
    computes_with_unet = False

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__(codec, config)
        self.takes_latents = config.data.latents is not None
        if self.takes_latents:
            check_latents(config.data, codec.backbone)
        if config.stage.sample_latents:
            check_posterior(codec.backbone)
        self.metrics = ("loss", *codec.bottleneck.columns())
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        return [self.codec.bottleneck]

    def forward(self, images: Tensor, rng: StepRng) -> dict[str, Tensor]:
        rng.seed_torch()
        latent = images
        if not self.takes_latents:
            with torch.no_grad():
                (latent,) = encode_latents(self.codec.backbone, images, rng, int(self.stage.sample_latents))
        draws = self.codec.bottleneck.draw(rng, latent, every=True)
        result: dict[str, Tensor] = {"loss": latent.new_zeros(())}
        for draw in draws:
            output = self.codec.bottleneck(latent, draw.point)
            loss, terms = self.weigh(output)
            result["loss"] = result["loss"] + loss / (1 if self.stage.independent_rates else len(draws))
            for name, value in terms.items():
                result[name] = result.get(name, 0.0) + value / len(draws)
            result |= self.logged({}, draw, {"loss": loss.detach(), **terms})
        return {name: value for name, value in result.items() if name in self.metrics}

    def clip_groups(self) -> list[list[nn.Parameter]] | None:
        return self.codec.bottleneck.independent_parts() if self.stage.independent_rates else None

    def finish(self, batches: Iterable[Tensor]) -> None:
        latents = itertools.islice(self._latents(batches), self.stage.table_batches)
        mapping = self.codec.bottleneck.finish(latents, self.codec.backbone.schedule)
        if mapping is not None:
            self.codec.set_mapping(mapping)
        self.codec.forget_fingerprint()

    @torch.no_grad()
    def _latents(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        self.codec.eval()
        for batch in batches:
            yield batch if self.takes_latents else self.codec.backbone.encode(batch)
