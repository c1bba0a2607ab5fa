"""The numbers of the integer model for a latent under a hyperprior (`oscar.bitstream.hyperprior`), checked.

Activations, means and decoded values are in units of 2**-6, weights of 2**-10, sums and biases of 2**-16. Products are
summed in float64, in which sums of integers below 2**53 are exact in whatever order a library takes them. So all
machines, thread counts and batch sizes find the same tables and means. This module knows no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from oscar.bitstream.integers import digest_arrays
from oscar.bitstream.rans import FEWEST_SYMBOLS, PRECISION

if TYPE_CHECKING:
    from typing_extensions import Self

ACTIVATION_STEPS = 2**6  # that make 1
WEIGHT_STEPS = 2**10
KNOTS = 8  # of the quality; what depends on it is linear between them
SCALES = 64
LARGEST_SIDE, LARGEST_SYMBOL = 127, 384  # values of z, and of the latent less its mean
REACH = 2  # of the convolutions over what is known; those over z reach half as far
LIMITS = np.iinfo(np.int16)  # of activations
_EXACT = 2**53

_BY_GROUP = ("known", "side", "first_bias", "middle", "middle_bias", "last", "last_bias")


@dataclass(frozen=True, eq=False)
class HyperpriorWeights:
    """An integer model for latents of C channels with Z channels of side information.

    A quality is a code from 0 to 4095; what has a dimension of 8 is linear between the qualities i / 7.

    Attributes:
        groups: channels of each group, (G,).
        side_frequencies: of z, (Z, 2 * R + 1), centred at 0, of 65536; zero outside of a channel's range.
        scale_frequencies: of symbols, (64, 2 * M + 1), likewise.
        up1, up1_bias: first layer over z, (4 * S, Z, 3, 3) and (8, 4 * S); then pixels are shuffled.
        up2, up2_bias: second layer, (4 * P, S, 3, 3) and (4 * P,), likewise.
        known: first layer over what is known, by group (H, C_0 + .. + C_g, 5, 5).
        side, first_bias: over the P features, by group (H, P), and its bias, (2, 8, H) by pass.
        middle, middle_bias: second layer, by group (H, H) and (H,).
        last, last_bias: third layer, by group (2 * C_g, H) and (2 * C_g,): means, then scales.

    Raises:
        ValueError: if shapes do not go together, frequencies are no table, or weights leave int16, biases int32, or
            sums the range in which they are exact.
    """

    groups: np.ndarray
    side_frequencies: np.ndarray
    scale_frequencies: np.ndarray
    up1: np.ndarray
    up1_bias: np.ndarray
    up2: np.ndarray
    up2_bias: np.ndarray
    known: tuple[np.ndarray, ...]
    side: tuple[np.ndarray, ...]
    first_bias: tuple[np.ndarray, ...]
    middle: tuple[np.ndarray, ...]
    middle_bias: tuple[np.ndarray, ...]
    last: tuple[np.ndarray, ...]
    last_bias: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        for name in _BY_GROUP:
            if len(getattr(self, name)) != self.groups.size:
                raise ValueError(f"{name} has {len(getattr(self, name))} groups; allowed: {self.groups.size}")
        for name, value in self.arrays().items():
            if value.dtype.kind not in "iu" or value.size == 0:
                raise ValueError(
                    f"{name} of type {value.dtype} and shape {value.shape} is not allowed; allowed: integers"
                )
        if self.groups.ndim != 1 or self.groups.min() < 1:
            raise ValueError(f"groups {self.groups.tolist()} is not allowed; allowed: channels of each, from 1")
        self._check_shapes()
        _check_frequencies("side_frequencies", self.side_frequencies, LARGEST_SIDE)
        _check_frequencies("scale_frequencies", self.scale_frequencies, LARGEST_SYMBOL)
        if self.channels + self.side_channels < FEWEST_SYMBOLS:
            raise ValueError(
                f"{self.channels} channels and {self.side_channels} of z are not allowed; "
                f"allowed: {FEWEST_SYMBOLS} in all"
            )
        self._check_sums()

    def _check_shapes(self) -> None:
        if self.up1.ndim != 4 or self.up2.ndim != 4 or len(self.up1) % 4 or len(self.up2) % 4:
            raise ValueError(
                f"up1 and up2 have shapes {self.up1.shape} and {self.up2.shape}; "
                "allowed: (4 S, Z, 3, 3) and (4 P, S, 3, 3)"
            )
        (inner, side_channels), outer, kernel = self.up1.shape[:2], len(self.up2), 2 * REACH + 1
        expected = {
            "side_frequencies": (side_channels, *self.side_frequencies.shape[-1:]),
            "scale_frequencies": (SCALES, *self.scale_frequencies.shape[-1:]),
            "up1": (inner, side_channels, 3, 3),
            "up1_bias": (KNOTS, inner),
            "up2": (outer, inner // 4, 3, 3),
            "up2_bias": (outer,),
        }
        for group, own in enumerate(self.groups.tolist()):
            hidden, channels = self.middle_bias[group].size, int(self.groups[: group + 1].sum())
            expected |= {
                f"known.{group}": (hidden, channels, kernel, kernel),
                f"side.{group}": (hidden, outer // 4),
                f"first_bias.{group}": (2, KNOTS, hidden),
                f"middle.{group}": (hidden, hidden),
                f"middle_bias.{group}": (hidden,),
                f"last.{group}": (2 * own, hidden),
                f"last_bias.{group}": (2 * own,),
            }
        arrays = self.arrays()
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}; allowed: {shape}")

    def _check_sums(self) -> None:
        for name, value in self.arrays().items():
            if name.endswith("frequencies") or name == "groups":
                continue
            kind = np.iinfo(np.int32 if "bias" in name else np.int16)
            if value.min() < kind.min or value.max() > kind.max:
                raise ValueError(
                    f"{name} from {value.min()} to {value.max()} is not allowed; allowed: {kind.min} to {kind.max}"
                )
        layers = {"up1": (self.up1,), "up2": (self.up2,)}
        for group, weights in enumerate(zip(self.known, self.side, self.middle, self.last, strict=True)):
            layers |= {f"known.{group}": weights[:2], f"middle.{group}": weights[2:3], f"last.{group}": weights[3:]}
        for name, weights in layers.items():
            rows = sum(np.abs(part.reshape(len(part), -1).astype(np.int64)).sum(axis=1) for part in weights)
            sums = int(rows.max()) * -LIMITS.min - np.iinfo(np.int32).min + WEIGHT_STEPS
            if sums >= _EXACT:
                raise ValueError(f"{name}: sums reach {sums}; allowed: below 2**53, where float64 is exact")

    @property
    def channels(self) -> int:
        return int(self.groups.sum())

    @property
    def side_channels(self) -> int:
        return len(self.side_frequencies)

    def arrays(self) -> dict[str, np.ndarray]:
        """What it consists of, by name, with that of group g as `name.g`; `from_arrays` is the inverse."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _BY_GROUP}
        for name in _BY_GROUP:
            found |= {f"{name}.{group}": value for group, value in enumerate(getattr(self, name))}
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The model that consists of these arrays.

        Raises:
            ValueError: if there are others than it has, or as for the class.
        """
        numbers = range(np.size(arrays.get("groups", ())))
        by_group = {name: [f"{name}.{group}" for group in numbers] for name in _BY_GROUP}
        single = {field.name for field in fields(cls)} - set(_BY_GROUP)
        wrong = single.union(*by_group.values()) ^ set(arrays)
        if wrong:
            raise ValueError(f"hyperprior coder: missing or unknown arrays {', '.join(sorted(wrong))}")
        values = {name: tuple(arrays[each] for each in names) for name, names in by_group.items()}
        return cls(**values, **{name: arrays[name] for name in single})

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that decoding depends on."""
        return digest_arrays(self.arrays())


def _check_frequencies(name: str, tables: np.ndarray, limit: int) -> None:
    width = tables.shape[1]
    if width % 2 == 0 or width > 2 * limit + 1:
        raise ValueError(f"{name} has {width} symbols; allowed: odd numbers up to {2 * limit + 1}")
    for row, frequencies in enumerate(tables.astype(np.int64)):
        used = np.flatnonzero(frequencies)
        # CompressAI keeps a frequency in 16 bits, so that one of 2**16 would be none.
        if (
            frequencies.min() < 0
            or frequencies.sum() != 2**PRECISION
            or frequencies.max() == 2**PRECISION
            or not frequencies[used[0] : used[-1] + 1].all()
            or frequencies[width // 2] == 0
        ):
            raise ValueError(
                f"{name}: row {row} is no table; allowed: two symbols or more side by side, 0 among them, of "
                f"frequencies that sum to {2**PRECISION}"
            )
