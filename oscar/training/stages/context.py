"""Stage `context`: context models of the indices, on a codec that stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from oscar.bottlenecks.context import ContextNetwork
from oscar.bottlenecks.hyper_encoder import HyperEncoder
from oscar.bottlenecks.vq import need_rates
from oscar.codec import OscarCodec
from oscar.config import ContextConfig, TrainConfig
from oscar.data.latents import check_latents
from oscar.registry import STAGES
from oscar.training.stages.base import Stage, validation_points
from oscar.utils.rng import StepRng

MEMORY = 2**17  # indices of each rate that are kept to be learned from
ROWS = 4096  # learned from at once, of each rate


@STAGES.register("context")
class ContextStage(Stage):
    """Bits per index that each rate's context model spends, as shares of what fixed length takes, averaged over rates.

    The models of the rates are independent. A coarse grid gives few indices per pass, and encoding takes longer than
    learning; so a memory of each rate's newest indices with their neighbours goes on being learned from. It is part of
    checkpoints. With cached latents (`data.latents`) there is no VAE pass: batches are latents (B, 4, h, w) in place of
    images.
    """

    works_on_latents = True

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__()
        self.codec = codec
        self.takes_latents = config.data.latents is not None
        if self.takes_latents:
            check_latents(config.data, codec.backbone)
        need_rates(codec.bottleneck, "stage context")
        weights = config.stage.draw_weights(codec.bottleneck.rates)
        validation_points(config.validation, codec.bottleneck)  # those of `init_from` are known only here
        self.rates = [rate for rate, weight in zip(codec.bottleneck.rates, weights, strict=True) if weight > 0]
        self.networks = nn.ModuleDict(
            {str(rate.id): build_network(codec.bottleneck.at(rate), config.stage.context) for rate in self.rates}
        )
        for rate in self.rates:  # neighbours, the index itself and its pass
            dtype = torch.int16 if codec.bottleneck.at(rate).codebook_size < 2**15 else torch.int32
            memory = torch.zeros(MEMORY, config.stage.context.neighbours + 2, dtype=dtype)
            self.register_buffer(f"memory_{rate.id}", memory)
        self.metrics = ("loss", *(f"bits_{rate.bpp:.4f}" for rate in self.rates))
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        return [self.networks]

    def forward(self, images: Tensor, rng: StepRng) -> dict[str, Tensor]:
        with torch.no_grad():
            latent = images if self.takes_latents else self.codec.backbone.encode(images)
            grids = [self.codec.bottleneck.at(rate).encode(latent) for rate in self.rates]
        result = {"loss": latent.new_zeros(())}
        for rate, grid in zip(self.rates, grids, strict=True):
            network = self.networks[str(rate.id)]
            found = torch.cat([part.view(len(part), -1) for part in network.contexts(grid.cpu().numpy())], dim=1)
            rows = self._remember(getattr(self, f"memory_{rate.id}"), found, rng).long()
            bits = network(rows[:, :-2], rows[:, -2], rows[:, -1])
            result["loss"] = result["loss"] + bits / (network.depth * len(self.rates))
            result[f"bits_{rate.bpp:.4f}"] = bits.detach()
        return result

    def _remember(self, memory: Tensor, found: Tensor, rng: StepRng) -> Tensor:
        """Put the newest rows in the place of the oldest, and draw as many as are learned from at once."""
        found = found[:MEMORY]
        first = rng.number * len(found)
        memory[(first + torch.arange(len(found), device=memory.device)) % MEMORY] = found.to(memory)
        filled = min(MEMORY, first + len(found))
        drawn = torch.randint(filled, (ROWS,), device=memory.device, generator=rng.noise(memory.device))
        return memory[drawn]

    def current_codec(self) -> OscarCodec:
        """The codec with the context models as they stand."""
        self.codec.bottleneck.contexts.update({rate.id: self.networks[str(rate.id)].integers() for rate in self.rates})
        return self.codec

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        self.codec.provenance = provenance
        self.current_codec().save_pretrained(folder)


def build_network(encoder: HyperEncoder, sizes: ContextConfig) -> ContextNetwork:
    """An untrained context network for the indices of a hyper-encoder."""
    codebook = encoder.quantizer.codebook.detach().cpu().float()
    return ContextNetwork(codebook, sizes.neighbours, sizes.embedding, sizes.hidden, sizes.features)
