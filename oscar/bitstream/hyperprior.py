"""A latent coded with a mean-scale hyperprior and context from channels and a checkerboard, all in integers.

Side information z is coded first, channel by channel with fixed tables. Two convolutions turn it into features. Then
the latent's channels are coded group by group, and each group in two passes over the grid: first the positions whose
row and column have an even sum, the anchors, then the others. For a pass a small network, which sees the features and
all that is known so far, tells the mean and the scale of each symbol; a table holds the frequencies of each scale.
Sources: Minnen et al., NeurIPS 2018 (means and scales), Minnen and Singh, ICIP 2020 (channels), He et al., CVPR 2021
(checkerboard).

Activations, means and decoded values are in units of 2**-6, weights of 2**-10, sums and biases of 2**-16. Products are
summed in float64, in which sums of integers below 2**53 are exact in whatever order a library takes them;
`HyperpriorCoder` refuses weights that could leave this range. So all machines, thread counts and batch sizes find the
same tables and means. This module knows no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from oscar.bitstream.container import MAX_QUALITY
from oscar.bitstream.errors import PayloadError
from oscar.bitstream.integers import digest_arrays
from oscar.bitstream.rans import (
    FEWEST_SYMBOLS,
    PRECISION,
    PrefixDecoder,
    check_payload,
    decoder,
    encode_symbols,
    longest_payload,
    whole_words,
)

ACTIVATION_STEPS = 2**6  # that make 1
WEIGHT_STEPS = 2**10
KNOTS = 8  # of the quality; what depends on it is linear between them
SCALES = 64
LARGEST_SIDE, LARGEST_SYMBOL = 127, 384  # values of z, and of the latent less its mean
REACH = 2  # of the convolutions over what is known; those over z reach half as far
_LIMITS = np.iinfo(np.int16)  # of activations
_EXACT = 2**53
_ROWS = 1024  # positions that are computed at once; bounds the memory
_POSITIONS_PER_BYTE = 64  # at most, so that a short file is decoded soon

_BY_GROUP = ("known", "side", "first_bias", "middle", "middle_bias", "last", "last_bias")

Symbols = Callable[[np.ndarray, slice, np.ndarray, np.ndarray], np.ndarray]
Coded = list[tuple[np.ndarray, np.ndarray]]  # table and symbol of z, then of each pass, in the order of coding


def side_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of z for those of the latent: a quarter, rounded up."""
    rows, columns = shape
    return -(-rows // 4), -(-columns // 4)


class _Field:
    """A grid of vectors with a margin of zeros, (rows, columns, channels), flat.

    Attributes:
        values: with the margin, (places, channels) float64.
        places: in `values`, of the grid's positions in rows.
    """

    def __init__(self, rows: int, columns: int, channels: int, reach: int):
        width = columns + 2 * reach
        self.values = np.zeros(((rows + 2 * reach) * width, channels))
        self.places = ((np.arange(rows)[:, None] + reach) * width + np.arange(columns) + reach).reshape(-1)
        window = np.arange(-reach, reach + 1)
        self.offsets = (window[:, None] * width + window).reshape(-1)

    def patches(self, positions: np.ndarray | slice, channels: int) -> np.ndarray:
        """The first `channels` around positions (n,), (n, (2 * reach + 1)**2 * channels)."""
        around = self.places[positions][:, None] + self.offsets
        return self.values[:, :channels][around].reshape(len(around), -1)


class _Tables(NamedTuple):
    """Of z's channels, then of the scales, T in all.

    Attributes:
        cdfs, sizes, lowest: as CompressAI takes them; the escape has no width.
        low, high: range of each one's symbols, (T,).
        bits: of each one's symbols from `-centre` on, (T, 2 * centre + 1).
    """

    cdfs: list[list[int]]
    sizes: list[int]
    lowest: list[int]
    low: np.ndarray
    high: np.ndarray
    bits: np.ndarray
    centre: int


@dataclass(frozen=True, eq=False)
class HyperpriorCoder:
    """Codes latents of C channels with Z channels of side information; all its numbers are integers.

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
            sums = int(rows.max()) * -_LIMITS.min - np.iinfo(np.int32).min + WEIGHT_STEPS
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
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> HyperpriorCoder:
        """The coder that consists of these arrays.

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

    def encode(self, y: np.ndarray, z: np.ndarray, code: int) -> tuple[bytes, np.ndarray]:
        """Code a latent.

        Args:
            y: (C, h, w) numbers, in steps of the symbols.
            z: (Z, hz, wz) integers, with `side_shape`'s rows and columns; clipped to their tables' ranges.
            code: the quality.

        Returns:
            The payload, and what the decoder makes of it: (C, h, w) int32 in units of 2**-6.

        Raises:
            ValueError: if shapes, types or values are not as above.
        """
        coded, y_hat = self.choose(y, z, code)
        return self.write(coded, y.shape[1:]), y_hat

    def decode(self, payload: bytes, shape: tuple[int, int], code: int) -> np.ndarray:
        """Recover what `encode` returned with the payload.

        Only payloads that `encode` can have written are accepted, whatever the bytes: when its symbols are encoded
        anew, the payload must come out again. Time and memory grow with `shape`, and a large one takes a long payload.

        Args:
            payload: the coded latent.
            shape: rows and columns of the latent.
            code: the quality.

        Returns:
            (C, h, w) int32 in units of 2**-6.

        Raises:
            PayloadError: if the payload does not decode to such a latent.
            ValueError: if the shape or the code is not allowed.
        """
        return self.read(payload, shape, code)[1]

    def decode_prefix(self, prefix: bytes, shape: tuple[int, int], code: int) -> tuple[np.ndarray, float]:
        """What the first bytes of a payload tell: z, the first groups of channels, and guesses of the others.

        Args:
            prefix: of the payload, of any length.
            shape, code: as `decode`.

        Returns:
            (C, h, w) int32 in units of 2**-6, and the share of the symbols that was read.
        """
        self._check_request(shape, code)
        stream = PrefixDecoder(prefix)
        _, y_hat = self._follow(stream, shape, code)
        return y_hat, stream.known / stream.asked

    def payload_bits(self, payload: bytes, shape: tuple[int, int], code: int) -> float:
        """Bits that rANS needs for what a payload holds, without its final state of 32 to 64 bits; see `decode`."""
        return sum(self.bits(self.read(payload, shape, code)[0]))

    def read(self, payload: bytes, shape: tuple[int, int], code: int) -> tuple[Coded, np.ndarray]:
        """The symbols of a payload with their tables, and what `decode` makes of them; see there."""
        self._check_request(shape, code)
        side_rows, side_columns = side_shape(shape)
        count = side_rows * side_columns * self.side_channels + shape[0] * shape[1] * self.channels
        check_payload(payload, _shortest(shape), longest_payload(count) + 1, f"{shape[0]}x{shape[1]} positions")
        coded, y_hat = self._follow(decoder(payload, count), shape, code)
        if self.write(coded, shape) != payload:
            raise PayloadError(f"payload of {len(payload)} bytes is not a coding of {shape[0]}x{shape[1]} positions")
        return coded, y_hat

    def _follow(self, stream, shape: tuple[int, int], code: int) -> tuple[Coded, np.ndarray]:
        """What a decoder's symbols lead to, and these symbols with their tables, as they are coded."""
        own, coded = self._tables, []

        def read(tables: np.ndarray) -> np.ndarray:
            found = stream.decode_stream(tables.reshape(-1).tolist(), own.cdfs, own.sizes, own.lowest)
            coded.append((tables, np.array(found, dtype=np.int64).reshape(tables.shape)))
            return coded[-1][1]

        z = read(self._side_tables(shape))
        return coded, self._walk(z, shape, code, lambda positions, channels, means, tables: read(tables))

    def bits_by_part(self, y: np.ndarray, z: np.ndarray, code: int) -> tuple[float, float]:
        """Bits that rANS needs for z and for y, without its final state of 32 to 64 bits; arguments as `encode`."""
        side, *values = self.bits(self.choose(y, z, code)[0])
        return side, sum(values)

    def estimated_bits(self, y: np.ndarray, z: np.ndarray, code: int) -> float:
        """Bits that rANS needs for both, without its final state of 32 to 64 bits; arguments as `encode`."""
        return sum(self.bits_by_part(y, z, code))

    def bits(self, coded: Coded) -> list[float]:
        """Bits that rANS needs for z, then for each pass, without its final state of 32 to 64 bits."""
        own = self._tables
        return [float(own.bits[tables, symbols + own.centre].sum()) for tables, symbols in coded]

    def choose(self, y: np.ndarray, z: np.ndarray, code: int) -> tuple[Coded, np.ndarray]:
        """The symbols nearest to a latent with their tables, and what the decoder makes of them; see `encode`."""
        if y.ndim != 3 or len(y) != self.channels or y.dtype.kind != "f" or not np.isfinite(y).all():
            raise ValueError(
                f"y of type {y.dtype} and shape {y.shape} is not allowed; "
                f"allowed: finite numbers of shape ({self.channels}, h, w)"
            )
        shape = y.shape[1:]
        self._check_request(shape, code)
        if z.shape != (self.side_channels, *side_shape(shape)) or z.dtype.kind not in "iu":
            raise ValueError(
                f"z of type {z.dtype} and shape {z.shape} is not allowed; "
                f"allowed: integers of shape {(self.side_channels, *side_shape(shape))}"
            )
        coded, own, wanted = [], self._tables, y.reshape(self.channels, -1).T.astype(np.float64)

        def choose(nearest: np.ndarray, tables: np.ndarray) -> np.ndarray:
            coded.append((tables, np.clip(nearest, own.low[tables], own.high[tables]).astype(np.int64)))
            return coded[-1][1]

        def choose_for(positions: np.ndarray, channels: slice, means: np.ndarray, tables: np.ndarray) -> np.ndarray:
            return choose(np.rint(wanted[positions, channels] - means / ACTIVATION_STEPS), tables)

        z_rows = choose(z.reshape(self.side_channels, -1).T, self._side_tables(shape))
        return coded, self._walk(z_rows, shape, code, choose_for)

    def _walk(self, z: np.ndarray, shape: tuple[int, int], code: int, symbols: Symbols) -> np.ndarray:
        """Predict y pass by pass from what is known of it.

        Args:
            z: (hz * wz, Z) whole numbers.
            shape: rows and columns of y.
            code: the quality.
            symbols: gives the whole numbers (n, c) of a pass by its positions (n,), flat, its channels, and their
                means and tables, (n, c) each.

        Returns:
            (C, h, w) int32 in units of 2**-6.
        """
        features = self._features(z, shape, code)
        y_hat = _Field(*shape, self.channels, REACH)
        rows, columns = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
        passes = [np.flatnonzero((rows + columns) % 2 == number) for number in (0, 1)]
        stop = 0
        for group, size in enumerate(self.groups.tolist()):
            channels, stop = slice(stop, stop + size), stop + size
            for number, positions in enumerate(passes):
                # The first pass sees other groups only, so what it does not know of its own is not even looked at.
                seen = (channels.start, channels.stop)[number]
                first_bias = _at_quality(self.first_bias[group][number], code)
                means, tables = self._predict(group, first_bias, y_hat, seen, features, positions)
                found = symbols(positions, channels, means, tables)
                y_hat.values[y_hat.places[positions], channels] = np.clip(
                    found * ACTIVATION_STEPS + means, _LIMITS.min, _LIMITS.max
                )
        return y_hat.values[y_hat.places].T.reshape(self.channels, *shape).astype(np.int32)

    def _features(self, z: np.ndarray, shape: tuple[int, int], code: int) -> np.ndarray:
        """What z (hz * wz, Z) says of each position: (h * w, P)."""
        rows, columns = side_shape(shape)
        grid = (z * ACTIVATION_STEPS).reshape(rows, columns, -1)
        grid = _upsample(grid, self._weights["up1"], _at_quality(self.up1_bias, code))
        grid = _upsample(grid, self._weights["up2"], self.up2_bias)
        return grid[: shape[0], : shape[1]].reshape(shape[0] * shape[1], -1)

    def _predict(
        self,
        group: int,
        first_bias: np.ndarray,
        y_hat: _Field,
        seen: int,
        features: np.ndarray,
        positions: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Means and tables (n, c) of a group's pass at positions (n,), from the first `seen` channels around them."""
        own = self._weights
        known = own[f"known.{group}"][:, :seen].reshape(-1, len(first_bias))
        outputs = np.empty((len(positions), len(self.last[group])), dtype=np.int64)
        for part in _parts(len(positions)):
            sums = y_hat.patches(positions[part], seen) @ known
            sums += features[positions[part]] @ own[f"side.{group}"] + first_bias
            hidden = _activate(sums, 0)
            hidden = _activate(hidden @ own[f"middle.{group}"] + self.middle_bias[group], 0)
            outputs[part] = _activate(hidden @ own[f"last.{group}"] + self.last_bias[group], _LIMITS.min)
        means, scales = np.split(outputs, 2, axis=1)
        levels = np.clip((scales + ACTIVATION_STEPS // 2) // ACTIVATION_STEPS, 0, SCALES - 1)
        return means, self.side_channels + levels

    def write(self, coded: Coded, shape: tuple[int, int]) -> bytes:
        """The payload of symbols that `choose` or `read` gave for a latent of this shape."""
        own = self._tables
        parts = ((symbols.reshape(-1).tolist(), tables.reshape(-1).tolist()) for tables, symbols in coded)
        return encode_symbols(parts, own.cdfs, own.sizes, own.lowest).ljust(_shortest(shape), b"\0")

    def _side_tables(self, shape: tuple[int, int]) -> np.ndarray:
        """The table of each value of z, (hz * wz, Z)."""
        rows, columns = side_shape(shape)
        return np.tile(np.arange(self.side_channels), (rows * columns, 1))

    def _check_request(self, shape: tuple[int, int], code: int) -> None:
        if min(shape) < 1:
            raise ValueError(f"shape {shape[0]}x{shape[1]} is not allowed; allowed: from 1x1")
        if not 0 <= code <= MAX_QUALITY:
            raise ValueError(f"code {code} is not allowed; allowed: 0 to {MAX_QUALITY}")

    @functools.cached_property
    def _weights(self) -> Mapping[str, np.ndarray]:
        """Weights for products with rows from the left, float64; of `known`, (25, channels, H)."""
        found = {
            "up1": _matrix(self.up1).reshape(-1, len(self.up1)),
            "up2": _matrix(self.up2).reshape(-1, len(self.up2)),
        }
        for group, known in enumerate(self.known):
            found[f"known.{group}"] = _matrix(known)
            for name in ("side", "middle", "last"):
                found[f"{name}.{group}"] = getattr(self, name)[group].T.astype(np.float64)
        return found

    @functools.cached_property
    def _tables(self) -> _Tables:
        cdfs, low, high = [], [], []
        centre = max(self.side_frequencies.shape[1], self.scale_frequencies.shape[1]) // 2
        bits = np.full((self.side_channels + SCALES, 2 * centre + 1), np.inf)
        for row, frequencies in enumerate([*self.side_frequencies, *self.scale_frequencies]):
            used = np.flatnonzero(frequencies)
            low.append(int(used[0]) - len(frequencies) // 2)
            high.append(int(used[-1]) - len(frequencies) // 2)
            cdfs.append([0, *np.cumsum(frequencies[used]).tolist(), 2**PRECISION])
            bits[row, low[-1] + centre : high[-1] + centre + 1] = PRECISION - np.log2(frequencies[used])
        return _Tables(cdfs, [len(cdf) for cdf in cdfs], low, np.array(low), np.array(high), bits, centre)


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


def _shortest(shape: tuple[int, int]) -> int:
    """Bytes that a payload has at least: a multiple of 4."""
    return whole_words(shape[0] * shape[1] // _POSITIONS_PER_BYTE)


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(count, start + _ROWS))


def _matrix(weights: np.ndarray) -> np.ndarray:
    """Weights of a convolution, (outputs, inputs, k, k), as (k * k, inputs, outputs) float64."""
    outputs, inputs = weights.shape[:2]
    return np.ascontiguousarray(weights.transpose(2, 3, 1, 0), dtype=np.float64).reshape(-1, inputs, outputs)


def _activate(sums: np.ndarray, lowest: int) -> np.ndarray:
    return np.clip(np.floor((sums + WEIGHT_STEPS // 2) / WEIGHT_STEPS), lowest, _LIMITS.max)


def _at_quality(knots: np.ndarray, code: int) -> np.ndarray:
    """Biases (8, n) between the two knots next to a quality: (n,)."""
    knot, rest = divmod((KNOTS - 1) * code, MAX_QUALITY)
    low, high = knots[[knot, min(knot + 1, KNOTS - 1)]].astype(np.int64)
    return (low * (MAX_QUALITY - rest) + high * rest) // MAX_QUALITY


def _upsample(grid: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Convolve (rows, columns, channels) by 3x3, cut below zero, shuffle pixels: (2 rows, 2 columns, outputs / 4)."""
    rows, columns, channels = grid.shape
    field = _Field(rows, columns, channels, REACH // 2)
    field.values[field.places] = grid.reshape(-1, channels)
    outputs = np.empty((rows * columns, len(bias)))
    for part in _parts(len(outputs)):
        outputs[part] = _activate(field.patches(part, channels) @ weights + bias, 0)
    return outputs.reshape(rows, columns, -1, 2, 2).transpose(0, 3, 1, 4, 2).reshape(2 * rows, 2 * columns, -1)
