"""Side information: one byte for the root mean square of each latent channel.

The paper rescales the decoded latent to the original latent's norm per channel. A decoder has no original, so the file
carries these norms, as rms over the channel so that they do not depend on the image's size.
"""

from __future__ import annotations

from decimal import Context, Decimal

import numpy as np

SMALLEST_RMS, LARGEST_RMS = 2.0**-4, 2.0**2
# Worst relative error between the two: half a step of 6/254 octaves, 2**(3/254) - 1, plus the rounding to float32.
MAX_RELATIVE_ERROR = 0.00823


def _build_table() -> np.ndarray:
    # Decimal arithmetic is done in software, so that the table has the same bits on every machine; exp2 may not.
    context = Context(prec=40)
    octaves = (Decimal(-4) + Decimal(6 * step) / Decimal(254) for step in range(255))
    table = np.array([0.0] + [float(context.power(Decimal(2), exponent)) for exponent in octaves], dtype=np.float32)
    table.setflags(write=False)
    return table


_TABLE = _build_table()  # (256,): zero, then 255 values from 2**-4 to 2**2 in equal ratios
# Between zero and the smallest value the middle is arithmetic, between two values geometric (in float64).
_BOUNDARIES = np.concatenate(([SMALLEST_RMS / 2], np.sqrt(_TABLE[1:-1].astype(np.float64) * _TABLE[2:])))


def quantise_rms(rms: np.ndarray) -> np.ndarray:
    """Quantise root mean squares to one byte each.

    Args:
        rms: finite values >= 0 of any shape. Above 2**2 they are clamped; below 2**-4 they become 2**-4 or, under
            half of that, zero.

    Returns:
        uint8 codes of the same shape: 0 for zero, 1 to 255 logarithmically spaced.

    Raises:
        ValueError: if a value is negative or not finite.
    """
    rms = np.asarray(rms, dtype=np.float64)
    wrong = rms[~(np.isfinite(rms) & (rms >= 0))]
    if wrong.size:
        raise ValueError(f"rms {wrong[0]:g} is not allowed; allowed: finite values from 0")
    return np.searchsorted(_BOUNDARIES, rms, side="right").astype(np.uint8)


def dequantise_rms(codes: np.ndarray | bytes) -> np.ndarray:
    """The float32 root mean squares of uint8 codes (an array of any shape, or bytes), the same on every machine.

    Raises:
        ValueError: if the codes are not of type uint8.
    """
    codes = np.frombuffer(codes, dtype=np.uint8) if isinstance(codes, (bytes, bytearray)) else np.asarray(codes)
    if codes.dtype != np.uint8:
        raise ValueError(f"codes of type {codes.dtype} are not allowed; allowed: uint8")
    return _TABLE[codes]
