"""Named errors of `.oscar` files: whatever the bytes, reading a file ends in a right result or in one of these."""

from __future__ import annotations


class BitstreamError(ValueError):
    """A file that cannot be decoded, or a container that cannot be written."""


class NotAnOscarFileError(BitstreamError):
    """The file does not begin with the magic number."""


class UnsupportedVersionError(BitstreamError):
    """The file has a format version that this program does not know."""


class TruncatedFileError(BitstreamError):
    """The file ends too early."""


class ChecksumError(BitstreamError):
    """The bytes are not those that were written."""


class HeaderError(BitstreamError):
    """A header field has a value that is not allowed."""


class WrongModelError(BitstreamError):
    """The file was written with other weights than those at hand."""


class UnknownRateError(BitstreamError):
    """The file names a rate point that does not exist or that the model lacks."""


class PayloadError(BitstreamError):
    """The coded indices do not fit the header or the frequency table."""
