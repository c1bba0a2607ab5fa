"""A latent coded with a mean-scale hyperprior and context from channels and a checkerboard, all in integers.

Side information z is coded first, channel by channel with fixed tables. Two convolutions turn it into features. Then
the latent's channels are coded group by group, and each group in two passes over the grid: first the positions whose
row and column have an even sum, the anchors, then the others. For a pass a small network, which sees the features and
all that is known so far, tells the mean and the scale of each symbol; a table holds the frequencies of each scale.
Sources: Minnen et al., NeurIPS 2018 (means and scales), Minnen and Singh, ICIP 2020 (channels), He et al., CVPR 2021
(checkerboard).

All numbers on the way are integers, in units that `oscar.bitstream.hyperprior_weights` names. This module knows no
torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from oscar.bitstream.container import MAX_QUALITY
from oscar.bitstream.errors import PayloadError
from oscar.bitstream.hyperprior_weights import (
    ACTIVATION_STEPS,
    KNOTS,
    LIMITS,
    REACH,
    SCALES,
    WEIGHT_STEPS,
    HyperpriorWeights,
)
from oscar.bitstream.rans import (
    PRECISION,
    PrefixDecoder,
    check_payload,
    decoder,
    encode_symbols,
    longest_payload,
    whole_words,
)

_ROWS = 1024  # positions that are computed at once; bounds the memory
_POSITIONS_PER_BYTE = 64  # at most, so that a short file is decoded soon

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


class HyperpriorCoder(HyperpriorWeights):
    """Codes latents by an integer model."""

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
                    found * ACTIVATION_STEPS + means, LIMITS.min, LIMITS.max
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
            outputs[part] = _activate(hidden @ own[f"last.{group}"] + self.last_bias[group], LIMITS.min)
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
    return np.clip(np.floor((sums + WEIGHT_STEPS // 2) / WEIGHT_STEPS), lowest, LIMITS.max)


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
