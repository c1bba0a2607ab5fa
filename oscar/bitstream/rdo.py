"""Rate-distortion optimised quantisation: indices that cost fewer bits at little loss, chosen when an image is encoded.

Effort e chooses, in the order in which indices are coded, the code that minimises

    squared distance to the image's feature + e * STEP * (mean squared distance of the nearest codes) * bits

(and the penalties of a quantiser that has some, see `oscar.bottlenecks.residual_vq`), where the bits are what the
rate's context model, or without one its frequency table, spends on the code. The decoder knows nothing of it. Effort 0
takes the nearest codes, as the paper does. This module knows no torch.
"""

from __future__ import annotations

import math

import numpy as np

from oscar.bitstream.coding import MAX_EFFORT
from oscar.bitstream.context import ContextModel, choose_indices
from oscar.bitstream.rans import PRECISION

_POSITIONS = 4096  # whose distances are computed at once; bounds the memory
BEAM = 16  # candidates that the search for residual codes keeps, in torch and without
STEP = 0.03  # of the multiplier; the distance of a fine quantiser falls by about a quarter of itself per bit


def check_effort(effort: int) -> int:
    """The effort, or ValueError if there is no such one."""
    if effort not in range(MAX_EFFORT + 1):
        raise ValueError(f"effort is {effort!r}; allowed: 0 to {MAX_EFFORT}")
    return effort


def optimise_indices(
    features: np.ndarray,
    codebooks: np.ndarray,
    penalties: np.ndarray,
    indices: np.ndarray,
    effort: int,
    frequencies: np.ndarray,
    context: ContextModel | None = None,
) -> np.ndarray:
    """Replace nearest codes by cheaper ones.

    Args:
        features: of an image, unit norm, (rows of cells, columns of cells, dimensions).
        codebooks: (stages, K, dimensions), one stage but for residual codes.
        penalties: (stages, K), what the search adds to the distances of codes.
        indices: the nearest ones, (rows, columns).
        effort: 1 to 9.
        frequencies: table of the rate.
        context: context model of the rate.

    Returns:
        Indices (rows, columns).
    """
    cells = _Cells(features, codebooks, penalties, indices)
    multiplier = effort * STEP * cells.mean_distance()
    if context is not None:
        return choose_indices(cells.distances, indices.shape, context, multiplier, cells.put)
    bits = (PRECISION - np.log2(frequencies)).astype(np.float32)
    parts = np.array_split(np.arange(indices.size), -(-indices.size // _POSITIONS))
    chosen = [(cells.distances(part) + multiplier * bits).argmin(axis=1) for part in parts]
    return np.concatenate(chosen).reshape(indices.shape)


class _Cells:
    """Features of an image and the sums of codes that stand for them, one code each where there are no stages.

    Args:
        features: (rows of cells, columns of cells, dimensions).
        codebooks: (stages, K, dimensions).
        penalties: (stages, K), of the codes.
        indices: (rows, columns) of a grid with n x n positions per cell, n * n stages; cells at its end may lack some.
    """

    def __init__(self, features: np.ndarray, codebooks: np.ndarray, penalties: np.ndarray, indices: np.ndarray):
        self.side = math.isqrt(len(codebooks))
        self.features, self.codebooks, self.penalties, self.indices = features, codebooks, penalties, indices.copy()
        self.sums = np.zeros_like(features)
        every = np.arange(indices.size)
        cell, stage, codes = self._find(every)
        np.add.at(self.sums, cell, self.codebooks[stage, codes])

    def _find(self, positions: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
        """Cells, stages and present codes of flat positions."""
        row, column = np.divmod(positions, self.indices.shape[1])
        stage = row % self.side * self.side + column % self.side
        return (row // self.side, column // self.side), stage, self.indices[row, column]

    def mean_distance(self) -> float:
        """Mean squared distance of the sums to the features."""
        return float(np.square(self.features - self.sums).sum(axis=-1).mean())

    def distances(self, positions: np.ndarray) -> np.ndarray:
        """Squared distances with penalties (n, K), were each position's code another and all others as they are."""
        cell, stage, codes = self._find(positions)
        wanted = self.features[cell] - self.sums[cell] + self.codebooks[stage, codes]
        result = np.empty((len(positions), self.codebooks.shape[1]), dtype=np.float32)
        for number in np.unique(stage):
            rows, book = stage == number, self.codebooks[number]
            result[rows] = np.square(book).sum(axis=1) + self.penalties[number] - 2 * wanted[rows] @ book.T
        return result + np.square(wanted).sum(axis=1, keepdims=True)

    def put(self, positions: np.ndarray, codes: np.ndarray) -> None:
        """Take other codes at positions."""
        cell, stage, before = self._find(positions)
        np.add.at(self.sums, cell, self.codebooks[stage, codes] - self.codebooks[stage, before])
        self.indices.reshape(-1)[positions] = codes
