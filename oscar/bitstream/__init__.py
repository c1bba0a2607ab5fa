"""The `.oscar` file: container (header, integrity), entropy coding and side information. Imports no torch.

Entropy coding (`oscar.bitstream.entropy`) and norms (`oscar.bitstream.norms`) need numpy and are imported from their
modules, so that reading a header (`oscar info`) does without.
"""

from __future__ import annotations

from oscar.bitstream.coding import Coding, Payload, packed_length
from oscar.bitstream.container import MAX_QUALITY, MAX_SIDE, VERSION, Container
from oscar.bitstream.errors import (
    BitstreamError,
    ChecksumError,
    HeaderError,
    NotAnOscarFileError,
    PayloadError,
    TruncatedFileError,
    UnknownRateError,
    UnsupportedVersionError,
    WrongModelError,
)

__all__ = [
    "MAX_QUALITY",
    "MAX_SIDE",
    "VERSION",
    "BitstreamError",
    "ChecksumError",
    "Coding",
    "Container",
    "HeaderError",
    "NotAnOscarFileError",
    "Payload",
    "PayloadError",
    "TruncatedFileError",
    "UnknownRateError",
    "UnsupportedVersionError",
    "WrongModelError",
    "packed_length",
]
