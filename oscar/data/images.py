"""Images at the edges of the codec: files, PIL images, arrays and tensors, in and out, with nothing lost in silence.

This module knows no torch; `oscar.data.tensors` does.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, features

from oscar.bitstream.container import MAX_SIDE
from oscar.utils.files import Listing, list_folder

if TYPE_CHECKING:
    from PIL import ImageCms

logger = logging.getLogger(__name__)

# Formats of which Pillow knows the suffix but reads no pixels: stubs for other programs (GRIB, HDF5, Windows's
# metafiles), films, text and vector graphics.
_NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"})
_OPTIONAL = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "MPO": "jpg", "WEBP": "webp"}  # parts of a build
_SRGB_TOLERANCE = 1  # levels by which a profile may move colours that is taken for sRGB's own
_SRGB_GAMMA = 0.45455  # as PNG has it
_PROFILE_DATE = bytes.fromhex("07cf 0001 0001 0000 0000 0000")  # 1 January 1999, of sRGB's standard


class ImageError(ValueError):
    """An image that cannot be read or that has no unambiguous RGB form of 8 bits."""


def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the files that Pillow decodes in this installation."""
    _load_plugins()
    lacking = {name for name, part in _OPTIONAL.items() if not features.check(part)}
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name not in _NOT_DECODED | lacking)


@functools.cache
def _load_plugins() -> None:
    Image.init()
    try:
        import pillow_jxl  # noqa: F401  JPEG XL, of the extra `eval`
    except ImportError:
        pass


def read_image(
    source: str | Path | BinaryIO,
    background: tuple[int, int, int] | None = None,
    frame: int | None = None,
    name: str | None = None,
) -> Image.Image:
    """Read an image file as 8-bit sRGB, turned upright as its EXIF orientation says.

    `info["frames"]` of the result is how many frames (or pages) the file has.

    Args:
        source: a file of any kind that Pillow reads, by name or opened.
        background: see `to_rgb`.
        frame: which of several frames is taken, from 1; by default the first.
        name: of an opened file, for messages.

    Raises:
        ImageError: in one line with the path, if it is not a whole and readable image, has no such frame, or
            `to_rgb` refuses it.
    """
    name = name or str(source)
    try:
        if isinstance(source, (str, Path)):
            path = Path(source)
            if path.is_dir() or not path.exists():
                raise ImageError(f"{'is a folder' if path.is_dir() else 'no such file'}; allowed: an image file")
            # Opened by name, Pillow 13.0 maps some uncompressed TIFF into memory and scrambles it if turned by a
            # quarter.
            with path.open("rb") as stream:
                image, frames = _read_frame(stream, frame)
        else:
            image, frames = _read_frame(source, frame)
        image = _to_rgb(image, background, lambda message: _warn(f"{name}: {message}"))
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image of a known format") from error
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # on broken files Pillow's readers raise nearly anything: OSError, SyntaxError, KeyError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be read as an image: {reason}") from error
    image.info["frames"] = frames
    return image


def _read_frame(stream: BinaryIO, frame: int | None) -> tuple[Image.Image, int]:
    """One frame, upright, and how many there are."""
    _load_plugins()
    if not stream.seekable():
        stream = io.BytesIO(stream.read())
    image = Image.open(stream)
    frames = _count_frames(image)
    if frames != 1:  # counting went through the file, perhaps into a damaged frame
        stream.seek(0)
        image = Image.open(stream)
    frames = frames or 1
    if frame is not None and not 1 <= frame <= frames:
        raise ImageError(f"frame {frame} does not exist; allowed: 1{f' to {frames}' if frames > 1 else ''}")
    if frame is not None and frame > 1:
        image.seek(frame - 1)
    if image.format == "JPEG2000" and not image.mode.startswith("I;16"):
        _check_depth(stream)
    return ImageOps.exif_transpose(image), frames


def _check_depth(stream: BinaryIO) -> None:
    """Refuse JPEG 2000 in colour of more than 8 bits, of which Pillow (13.0 too) reads the brightest levels as 0."""
    at = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(at)
    header = data.find(b"\xff\x4f\xff\x51")  # start of the codestream, and its size segment
    bits = (data[header + 42] & 0x7F) + 1 if header >= 0 else 8  # of the first component
    if bits > 8:
        raise ImageError(f"JPEG 2000 with {bits} bits per channel in colour is not allowed; allowed: 8 bits, or grey")


def _count_frames(image: Image.Image) -> int | None:
    """How many frames there are, None if they cannot be counted."""
    if image.format == "PSD":  # has layers, which are parts of one image
        return 1
    try:
        return getattr(image, "n_frames", 1) or None
    except Exception:  # as in reading; the first frame may still be whole
        return None


@functools.lru_cache(1024)
def _warn(message: str) -> None:
    """Log a warning, once."""
    logger.warning(message)


def to_rgb(image: Image.Image, background: tuple[int, int, int] | None = None) -> Image.Image:
    """Convert any PIL image to 8-bit sRGB, or refuse.

    A colour profile is applied with perceptual intent and black-point compensation; one that is damaged, or not of the
    image's kind of pixels, is passed over with a warning. Pixels without one are taken for sRGB, and PNG's gAMA and
    cHRM are not applied. 16-bit grey is scaled to 8 bits and rounded; of 16-bit colour Pillow keeps the upper 8.
    Transparency (an alpha channel or a transparent colour) is dropped if every pixel is opaque.

    Args:
        image: of any mode.
        background: colour in sRGB, 0 to 255 each, on which transparent pixels are laid; without one they are refused.

    Raises:
        ImageError: if pixels are transparent and there is no background, the values are floats or 32-bit integers, or
            Pillow cannot convert the mode.
    """
    return _to_rgb(image, background, _warn)


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None, warn: Callable[[str], None]) -> Image.Image:
    if background is not None:
        background = tuple(background)
        if len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
            raise ImageError(f"background {background} is not allowed; allowed: three integers from 0 to 255")
    if 0 in image.size:
        raise ImageError(f"image of {image.width}x{image.height} pixels is not allowed; allowed: from 1x1")
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey16_to_8(image)
    if image.mode == "F":
        raise ImageError("pixels of mode F (floats) are not allowed; allowed: 8 or 16 bits per channel")
    alpha = None
    try:
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            alpha, rgb = rgba.getchannel("A"), rgba.convert("RGB")
        else:
            rgb = image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ImageError(f"pixels of mode {image.mode} cannot be converted to RGB: {error}") from error
    if profile:
        rgb = _apply_profile(profile, image, rgb, warn)
    elif isinstance(gamma, float) and "srgb" not in image.info and abs(gamma / _SRGB_GAMMA - 1) > 0.05:
        warn(f"gamma of {gamma:g} is not applied, the pixels are taken for sRGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        if background is None:
            raise ImageError("image has transparent pixels; allowed: opaque ones, or a background to lay them on")
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), rgb).convert("RGB")
    for key in ("icc_profile", "gamma", "transparency"):  # of the pixels as they were
        rgb.info.pop(key, None)
    return rgb


def _apply_profile(profile: bytes, image: Image.Image, rgb: Image.Image, warn: Callable[[str], None]) -> Image.Image:
    """Take the image's pixels from its profile's colour space to sRGB; `rgb` are its pixels as Pillow converts them."""
    if image.mode == "LAB":  # which Pillow has converted by colour already
        return rgb
    if not features.check("littlecms2"):
        warn("colour profile is not applied, since this build of Pillow lacks LittleCMS")
        return rgb
    from PIL import ImageCms

    try:
        space, transform = _to_srgb(profile)
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError) as error:
        warn(f"colour profile is damaged and not applied: {' '.join(str(error).split()) or type(error).__name__}")
        return rgb
    is_grey = image.mode in ("1", "L", "LA", "La")
    pixels = {
        "RGB": rgb if image.mode != "CMYK" else None,
        "GRAY": rgb.getchannel(0) if is_grey else None,
        "CMYK": image if image.mode == "CMYK" else None,
    }.get(space)
    if pixels is None:
        warn(f"colour profile is for {space} and not applied to pixels of mode {image.mode}")
        return rgb
    return rgb if transform is None else transform.apply(pixels)


@functools.lru_cache(8)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The colour space of a profile, and what takes its pixels to sRGB; None if they are sRGB as they are.

    Raises:
        OSError, TypeError, ValueError, PyCMSError: if the profile is damaged, or is not one of an image's colours.
    """
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    mode = {"GRAY": "L"}.get(space, space)
    if mode not in ("RGB", "L", "CMYK"):
        return space, None
    # For the usual RGB profiles all intents are one. Of ink, paper becomes white and the darkest mixture black.
    intent, flags = ImageCms.Intent.PERCEPTUAL, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    if mode != "CMYK" and _moves_little(transform, mode):
        return space, None
    return space, transform


def _moves_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves a lattice of colours where they are."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    lattice = np.stack(np.meshgrid(*[levels] * len(mode)), axis=-1).reshape(1, -1, len(mode))
    moved = np.asarray(transform.apply(Image.fromarray(lattice.squeeze(-1) if mode == "L" else lattice)))
    return np.abs(moved.astype(int) - lattice).max() <= _SRGB_TOLERANCE


def srgb_mark(kind: str) -> dict[str, Any]:
    """Options of Pillow's `save` that mark a file as sRGB, where its format can say so.

    PNG has a chunk of 13 bytes for it; TIFF and WebP hold a profile of 588 bytes. BMP and PPM have no place for it.

    Args:
        kind: Pillow's name of the format.
    """
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add(b"sRGB", b"\0")  # perceptual intent
        return {"pnginfo": chunks}
    if kind in ("TIFF", "WEBP") and features.check("littlecms2"):
        return {"icc_profile": _srgb_profile()}
    return {}


@functools.cache
def _srgb_profile() -> bytes:
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = _PROFILE_DATE  # instead of today, so that equal pixels make equal files
    return bytes(profile)


def _grey16_to_8(image: Image.Image) -> Image.Image:
    """Scale grey values of 16 bits, which Pillow's own convert clips; mode I is how some versions read 16-bit PNG."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"grey values from {values.min()} to {values.max()} are not allowed; allowed: 0 to 65535")
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one grey value, in 16 bits
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def to_pixels(image: Image.Image | np.ndarray, background: tuple[int, int, int] | None = None) -> np.ndarray:
    """Convert one image to sRGB pixels, uint8 (H, W, 3).

    Args:
        image: a PIL image, or a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        background: see `to_rgb`.

    Raises:
        ImageError: if the shape or type is not as above, or `to_rgb` refuses the image.
    """
    if isinstance(image, np.ndarray):
        image = _array_to_pil(image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"image of type {type(image).__name__} is not allowed; allowed: PIL image, array, tensor")
    return np.array(to_rgb(image, background))


def _array_to_pil(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ImageError(f"array of type {pixels.dtype} is not allowed; allowed: uint8")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))) or 0 in pixels.shape:
        raise ImageError(f"array of shape {pixels.shape} is not allowed; allowed: (H, W) or (H, W, 1, 3 or 4)")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))


def scan_images(folder: str | Path, recursive: bool = True) -> Listing:
    """The image files of a folder, by `image_suffixes`, and what else it holds; see `oscar.utils.files.list_folder`.

    Raises:
        ImageError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder")
    return list_folder(folder, image_suffixes(), recursive)


def list_images(folder: str | Path, recursive: bool = True) -> list[Path]:
    """The sorted paths of the image files of a folder.

    Raises:
        ImageError: if there is no such folder, or one in it cannot be read.
    """
    listing = scan_images(folder, recursive)
    if listing.errors:
        error = listing.errors[0]
        raise ImageError(f"{error.filename}: {error.strerror}")
    return listing.files


def check_sides(height: int, width: int) -> None:
    """Refuse (ImageError) an image that no file can hold."""
    if max(height, width) > MAX_SIDE:
        raise ImageError(f"image of {width}x{height} pixels is not allowed; allowed: {MAX_SIDE} a side")
