"""Files of at most so many bytes: the best rate that fits, and at it the least effort."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oscar.effort import MAX_EFFORT
from oscar.rates import RatePoint

if TYPE_CHECKING:
    from oscar.codec import OscarCodec


class TargetError(ValueError):
    """A size that no rate and effort of a model meets for a picture."""


@torch.inference_mode()
def compress_within(codec: OscarCodec, image: Tensor, max_bytes: int) -> bytes:
    """The file of the highest rate that fits, and at this rate of the lowest effort, found by bisection.

    Args:
        codec: the codec.
        image: (1, 3, H, W) in [-1, 1].
        max_bytes: length of the file at most.

    Raises:
        TargetError: if none fits, with the lengths that can be had.
    """
    largest = smallest = 0
    for rate in sorted(codec.rates, key=lambda rate: rate.bpp, reverse=True):
        files = _Efforts(codec, image, rate)
        if len(files.at(MAX_EFFORT)) <= max_bytes:
            return files.least(max_bytes)
        largest = largest or len(files.at(0))
        smallest = len(files.at(MAX_EFFORT))
    height, width = image.shape[-2:]
    raise TargetError(
        f"max_bytes is {max_bytes}, which no rate meets for this picture; reachable: {smallest} to {largest} bytes "
        f"({8 * smallest / (height * width):.4f} to {8 * largest / (height * width):.4f} bpp)"
    )


class _Efforts:
    """Files of one picture at one rate, by effort."""

    def __init__(self, codec: OscarCodec, image: Tensor, rate: RatePoint):
        self.codec, self.image, self.rate = codec, image, rate
        self.analysis = codec.analyse(image, rate)
        self.files: dict[int, bytes] = {}

    def at(self, effort: int) -> bytes:
        if effort not in self.files:
            analysis = self.codec.economise(self.analysis, self.rate, effort)
            height, width = self.image.shape[-2:]
            (self.files[effort],) = self.codec.write(analysis, self.rate, height, width)
        return self.files[effort]

    def least(self, max_bytes: int) -> bytes:
        """The file of the lowest effort that fits; that of the highest does."""
        low, high = 0, MAX_EFFORT
        while low < high:
            middle = (low + high) // 2
            if len(self.at(middle)) <= max_bytes:
                high = middle
            else:
                low = middle + 1
        return self.at(high)
