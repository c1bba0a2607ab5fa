"""Image files that commands read and write. Decoded images are stored without loss."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oscar.cli.messages import STDIN, CommandError, name
from oscar.utils.files import STDIO, Listing, read_source

if TYPE_CHECKING:
    from PIL import Image

# What a decoded image may be stored as: Pillow's format and options. All are lossless: a lossy one such as JPEG would
# change the pixels once more, and a measurement on it would not be one of this codec.
IMAGE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".ppm": ("PPM", {}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_deflate"}),
    ".webp": ("WEBP", {"lossless": True}),
}
_DEFAULT_FORMAT = ".png"
_MAX_WEBP_SIDE = 16383
_MAX_FILE_BYTES = 2**32 - 1  # of BMP and TIFF, whose offsets have 32 bits
_HEADROOM = 2**24  # of TIFF's tables, and of what its compression may add to noise


def list_images(folder: Path) -> Listing:
    from oscar.data.images import scan_images

    return scan_images(folder)


def read_image(path: Path, background: tuple[int, int, int] | None, frame: int | None) -> Image.Image:
    from oscar.data.images import read_image

    if path == STDIO:
        return read_image(io.BytesIO(read_source(path)), background, frame, name=STDIN)
    return read_image(path, background, frame)


def frames_note(several: dict[Path, int]) -> str:
    path, frames = next(iter(several.items()))
    if len(several) > 1:
        return f"{len(several)} files have several frames, and the first is taken; --frame N takes another"
    return f"{name(path)}: has {frames} frames, and the first is taken; --frame N takes another"


def image_suffix(image_format: str | None, target: Path) -> str:
    """The suffix of --format, which must not contradict a file's."""
    if image_format is None:
        return _DEFAULT_FORMAT
    suffix = f".{image_format.lower()}"
    if suffix not in IMAGE_FORMATS:
        allowed = ", ".join(name[1:] for name in IMAGE_FORMATS)
        raise CommandError(f"--format {image_format!r} does not exist; allowed: {allowed}")
    other = IMAGE_FORMATS.get(target.suffix.lower())
    if other not in (None, IMAGE_FORMATS[suffix]) and not target.is_dir():
        raise CommandError(f"--format is {image_format}, but OUT is {target}; allowed: the same in both")
    return suffix


def check_size(width: int, height: int, suffix: str) -> None:
    """Refuse what the format of an image file cannot hold."""
    kind, _ = IMAGE_FORMATS[suffix]
    row = {"BMP": -(-3 * width // 4) * 4, "TIFF": 3 * width}.get(kind, 0)
    limit = {"BMP": _MAX_FILE_BYTES - 54, "TIFF": _MAX_FILE_BYTES - _HEADROOM}.get(kind, 0)
    if kind == "WEBP" and max(width, height) > _MAX_WEBP_SIDE:
        allowed = f"up to {_MAX_WEBP_SIDE} a side"
    elif row * height > limit:
        allowed = f"up to {limit} bytes of pixels"
    else:
        return
    raise ValueError(f"{width}x{height} pixels do not fit into {suffix}; allowed: {allowed}, or .png")


def encode_image(image: Image.Image, suffix: str) -> bytes:
    from oscar.data.images import srgb_mark

    kind, options = IMAGE_FORMATS[suffix]
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options, **srgb_mark(kind))
    return buffer.getvalue()


def parse_colour(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text)
    if match is None:
        raise CommandError(f"--background {text!r} is not a colour; allowed: #rrggbb, such as '#ffffff'")
    red, green, blue = (int(part, 16) for part in match.groups())
    return red, green, blue
