"""Distortion between two pictures, on 8-bit RGB, as the field reports it.

PSNR is over all three channels together. MS-SSIM is the five-scale, 11x11-window form on each RGB channel, averaged, by
`pytorch_msssim`, which CompressAI's evaluation uses as well. pyiqa's own MS-SSIM defaults to luminance of YCbCr,
some 0.05 higher on JPEG at quality 5; on RGB it agrees to 1e-3 but is sixty times slower (float64, two-dimensional
windows). No metric here needs weights. torch is imported lazily.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from oscar.images import to_pil, to_rgb, to_tensor

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Picture = Image.Image | np.ndarray | torch.Tensor
else:
    Picture = Any

# Four halvings must leave more than the 11-pixel window's reach: (11 - 1) * 2**4 + 1.
MS_SSIM_MIN_SIDE = 161
MS_SSIM_UNAVAILABLE = f"unavailable: picture smaller than {MS_SSIM_MIN_SIDE} pixels on a side"


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB over the pixels of all three channels, peak 255.

    Args:
        a: PIL image, uint8 array (H, W, 3), or tensor (3, H, W) or (1, 3, H, W), uint8 or floats in [-1, 1], which are
            rounded to 8 bits first.
        b: the other picture, of the same size.

    Returns:
        dB; infinity for equal pictures.

    Raises:
        ValueError: if the sizes differ.
        ImageError: if one of them is not such a picture.
    """
    a, b = _pixels(a, b)
    difference = a.astype(np.int64) - b
    error = int((difference * difference).sum())  # in integers: exact
    return 10 * math.log10(255**2 * a.size / error) if error else math.inf


def ms_ssim(a: Picture, b: Picture) -> float | None:
    """Multi-scale structural similarity (Wang et al. 2003), mean over the RGB channels, 1 for equal pictures.

    Args:
        a: as for `psnr`.
        b: the other picture, of the same size.

    Returns:
        The similarity, or None where a side is under 161 pixels: the metric's five scales do not exist there
        (`MS_SSIM_UNAVAILABLE` says so in words).

    Raises:
        ValueError: if the sizes differ.
        ImageError: if one of them is not such a picture.
    """
    a, b = _pixels(a, b)
    if min(a.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    import pytorch_msssim
    import torch

    tensors = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() for pixels in (a, b))
    with torch.inference_mode():
        return pytorch_msssim.ms_ssim(*tensors, data_range=255).item()


def _pixels(a: Picture, b: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures as uint8 (H, W, 3)."""
    a, b = _to_array(a), _to_array(b)
    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]} pixels cannot be "
                         "compared; allowed: equal sizes")  # fmt: skip
    return a, b


def _to_array(picture: Picture) -> np.ndarray:
    rgb = to_rgb(picture) if hasattr(picture, "getexif") else to_pil(to_tensor(picture))  # PIL needs no torch
    return np.array(rgb)
