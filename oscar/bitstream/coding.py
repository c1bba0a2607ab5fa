"""How a payload holds its indices, and the length that fixed-length packing gives them. Imports no numpy."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Coding(IntEnum):
    """What a payload holds, and how; the number is stored in files."""

    PACKED = 0  # ceil(log2 K) bits each, most significant first, zero bits up to a whole byte
    TABLE = 1  # rANS with the frequency table of the rate
    CONTEXT = 2  # rANS with predictions from neighbours (`oscar.bitstream.context`)
    HYPERPRIOR = 3  # no indices: a latent under a hyperprior (`oscar.bitstream.hyperprior`)
    EXTERNAL = 7  # a bottleneck of the user's own (`oscar.bottlenecks.base`), as its checkpoint says

    @property
    def model(self) -> str:
        """What a model that writes such files has."""
        return {self.HYPERPRIOR: "a hyperprior", self.EXTERNAL: "a bottleneck of its own"}.get(
            self, "a vector quantiser"
        )


class Payload(NamedTuple):
    """One image's symbols, coded.

    Attributes:
        coding: how.
        side: side information of fixed length in the header; only codings of indices have any.
        data: the coded symbols.
    """

    coding: Coding
    side: bytes
    data: bytes


INDEX_CODINGS = (Coding.PACKED, Coding.TABLE, Coding.CONTEXT)
MAX_EFFORT = 9  # in choosing indices (`oscar.bitstream.rdo`)


def bits_per_packed_index(codebook_size: int) -> int:
    """Whole bits that an index of a codebook of this size needs at fixed length."""
    return (codebook_size - 1).bit_length()


def packed_length(count: int, codebook_size: int) -> int:
    """Bytes of `count` indices at fixed length: the most that any payload takes."""
    return -(-count * bits_per_packed_index(codebook_size) // 8)
