"""Indices predicted from neighbours that are coded before them, and coded with these predictions.

A grid is coded from coarse to fine: first every eighth row and column, then the lattice between them, halved in three
passes per step until all positions are there. The positions of one pass do not see each other; each sees the nearest
ones of earlier passes, which at the end lie on all sides. A small network turns their codes into features.

An index is the path to a leaf of a binary tree over the codes, whose every node decides by the product of its own
vector with the features. What a decision costs is looked up in a table of fixed probabilities.

Every number on the way is an integer. Products are summed in float32, in which sums of integers below 2**24 are exact
in whatever order a library takes them; `ContextModel` refuses weights that could leave this range. So all machines,
thread counts and batch sizes find the same probabilities. This module knows no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Context, Decimal
from typing import NamedTuple

import numpy as np

from oscar.bitstream.coding import Coding, packed_length
from oscar.bitstream.entropy import decode_indices, encode_indices, pack_indices
from oscar.bitstream.errors import PayloadError
from oscar.bitstream.integers import digest_arrays
from oscar.bitstream.rans import PRECISION, PrefixDecoder, check_payload, decoder, encode_symbols, whole_words

ACTIVATION_UNIT = 2**-4  # what 1 stands for in embeddings and activations
WEIGHT_UNIT = 2**-6  # and in weights; a sum of products, and a bias, is in units of 2**-10
SUM_UNIT = ACTIVATION_UNIT * WEIGHT_UNIT
ACTIVATION_LIMIT = 255
LEVEL_UNIT = 2**-3  # step of the log-odds in the table of probabilities
TOP_LEVEL = 80  # their largest is 10
WEIGHT_SETS = 6  # the three passes of the last step have their own, and those of the other steps share three
_EXACT = 2**24
_ROWS = 4096  # positions that are computed at once; bounds the memory
_COSTS = 2**22  # likewise, costs of codes at positions
_SMALLEST_SHARE = 64  # a payload is no shorter than the packed one by more, so that a short file is decoded soon


class Pass(NamedTuple):
    """Positions that are coded together: one of every `step` rows and columns.

    Attributes:
        row, column: of the first.
        step: between them.
        weights: which set of weights predicts them.
    """

    row: int
    column: int
    step: int
    weights: int


PASSES = (Pass(0, 0, 8, 3),) + tuple(
    Pass(row * step // 2, column * step // 2, step, which + (3 if step > 2 else 0))
    for step in (8, 4, 2)
    for which, (row, column) in enumerate(((0, 1), (1, 0), (1, 1)))
)


@functools.cache
def offsets(number: int, count: int) -> np.ndarray:
    """The `count` nearest positions of earlier passes, (count, 2) rows and columns from one of pass `number`."""
    this = PASSES[number]
    half, reach = this.step // 2, 6
    phases = [(0, 0), (0, half), (half, 0), (half, half)]
    known = set() if number == 0 else set(phases[: phases.index((this.row, this.column))])
    found = [
        (half * row, half * column)
        for row in range(-reach, reach + 1)
        for column in range(-reach, reach + 1)
        if ((this.row + half * row) % this.step, (this.column + half * column) % this.step) in known
    ]
    found.sort(key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset))
    return np.array(found[:count] or [(0, 0)] * count)  # of the first pass: itself, not yet known


class Field:
    """A grid of codes that fills up pass by pass, with a margin of missing ones around it.

    Args:
        rows, columns: of the grid.
        missing: the code that stands for one that is not known.
        neighbours: how many each position looks at.
    """

    def __init__(self, rows: int, columns: int, missing: int, neighbours: int):
        self.offsets = [offsets(number, neighbours) for number in range(len(PASSES))]
        self.margin = max(int(abs(found).max()) for found in self.offsets)
        self.rows, self.columns = rows, columns
        self.codes = np.full((rows + 2 * self.margin, columns + 2 * self.margin), missing, dtype=np.int32)

    def parts(self, limit: int = _ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """Pass by pass, its number and the places (n,) in `codes`, flat, of at most `limit` of its positions."""
        width = self.codes.shape[1]
        for number, this in enumerate(PASSES):
            rows = np.arange(this.row, self.rows, this.step) + self.margin
            columns = np.arange(this.column, self.columns, this.step) + self.margin
            places = (rows[:, None] * width + columns).reshape(-1)
            for start in range(0, len(places), limit):
                yield number, places[start : start + limit]

    def neighbours(self, number: int, places: np.ndarray) -> np.ndarray:
        """The codes around places of a pass, (n, neighbours)."""
        found = self.offsets[number]
        return self.codes.reshape(-1)[places[:, None] + (found[:, 0] * self.codes.shape[1] + found[:, 1])]

    def positions(self, places: np.ndarray) -> np.ndarray:
        """Where places are in the grid, flat."""
        row, column = np.divmod(places, self.codes.shape[1])
        return (row - self.margin) * self.columns + column - self.margin

    def put(self, places: np.ndarray, codes: np.ndarray) -> None:
        self.codes.reshape(-1)[places] = codes

    @property
    def grid(self) -> np.ndarray:
        """The codes, (rows, columns)."""
        return self.codes[self.margin : self.margin + self.rows, self.margin : self.margin + self.columns]


@dataclass(frozen=True, eq=False)
class ContextModel:
    """The predictor of one rate's K indices, all in integers.

    Attributes:
        leaf: leaf of each code, a permutation (K,).
        embedding: vector of each code and, last, of a missing one, (K + 1, E).
        hidden, hidden_bias: first layer, (6, N * E, H) by set of weights and (10, H) by pass.
        mixing, mixing_bias: second layer, (6, H, D) and (10, D).
        nodes, node_bias: the tree's nodes, level by level, (2**depth - 1, D) and (2**depth - 1,).

    Raises:
        ValueError: if shapes do not go together, or sums could leave the range in which they are exact.
    """

    leaf: np.ndarray
    embedding: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    mixing: np.ndarray
    mixing_bias: np.ndarray
    nodes: np.ndarray
    node_bias: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value.dtype.kind not in "iu" or value.size == 0:
                raise ValueError(
                    f"{field.name} of type {value.dtype} and shape {value.shape} is not allowed; allowed: integers"
                )
        codes, passes, nodes = self.codebook_size, len(PASSES), 2**self.depth - 1
        if self.embedding.ndim != 2 or self.hidden.ndim != 3 or self.mixing.ndim != 3 or self.depth == 0:
            raise ValueError("embedding, hidden or mixing has another number of dimensions, or there is one code only")
        width, features = self.mixing.shape[1:]
        inputs = self.embedding.shape[1] * max(1, self.neighbours)
        expected = {
            "leaf": (codes,),
            "embedding": (codes + 1, self.embedding.shape[1]),
            "hidden": (WEIGHT_SETS, inputs, width),
            "hidden_bias": (passes, width),
            "mixing": (WEIGHT_SETS, width, features),
            "mixing_bias": (passes, features),
            "nodes": (nodes, features),
            "node_bias": (nodes,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}; allowed: {shape}")
        if not np.array_equal(np.sort(self.leaf), np.arange(codes)):
            raise ValueError(f"leaf is no permutation of 0 to {codes - 1}")
        largest = int(np.abs(self.embedding.astype(np.int64)).max())
        for name, weights, bias, limit in (
            ("hidden", self.hidden, self.hidden_bias, largest),
            ("mixing", self.mixing, self.mixing_bias, ACTIVATION_LIMIT),
            ("nodes", self.nodes.T, self.node_bias, ACTIVATION_LIMIT),
        ):
            sums = np.abs(weights.astype(np.int64)).sum(axis=-2).max() * limit + np.abs(bias.astype(np.int64)).max()
            if sums >= _EXACT:
                raise ValueError(f"{name}: sums reach {sums}; allowed: below 2**24, where float32 is exact")

    @property
    def codebook_size(self) -> int:
        return len(self.leaf)

    @property
    def depth(self) -> int:
        """Decisions per index."""
        return (self.codebook_size - 1).bit_length()

    @property
    def neighbours(self) -> int:
        """Positions that each one looks at."""
        return self.hidden.shape[1] // self.embedding.shape[1]

    def arrays(self) -> dict[str, np.ndarray]:
        """What it consists of, by name; `ContextModel(**arrays)` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that decoding depends on."""
        return digest_arrays(self.arrays())

    @functools.cached_property
    def _floats(self) -> Mapping[str, np.ndarray]:
        return {name: value.astype(np.float32) for name, value in self.arrays().items()}

    @functools.cached_property
    def _code(self) -> np.ndarray:
        """The code of each leaf, -1 where there is none: (2**depth,)."""
        codes = np.full(2**self.depth, -1, dtype=np.int32)
        codes[self.leaf] = np.arange(self.codebook_size)
        return codes

    def field(self, rows: int, columns: int) -> Field:
        """An empty grid for this model."""
        return Field(rows, columns, self.codebook_size, self.neighbours)

    def features(self, number: int, neighbours: np.ndarray) -> np.ndarray:
        """What the tree decides by: codes (n, N) around positions of pass `number` -> whole float32 numbers (n, D)."""
        own, weights = self._floats, PASSES[number].weights
        vectors = own["embedding"][neighbours].reshape(len(neighbours), -1)
        hidden = _activate(vectors @ own["hidden"][weights] + own["hidden_bias"][number])
        return _activate(hidden @ own["mixing"][weights] + own["mixing_bias"][number])

    def levels(self, features: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Rows of the table of probabilities for decisions at `nodes` (n,), by features (n, D)."""
        own = self._floats
        return _level(np.einsum("nd,nd->n", features, own["nodes"][nodes]) + own["node_bias"][nodes])

    def bits(self, features: np.ndarray) -> np.ndarray:
        """Bits that each code would cost, by features (n, D): (n, K)."""
        own = self._floats
        levels = _level(features @ own["nodes"].T + own["node_bias"])
        costs = np.zeros((len(features), 1), dtype=np.float32)
        for depth in range(self.depth):
            of_nodes = _BITS[:, levels[:, 2**depth - 1 : 2 ** (depth + 1) - 1]]  # (2, n, nodes of this depth)
            costs = (costs[..., None] + of_nodes.transpose(1, 2, 0)).reshape(len(features), -1)
        return costs[:, self.leaf]


def _activate(sums: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(sums * np.float32(WEIGHT_UNIT) + np.float32(0.5)), 0, ACTIVATION_LIMIT)


def _level(sums: np.ndarray) -> np.ndarray:
    rounded = np.floor(sums * np.float32(SUM_UNIT / LEVEL_UNIT) + np.float32(0.5))
    return np.clip(rounded, -TOP_LEVEL, TOP_LEVEL).astype(np.int64) + TOP_LEVEL


def _frequencies_of_zero() -> list[int]:
    # Decimal arithmetic is done in software, so that the table is the same on every machine; exp may not be.
    context, whole = Context(prec=40), 2**PRECISION - 1
    odds = (context.exp(Decimal(level) * Decimal(LEVEL_UNIT)) for level in range(-TOP_LEVEL, TOP_LEVEL + 1))
    return [int((Decimal(whole) / (1 + odd)).to_integral_value()) for odd in odds]


_ZERO = _frequencies_of_zero()  # of 2**16 - 1, by level; the rest is for one, but for a unit of CompressAI's escape
_ENCODER_CDFS = [[0, zero, 2**PRECISION - 1, 2**PRECISION] for zero in _ZERO]
_DECODER_CDFS = [[*cdf, 2**PRECISION] for cdf in _ENCODER_CDFS]  # the escape as a symbol, and one of no width behind it
_BITS = np.stack([PRECISION - np.log2(_ZERO), PRECISION - np.log2(2**PRECISION - 1 - np.array(_ZERO))]).astype(
    np.float32
)  # of a zero and a one, by level


def encode_grid(
    grid: np.ndarray,
    frequencies: np.ndarray,
    model: ContextModel | None = None,
    newest: Coding = Coding.CONTEXT,
) -> tuple[Coding, bytes]:
    """Code indices by context, with their frequency table or at fixed length, whichever is shortest.

    Args:
        grid: (rows, columns) integers from 0 to K - 1.
        frequencies: (K,) table as `normalise_counts` makes it.
        model: predicts them; without one there is no context coding.
        newest: of the codings to choose from, in the order of their numbers; for comparisons.

    Returns:
        The coding chosen and the payload.

    Raises:
        ValueError: if the indices or the frequencies are not as above.
    """
    if newest == Coding.PACKED:
        return newest, pack_indices(grid.reshape(-1), len(frequencies))
    coding, payload = encode_indices(grid.reshape(-1), frequencies)
    if newest == Coding.CONTEXT and model is not None and _shortest(grid.size, model) < len(payload):
        candidate = _encode(*_decisions(grid, model)).ljust(_shortest(grid.size, model), b"\0")
        if len(candidate) < len(payload):
            return Coding.CONTEXT, candidate
    return coding, payload


def decode_grid(
    payload: bytes,
    coding: Coding,
    shape: tuple[int, int],
    frequencies: np.ndarray,
    model: ContextModel | None = None,
) -> np.ndarray:
    """Recover the indices, int32 (rows, columns), of a payload of `encode_grid`.

    Raises:
        PayloadError: if the payload does not decode to so many indices under this table or model.
        ValueError: if the frequencies are not as `encode_grid` has them, which is not the payload's fault.
    """
    count = shape[0] * shape[1]
    if coding != Coding.CONTEXT:
        return decode_indices(payload, coding, count, frequencies).reshape(shape)
    if model is None:
        raise PayloadError("payload has coding context; this model has no context model for this rate")
    shortest, limit = _shortest(count, model), packed_length(count, model.codebook_size)
    check_payload(payload, shortest, limit, f"{count} indices coded by context")
    grid, decisions = _decode(decoder(payload, count * model.depth), shape, model)
    if _encode(*decisions).ljust(shortest, b"\0") != payload:
        raise PayloadError(f"payload of {len(payload)} bytes is not a coding of {count} indices by context")
    return grid


def decode_prefix(prefix: bytes, shape: tuple[int, int], model: ContextModel) -> tuple[np.ndarray, float]:
    """What the first bytes of a payload coded by context tell: the coarse lattices, and guesses between them.

    Args:
        prefix: of the payload, of any length.
        shape: rows and columns of the grid.
        model: predicts what is not known.

    Returns:
        The indices, int32 (rows, columns), and the share of the decisions on them that was read.

    Raises:
        PayloadError: if it is no such payload.
    """
    stream = PrefixDecoder(prefix)
    grid, _ = _decode(stream, shape, model)
    return grid, stream.known / stream.asked


def _decode(stream, shape: tuple[int, int], model: ContextModel) -> tuple[np.ndarray, tuple[list[int], list[int]]]:
    """The indices that a decoder's decisions lead to, and these decisions with their levels, as they are coded."""
    field = model.field(*shape)
    all_levels, all_bits = [], []
    for number, places in field.parts():
        features = model.features(number, field.neighbours(number, places))
        path = np.zeros(len(places), dtype=np.int64)
        for depth in range(model.depth):
            levels = model.levels(features, path + (2**depth - 1)).tolist()
            bits = stream.decode_stream(levels, _DECODER_CDFS, [5] * len(_DECODER_CDFS), [0] * len(_DECODER_CDFS))
            if max(bits) > 1:
                raise PayloadError("payload holds decision 2; allowed: 0, 1")
            all_levels += levels
            all_bits += bits
            path = 2 * path + bits
        codes = model._code[path]
        if codes.min() < 0:
            raise PayloadError(f"payload holds leaf {path[codes.argmin()]}; allowed: 0 to {model.codebook_size - 1}")
        field.put(places, codes)
    return field.grid.copy(), (all_bits, all_levels)


def choose_indices(
    distances: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, int],
    model: ContextModel,
    multiplier: float,
) -> np.ndarray:
    """Choose the indices that distort and cost least, in the order in which they are coded.

    Args:
        distances: of all codes, (n, K), at flat positions (n,) of the grid.
        shape: rows and columns of the grid.
        model: predicts what each code costs.
        multiplier: distance that a bit is worth.

    Returns:
        The indices, int32 (rows, columns).
    """
    field = model.field(*shape)
    for number, places in field.parts(max(1, min(_ROWS, _COSTS >> model.depth))):
        positions = field.positions(places)
        bits = model.bits(model.features(number, field.neighbours(number, places)))
        field.put(places, (distances(positions) + multiplier * bits).argmin(axis=1))
    return field.grid.copy()


def estimated_bits(grid: np.ndarray, model: ContextModel) -> float:
    """Bits that rANS needs for indices (rows, columns), without its final state of 32 to 64 bits."""
    bits, levels = _decisions(grid, model)
    return float(_BITS[np.array(bits, dtype=np.int64), levels].sum(dtype=np.float64))


def _decisions(grid: np.ndarray, model: ContextModel) -> tuple[list[int], list[int]]:
    """The decisions that lead to the codes, and the level of each, in the order in which they are coded."""
    field = model.field(*grid.shape)
    codes = grid.reshape(-1)
    all_bits, all_levels = [], []
    for number, places in field.parts():
        own = codes[field.positions(places)]
        features = model.features(number, field.neighbours(number, places))
        leaves = model.leaf[own].astype(np.int64)
        for depth in range(model.depth):
            nodes = (2**depth - 1) + (leaves >> (model.depth - depth))
            all_levels += model.levels(features, nodes).tolist()
            all_bits += ((leaves >> (model.depth - 1 - depth)) & 1).tolist()
        field.put(places, own)
    return all_bits, all_levels


def _encode(bits: list[int], levels: list[int]) -> bytes:
    return encode_symbols([(bits, levels)], _ENCODER_CDFS, [4] * len(_ENCODER_CDFS), [0] * len(_ENCODER_CDFS))


def _shortest(count: int, model: ContextModel) -> int:
    """Bytes that a payload has at least: a multiple of 4."""
    return whole_words(packed_length(count, model.codebook_size) // _SMALLEST_SHARE)
