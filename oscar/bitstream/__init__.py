"""The `.oscar` file: container (header, integrity), entropy coding and side information. Imports no torch."""

from oscar.bitstream.container import MAX_SIDE, VERSION, Container
from oscar.bitstream.entropy import (
    FREQUENCY_TOTAL,
    Coding,
    decode_indices,
    encode_indices,
    estimated_bits,
    normalise_counts,
    packed_length,
    uniform_frequencies,
)
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
from oscar.bitstream.norms import dequantise_rms, quantise_rms

__all__ = [
    "FREQUENCY_TOTAL",
    "MAX_SIDE",
    "VERSION",
    "BitstreamError",
    "ChecksumError",
    "Coding",
    "Container",
    "HeaderError",
    "NotAnOscarFileError",
    "PayloadError",
    "TruncatedFileError",
    "UnknownRateError",
    "UnsupportedVersionError",
    "WrongModelError",
    "decode_indices",
    "dequantise_rms",
    "encode_indices",
    "estimated_bits",
    "normalise_counts",
    "packed_length",
    "quantise_rms",
    "uniform_frequencies",
]
