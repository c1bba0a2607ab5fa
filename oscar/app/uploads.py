"""What visitors send: an image or an `.oscar` file, of bounded size."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image

from oscar.bitstream.container import MAGIC
from oscar.data.images import ImageError, read_image

MAX_BYTES = 32 * 2**20  # of an upload
MAX_PIXELS = 2**22  # of an image, such as 2048 x 2048
# Formats of photographs alone: for some others Pillow starts programs (EPS), or knows a name and nothing more.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Upload:
    """An upload that was understood: an image, or else the bytes of an `.oscar` file.

    Attributes:
        name: of its file, without folders.
        image: 8-bit sRGB.
        data: of an `.oscar` file.
        note: what was done to the image, in words; empty for nothing.
    """

    name: str
    image: Image.Image | None = None
    data: bytes | None = None
    note: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffix, for names of downloads."""
        return PurePath(self.name).stem or "image"


def read_upload(data: bytes, name: str) -> Upload:
    """Tell images and `.oscar` files apart by their first bytes, and read the image.

    Raises:
        ImageError: in one line, if it is neither, is damaged or too large.
    """
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: has {len(data):,} bytes; allowed: {MAX_BYTES:,}")
    if name.lower().endswith(".oscar") or int.from_bytes(data[:2], "big") >> 4 == MAGIC:
        return Upload(name, data=data)
    _check(data, name)
    notes = []
    try:
        image = read_image(io.BytesIO(data), name=name)
    except ImageError:  # unless for transparency, it is raised again
        image = read_image(io.BytesIO(data), _WHITE, name=name)
        notes.append("transparent parts were laid on white")
    if image.info["frames"] > 1:
        notes.append(f"the first of {image.info['frames']} frames was taken")
    return Upload(name, image=image, note="; ".join(notes))


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse (ImageError) what would take too long or too much memory."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: has {width}x{height} pixels; allowed: {MAX_PIXELS:,} in all")


def _check(data: bytes, name: str) -> None:
    """Refuse by the header alone what is too large or of a format that is not read here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                kind, size = image.format, image.size
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: has too many pixels; allowed: {MAX_PIXELS:,}") from error
    except Exception:  # on broken files Pillow raises nearly anything: `read_image` says what
        return
    if kind not in FORMATS:
        raise ImageError(f"{name}: is {kind}; allowed: {', '.join(FORMATS)}, or an .oscar file")
    check_pixels(*size, name)
