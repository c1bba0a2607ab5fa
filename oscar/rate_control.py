"""A length in bytes -> an operating point: the best one whose file fits, and at it the least effort. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from oscar.operating_points import Point

if TYPE_CHECKING:
    from oscar.codec import OscarCodec
    from oscar.runtime import Codec

FEW = 64  # points that are tried one by one; of more, bytes are taken to rise from point to point


class TargetError(ValueError):
    """A size that nothing of a model's meets for an image."""


def compress_within(codec: OscarCodec | Codec, image: Any, max_bytes: int) -> bytes:
    """The file of the highest operating point that fits, and at this point of the lowest effort.

    Args:
        codec: the codec.
        image: (1, 3, H, W) in [-1, 1], as the codec's `encode_latent` takes it.
        max_bytes: length of the file at most.

    Raises:
        TargetError: if none fits, with the lengths that can be had.
    """
    points, files = codec.bottleneck.all_points, _Files(codec, image)
    most = codec.bottleneck.max_effort
    best = _highest(points, lambda point: len(files.at(point, most)) <= max_bytes)
    if best is None:
        smallest, largest = files.lengths()
        pixels, what = image.shape[-2] * image.shape[-1], codec.bottleneck.point_name
        raise TargetError(
            f"max_bytes is {max_bytes}, which no {what} meets for this image; reachable: {smallest} to {largest} "
            f"bytes ({8 * smallest / pixels:.4f} to {8 * largest / pixels:.4f} bpp)"
        )
    efforts = range(most, -1, -1)  # bytes rise along them
    return files.at(best, _bisect(efforts, lambda effort: len(files.at(best, effort)) <= max_bytes))


def reachable(codec: OscarCodec | Codec, image: Any) -> tuple[int, int]:
    """The lengths in bytes of the smallest and of the largest file of an image (1, 3, H, W) in [-1, 1]."""
    return _Files(codec, image).lengths()


def _highest(points: Sequence[Point], fits: Callable[[Point], bool]) -> Point | None:
    if len(points) <= FEW:
        return next((point for point in reversed(points) if fits(point)), None)
    return _bisect(points, fits) if fits(points[0]) else None


def _bisect(items: Sequence, fits: Callable):
    """The last item that fits, of which the first does, and none behind one that does not."""
    if fits(items[-1]):
        return items[-1]
    low, high = 0, len(items) - 1  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(items[middle]) else (low, middle)
    return items[low]


class _Files:
    """Files of one image by operating point and effort; its latents are computed once for each padding."""

    def __init__(self, codec: OscarCodec | Codec, image: Any):
        self.codec, self.image = codec, image
        self.latents: dict[int, Any] = {}
        self.files: dict[tuple[Point, int], bytes] = {}

    def at(self, point: Point, effort: int) -> bytes:
        if (point, effort) not in self.files:
            multiple = self.codec.bottleneck.multiple(point)
            if multiple not in self.latents:
                self.latents[multiple] = self.codec.encode_latent(self.image, point)
            encoded = self.codec.quantise(self.latents[multiple], point, effort)
            (self.files[point, effort],) = self.codec.write(encoded, point, *self.image.shape[-2:])
        return self.files[point, effort]

    def lengths(self) -> tuple[int, int]:
        """Of the smallest and of the largest file."""
        bottleneck = self.codec.bottleneck
        points = bottleneck.all_points
        return len(self.at(points[0], bottleneck.max_effort)), len(self.at(points[-1], 0))
