"""Exact statistics of maps in parts, and the affine map that a group normalisation is with them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Moments = tuple[int, Tensor, Tensor]


def moments(part: Tensor) -> Moments:
    """Positions of a part (..., C) of a map, means (C,), and sums (C,) of the squares about them."""
    mean = part
    while mean.dim() > 1:  # much faster than over two dimensions at once
        mean = mean.mean(dim=-2)
    return part.numel() // len(mean), mean, (part - mean).square_().flatten(0, -2).sum(dim=0)


def group_statistics(parts: Iterable[Moments], groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels of a map.

    Args:
        parts: `moments` of the parts of the map.
        groups: number of groups.

    Returns:
        float64 (groups,) each, on the CPU.
    """
    counts, means, squares = zip(*parts, strict=True)
    count = torch.tensor(counts, dtype=torch.float64)[:, None, None]
    mean, square = (torch.stack(values).cpu().double().view(len(counts), groups, -1) for values in (means, squares))
    members = sum(counts) * mean.shape[2]
    centre = (count * mean).sum(dim=(0, 2)) / members
    variance = (square + count * (mean - centre[:, None]).square()).sum(dim=(0, 2)) / members
    return centre, variance


def affine_map(norm: nn.GroupNorm, centre: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), float64 on the CPU: ``scale * map + shift`` is the normalisation of a map with those
    statistics."""
    members = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(members)
    scale = scale if norm.weight is None else scale * norm.weight.cpu()
    shift = -centre.repeat_interleave(members) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.cpu()
