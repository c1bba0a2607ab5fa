"""The paper's hyper-encoder: quantises a latent at one rate (paper section 3.2, figure 2; blocks after PerCo's).

A hyper-encoder is backbone -> cosine-similarity vector quantiser -> projection. The encoder side runs `encode`
(backbone and nearest code), the decoder side `decode` (codebook and projection), so that neither needs the other's
half. Module names equal those of the published checkpoint, so that its keys carry over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from vector_quantize_pytorch import VectorQuantize

from oscar.models.compressai import AttentionBlock
from oscar.models.precision import compute_finite
from oscar.rates import RatePoint


class Quantised(NamedTuple):
    """What a training pass through a hyper-encoder gives.

    Attributes:
        z_hat: quantised latent before rescaling, (B, 4, h, w).
        indices: code indices, int64 (B, rows, columns).
        commitment: mean squared distance of the (unit-norm) features to their codes, scalar; 0 in evaluation.
    """

    z_hat: Tensor
    indices: Tensor
    commitment: Tensor


class BottleneckBlock(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions at half width with ReLU between them."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.layers = nn.Sequential(
            nn.Conv2d(channels, half, 1),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _down(in_channels: int, out_channels: int, active: bool) -> nn.Module:
    if active:
        return nn.Conv2d(in_channels, out_channels, 5, stride=2, padding=2)
    return nn.Conv2d(in_channels, out_channels, 1)


def _up(channels: int, active: bool) -> nn.Module:
    if active:
        return nn.ConvTranspose2d(channels, channels, 5, stride=2, padding=2, output_padding=1)
    return nn.Conv2d(channels, channels, 1)


def _blocks(channels: int) -> list[nn.Module]:
    return [BottleneckBlock(channels) for _ in range(3)]


class HyperEncoder(nn.Module):
    """Quantises a latent at one rate.

    Args:
        rate: the rate point; sets the number of stride-2 steps (0 to 3, the last of three first) and the codebook size.
        width: channels N of the backbone (192 in the paper).
        features: channels M around the quantiser (320 in the paper).
        codebook_dim: dimensions of the codebook space (32 in the paper).
        latent_channels: channels of the latent.
        codebook_size: number of codes, where it departs from the rate's.
        kmeans_init, decay, rotation_trick: options of the library's quantiser for training; the paper has no k-means
            start.
        dead_code_threshold: share of the uses that a code would have if all were used alike, in the moving average,
            under which it is replaced by a feature of the batch; 0, the paper's setting, never.
    """

    def __init__(
        self,
        rate: RatePoint,
        width: int = 192,
        features: int = 320,
        codebook_dim: int = 32,
        latent_channels: int = 4,
        codebook_size: int | None = None,
        kmeans_init: bool = False,
        dead_code_threshold: float = 0,
        decay: float = 0.8,
        rotation_trick: bool = True,
    ):
        super().__init__()
        self.rate = rate
        self.codebook_size = codebook_size or rate.codebook_size
        self.dead_code_threshold = dead_code_threshold
        steps = rate.downsample.bit_length() - 1
        first, second, third = (steps > 2, steps > 1, steps > 0)
        self.backbone = nn.Sequential(
            _down(latent_channels, width, first),
            *_blocks(width),
            _down(width, width, second),
            *_blocks(width),
            AttentionBlock(width),
            _down(width, width, third),
            *_blocks(width),
            nn.Conv2d(width, features, 1),
            AttentionBlock(features),
        )
        self.quantizer = VectorQuantize(
            dim=features,
            codebook_size=self.codebook_size,
            codebook_dim=codebook_dim,
            use_cosine_sim=True,
            kmeans_init=kmeans_init,
            threshold_ema_dead_code=dead_code_threshold,
            decay=decay,
            rotation_trick=rotation_trick,
            # the library's own answer is that of the first codebook ever built in this process
            sync_codebook=distributed.is_initialized() and distributed.get_world_size() > 1,
        )
        self.proj = nn.Sequential(
            _up(features, first),
            *_blocks(features),
            _up(features, second),
            *_blocks(features),
            _up(features, third),
            *_blocks(features),
            nn.Conv2d(features, latent_channels, 1),
        )

    def codebook_features(self, latent: Tensor) -> Tensor:
        """Unit-norm features (B, rows, columns, codebook_dim) whose nearest codes are the indices."""
        return F.normalize(compute_finite("the hyper-encoder's features", self, HyperEncoder.project, latent), dim=-1)

    def project(self, latent: Tensor) -> Tensor:
        """Features before they are brought to unit norm."""
        return self.quantizer.project_in(self.backbone(latent).permute(0, 2, 3, 1))

    def set_training(self, dead_code_threshold: float, decay: float, rotation_trick: bool) -> None:
        """Change how the codebook is trained from now on; see the class."""
        self.dead_code_threshold = dead_code_threshold
        self.quantizer.rotation_trick = rotation_trick
        codebook = self.quantizer._codebook
        codebook.decay = decay
        codebook.threshold_ema_dead_code = dead_code_threshold
        codebook.has_dead_code_replacement = dead_code_threshold > 0

    def keep_codes(self) -> None:
        """Have training go on from the codes as they are (of a checkpoint), not start or revive them anew."""
        codebook = self.quantizer._codebook
        codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[..., None])
        codebook.initted.fill_(bool(codebook.embed.any()))

    def usage(self) -> Tensor:
        """Uses of each code per training pass, over all processes, as a moving average: (codebook_size,)."""
        return self.quantizer._codebook.cluster_size[0]

    def encode(self, latent: Tensor) -> Tensor:
        """Latent (B, 4, h, w), h and w multiples of the rate's downsample -> indices, int64 (B, rows, columns)."""
        features = self.codebook_features(latent)
        return (features @ self.quantizer.codebook.t().to(features.dtype)).argmax(dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, rows, columns) -> quantised latent before rescaling (B, 4, h, w)."""
        codes = self.quantizer.codebook.to(self.proj[-1].weight.dtype)[indices]
        return self.proj(self.quantizer.project_out(codes).permute(0, 3, 1, 2))

    def forward(self, latent: Tensor) -> Quantised:
        """The training pass: quantised latent with gradients through the quantiser, indices and commitment loss."""
        features = self.backbone(latent).permute(0, 2, 3, 1)
        with torch.autocast(latent.device.type, enabled=False):  # the codes, and their averages, are in float32
            quantised, indices, commitment = self._quantise(features.to(self.proj[-1].weight.dtype))
        z_hat = self.proj(quantised.view_as(features).permute(0, 3, 1, 2))
        return Quantised(z_hat, indices.reshape(features.shape[:3]), commitment.mean())

    def _quantise(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, rows, columns, M) -> quantised ones and indices, rows and columns as one, and commitments."""
        positions, codebook = features.shape[:3].numel(), self.quantizer._codebook
        if self.training and self.dead_code_threshold:  # the library counts uses per pass, over all processes
            positions *= distributed.get_world_size() if codebook.use_ddp else 1
            uses = self.dead_code_threshold * positions / self.codebook_size
            codebook.threshold_ema_dead_code = codebook.reset_cluster_size = uses
        return self.quantizer(features.flatten(1, 2))
