"""Group normalisation from exact statistics, whatever the order of the map in memory.

On a CPU torch sums maps in channels-last order number after number in float32, and takes the variance as a difference
of such sums: on a map of 512x512 that leaves errors of 1e-4, other ones with another number of threads. Here squares
are summed about the mean of a few rows at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from oscar.inference.cpu.reuse import POOL
from oscar.inference.cpu.threads import each
from oscar.inference.statistics import Moments, affine_map, group_statistics, moments

_PART = 65536  # numbers that are summed at a time


def normalisation(
    norm: nn.GroupNorm, images: Tensor, known: Sequence[Sequence[Moments]] | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and shift (B, C), float32: ``scale * images + shift`` is the group normalisation of images (B, C, ...).

    Args:
        norm: the normalisation.
        images: the maps.
        known: `moments` of the parts of each, if they were found before.
    """
    if known is None:
        rows = max(1, _PART // norm.num_channels)
        known = [each(moments, tokens.split(rows)) for tokens in images.flatten(2).transpose(1, 2)]
    maps = [affine_map(norm, *group_statistics(parts, norm.num_groups)) for parts in known]
    scale, shift = (torch.stack(values).float() for values in zip(*maps, strict=True))
    return scale, shift


class ExactGroupNorm(nn.GroupNorm):
    """Group normalisation that is as exact in channels-last order as in the other, for inference."""

    def forward(self, images: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *self.parameters()))
        if learning or images.dtype != torch.float32 or images.device.type != "cpu":
            return super().forward(images)
        tokens = images.flatten(2).transpose(1, 2)
        scale, shift = (value[:, None] for value in normalisation(self, images))
        out = POOL.empty(*tokens.shape) if tokens.is_contiguous() else None  # in the order of the images
        result = torch.addcmul(shift, tokens, scale, out=out)
        return result.transpose(1, 2).view(images.shape)


@contextlib.contextmanager
def exact_norms(network: nn.Module) -> Iterator[None]:
    """Have a network's group normalisations be exact as long as the context lasts."""
    norms = [module for module in network.modules() if type(module) is nn.GroupNorm]
    for norm in norms:
        norm.__class__ = ExactGroupNorm
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.GroupNorm
