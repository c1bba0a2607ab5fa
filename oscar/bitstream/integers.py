"""What the integer models of `context` and `hyperprior` have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """SHA-256 of arrays of integers, which fit int32, by name and in their order."""
    digest = hashlib.sha256()
    for name, value in arrays.items():
        digest.update(f"{name}:{value.shape};".encode() + value.astype("<i4").tobytes())
    return digest.digest()
