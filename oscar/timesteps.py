"""Mappings from rate to pseudo-timestep: how noisy a quantised latent is taken to be (paper section 3.1).

A mapping is a small object that a config names and a checkpoint stores; `mapping_from_config` is the inverse of its
`to_config`. One of your own is a frozen dataclass and a call of `MAPPINGS.register` (docs/extend.md). This module knows
no torch: what is measured comes from `oscar.evaluation.calibration`, what is learned from `oscar.training.timesteps`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

from oscar.rates import PAPER_RATES, RatePoint, rate_by_id
from oscar.registry import MAPPINGS

CODES = 256  # timesteps that the one byte of a file tells apart


class TimestepMapping(ABC):
    """The pseudo-timestep of an operating point: a rate, or whatever points the bottleneck has.

    Attributes:
        kind: the mapping's name in configs.
        per_image: whether images have timesteps of their own, which the encoder measures and the file carries.
    """

    kind: str
    per_image: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, rate: Any) -> int | float:
        """The pseudo-timestep of a rate (or of another point, with a `value` and a `code`).

        Raises:
            ValueError: if there is none for it.
        """

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """What a config may name beside `kind`: the dataclass's fields."""
        return tuple(item.name for item in _fields(cls) if item.name != "kind")

    def to_config(self) -> dict:
        """A JSON-able description: kind and fields."""
        return {"kind": self.kind, **asdict(cast(Any, self))}

    @classmethod
    def from_config(cls, config: Mapping) -> TimestepMapping:
        """The inverse of `to_config` (ValueError for a malformed one)."""
        values = {name: value for name, value in config.items() if name != "kind"}
        for item in _fields(cls):
            number = {"int": int, "float": float}.get(getattr(item.type, "__name__", str(item.type)))
            if item.name in values and number is not None:
                values[item.name] = _number(values[item.name], number, item.name)
        return cls(**values)

    def check(self, rates: Iterable[Any], schedule_length: int) -> None:
        """Refuse a mapping that lacks one of `rates` or points outside the schedule (ValueError)."""
        for rate in rates:
            timestep = self(rate)
            if not 0 <= timestep <= schedule_length - 1:
                raise ValueError(
                    f"timesteps: {timestep} of rate {rate.value:.4f} is outside the schedule; "
                    f"allowed: 0 to {schedule_length - 1}"
                )


@MAPPINGS.register("table")
@dataclass(frozen=True)
class TableMapping(TimestepMapping):
    """One pseudo-timestep per rate, looked up by the rate's id.

    Attributes:
        timesteps: pseudo-timestep by rate id.
    """

    timesteps: Mapping[int, Any]
    kind = "table"

    @classmethod
    def paper(cls) -> TableMapping:
        """The paper's table, for the eight rates that its UNet is trained on."""
        return cls(_table("paper"))

    def __call__(self, rate: RatePoint) -> int:
        if _rate(rate, self.kind).id not in self.timesteps:
            allowed = ", ".join(f"{rate_by_id(key).bpp:.4f}" for key in sorted(self.timesteps))
            raise ValueError(f"timesteps: the table has no pseudo-timestep for rate {rate.bpp:.4f}; it has {allowed}")
        return self.timesteps[rate.id]

    def to_config(self) -> dict:
        return {"kind": self.kind, "timesteps": _by_key(self.timesteps)}

    @classmethod
    def from_config(cls, config: Mapping) -> TableMapping:
        return cls(_table(config.get("timesteps", "paper")))


@MAPPINGS.register("snr")
@MAPPINGS.register("cosine")
@dataclass(frozen=True)
class CalibratedMapping(TableMapping):
    """A table whose timesteps come from a measurement, which is kept with them.

    Kind `cosine` is the paper's rule: sqrt(alpha_bar_t) nearest to the mean cosine similarity between z_hat and z0.
    Kind `snr` matches second moments: 1 - alpha_bar_t nearest to the share of residual in the decoder's input.

    Attributes:
        values: what was measured, by rate id: mean cosine, or share of residual variance.
        kind: "cosine" or "snr".
    """

    values: Mapping[int, float]
    kind: str = "cosine"

    @classmethod
    def options(cls) -> tuple[str, ...]:
        return (*super().options(), "calibration")

    def to_config(self) -> dict:
        return {**super().to_config(), "values": _by_key(self.values)}

    @classmethod
    def from_config(cls, config: Mapping) -> CalibratedMapping:
        kind = config["kind"]
        if config.get("values") is None:
            raise ValueError(
                f"timesteps.calibration is unset, but kind {kind} is measured; "
                "allowed: a calibration.json of oscar calibrate-timesteps"
            )
        timesteps = _table(config.get("timesteps"))
        values = _table(config["values"], float, "values", "cosine or variance")
        if timesteps.keys() != values.keys():
            raise ValueError("timesteps.values and timesteps.timesteps name different rates; allowed: the same")
        return cls(timesteps, values, kind)


@MAPPINGS.register("learned")
@dataclass(frozen=True)
class LearnedMapping(TableMapping):
    """One fractional pseudo-timestep per rate, which stage `joint` trains (`oscar.training.timesteps`).

    Attributes:
        timesteps: where training starts or has arrived, by rate id.
    """

    timesteps: Mapping[int, float]
    kind = "learned"

    @classmethod
    def from_config(cls, config: Mapping) -> LearnedMapping:
        return cls(_table(config.get("timesteps", "paper"), float))


@MAPPINGS.register("shuffled")
@dataclass(frozen=True)
class ShuffledMapping(TableMapping):
    """A table whose timesteps have changed places, as a control: right values at wrong rates.

    Attributes:
        timesteps: the table before.
        seed: of the permutation, which is the same on every machine.
    """

    seed: int = 0
    kind = "shuffled"

    def __call__(self, rate: RatePoint) -> int:
        super().__call__(rate)  # refuses a rate that the table lacks
        order = sorted(self.timesteps, key=lambda key: hashlib.sha256(f"{self.seed}:{key}".encode()).digest())
        return self.timesteps[order[sorted(self.timesteps).index(rate.id)]]

    def to_config(self) -> dict:
        return {**super().to_config(), "seed": self.seed}

    @classmethod
    def from_config(cls, config: Mapping) -> ShuffledMapping:
        return cls(_table(config.get("timesteps", "paper")), _number(config.get("seed", 0), int, "seed"))


@MAPPINGS.register("log")
@MAPPINGS.register("linear")
@dataclass(frozen=True)
class RampMapping(TimestepMapping):
    """A straight line over bits per pixel (kind `linear`) or their logarithm (kind `log`), rounded.

    Attributes:
        first: pseudo-timestep at the paper's lowest rate, 0.0019 bpp.
        last: pseudo-timestep at its highest, 0.125 bpp.
        kind: "linear" or "log".
    """

    first: int
    last: int
    kind: str

    def __call__(self, rate: RatePoint) -> int:
        scale = math.log if self.kind == "log" else float
        bpp = _rate(rate, self.kind).bpp
        low, high, here = (scale(value) for value in (PAPER_RATES[0].bpp, PAPER_RATES[-1].bpp, bpp))
        return round(self.first + (self.last - self.first) * (here - low) / (high - low))

    @classmethod
    def from_config(cls, config: Mapping) -> RampMapping:
        ends = (PAPER_RATES[0].timestep, PAPER_RATES[-1].timestep)
        first, last = (
            _number(config.get(name, end), int, name) for name, end in zip(("first", "last"), ends, strict=True)
        )
        return cls(first, last, config["kind"])


@MAPPINGS.register("constant")
@dataclass(frozen=True)
class ConstantMapping(TimestepMapping):
    """The same pseudo-timestep at every rate.

    Attributes:
        timestep: that one.
    """

    timestep: int
    kind = "constant"

    def __call__(self, rate: Any) -> int:
        return self.timestep

    @classmethod
    def from_config(cls, config: Mapping) -> ConstantMapping:
        return cls(_number(config.get("timestep"), int, "timestep"))


@MAPPINGS.register("per_image")
@dataclass(frozen=True)
class PerImageMapping(TimestepMapping):
    """Each image's own pseudo-timestep, from the cosine similarity of its z_hat and z0; one byte of its file."""

    kind = "per_image"
    per_image = True

    def __call__(self, rate: RatePoint) -> int:
        raise ValueError("timesteps: kind per_image has a timestep for each image, not for each rate")

    def check(self, rates: Iterable[Any], schedule_length: int) -> None:
        """Every rate and every schedule will do."""


@MAPPINGS.register("curve")
@dataclass(frozen=True)
class CurveMapping(TimestepMapping):
    """The pseudo-timestep of a quality from 0 to 1, for models without rates: a line through evenly spaced knots.

    Attributes:
        timesteps: at the knots, of the qualities i / (n - 1).
        values: mean cosine similarity between z_hat and z0 that was measured there (`sqrt(alpha_bar_t)` is nearest to
            it), None if the curve is not measured.
    """

    timesteps: tuple[float, ...]
    values: tuple[float, ...] | None = None
    kind = "curve"

    @classmethod
    def straight(cls) -> CurveMapping:
        """From the paper's timestep at its lowest rate to little noise; to start with."""
        return cls((500.0, 20.0))

    def __call__(self, rate: Any) -> float:
        """The pseudo-timestep of a quality."""
        if isinstance(rate, RatePoint):
            raise ValueError("timesteps: kind curve is for models with a hyperprior, whose qualities go from 0 to 1")
        if not 0 <= rate.value <= 1:
            raise ValueError(f"timesteps: kind curve is for points from 0 to 1, and this model has {rate.value:g}")
        return self.at(rate.value)

    def at(self, quality: float) -> float:
        """The pseudo-timestep of a quality from 0 to 1."""
        place = quality * (len(self.timesteps) - 1)
        below = min(int(place), len(self.timesteps) - 2)
        low, high = self.timesteps[below : below + 2]
        return low + (high - low) * (place - below)

    def check(self, rates: Iterable[Any], schedule_length: int) -> None:
        for timestep in self.timesteps:
            if not 0 <= timestep <= schedule_length - 1:
                raise ValueError(f"timesteps: {timestep} is outside the schedule; allowed: 0 to {schedule_length - 1}")
        for rate in rates:
            self(rate)

    def to_config(self) -> dict:
        values = {} if self.values is None else {"values": list(self.values)}
        return {"kind": self.kind, "timesteps": list(self.timesteps), **values}

    @classmethod
    def from_config(cls, config: Mapping) -> CurveMapping:
        timesteps = _sequence(config.get("timesteps", cls.straight().timesteps), "timesteps")
        values = None if config.get("values") is None else _sequence(config["values"], "values")
        if len(timesteps) < 2 or values is not None and len(values) != len(timesteps):
            raise ValueError(f"timesteps.timesteps has {len(timesteps)} knots; allowed: 2 or more, as many as values")
        return cls(timesteps, values)


def mapping_from_config(config: Mapping, rates: Iterable[RatePoint] = ()) -> TimestepMapping:
    """The mapping that a config or a checkpoint describes by `kind` and the fields of this kind.

    Args:
        config: of the mapping.
        rates: for which the paper's table is completed, where `config` asks for it: those that are not in it lie
            between its, see `interpolate`.

    Raises:
        ValueError: if the kind or a field is unknown, or a value malformed.
    """
    kind = config.get("kind")
    mapping = MAPPINGS.find(kind)
    options = ("kind", *mapping.options())
    for name in config:
        if name not in options:
            raise ValueError(f"timesteps.{name} is unknown to kind {kind}; allowed: {', '.join(options)}")
    if kind in ("table", "shuffled") and config.get("timesteps", "paper") == "paper":
        paper = TableMapping.paper()
        others = [rate for rate in rates if rate.id not in paper.timesteps]
        config = {**config, "timesteps": interpolate(paper, PAPER_RATES, others).timesteps}
    try:
        return mapping.from_config(config)
    except TypeError as error:  # a field that is missing
        raise ValueError(f"timesteps: kind {kind}: {error}") from None


def read_calibration(config: Mapping) -> dict:
    """A config whose `calibration` names a file, with what that file holds in its place; others as they are.

    Args:
        config: with kind `cosine` or `snr` and the path of a calibration.json (oscar calibrate-timesteps).

    Raises:
        ValueError: naming the file, if it is none.
    """
    if config.get("calibration") is None:
        return dict(config)
    path = Path(config["calibration"])
    try:
        return dict(json.loads(path.read_text())["mappings"][config["kind"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"timesteps.calibration is {str(path)!r}, which cannot be read ({reason}); "
            "allowed: a calibration.json of oscar calibrate-timesteps"
        ) from None


def interpolate(mapping: TimestepMapping, known: Iterable[RatePoint], rates: Iterable[RatePoint]) -> TableMapping:
    """A mapping for further rates: a straight line over log(bpp) between the two known rates around each.

    Args:
        mapping: of the known rates.
        known: one or more; beyond the lowest and the highest their timestep holds.
        rates: to be added.

    Returns:
        A table of all of them, its timesteps whole unless `mapping` has others (kind learned).
    """
    steps = {rate: mapping(rate) for rate in sorted(known, key=lambda rate: rate.bpp)}
    places = [math.log(rate.bpp) for rate in steps]
    values = list(steps.values())
    whole = all(isinstance(value, int) for value in values)
    table: dict[int, Any] = {rate.id: value for rate, value in steps.items()}
    for rate in rates:
        place = math.log(rate.bpp)
        above = bisect.bisect_left(places, place)
        if above in (0, len(places)):
            value = values[min(above, len(places) - 1)]
        else:
            share = (place - places[above - 1]) / (places[above] - places[above - 1])
            value = values[above - 1] + share * (values[above] - values[above - 1])
        table[rate.id] = round(value) if whole else value
    return (TableMapping if whole else LearnedMapping)(table)


# The one byte of a file. Integers alone, or integer tensors, so that every machine gets the same timestep.


def timestep_code(timestep: Any, schedule_length: int) -> Any:
    """The code, 0 to 255, whose timestep is nearest; of an int or an array or tensor of them."""
    last = max(schedule_length - 1, 1)
    return ((CODES - 1) * timestep + last // 2) // last


def timestep_of_code(code: Any, schedule_length: int) -> Any:
    """The timestep of a code, or of an array or tensor of them: 256 steps, evenly over the schedule."""
    return (code * (schedule_length - 1) + (CODES - 1) // 2) // (CODES - 1)


# Parsing.


def _rate(point: Any, kind: str) -> RatePoint:
    if not isinstance(point, RatePoint):
        raise ValueError(
            f"timesteps: kind {kind} is for models with rates; allowed for others: constant, or a kind of their own"
        )
    return point


def _fields(kind: type) -> tuple[Field, ...]:
    return fields(cast(Any, kind))  # every kind is a dataclass


def _by_key(table: Mapping[int, float]) -> dict[str, float]:
    return {str(key): value for key, value in sorted(table.items())}


def _table(table: Any, number: type = int, field: str = "timesteps", what: str = "timestep") -> dict:
    """Numbers by rate id, from "paper" or a dict."""
    if table == "paper" and field == "timesteps":
        return {rate.id: number(rate.timestep) for rate in PAPER_RATES if rate.timestep is not None}
    try:
        return {rate_by_id(int(key)).id: _number(value, number, field) for key, value in table.items()}
    except (AttributeError, TypeError, ValueError) as error:
        paper = "'paper' or " if field == "timesteps" else ""
        raise ValueError(f"timesteps.{field} must be {paper}a table rate id: {what} ({error})") from None


def _sequence(values: object, field: str) -> tuple[float, ...]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"timesteps.{field} is {values!r}; allowed: a list of numbers")
    return tuple(_number(value, float, field) for value in values)


def _number(value: Any, number: type, field: str) -> Any:
    """A number that is finite and, if it is to be an int, whole."""
    whole = number is int
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or (whole and value != int(value))
    ):
        raise ValueError(f"timesteps.{field} is {value!r}; allowed: {'whole numbers' if whole else 'numbers'}")
    return number(value)
