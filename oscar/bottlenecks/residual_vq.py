"""Residual codes: a vector is the sum of one code from each of several small codebooks.

The codes of all stages are trained by gradient, and chosen by a beam search over the sum. The residual quantiser of
vector-quantize-pytorch does not serve here: its beams are ranked by the errors of all stages instead of the last one's,
its averages take no account of the beam, and it cannot leave out stages for some vectors only.

Codes that are used alike cost all the same, and an entropy coder saves little. `ResidualQuantizer.constrain` makes some
of them cheap and has the search prefer these: entropy-constrained vector quantisation (Chou, Lookabaugh and Gray 1989).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from vector_quantize_pytorch.vector_quantize_pytorch import kmeans

from oscar.bitstream.rdo import BEAM
from oscar.bottlenecks.hyper_encoder import HyperEncoder, Quantised
from oscar.bottlenecks.vq import VQBottleneck
from oscar.models.padding import pad_to_multiple
from oscar.rates import MAX_DOWNSAMPLE, PAPER_RATES, RatePoint, find_rate, rate_by_id
from oscar.registry import BOTTLENECKS

if TYPE_CHECKING:
    from oscar.config import BottleneckConfig

DITHER_PERIOD = 64  # latents
ODD_SHARE = 0.25  # of the training passes, in which a grid of cells ends with half a row; as many with half a column
USAGE_DECAY = 0.95
KMEANS_STEPS, REFINEMENTS, CONSTRAINED_REFINEMENTS = 15, 8, 12
RIDGE = 0.1  # in uses: keeps a rarely used code near its start


class ResidualQuantizer(nn.Module):
    """Unit-norm features of a hyper-encoder as sums of codes.

    Args:
        dim: channels of the features before `project_in` and after `project_out`.
        codebook_dim: dimensions of the codes.
        codebook_size: codes per stage.
        stages: codes per vector.
        kmeans_init: start from residual k-means over the features of the first training pass.

    Attributes:
        codebook: codes (stages, codebook_size, codebook_dim); 0 until k-means has set them.
        cluster_size: uses of each code per training pass, over all stages and processes, as a moving average.
        penalty: what the search adds to the squared distance for each code (stages, codebook_size), for its bits.
    """

    def __init__(self, dim: int, codebook_dim: int, codebook_size: int, stages: int, kmeans_init: bool = False):
        super().__init__()
        self.project_in = nn.Linear(dim, codebook_dim)
        self.project_out = nn.Linear(codebook_dim, dim)
        codebook = torch.randn(stages, codebook_size, codebook_dim) / (stages * codebook_dim) ** 0.5
        self.codebook = nn.Parameter(torch.zeros_like(codebook) if kmeans_init else codebook)
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("penalty", torch.zeros(stages, codebook_size))

    def search(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """The stages' codes whose sum, penalties included, is nearest to each feature, among those of a beam search.

        Args:
            features: (N, codebook_dim).
            present: which stages a feature has, bool (N, stages); all if None. One that it lacks adds nothing, and its
                index is 0.

        Returns:
            Indices, int64 (N, stages).
        """
        codebook = self.codebook.to(features.dtype)
        stages, size, _ = codebook.shape
        if present is None:
            present = torch.ones(len(features), stages, dtype=torch.bool, device=features.device)
        never = torch.arange(size, device=features.device) > 0  # in a stage that a feature lacks
        residual = features[:, None]  # (N, beams, codebook_dim)
        spent = features.new_zeros(len(features), 1)  # penalties so far (N, beams)
        indices = torch.empty(*residual.shape[:2], 0, dtype=torch.int64, device=features.device)
        for stage, codes in enumerate(codebook):
            lacks = ~present[:, stage, None, None]
            penalty = self.penalty[stage].to(features.dtype)
            errors = codes.square().sum(-1) + penalty - 2 * residual @ codes.t()  # (N, beams, codes), beside the beams'
            errors = errors.masked_fill(lacks, 0).masked_fill(lacks & never, torch.inf)
            errors = (residual.square().sum(-1, keepdim=True) + spent[..., None] + errors).flatten(1)
            kept = 1 if stage == stages - 1 else min(BEAM, errors.shape[1])
            best = errors.topk(kept, dim=1, largest=False).indices
            beams, chosen = best // size, (best % size).masked_fill(lacks[..., 0], 0)
            added = codes[chosen].masked_fill(lacks, 0)
            spent = spent.gather(1, beams) + penalty[chosen].masked_fill(lacks[..., 0], 0)
            residual = residual.gather(1, beams[..., None].expand(-1, -1, residual.shape[2])) - added
            indices = indices.gather(1, beams[..., None].expand(-1, -1, stage))
            indices = torch.cat([indices, chosen[..., None]], dim=2)
        return indices[:, 0]

    def look_up(self, indices: Tensor, present: Tensor | None = None) -> Tensor:
        """Indices (N, stages) -> sums of their codes (N, codebook_dim), with `present` as in `search`."""
        codes = self.codebook[torch.arange(len(self.codebook), device=indices.device), indices]
        return (codes if present is None else codes * present[..., None]).sum(1)

    def forward(self, features: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The training pass, on features (N, codebook_dim), with `present` as in `search`.

        Returns:
            Sums of codes (N, codebook_dim), whose gradient goes to codes and features alike; indices, int64
            (N, stages); mean squared distance of features and sums, scalar, 0 in evaluation.
        """
        if self.training and not self.codebook.any():
            self.fit(features.detach().float())
        with torch.no_grad():
            indices = self.search(features, present)
        quantised = self.look_up(indices, present)
        if not self.training:
            return quantised, indices, quantised.new_zeros(())
        self._count(indices if present is None else indices[present])
        distance = F.mse_loss(quantised, features)
        return quantised + features - features.detach(), indices, distance

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Set the codes by k-means on what each stage leaves to the next, then refine all stages together.

        The refinement alternates between the search and least squares for the codes. Several processes take over the
        codes of the first.
        """
        stages, size, _ = self.codebook.shape
        residual = features
        for stage in range(stages):
            codes = kmeans(residual[None], size, KMEANS_STEPS)[0][0]
            self.codebook[stage] = codes
            residual = residual - codes[torch.cdist(residual, codes).argmin(1)]
        for _ in range(REFINEMENTS):
            self._refit(features, self.search(features))
        if distributed.is_initialized():
            distributed.broadcast(self.codebook.data, 0)

    @torch.no_grad()
    def constrain(self, features: Tensor, strength: float) -> None:
        """Fit codes and penalties to features (N, codebook_dim) for their bits' sake too.

        Alternates between the search, the bits -log2 p of each stage's codes, and least squares for the codes. A bit is
        worth `strength` times the mean squared distance that the codes had at first, without penalties.
        """
        stages, size, _ = self.codebook.shape
        self.penalty.zero_()
        distance = (features - self.look_up(self.search(features))).square().sum(-1).mean()
        for _ in range(CONSTRAINED_REFINEMENTS):
            indices = self.search(features)
            self._refit(features, indices)
            uses = 0.5 + torch.stack([torch.bincount(stage, minlength=size) for stage in indices.t()])
            self.penalty.copy_(-strength * distance * (uses / uses.sum(1, keepdim=True)).log2())

    def _refit(self, features: Tensor, indices: Tensor) -> None:
        """Set the codes of all stages to what is nearest to the features (N, codebook_dim) they stand for, together."""
        stages, size, dim = self.codebook.shape
        offsets = torch.arange(stages, device=features.device) * size
        ridge = RIDGE * torch.eye(stages * size, device=features.device)
        chosen = features.new_zeros(len(features), stages * size).scatter_(1, indices + offsets, 1)
        codes = self.codebook.reshape(-1, dim)
        change = torch.linalg.solve(chosen.t() @ chosen + ridge, chosen.t() @ (features - chosen @ codes))
        self.codebook += change.view_as(self.codebook)

    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        uses = torch.bincount(indices.flatten(), minlength=self.codebook.shape[1]).to(self.cluster_size)
        if distributed.is_initialized():
            distributed.all_reduce(uses)
        self.cluster_size.lerp_(uses, 1 - USAGE_DECAY)


class ResidualHyperEncoder(HyperEncoder):
    """A hyper-encoder beyond the paper: several small codes for one vector, and noise at its input.

    Args:
        rate: the rate point.
        num_quantizers: codes that are summed to one vector: 1 (the paper), or a square number n * n; then backbone and
            projection work on cells of n x n indices, which are those of one vector of the cell, row by row. So
            small codebooks on a fine grid, which see little each, become a large one on a coarse grid at the same
            rate. At a border a cell may lack indices, and its vector their codes.
        dither: noise added to the encoder's input, as a share of each channel's root mean square; 0 in the paper. A
            network that sees a flat area gives it one code throughout, so that a small codebook shows as steps;
            noise lets neighbouring codes differ, and the decoder, which averages over them, find the values between.
        options: as of `HyperEncoder`.
    """

    def __init__(self, rate: RatePoint, num_quantizers: int = 1, dither: float = 0.0, **options):
        self.num_quantizers = num_quantizers
        self.cell = math.isqrt(num_quantizers)
        self.dither = dither
        if self.cell**2 != num_quantizers or rate.downsample * self.cell not in (1, 2, 4, MAX_DOWNSAMPLE):
            allowed = [n * n for n in (1, 2, 4, 8) if rate.downsample * n <= MAX_DOWNSAMPLE]
            raise ValueError(
                f"stages of rate {rate.bpp:.4f} are {num_quantizers}; allowed: {', '.join(map(str, allowed))}"
            )
        super().__init__(rate, **options)

    @property
    def has_codes_in_cells(self) -> bool:
        return self.num_quantizers > 1

    def make_quantizer(self, features: int, codebook_dim: int, kmeans_init: bool, *options) -> nn.Module:
        if not self.has_codes_in_cells:
            return super().make_quantizer(features, codebook_dim, kmeans_init, *options)
        return ResidualQuantizer(features, codebook_dim, self.codebook_size, self.num_quantizers, kmeans_init)

    def project(self, latent: Tensor) -> Tensor:
        """Of cells, for codes in cells."""
        return super().project(self.add_dither(latent))

    def codebooks(self) -> tuple[Tensor, Tensor]:
        if not self.has_codes_in_cells:
            return super().codebooks()
        return self.quantizer.codebook.float(), self.quantizer.penalty.float()

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
        self.dead_code_threshold = dead_code_threshold
        if not self.has_codes_in_cells:  # else its codes are trained by gradient
            super().set_training(dead_code_threshold, decay, rotation_trick)

    def keep_codes(self) -> None:
        if not self.has_codes_in_cells:
            super().keep_codes()

    def start_from(self, other: HyperEncoder) -> None:
        """Take over the weights of another one on the same grid of cells, all but its codes.

        Raises:
            ValueError: if it is on another grid, or of other sizes.
        """
        for name in ("backbone", "quantizer.project_in", "quantizer.project_out", "proj"):
            try:
                self.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
            except RuntimeError:
                raise ValueError(
                    f"rate {self.rate.bpp:.4f} in {self.num_quantizers} stages cannot start from rate "
                    f"{other.rate.bpp:.4f}, whose {name} has other shapes"
                ) from None

    def usage(self) -> Tensor:
        return self.quantizer.cluster_size if self.has_codes_in_cells else super().usage()

    def encode(self, latent: Tensor) -> Tensor:
        if not self.has_codes_in_cells:
            return super().encode(latent)
        rows, columns = (side // self.rate.downsample for side in latent.shape[-2:])
        features = self.codebook_features(pad_to_multiple(latent, self.rate.downsample * self.cell))
        present = self._cells(torch.ones(len(latent), rows, columns, dtype=torch.bool, device=latent.device))
        indices = self.quantizer.search(features.flatten(0, 2), None if present.all() else present.flatten(0, 2))
        return self._grid(indices.unflatten(0, features.shape[:3]))[:, :rows, :columns]

    def decode(self, indices: Tensor) -> Tensor:
        if not self.has_codes_in_cells:
            return super().decode(indices)
        cells, present = self._cells(indices), self._cells(torch.ones_like(indices, dtype=torch.bool))
        codes = self.quantizer.look_up(cells.flatten(0, 2), present.flatten(0, 2)).unflatten(0, cells.shape[:3])
        z_hat = self.proj(self.quantizer.project_out(codes).permute(0, 3, 1, 2))
        height, width = (side * self.rate.downsample for side in indices.shape[1:])
        return z_hat[..., :height, :width]

    def forward(self, latent: Tensor) -> Quantised:
        """As `HyperEncoder`'s; the latent must hold whole cells."""
        return super().forward(self.add_dither(latent))

    def quantise(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.has_codes_in_cells:
            return super().quantise(features)
        batch, rows, columns, _ = features.shape
        present = None
        if self.training:
            lacking = (torch.rand(2) < ODD_SHARE).tolist()
            grid = (batch, rows * self.cell - lacking[0], columns * self.cell - lacking[1])
            present = self._cells(torch.ones(grid, dtype=torch.bool, device=features.device)).flatten(0, 2)
        vectors = F.normalize(self.quantizer.project_in(features), dim=-1)
        quantised, indices, commitment = self.quantizer(vectors.flatten(0, 2), present)
        return self.quantizer.project_out(quantised), self._grid(indices.unflatten(0, features.shape[:3])), commitment

    def _cells(self, grid: Tensor) -> Tensor:
        """Of indices (B, rows, columns) -> of cells (B, rows / n, columns / n, n * n), padded with 0 or False."""
        padded = F.pad(grid, (0, -grid.shape[2] % self.cell, 0, -grid.shape[1] % self.cell))
        return F.pixel_unshuffle(padded[:, None], self.cell).permute(0, 2, 3, 1)

    def _grid(self, cells: Tensor) -> Tensor:
        """The inverse of `_cells`, padding included."""
        return F.pixel_shuffle(cells.permute(0, 3, 1, 2), self.cell)[:, 0]


@BOTTLENECKS.register("vq")
class ResidualVQBottleneck(VQBottleneck):
    """The paper's bottleneck, from which rates may depart by residual codes and dither; by default none does.

    Args:
        rates, latent_channels, codebook_sizes, options: as of `VQBottleneck`.
        dither, stages: by rate id, where a rate departs from the paper (`ResidualHyperEncoder`).
    """

    config_fields = (*VQBottleneck.config_fields, "dither", "stages", "start_from")
    by_rate = (*VQBottleneck.by_rate, "dither", "stages")

    def __init__(
        self,
        rates: Sequence[RatePoint] = PAPER_RATES,
        latent_channels: int = 4,
        codebook_sizes: Mapping[int, int] | None = None,
        dither: Mapping[int, float] | None = None,
        stages: Mapping[int, int] | None = None,
        **options,
    ):
        self._at_start = stages or {}, dither or {}
        super().__init__(rates, latent_channels, codebook_sizes, **options)

    def _make(self, rate: RatePoint, codebook_size: int | None) -> HyperEncoder:
        stages, dither = self._at_start
        return self._depart(rate, codebook_size, stages.get(rate.id, 1), dither.get(rate.id, 0))

    def _depart(self, rate: RatePoint, codebook_size: int | None, stages: int, dither: float) -> HyperEncoder:
        if stages == 1 and not dither:
            return super()._make(rate, codebook_size)
        options = {**self.options, "latent_channels": self.latent_channels, "codebook_size": codebook_size}
        return ResidualHyperEncoder(rate, stages, dither, **options)

    def to_config(self) -> dict:
        encoders = {str(rate.id): self.at(rate) for rate in self.rates}
        beyond = {key: encoder for key, encoder in encoders.items() if isinstance(encoder, ResidualHyperEncoder)}
        dither = {key: encoder.dither for key, encoder in beyond.items() if encoder.dither}
        stages = {key: encoder.num_quantizers for key, encoder in beyond.items() if encoder.num_quantizers > 1}
        found = {"dither": dither, "stages": stages}
        return {**super().to_config(), **{name: values for name, values in found.items() if values}}

    @classmethod
    def describe(cls, config: BottleneckConfig) -> dict[str, Any]:
        return {**super().describe(config), **{name: config.by_id(name) for name in ("dither", "stages")}}

    @classmethod
    def take_over(cls, config: BottleneckConfig, stored: Mapping[str, Any]) -> None:
        super().take_over(config, stored)
        names = {rate_id: rate_by_id(rate_id).bpp for rate_id in stored["rates"]}
        kept = {rate.id for rate in config.rate_points()}
        before = {
            name: {names[int(key)]: value for key, value in stored.get(name, {}).items() if int(key) in kept}
            for name in ("dither", "stages")
        }
        config.dither = config.dither or before["dither"]
        own = config.by_id("stages")
        config.stages |= {
            bpp: value
            for bpp, value in before["stages"].items()
            if not any(rate_by_id(rate_id).bpp == bpp for rate_id in own)
        }

    def adapt(self, config: BottleneckConfig) -> None:
        """Fewer rates, other numbers of codes for a vector, other dither."""
        self.set_stages(config.by_id("stages"), config.by_id("start_from"))
        super().adapt(config)
        self.set_dither(config.by_id("dither"))

    def set_dither(self, dither: Mapping[int, float]) -> None:
        """Noise of the encoder by rate id, 0 where it is not named; decoding does not depend on it."""
        for rate in self.rates:
            share, old = float(dither.get(rate.id, 0)), self.at(rate)
            if share == getattr(old, "dither", 0.0):
                continue
            if not isinstance(old, ResidualHyperEncoder):  # the same networks, with noise
                new = self._depart(rate, old.codebook_size, 1, share)
                new.load_state_dict(old.state_dict())
                self.hyper_encoders[str(rate.id)] = new
            self.at(rate).dither = share

    def set_stages(self, stages: Mapping[int, int], start_from: Mapping[int, int]) -> None:
        """Give rates (by id) a new hyper-encoder where they have another number of codes for a vector.

        It is untrained, but where `start_from` names a rate, on whose weights it builds (see `ResidualHyperEncoder`).

        Raises:
            ValueError: for a number, or a rate to start from, that does not fit.
        """
        old = dict(self.hyper_encoders.items())
        for rate in self.rates:
            key = str(rate.id)
            before = getattr(old[key], "num_quantizers", 1)
            if stages.get(rate.id, before) == before:
                continue
            new = self._depart(rate, old[key].codebook_size, stages[rate.id], 0)
            if rate.id in start_from:
                source = find_rate(rate_by_id(start_from[rate.id]).bpp, self.rates)
                new.start_from(old[str(source.id)])
            self.hyper_encoders[key] = new
