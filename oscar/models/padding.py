"""Sides that networks can halve."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(value: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with its last row and column repeated until both sides are multiples; itself if they are."""
    height, width = value.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return F.pad(value, padding, mode="replicate") if any(padding) else value
