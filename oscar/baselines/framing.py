"""Width and height before a stream that does not tell them, in 4 bytes that count as the file's."""

from __future__ import annotations

import struct

from PIL import Image

from oscar.baselines.base import CodecError

_SIZE = struct.Struct(">HH")  # each less 1
_MAX_SIDE = 1 << 16


def pack_size(codec: str, image: Image.Image) -> bytes:
    """The size of an image (CodecError if it is too large)."""
    if max(image.size) > _MAX_SIDE:
        raise CodecError(f"{codec}: {image.width}x{image.height} pixels is not allowed; allowed: {_MAX_SIDE} a side")
    return _SIZE.pack(image.width - 1, image.height - 1)


def split_size(codec: str, data: bytes) -> tuple[tuple[int, int], bytes]:
    """Width and height, and the stream behind them (CodecError if there is none)."""
    if len(data) <= _SIZE.size:
        raise CodecError(f"{codec}: a file of {len(data)} bytes is too short")
    width, height = _SIZE.unpack_from(data)
    return (width + 1, height + 1), data[_SIZE.size :]
