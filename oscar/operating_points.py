"""Operating points: what a bottleneck's files can be asked for, a rate or a quality. No torch, no numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from oscar.bitstream import MAX_QUALITY, Coding, Payload, PayloadError, UnknownRateError, WrongModelError
from oscar.bitstream.coding import INDEX_CODINGS, MAX_EFFORT
from oscar.rates import RatePoint, find_rate, rate_by_id

if TYPE_CHECKING:
    from oscar.bitstream.context import ContextModel

DEFAULT_QUALITY = 0.5
POINTS = 25  # qualities that stand for all


class Point(Protocol):
    """An operating point: one size of files.

    Attributes:
        value: what users say, such as nominal bits per pixel or a quality.
        code: the whole number that files hold.
    """

    @property
    def value(self) -> float: ...

    @property
    def code(self) -> int: ...


class Setting(NamedTuple):
    """A plain operating point; see `Point`."""

    value: float
    code: int


class Quality(NamedTuple):
    """A quality as a file holds it.

    Attributes:
        code: 0 to 4095.
    """

    code: int

    @property
    def value(self) -> float:
        """0 to 1."""
        return self.code / MAX_QUALITY

    @classmethod
    def of(cls, value: float) -> Quality:
        """The nearest to a value (ValueError if it is not from 0 to 1)."""
        if not 0 <= value <= 1:
            raise ValueError(f"quality is {value}; allowed: 0 to 1")
        return cls(round(value * MAX_QUALITY))


def no_preview(payload: Payload) -> PayloadError:
    """What is raised for the start of a payload that only shows an image as a whole."""
    return PayloadError(f"coding {payload.coding.name.lower()} has no preview; allowed: context, hyperprior")


class OperatingPoints:
    """The operating points of a bottleneck.

    Attributes:
        point_name: what an operating point is called, "rate" or "quality".
        point_words: what a model with it has, in messages: "rates", "a hyperprior".
        codings: of the files that it writes.
        points: operating points from small to large files: all, or so many that they stand for all.
        max_effort: the highest effort in choosing symbols.
    """

    point_name: ClassVar[str] = "point"
    point_words: ClassVar[str] = "a bottleneck of its own"
    codings: ClassVar[tuple[Coding, ...]] = (Coding.EXTERNAL,)
    points: Sequence[Any]
    max_effort: int = 0

    @property
    def default_point(self) -> Point:
        """Where files are written unless something else is asked for; by default the middle one."""
        return self.points[len(self.points) // 2]

    @property
    def all_points(self) -> Sequence[Any]:
        """Every operating point that a file can have, from small to large files."""
        return self.points

    def parse(self, value: float | Point) -> Point:
        """The operating point that a user means (ValueError, saying what is allowed)."""
        number: Any = getattr(value, "value", value)
        for point in self.points:
            if math.isclose(point.value, number, rel_tol=1e-6, abs_tol=1e-9):
                return point
        allowed = ", ".join(self.label(point) for point in self.points)
        raise ValueError(f"{self.point_name} {number:g} does not exist; allowed: {allowed}")

    def find(self, point: float | Point | None = None, **named: float | None) -> Point:
        """The operating point that is meant, by itself or by name; the default one if nothing is said.

        Raises:
            ValueError: if there is none such.
        """
        for name, value in named.items():
            if name != self.point_name and value is not None:
                raise ValueError(
                    f"{name} is {value}, but this model has {self.point_words}; allowed: {self.point_name} or max_bytes"
                )
            point = value if point is None else point
        return self.default_point if point is None else self.parse(point)

    def refuse_beside_max_bytes(self, point: float | Point | None, effort: int, *named: float | None) -> None:
        """Refuse (ValueError) an operating point or an effort beside a length, which chooses both."""
        if effort or any(value is not None for value in (point, *named)):
            raise ValueError(f"max_bytes is set, which chooses {self.point_name} and effort itself; allowed: it alone")

    def label(self, point: Any) -> str:
        """An operating point in messages, and in the names of columns."""
        return f"{point.value:g}"

    def point_of_code(self, code: int) -> Point:
        """The operating point of a file (UnknownRateError if it is none of this model's)."""
        for point in self.points:
            if point.code == code:
                return point
        raise UnknownRateError(f"the file has {self.point_name} of code {code}, which this model does not have")

    def multiple(self, point: Any) -> int:
        """Sides of a latent must be multiples of this."""
        return 1

    def nominal_bpp(self, point: Any) -> float | None:
        """The operating point's nominal rate, where it has one."""
        return None

    def digest(self, coding: Coding, point: Any) -> bytes:
        """What decoding files of this coding depends on beyond the model's fingerprint; empty for nothing.

        Raises:
            WrongModelError: if this model cannot have written such a file.
        """
        return b""


class Rates(OperatingPoints):
    """Those of a vector quantiser.

    Attributes:
        rates: that it has, in any order.
        contexts: context model by rate id, for rates whose indices one predicts.
    """

    point_name = "rate"
    point_words = "rates"
    codings = INDEX_CODINGS
    max_effort = MAX_EFFORT
    rates: tuple[RatePoint, ...]
    contexts: dict[int, ContextModel]

    @property
    def points(self) -> tuple[RatePoint, ...]:
        return tuple(sorted(self.rates, key=lambda rate: rate.bpp))

    def parse(self, value: float | RatePoint) -> RatePoint:
        return find_rate(value.bpp if isinstance(value, RatePoint) else value, self.rates)

    def label(self, point: RatePoint) -> str:
        return f"{point.bpp:.4f}"

    def point_of_code(self, code: int) -> RatePoint:
        rate = rate_by_id(code)
        if rate not in self.rates:
            raise UnknownRateError(f"the file has rate {rate.bpp:.4f}, which this model does not have")
        return rate

    def multiple(self, point: RatePoint) -> int:
        return point.downsample

    @staticmethod
    def grid_shape(point: RatePoint, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the indices for those of the latent, before it is padded."""
        rows, columns = shape
        return -(-rows // point.downsample), -(-columns // point.downsample)

    def nominal_bpp(self, point: RatePoint) -> float:
        return point.bpp

    def digest(self, coding: Coding, point: RatePoint) -> bytes:
        if coding != Coding.CONTEXT:
            return b""
        if point.id not in self.contexts:
            raise WrongModelError(f"the file is coded by context; this model has none for rate {point.bpp:.4f}")
        return self.contexts[point.id].digest


class Qualities(OperatingPoints):
    """Those of a hyperprior: 4096 qualities."""

    point_name = "quality"
    point_words = "a hyperprior"
    codings = (Coding.HYPERPRIOR,)

    @property
    def points(self) -> tuple[Quality, ...]:
        """So many that they stand for all."""
        return tuple(Quality.of(step / (POINTS - 1)) for step in range(POINTS))

    @property
    def all_points(self) -> Sequence[Quality]:
        return [Quality(code) for code in range(MAX_QUALITY + 1)]

    @property
    def default_point(self) -> Quality:
        return Quality.of(DEFAULT_QUALITY)

    def parse(self, value: float | Quality) -> Quality:
        return value if isinstance(value, Quality) else Quality.of(value)

    def label(self, point: Quality) -> str:
        return f"{point.value:.4f}"

    def point_of_code(self, code: int) -> Quality:
        return Quality(code)
