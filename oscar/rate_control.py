"""Files of at most so many bytes: the best rate that fits, and at it the least effort; or the highest quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oscar.bottlenecks.rdo import MAX_EFFORT
from oscar.rates import RatePoint

if TYPE_CHECKING:
    from oscar.codec import OscarCodec
    from oscar.continuous import ContinuousCodec


class TargetError(ValueError):
    """A size that nothing of a model's meets for a picture."""


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
    raise _out_of_reach(max_bytes, "rate", smallest, largest, image)


@torch.inference_mode()
def quality_within(codec: ContinuousCodec, image: Tensor, max_bytes: int) -> bytes:
    """The file of the highest quality that fits, found by bisection.

    Args:
        codec: the codec.
        image: (1, 3, H, W) in [-1, 1].
        max_bytes: length of the file at most.

    Raises:
        TargetError: if none fits, with the lengths that can be had.
    """
    from oscar.continuous import MAX_QUALITY, Quality

    latent = codec.encode_latent(image)

    def at(code: int) -> bytes:
        return codec.write_latent(latent, Quality(code), *image.shape[-2:])[0]

    best, largest = at(0), at(MAX_QUALITY)
    if len(best) > max_bytes:
        raise _out_of_reach(max_bytes, "quality", len(best), len(largest), image)
    if len(largest) <= max_bytes:
        return largest
    low, high = 0, MAX_QUALITY  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        data = at(middle)
        if len(data) <= max_bytes:
            low, best = middle, data
        else:
            high = middle
    return best


def _out_of_reach(max_bytes: int, what: str, smallest: int, largest: int, image: Tensor) -> TargetError:
    pixels = image.shape[-2] * image.shape[-1]
    return TargetError(
        f"max_bytes is {max_bytes}, which no {what} meets for this picture; reachable: {smallest} to {largest} bytes "
        f"({8 * smallest / pixels:.4f} to {8 * largest / pixels:.4f} bpp)"
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
