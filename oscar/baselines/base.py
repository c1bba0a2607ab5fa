"""What every codec under evaluation can do, ours and the baselines: image -> bytes -> image, at a chosen point.

A point is one setting of the codec's own rate control (quality, quantiser, nominal rate). Files are bytes in memory, so
their length is the rate; a search over the points gives files of a chosen size.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Real

from PIL import Image

_NEIGHBOURS = 2  # grid points looked at beyond the bisection's answer, since file sizes are only nearly monotonic


class BaselineUnavailable(RuntimeError):
    """A codec that cannot run here; the message is one line: what is missing, and how to get it."""


class CodecError(RuntimeError):
    """A codec that runs here but failed at one image or file; the message is one line."""


@dataclass(frozen=True)
class Encoded:
    """A file in memory.

    Attributes:
        data: the whole file.
        parts: bytes by part; they sum to `len(data)`. {"file": n} where the format is opaque to us.
        nominal_bpp: bits per pixel by the codec's name for the rate, where it has one.
        estimated_bpp: header and ideal code length of the payload in bits per pixel, where the codec tells it.
    """

    data: bytes
    parts: dict[str, int] = field(default_factory=dict)
    nominal_bpp: float | None = None
    estimated_bpp: float | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", {"file": len(self.data)})
        if sum(self.parts.values()) != len(self.data):
            raise ValueError(f"parts {self.parts} do not sum to the file's {len(self.data)} bytes")


@dataclass(frozen=True)
class RoundTrip:
    """An image through a codec and back.

    Attributes:
        reference: RGB image that `decoded` is to be scored against: the original, unless a protocol resizes it (sets
            of images are compared with the originals all the same).
        decoded: RGB image.
        encoded: the file; None where a protocol writes none.
        nominal_bpp, estimated_bpp: see `Encoded`.
        encode_seconds, decode_seconds: image in memory -> bytes in memory, and back.
    """

    reference: Image.Image
    decoded: Image.Image
    encoded: Encoded | None
    nominal_bpp: float | None
    estimated_bpp: float | None
    encode_seconds: float
    decode_seconds: float

    @classmethod
    def of_file(
        cls,
        reference: Image.Image,
        decoded: Image.Image,
        encoded: Encoded,
        encode_seconds: float,
        decode_seconds: float,
    ) -> RoundTrip:
        """One through a file, whose rates are the file's."""
        rates = encoded.nominal_bpp, encoded.estimated_bpp
        return cls(reference, decoded, encoded, *rates, encode_seconds, decode_seconds)


class ImageCodec(ABC):
    """A codec with its settings fixed, except for the point.

    Attributes:
        name: unique and safe as a file name ("jpeg", "oscar-nano").
        label: for tables and plots ("JPEG", "OSCAR nano").
        point_name: what a point is ("quality", "rate").
        points: operating points of an evaluation, smallest file first.
        grid: all points that a search may use, smallest file first.
    """

    name: str
    label: str
    point_name: str
    points: tuple[float, ...]
    grid: tuple[float, ...]

    @abstractmethod
    def encode(self, image: Image.Image, point: float) -> Encoded:
        """Compress an RGB image.

        Raises:
            ValueError: for a point that the codec does not have.
            CodecError: if the codec fails.
        """

    @abstractmethod
    def decode(self, data: bytes) -> Image.Image:
        """Restore the RGB image of a file, in its original size.

        Raises:
            ValueError, RuntimeError, OSError: if the file is not one of this codec's, or the codec fails.
        """

    def describe(self) -> dict:
        """What determines the results besides the point, for JSON: library, version, settings, checkpoint hash."""
        return {"name": self.name, "label": self.label, "point_name": self.point_name}

    def check_point(self, point: float) -> float:
        """The point as the codec knows it; by default one of the grid's.

        Raises:
            ValueError: naming the point and what is allowed.
        """
        if isinstance(point, Real):
            for known in self.grid:
                if math.isclose(known, point, rel_tol=1e-6, abs_tol=1e-9):
                    return known
        raise ValueError(f"{self.name}: {self.point_name} {point!r} is not allowed; allowed: {_in_words(self.grid)}")

    def round_trip(self, image: Image.Image, point: float) -> RoundTrip:
        """Encode an RGB image and decode it again, timed."""
        start = time.perf_counter()
        encoded = self.encode(image, point)
        middle = time.perf_counter()
        decoded = self.decode(encoded.data)
        end = time.perf_counter()
        return RoundTrip.of_file(image, decoded, encoded, middle - start, end - middle)


def encode_to_size(codec: ImageCodec, image: Image.Image, max_bytes: int) -> tuple[float, Encoded]:
    """The largest file of a codec's grid that is no larger than `max_bytes`, found by bisection.

    File sizes need only be nearly monotonic over the grid: the points next to the bisection's answer are tried as well.

    Returns:
        The point and its file. If no file is small enough, the smallest one found: `len(data) > max_bytes` then.
    """
    tried: dict[int, Encoded] = {}

    def fits(index: int) -> bool:
        if index not in tried:
            tried[index] = codec.encode(image, codec.grid[index])
        return len(tried[index].data) <= max_bytes

    low, high = 0, len(codec.grid)  # points before `low` fit; those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(middle) else (low, middle)
    for index in range(low, min(low + 1 + _NEIGHBOURS, len(codec.grid))):
        fits(index)
    sizes = {index: len(encoded.data) for index, encoded in tried.items()}
    fitting = [index for index in sizes if sizes[index] <= max_bytes]
    best = max(fitting, key=sizes.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)
    return codec.grid[best], tried[best]


def _in_words(grid: tuple[float, ...]) -> str:
    """The points of a grid, for a message."""
    low, high = min(grid), max(grid)
    if len(grid) > 2 and sorted(grid) == list(range(int(low), int(low) + len(grid))):
        return f"whole numbers from {low:g} to {high:g}"
    if len(grid) > 16:
        return f"{len(grid)} values from {low:g} to {high:g}"
    return ", ".join(f"{point:g}" for point in grid)


def check_choice(codec: str, option: str, value: object, allowed: tuple) -> object:
    """An option's value, if it is one of those allowed (ValueError naming all)."""
    if not any(value is known or (type(value) is type(known) and value == known) for known in allowed):
        raise ValueError(f"{codec}: {option} {value!r} is not allowed; allowed: {', '.join(map(str, allowed))}")
    return value


def check_whole(codec: str, option: str, value: object, low: int, high: int) -> int:
    """An option's value, if it is a whole number from `low` to `high` (ValueError naming them)."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{codec}: {option} {value!r} is not allowed; allowed: whole numbers from {low} to {high}")
    return value
