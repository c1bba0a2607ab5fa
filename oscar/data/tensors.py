"""Images as tensors, and back."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from oscar.data.images import ImageError, check_sides, to_pixels

_RANGE_SLACK = 1e-3  # of float pixels, for results of float arithmetic that end a little outside [-1, 1]


def to_tensor(
    image: Image.Image | np.ndarray | torch.Tensor, background: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """Convert one image to a float32 tensor (1, 3, H, W) in [-1, 1].

    Args:
        image: a PIL image; a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a tensor (3, H, W) or
            (1, 3, H, W), of uint8 or of floats in [-1, 1]. A tensor keeps its device.
        background: see `to_rgb`.

    Raises:
        ImageError: if the shape, type or values are not as above, or `to_rgb` refuses the image.
    """
    if isinstance(image, torch.Tensor):
        return _check_tensor(image)
    pixels = torch.from_numpy(to_pixels(image, background)).permute(2, 0, 1)[None]
    return (pixels.float() / 127.5 - 1).contiguous()


def to_pil(pixels: torch.Tensor, truncate: bool = False) -> Image.Image:
    """Convert a tensor (3, H, W) or (1, 3, H, W) in [-1, 1] to PIL RGB; values beyond are clamped, all are rounded.

    With `truncate` they are rounded down, as by torchvision's `to_pil_image`, which the published code calls.

    Raises:
        ImageError: if the shape is another.
    """
    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ImageError(f"tensor of shape {tuple(pixels.shape)} is not allowed; allowed: (3, H, W) or (1, 3, H, W)")
    pixels = pixels.detach().float()
    levels = (pixels / 2 + 0.5) * 255 if truncate else ((pixels + 1) * 127.5).round()
    pixels = levels.clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def as_batch(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """An image as (1, 3, H, W) in [-1, 1]; ImageError if no file can hold it."""
    batch = to_tensor(image)
    check_sides(*batch.shape[-2:])
    return batch


def _check_tensor(pixels: torch.Tensor) -> torch.Tensor:
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
