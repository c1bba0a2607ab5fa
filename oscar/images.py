"""Pictures at the edges of the codec: files, PIL images, arrays and tensors, in and out, with nothing lost in silence.

torch is imported by the two functions that need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
_RANGE_SLACK = 1e-3  # of float pixels, for results of float arithmetic that end a little outside [-1, 1]


class ImageError(ValueError):
    """A picture that cannot be read or that has no unambiguous RGB form of 8 bits."""


def read_image(path: str | Path, background: tuple[int, int, int] | None = None) -> Image.Image:
    """Read a picture file as 8-bit RGB, turned upright as its EXIF orientation says.

    Args:
        path: a file of any kind that Pillow reads; of several frames the first counts.
        background: see `to_rgb`.

    Raises:
        ImageError: in one line with the path, if it is not a whole and readable picture, or `to_rgb` refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; allowed: a picture file")
    try:
        # Opened by name, Pillow 13.0 maps some uncompressed TIFF into memory and scrambles it if turned by a quarter.
        with path.open("rb") as stream, Image.open(stream) as image:
            image = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture of a known format") from error
    except Exception as error:  # on broken files Pillow's readers raise nearly anything: OSError, SyntaxError, KeyError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: cannot be read as a picture: {reason}") from error
    try:
        return to_rgb(image, background)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int] | None = None) -> Image.Image:
    """Convert any PIL image to 8-bit RGB, or refuse.

    16-bit grey is scaled to 8 bits and rounded. Transparency (an alpha channel or a transparent colour) is dropped if
    every pixel is opaque. Colour profiles are not applied.

    Args:
        image: of any mode.
        background: colour, 0 to 255 each, on which transparent pixels are laid; without one they are refused.

    Raises:
        ImageError: if pixels are transparent and there is no background, the values are floats or 32-bit integers, or
            Pillow cannot convert the mode.
    """
    if background is not None:
        background = tuple(background)
        if len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
            raise ImageError(f"background {background} is not allowed; allowed: three integers from 0 to 255")
    if 0 in image.size:
        raise ImageError(f"picture of {image.width}x{image.height} pixels is not allowed; allowed: from 1x1")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey16_to_8(image)
    if image.mode == "F":
        raise ImageError("pixels of mode F (floats) are not allowed; allowed: 8 or 16 bits per channel")
    try:
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            return _drop_alpha(image.convert("RGBA"), background)
        return image.convert("RGB")
    except (ValueError, OSError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"pixels of mode {image.mode} cannot be converted to RGB: {error}") from error


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


def _drop_alpha(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    """RGBA to RGB."""
    if image.getchannel("A").getextrema() != (255, 255):
        if background is None:
            raise ImageError("picture has transparent pixels; allowed: opaque ones, or a background to lay them on")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")


def to_tensor(
    image: Image.Image | np.ndarray | torch.Tensor, background: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """Convert one picture to a float32 tensor (1, 3, H, W) in [-1, 1].

    Args:
        image: a PIL image; a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a tensor (3, H, W) or
            (1, 3, H, W), of uint8 or of floats in [-1, 1]. A tensor keeps its device.
        background: see `to_rgb`.

    Raises:
        ImageError: if the shape, type or values are not as above, or `to_rgb` refuses the picture.
    """
    import torch

    if isinstance(image, torch.Tensor):
        return _check_tensor(image)
    if isinstance(image, np.ndarray):
        image = _array_to_pil(image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"picture of type {type(image).__name__} is not allowed; allowed: PIL image, array, tensor")
    pixels = torch.from_numpy(np.array(to_rgb(image, background))).permute(2, 0, 1)[None]
    return (pixels.float() / 127.5 - 1).contiguous()


def _array_to_pil(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ImageError(f"array of type {pixels.dtype} is not allowed; allowed: uint8")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))) or 0 in pixels.shape:
        raise ImageError(f"array of shape {pixels.shape} is not allowed; allowed: (H, W) or (H, W, 1, 3 or 4)")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))


def _check_tensor(pixels: torch.Tensor) -> torch.Tensor:
    import torch

    shape = tuple(pixels.shape)
    if shape[-3:-2] != (3,) or len(shape) not in (3, 4) or (len(shape) == 4 and shape[0] != 1) or 0 in shape:
        raise ImageError(f"tensor of shape {shape} is not allowed; allowed: (3, H, W) or (1, 3, H, W)")
    pixels = pixels.detach().reshape(1, *shape[-3:])
    if pixels.dtype == torch.uint8:
        return pixels.float() / 127.5 - 1
    if not pixels.is_floating_point():
        raise ImageError(f"tensor of type {pixels.dtype} is not allowed; allowed: uint8, or floats in [-1, 1]")
    low, high = (value.item() for value in pixels.float().aminmax())
    if not (low >= -1 - _RANGE_SLACK and high <= 1 + _RANGE_SLACK):  # so written that NaN is refused too
        raise ImageError(f"tensor with values from {low:g} to {high:g} is not allowed; allowed: -1 to 1")
    return pixels.float().clamp(-1, 1)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """Convert a tensor (3, H, W) or (1, 3, H, W) in [-1, 1] to PIL RGB; values beyond are clamped, all are rounded.

    Raises:
        ImageError: if the shape is another.
    """
    import torch

    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ImageError(f"tensor of shape {tuple(pixels.shape)} is not allowed; allowed: (3, H, W) or (1, 3, H, W)")
    pixels = ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def list_images(folder: str | Path, recursive: bool = True) -> list[Path]:
    """The sorted paths of the picture files in a folder, known by their extensions in any case.

    Raises:
        ImageError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder")
    paths = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(path for path in paths if path.suffix.lower() in EXTENSIONS and path.is_file())
