"""The `.oscar` container: a header of at most 16 bytes for images up to 16384x16384, and the coded symbols.

An image with a timestep of its own (mapping `per_image`) has one byte more.

bytes   field
2       magic number 0x05C (12 bits), format version (4 bits)
1       whether the image has a timestep of its own (1 bit), coding (3 bits), rate id (4 bits)
2       model tag, big-endian
2 to 6  width - 1, then height - 1: seven bits a byte, lowest first, high bit set when more follow
4       codes of the latent norms, one per channel
0 to 1  code of the image's own timestep, where the bit says so
3       checksum: low 24 bits of the CRC-32 of all other bytes, big-endian
rest    payload: the coded symbols, up to the end of the file

With codings that hold no indices (3, hyperprior, and 7, external) there is an operating point of 12 bits, such as a
quality, whose upper four take the rate id's place, and whose lower eight are a byte of their own behind it; and there
are neither norms nor a timestep.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from oscar.bitstream.coding import INDEX_CODINGS, Coding, Payload, packed_length
from oscar.bitstream.errors import (
    ChecksumError,
    HeaderError,
    NotAnOscarFileError,
    PayloadError,
    TruncatedFileError,
    UnknownRateError,
    UnsupportedVersionError,
)
from oscar.rates import RATES, RatePoint, rate_by_id

MAGIC = 0x05C
VERSION = 1
LATENT_CHANNELS = 4
MAX_SIDE = 65536
MAX_QUALITY = 2**12 - 1
_CHECKSUM_BYTES = 3
_VARINT_BYTES = 3  # enough for MAX_SIDE - 1
_HAS_TIMESTEP = 0x80


@dataclass(frozen=True)
class Container:
    """What a file holds.

    Attributes:
        coding: how the payload holds the symbols.
        point_code: the operating point: with codings of indices the rate id, else 0 to 4095, such as a quality.
        model_tag: fingerprint of the weights that decoding depends on, 0 to 65535.
        width: true width of the image in pixels, 1 to 65536.
        height: true height likewise.
        side: with codings of indices the codes of the latent norms, one byte per channel; else empty.
        payload: the coded symbols.
        timestep: code of the image's own timestep, 0 to 255; None where the operating point determines it.
        version: version of the format.

    Raises:
        UnknownRateError: if the rate id does not exist.
        UnsupportedVersionError: if the version is not 1.
        HeaderError: if another field is out of range, or does not go with the coding.
        PayloadError: if the payload's length does not fit the other fields.
    """

    coding: Coding
    point_code: int
    model_tag: int
    width: int
    height: int
    side: bytes
    payload: bytes
    timestep: int | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise UnsupportedVersionError(f"format version {self.version} is not supported; allowed: {VERSION}")
        if self.coding not in tuple(Coding):
            allowed = ", ".join(str(int(coding)) for coding in Coding)
            raise HeaderError(f"coding {self.coding} does not exist; allowed: {allowed}")
        object.__setattr__(self, "coding", Coding(self.coding))
        _check_range("model tag", self.model_tag, 0, 2**16 - 1)
        _check_range("width", self.width, 1, MAX_SIDE)
        _check_range("height", self.height, 1, MAX_SIDE)
        if self.has_indices:
            self._check_indices()
        else:
            self._check_others()

    def _check_others(self) -> None:
        for name, value in (("timestep", self.timestep), ("norms", self.side or None)):
            if value is not None:
                raise HeaderError(f"{name} is {value!r}; allowed with coding {self.coding.name.lower()}: none")
        _check_range("quality", self.point_code, 0, MAX_QUALITY)

    def _check_indices(self) -> None:
        if not 0 <= self.point_code < len(RATES):
            raise UnknownRateError(f"rate id {self.point_code} does not exist; allowed: 0 to {len(RATES) - 1}")
        if len(self.side) != LATENT_CHANNELS:
            raise HeaderError(f"norms have {len(self.side)} codes; allowed: {LATENT_CHANNELS}")
        if self.timestep is not None:
            _check_range("timestep code", self.timestep, 0, 255)
        rate = rate_by_id(self.point_code)
        longest = packed_length(self.index_count, rate.codebook_size)
        length = len(self.payload)
        if (length != longest) if self.coding == Coding.PACKED else (length >= longest):
            allowed = longest if self.coding == Coding.PACKED else f"fewer than {longest}"
            raise PayloadError(
                f"payload has {length} bytes; allowed for {self.width}x{self.height} at rate "
                f"{rate.bpp:.4f} with coding {self.coding.name.lower()}: {allowed}"
            )

    @property
    def coded(self) -> Payload:
        """The coded symbols, with what goes with them."""
        return Payload(self.coding, self.side, self.payload)

    @property
    def has_indices(self) -> bool:
        """Whether the payload holds indices of a rate."""
        return self.coding in INDEX_CODINGS

    @property
    def rate(self) -> RatePoint | None:
        """The rate point, where there are indices."""
        return rate_by_id(self.point_code) if self.has_indices else None

    @property
    def quality(self) -> float | None:
        """The quality from 0 to 1, with coding HYPERPRIOR."""
        return self.point_code / MAX_QUALITY if self.coding == Coding.HYPERPRIOR else None

    def point_facts(self) -> dict[str, float | int]:
        """What the header says of the operating point, by name, JSON-able."""
        if self.quality is not None:
            return {"quality": self.quality, "quality_code": self.point_code}
        if self.rate is None:
            return {"point_code": self.point_code}
        nominal = self.rate.nominal_bits(self.height, self.width) / (self.width * self.height)
        return {"rate": self.rate.bpp, "rate_id": self.point_code, "nominal_bpp": nominal}

    @property
    def index_count(self) -> int:
        """Number of indices that the payload holds."""
        rows, columns = rate_by_id(self.point_code).grid_shape(self.height, self.width)
        return rows * columns

    def parts(self) -> dict[str, bytes]:
        """The file's parts by name, in the file's order: magic_version, coding_rate, model_tag, size, norms, timestep
        (if there is one), checksum, payload; without indices coding_quality in place of coding_rate, and no norms."""
        before = {"magic_version": (MAGIC << 4 | self.version).to_bytes(2, "big")}
        if self.has_indices:
            flag = 0 if self.timestep is None else _HAS_TIMESTEP
            before["coding_rate"] = bytes([flag | self.coding << 4 | self.point_code])
        else:
            before["coding_quality"] = (self.coding << 12 | self.point_code).to_bytes(2, "big")
        before["model_tag"] = int(self.model_tag).to_bytes(2, "big")
        before["size"] = _write_varint(self.width - 1) + _write_varint(self.height - 1)
        if self.has_indices:
            before["norms"] = bytes(self.side)
        if self.timestep is not None:
            before["timestep"] = bytes([self.timestep])
        checksum = _checksum(b"".join(before.values()), self.payload)
        return {**before, "checksum": checksum, "payload": bytes(self.payload)}

    def pack(self) -> bytes:
        """The bytes of the file."""
        return b"".join(self.parts().values())

    @classmethod
    def unpack(cls, data: bytes, whole: bool = True) -> Container:
        """Read the bytes of a file. `unpack(data).pack() == data` holds for all data that it accepts.

        Args:
            data: the bytes.
            whole: whether they must be all; without, the payload's end may be missing, and damage is not noticed.

        Raises:
            BitstreamError: one of its kinds, whatever the bytes, if they are not a whole and undamaged file.
        """
        data = bytes(memoryview(data))  # bytes(5) would be five zeros
        _check_magic(data)
        if len(data) < 6:
            raise TruncatedFileError(f"file ends in its header: it has {len(data)} bytes")
        coding = (data[2] & ~_HAS_TIMESTEP) >> 4
        indices = coding not in (Coding.HYPERPRIOR, Coding.EXTERNAL)
        tag_end = 5 if indices else 6
        width, position = _read_varint(data, tag_end, "width")
        height, position = _read_varint(data, position, "height")
        norms_end = position + (LATENT_CHANNELS if indices else 0)
        checksum_start = norms_end + bool(data[2] & _HAS_TIMESTEP)
        header_end = checksum_start + _CHECKSUM_BYTES
        if len(data) < header_end:
            raise TruncatedFileError(f"file ends in its header: it has {len(data)} of {header_end} bytes")
        payload = data[header_end:]
        if whole and _checksum(data[:checksum_start], payload) != data[checksum_start:header_end]:
            raise ChecksumError("checksum does not match: the file is damaged or cut short")
        return cls(
            coding=coding,  # type: ignore[arg-type]  # checked by the constructor, as are the other fields
            point_code=data[2] & 0xF if indices else (data[2] & 0xF) << 8 | data[3],
            model_tag=int.from_bytes(data[tag_end - 2 : tag_end], "big"),
            width=width + 1,
            height=height + 1,
            side=data[position:norms_end],
            timestep=data[norms_end] if norms_end < checksum_start else None,
            payload=payload,
        )


def _check_range(field: str, value: int, smallest: int, largest: int) -> None:
    if not smallest <= value <= largest:
        raise HeaderError(f"{field} {value} is not allowed; allowed: {smallest} to {largest}")


def _check_magic(data: bytes) -> None:
    if not data:
        raise TruncatedFileError("file is empty")
    if data[0] != MAGIC >> 4 or (len(data) > 1 and data[1] >> 4 != MAGIC & 0xF):
        raise NotAnOscarFileError(
            f"not an .oscar file: it begins with {data[:2].hex()}, not with {MAGIC << 4 | VERSION:04x}"
        )
    if len(data) > 1 and data[1] & 0xF != VERSION:
        raise UnsupportedVersionError(f"format version {data[1] & 0xF} is not supported; allowed: {VERSION}")


def _checksum(before: bytes, payload: bytes) -> bytes:
    return zlib.crc32(payload, zlib.crc32(before)).to_bytes(4, "big")[-_CHECKSUM_BYTES:]


def _write_varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _write_varint(rest) if rest else bytes([low])


def _read_varint(data: bytes, position: int, field: str) -> tuple[int, int]:
    """The value at `position` and the position after it; a value has one spelling only, the shortest."""
    value = 0
    for offset in range(_VARINT_BYTES):
        if position + offset >= len(data):
            raise TruncatedFileError(f"file ends in its {field}: it has {len(data)} bytes")
        byte = data[position + offset]
        value |= (byte & 0x7F) << 7 * offset
        if byte < 0x80:
            if byte == 0 and offset:
                raise HeaderError(f"{field} {value + 1} is not written in the fewest bytes")
            return value, position + offset + 1
    raise HeaderError(f"{field} takes more than {_VARINT_BYTES} bytes; allowed: 1 to {MAX_SIDE} pixels")
