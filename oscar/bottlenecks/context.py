"""The context model of one rate as a network that can be trained: `oscar.bitstream.context` with gradients.

It computes in float what the integer model computes, with weights and activations rounded to the same steps; gradients
pass the rounding as if it were not there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.bitstream.context import (
    ACTIVATION_LIMIT,
    ACTIVATION_UNIT,
    PASSES,
    SUM_UNIT,
    WEIGHT_SETS,
    WEIGHT_UNIT,
    ContextModel,
    Field,
)

_LARGEST = 127  # of an int8 weight


class ContextNetwork(nn.Module):
    """Predicts indices of a codebook from their neighbours.

    Args:
        codebook: (K, dimensions), from which the tree and the first embedding are made.
        neighbours: positions that each one looks at.
        embedding, hidden, features: widths.
    """

    def __init__(
        self, codebook: Tensor, neighbours: int = 12, embedding: int = 16, hidden: int = 64, features: int = 48
    ):
        super().__init__()
        self.neighbours = neighbours
        codes = len(codebook)
        self.depth = (codes - 1).bit_length()
        leaf = similarity_order(codebook).argsort()
        self.register_buffer("leaf", leaf)
        depths = torch.arange(self.depth, device=leaf.device)
        self.register_buffer("path", 2**depths - 1 + (leaf[:, None] >> (self.depth - depths)))  # nodes, (K, depth)
        self.register_buffer("bits", (leaf[:, None] >> (self.depth - 1 - depths) & 1).float())
        axes = codebook - codebook.mean(dim=0)
        axes = axes @ torch.linalg.svd(axes, full_matrices=False)[2].t()[:, :embedding]
        vectors = torch.zeros(codes + 1, embedding)
        vectors[:codes, : axes.shape[1]] = axes / axes.std().clamp_min(1e-6)
        self.embedding = nn.Parameter(vectors)
        inputs = neighbours * embedding
        self.hidden = nn.Parameter(torch.randn(WEIGHT_SETS, inputs, hidden) * inputs**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(len(PASSES), hidden))
        self.mixing = nn.Parameter(torch.randn(WEIGHT_SETS, hidden, features) * (2 / hidden) ** 0.5)
        self.mixing_bias = nn.Parameter(torch.full((len(PASSES), features), 0.1))
        self.nodes = nn.Parameter(torch.randn(2**self.depth - 1, features) * 0.05)
        self.node_bias = nn.Parameter(torch.zeros(2**self.depth - 1))

    def contexts(self, grids: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """What there is to learn from indices (B, rows, columns): codes (n, neighbours), targets and passes (n,)."""
        missing, found = len(self.leaf), []
        for grid in grids:
            field = Field(*grid.shape, missing, self.neighbours)
            for number, places in field.parts(grid.size):
                own = grid.reshape(-1)[field.positions(places)]
                found.append((field.neighbours(number, places), own, np.full(len(own), number)))
                field.put(places, own)
        device = self.leaf.device
        return tuple(torch.from_numpy(np.concatenate(part)).to(device).long() for part in zip(*found, strict=True))

    def forward(self, neighbours: Tensor, targets: Tensor, passes: Tensor) -> Tensor:
        """Bits per index of what `contexts` gives, scalar."""
        vectors = _rounded(self.embedding, ACTIVATION_UNIT, _LARGEST)
        hidden, mixing = (_rounded(weights, WEIGHT_UNIT, _LARGEST) for weights in (self.hidden, self.mixing))
        nodes = _rounded(self.nodes, WEIGHT_UNIT, _LARGEST)
        weights = torch.tensor([this.weights for this in PASSES], device=passes.device)[passes]
        bits = vectors.new_zeros(())
        for number in range(WEIGHT_SETS):
            rows = (weights == number).nonzero()[:, 0]
            own = passes[rows]
            inputs = F.embedding(neighbours[rows], vectors).flatten(1)
            features = _activate(inputs @ hidden[number] + F.embedding(own, self.hidden_bias))
            features = _activate(features @ mixing[number] + F.embedding(own, self.mixing_bias))
            path = self.path[targets[rows]]
            logits = torch.bmm(F.embedding(path, nodes), features[:, :, None])[:, :, 0] + self.node_bias[path]
            bits = bits + F.binary_cross_entropy_with_logits(logits, self.bits[targets[rows]], reduction="sum")
        return bits / (len(targets) * np.log(2))

    @torch.no_grad()
    def integers(self) -> ContextModel:
        """The integer model, without which nothing is coded."""

        def scaled(value: Tensor, unit: float, dtype: type) -> np.ndarray:
            largest = np.iinfo(dtype).max
            return (value.cpu() / unit).round().clamp(-largest, largest).numpy().astype(dtype)

        return ContextModel(
            leaf=self.leaf.cpu().numpy().astype(np.int16 if len(self.leaf) <= 2**15 else np.int32),
            embedding=scaled(self.embedding, ACTIVATION_UNIT, np.int8),
            hidden=scaled(self.hidden, WEIGHT_UNIT, np.int8),
            hidden_bias=scaled(self.hidden_bias, SUM_UNIT, np.int16),
            mixing=scaled(self.mixing, WEIGHT_UNIT, np.int8),
            mixing_bias=scaled(self.mixing_bias, SUM_UNIT, np.int16),
            nodes=scaled(self.nodes, WEIGHT_UNIT, np.int8),
            node_bias=scaled(self.node_bias, SUM_UNIT, np.int16),
        )


def similarity_order(codebook: Tensor) -> Tensor:
    """Codes (K,) in an order in which halves, quarters and so on are alike, from vectors (K, dimensions)."""

    def split(codes: Tensor) -> list[Tensor]:
        if len(codes) == 1:
            return [codes]
        vectors = codebook[codes] - codebook[codes].mean(dim=0)
        axis = torch.linalg.svd(vectors, full_matrices=False)[2][0]
        ordered = codes[(vectors @ axis).argsort(stable=True)]
        half = 2 ** ((len(codes) - 1).bit_length() - 1)  # a left half is always full
        return split(ordered[:half]) + split(ordered[half:])

    return torch.cat(split(torch.arange(len(codebook))))


def _rounded(value: Tensor, unit: float, largest: int, smallest: int | None = None) -> Tensor:
    steps = (value / unit).round().clamp(-largest if smallest is None else smallest, largest)
    return value + (steps * unit - value).detach()


def _activate(sums: Tensor) -> Tensor:
    """ReLU up to the largest activation, rounded."""
    return _rounded(sums.clamp(0, ACTIVATION_LIMIT * ACTIVATION_UNIT), ACTIVATION_UNIT, ACTIVATION_LIMIT, 0)
