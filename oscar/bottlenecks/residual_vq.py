"""A vector quantiser in stages: a vector is the sum of one code from each of several small codebooks.

The codes of all stages are trained by gradient, and chosen by a beam search over the sum. The residual quantiser of
vector-quantize-pytorch does not serve here: its beams are ranked by the errors of all stages instead of the last one's,
its averages take no account of the beam, and it cannot leave out stages for some vectors only.

Codes that are used alike cost all the same, and an entropy coder saves little. `ResidualQuantizer.constrain` makes some
of them cheap and has the search prefer these: entropy-constrained vector quantisation (Chou, Lookabaugh and Gray 1989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from vector_quantize_pytorch.vector_quantize_pytorch import kmeans

BEAM = 16
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
