"""The paper's bottleneck: one hyper-encoder per rate, with a cosine-similarity vector quantiser in the middle.

A hyper-encoder is backbone -> vector quantiser -> projection (paper section 3.2, figure 2; blocks after PerCo's).
The encoder side runs `encode` (backbone and nearest code), the decoder side `decode` (codebook and projection), so
that neither needs the other's half. Module names equal those of the published checkpoint, so that its keys carry over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from compressai.layers import AttentionBlock
from torch import Tensor, distributed, nn
from vector_quantize_pytorch import VectorQuantize

from oscar.models.padding import pad_to_multiple
from oscar.models.precision import compute_finite
from oscar.models.residual_vq import ResidualQuantizer
from oscar.rates import MAX_DOWNSAMPLE, PAPER_RATES, RatePoint, find_rate, rate_by_id

DITHER_PERIOD = 64  # latents
ODD_SHARE = 0.25  # of the training passes, in which a grid of cells ends with half a row; as many with half a column


class BottleneckOutput(NamedTuple):
    """What a training pass through the bottleneck gives.

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
        stages: codes that are summed to one vector: 1 (the paper), or a square number n * n; then backbone and
            projection work on cells of n x n indices, which are the stages of one vector of the cell, row by row. So
            small codebooks on a fine grid, which see little each, become a large one on a coarse grid at the same
            rate. At a border a cell may lack indices, and its vector their stages.
        kmeans_init, decay, rotation_trick: options of the library's quantiser for training; the paper has no k-means
            start.
        dead_code_threshold: share of the uses that a code would have if all were used alike, in the moving average,
            under which it is replaced by a feature of the batch; 0, the paper's setting, never.
        dither: noise added to the encoder's input, as a share of each channel's root mean square; 0 in the paper. A
            network that sees a flat area gives it one code throughout, so that a small codebook shows as steps;
            noise lets neighbouring codes differ, and the decoder, which averages over them, find the values between.
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
        dither: float = 0.0,
        stages: int = 1,
    ):
        super().__init__()
        self.rate = rate
        self.stages = stages
        self.cell = math.isqrt(stages)  # indices along each side
        downsample = rate.downsample * self.cell
        if self.cell**2 != stages or downsample not in (1, 2, 4, MAX_DOWNSAMPLE):
            allowed = [n * n for n in (1, 2, 4, 8) if rate.downsample * n <= MAX_DOWNSAMPLE]
            raise ValueError(f"stages of rate {rate.bpp:.4f} are {stages}; allowed: {', '.join(map(str, allowed))}")
        self.dither = dither
        self.codebook_size = codebook_size or rate.codebook_size
        self.dead_code_threshold = dead_code_threshold
        steps = downsample.bit_length() - 1
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
        self.quantizer: VectorQuantize | ResidualQuantizer
        if stages > 1:
            self.quantizer = ResidualQuantizer(features, codebook_dim, self.codebook_size, stages, kmeans_init)
        else:
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
        """Unit-norm features (B, rows, columns, codebook_dim), of cells, whose nearest codes are the indices."""
        features = compute_finite("the hyper-encoder's features", self, HyperEncoder._project, latent)
        return F.normalize(features, dim=-1)

    def _project(self, latent: Tensor) -> Tensor:
        return self.quantizer.project_in(self.backbone(self.add_dither(latent)).permute(0, 2, 3, 1))

    def add_dither(self, latent: Tensor) -> Tensor:
        """The latent with the encoder's noise: random in training, else a fixed pattern, so that files repeat."""
        if not self.dither:
            return latent
        if self.training:
            noise = torch.randn_like(latent)
        else:
            height, width = latent.shape[-2:]
            generator = torch.Generator().manual_seed(0)
            pattern = torch.randn(latent.shape[1], DITHER_PERIOD, DITHER_PERIOD, generator=generator)
            noise = pattern.repeat(1, -(-height // DITHER_PERIOD), -(-width // DITHER_PERIOD))[:, :height, :width]
        rms = latent.square().mean(dim=(2, 3), keepdim=True).sqrt()
        return latent + self.dither * rms * noise.to(latent)

    def set_training(self, dead_code_threshold: float, decay: float, rotation_trick: bool) -> None:
        """Change how the codebook is trained from now on; see the class."""
        self.dead_code_threshold = dead_code_threshold
        if self.stages > 1:  # its codes are trained by gradient
            return
        self.quantizer.rotation_trick = rotation_trick
        codebook = self.quantizer._codebook
        codebook.decay = decay
        codebook.threshold_ema_dead_code = dead_code_threshold
        codebook.has_dead_code_replacement = dead_code_threshold > 0

    def keep_codes(self) -> None:
        """Have training go on from the codes as they are (of a checkpoint), not start or revive them anew."""
        if self.stages == 1:
            codebook = self.quantizer._codebook
            codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[..., None])
            codebook.initted.fill_(bool(codebook.embed.any()))

    def start_from(self, other: HyperEncoder) -> None:
        """Take over the weights of another one on the same grid of cells, all but its codes.

        Raises:
            ValueError: if it is on another grid, or of other sizes.
        """
        for name in ("backbone", "quantizer.project_in", "quantizer.project_out", "proj"):
            try:
                self.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
            except RuntimeError:
                raise ValueError(f"rate {self.rate.bpp:.4f} in {self.stages} stages cannot start from rate "
                                 f"{other.rate.bpp:.4f}, whose {name} has other shapes") from None  # fmt: skip

    def usage(self) -> Tensor:
        """Uses of each code per training pass, over all processes, as a moving average: (codebook_size,)."""
        return self.quantizer.cluster_size if self.stages > 1 else self.quantizer._codebook.cluster_size[0]

    def encode(self, latent: Tensor) -> Tensor:
        """Latent (B, 4, h, w), h and w multiples of the rate's downsample -> indices, int64 (B, rows, columns)."""
        if self.stages == 1:
            features = self.codebook_features(latent)
            return (features @ self.quantizer.codebook.t().to(features.dtype)).argmax(dim=-1)
        rows, columns = (side // self.rate.downsample for side in latent.shape[-2:])
        features = self.codebook_features(pad_to_multiple(latent, self.rate.downsample * self.cell))
        present = self._cells(torch.ones(len(latent), rows, columns, dtype=torch.bool, device=latent.device))
        indices = self.quantizer.search(features.flatten(0, 2), None if present.all() else present.flatten(0, 2))
        return self._grid(indices.unflatten(0, features.shape[:3]))[:, :rows, :columns]

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, rows, columns) -> quantised latent before rescaling (B, 4, h, w)."""
        if self.stages == 1:
            codes = self.quantizer.codebook.to(self.quantizer.project_out.weight.dtype)[indices]
            return self.proj(self.quantizer.project_out(codes).permute(0, 3, 1, 2))
        cells, present = self._cells(indices), self._cells(torch.ones_like(indices, dtype=torch.bool))
        codes = self.quantizer.look_up(cells.flatten(0, 2), present.flatten(0, 2)).unflatten(0, cells.shape[:3])
        z_hat = self.proj(self.quantizer.project_out(codes).permute(0, 3, 1, 2))
        height, width = (side * self.rate.downsample for side in indices.shape[1:])
        return z_hat[..., :height, :width]

    def _cells(self, grid: Tensor) -> Tensor:
        """Of indices (B, rows, columns) -> of cells (B, rows / n, columns / n, stages), padded with 0 or False."""
        padded = F.pad(grid, (0, -grid.shape[2] % self.cell, 0, -grid.shape[1] % self.cell))
        return F.pixel_unshuffle(padded[:, None], self.cell).permute(0, 2, 3, 1)

    def _grid(self, cells: Tensor) -> Tensor:
        """The inverse of `_cells`, padding included."""
        return F.pixel_shuffle(cells.permute(0, 3, 1, 2), self.cell)[:, 0]

    def forward(self, latent: Tensor) -> BottleneckOutput:
        """The training pass: quantised latent with gradients through the quantiser, indices and commitment loss.

        The latent (B, 4, h, w) must hold whole cells.
        """
        features = self.backbone(self.add_dither(latent)).permute(0, 2, 3, 1)
        quantise = self._quantise if self.stages == 1 else self._quantise_in_stages
        with torch.autocast(latent.device.type, enabled=False):  # the codes, and their averages, are in float32
            quantised, indices, commitment = quantise(features.to(self.proj[-1].weight.dtype))
        z_hat = self.proj(quantised.view_as(features).permute(0, 3, 1, 2))
        return BottleneckOutput(z_hat, indices, commitment.mean())

    def _quantise(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, rows, columns, channels = features.shape
        codebook = self.quantizer._codebook
        if self.training and self.dead_code_threshold:  # the library counts uses per pass, over all processes
            positions = batch * rows * columns * (distributed.get_world_size() if codebook.use_ddp else 1)
            uses = self.dead_code_threshold * positions / self.codebook_size
            codebook.threshold_ema_dead_code = codebook.reset_cluster_size = uses
        quantised, indices, commitment = self.quantizer(features.reshape(batch, rows * columns, channels))
        return quantised, indices.reshape(batch, rows, columns), commitment

    def _quantise_in_stages(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, rows, columns, _ = features.shape
        present = None
        if self.training:
            lacking = (torch.rand(2) < ODD_SHARE).tolist()
            grid = (batch, rows * self.cell - lacking[0], columns * self.cell - lacking[1])
            present = self._cells(torch.ones(grid, dtype=torch.bool, device=features.device)).flatten(0, 2)
        vectors = F.normalize(self.quantizer.project_in(features), dim=-1)
        quantised, indices, commitment = self.quantizer(vectors.flatten(0, 2), present)
        return self.quantizer.project_out(quantised), self._grid(indices.unflatten(0, features.shape[:3])), commitment


class VQBottleneck(nn.Module):
    """The hyper-encoders of several rates behind the bottleneck interface: `encode`, `decode`, `forward`.

    Args:
        rates: rate points, each with a hyper-encoder of its own.
        codebook_sizes: codebook size by rate id where it departs from the rate's (as the 8196 of the published code).
        dither: by rate id, where it is not 0.
        stages: by rate id, where they are not 1.
        options: further arguments of `HyperEncoder`.

    Attributes:
        options: these further arguments.
    """

    kind = "vq"

    def __init__(
        self,
        rates: Sequence[RatePoint] = PAPER_RATES,
        codebook_sizes: Mapping[int, int] | None = None,
        dither: Mapping[int, float] | None = None,
        stages: Mapping[int, int] | None = None,
        **options,
    ):
        super().__init__()
        sizes, stages = codebook_sizes or {}, stages or {}
        self.rates = tuple(rates)
        self.options = options
        self.hyper_encoders = nn.ModuleDict(
            {str(rate.id): HyperEncoder(rate, codebook_size=sizes.get(rate.id), stages=stages.get(rate.id, 1),
                                        **options)
             for rate in self.rates}
        )  # fmt: skip
        self.set_dither(dither or {})

    def describe(self) -> dict:
        """Rates and options in JSON-able form, as a checkpoint stores them."""
        options = {name: value for name, value in self.options.items() if name != "latent_channels"}
        encoders = {str(rate.id): self.at(rate) for rate in self.rates}
        sizes = {key: encoder.codebook_size for key, encoder in encoders.items()
                 if encoder.codebook_size != encoder.rate.codebook_size}  # fmt: skip
        dither = {key: encoder.dither for key, encoder in encoders.items() if encoder.dither}
        stages = {key: encoder.stages for key, encoder in encoders.items() if encoder.stages > 1}
        return {"rates": [rate.id for rate in self.rates], "codebook_sizes": sizes, **options,
                **({"dither": dither} if dither else {}), **({"stages": stages} if stages else {})}  # fmt: skip

    def set_stages(self, stages: Mapping[int, int], start_from: Mapping[int, int]) -> None:
        """Give rates (by id) a new hyper-encoder where they have another number of stages.

        It is untrained, but where `start_from` names a rate, on whose weights it builds (see `HyperEncoder`), and has
        no dither.

        Raises:
            ValueError: for a number of stages, or a rate to start from, that does not fit.
        """
        old = dict(self.hyper_encoders.items())
        for rate in self.rates:
            key = str(rate.id)
            if stages.get(rate.id, old[key].stages) == old[key].stages:
                continue
            new = HyperEncoder(rate, codebook_size=old[key].codebook_size, stages=stages[rate.id], **self.options)
            if rate.id in start_from:
                source = find_rate(rate_by_id(start_from[rate.id]).bpp, self.rates)
                new.start_from(old[str(source.id)])
            self.hyper_encoders[key] = new

    def keep(self, rates: Sequence[RatePoint]) -> None:
        """Drop the hyper-encoders of all other rates."""
        self.rates = tuple(rates)
        kept = {str(rate.id): self.at(rate) for rate in self.rates}
        self.hyper_encoders = nn.ModuleDict(kept)

    def set_dither(self, dither: Mapping[int, float]) -> None:
        """Noise of the encoder by rate id, 0 where it is not named; decoding does not depend on it."""
        for rate in self.rates:
            self.at(rate).dither = float(dither.get(rate.id, 0))

    def set_training(self, **options) -> None:
        """Change how the codebooks are trained from now on; see `HyperEncoder.set_training`."""
        for rate in self.rates:
            self.at(rate).set_training(**options)

    def at(self, rate: RatePoint) -> HyperEncoder:
        """The hyper-encoder of a rate."""
        return self.hyper_encoders[str(rate.id)]

    def encode(self, latent: Tensor, rate: RatePoint) -> Tensor:
        """Encoder half: latent (B, 4, h, w) -> indices, int64 (B, rows, columns)."""
        return self.at(rate).encode(latent)

    def decode(self, indices: Tensor, rate: RatePoint) -> Tensor:
        """Decoder half: indices (B, rows, columns) -> quantised latent before rescaling (B, 4, h, w)."""
        # Networks keep the order in memory of their input; on a CPU, torch's normalisations are most exact in this one.
        return compute_finite("the quantised latent", self.at(rate), HyperEncoder.decode, indices).contiguous()

    def forward(self, latent: Tensor, rate: RatePoint) -> BottleneckOutput:
        """The training pass at one rate."""
        return self.at(rate)(latent)
