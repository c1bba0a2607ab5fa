"""Rate-distortion optimised quantisation: indices that cost fewer bits at little loss, chosen when an image is encoded.

Effort e chooses, in the order in which indices are coded, the code that minimises

    squared distance to the image's feature + e * STEP * (mean squared distance of the nearest codes) * bits

where the bits are what the rate's context model, or without one its frequency table, spends on the code. The decoder
knows nothing of it. Effort 0 takes the nearest codes, as the paper does. This module knows no torch.
"""

from __future__ import annotations

import numpy as np

from oscar.bitstream.coding import MAX_EFFORT
from oscar.bitstream.context import ContextModel, choose_indices
from oscar.bitstream.rans import PRECISION

_POSITIONS = 4096  # whose distances are computed at once; bounds the memory
STEP = 0.03  # of the multiplier; the distance of a fine quantiser falls by about a quarter of itself per bit


def check_effort(effort: int) -> int:
    """The effort, or ValueError if there is no such one."""
    if effort not in range(MAX_EFFORT + 1):
        raise ValueError(f"effort is {effort!r}; allowed: 0 to {MAX_EFFORT}")
    return effort


def optimise_indices(
    features: np.ndarray,
    codebook: np.ndarray,
    indices: np.ndarray,
    effort: int,
    frequencies: np.ndarray,
    context: ContextModel | None = None,
) -> np.ndarray:
    """Replace nearest codes by cheaper ones.

    Args:
        features: of an image, unit norm, (rows, columns, dimensions).
        codebook: codes (K, dimensions).
        indices: the nearest ones, (rows, columns).
        effort: 1 to 9.
        frequencies: table of the rate.
        context: context model of the rate.

    Returns:
        Indices (rows, columns).
    """
    flat, norms = features.reshape(indices.size, -1), np.square(codebook).sum(axis=1)
    mean_distance = float(np.square(features - codebook[indices]).sum(axis=-1).mean())
    multiplier = effort * STEP * mean_distance

    def distances(positions: np.ndarray) -> np.ndarray:
        wanted = flat[positions]
        return norms - 2 * wanted @ codebook.T + np.square(wanted).sum(axis=1, keepdims=True)

    if context is not None:
        return choose_indices(distances, indices.shape, context, multiplier)
    bits = (PRECISION - np.log2(frequencies)).astype(np.float32)
    parts = np.array_split(np.arange(indices.size), -(-indices.size // _POSITIONS))
    chosen = [(distances(part) + multiplier * bits).argmin(axis=1) for part in parts]
    return np.concatenate(chosen).reshape(indices.shape)
