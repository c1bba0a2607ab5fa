"""PSNR and MS-SSIM of two images, our own code: pyiqa's agree to 2e-6, take 10 to 30 times as long and are an extra.

`psnr` is pyiqa's `PSNR()`, `ms_ssim` its `MS_SSIM(test_y_channel=False)`, `ms_ssim_y` its default `MS_SSIM()`, which
the published evaluation reports. SSIMULACRA2 is that of the package of its name. torch is imported lazily.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from oscar.data.images import to_rgb
from oscar.data.tensors import to_pil, to_tensor

if TYPE_CHECKING:
    import torch
    from PIL import Image

    ImageLike = Image.Image | np.ndarray | torch.Tensor
else:
    ImageLike = Any


# Four halvings must leave more than the 11-pixel window's reach: (11 - 1) * 2**4 + 1.
MS_SSIM_MIN_SIDE = 161


MS_SSIM_UNAVAILABLE = f"unavailable: image smaller than {MS_SSIM_MIN_SIDE} pixels on a side"


SSIMULACRA2_MIN_SIDE = 8


def psnr(a: ImageLike, b: ImageLike) -> float:
    """Peak signal-to-noise ratio in dB over the pixels of all three channels, peak 255.

    As in pyiqa, 1e-8 of the squared peak is added to the mean squared error: 4e-4 dB less at 40 dB, and 80 dB for
    equal images, so that every pair has a finite value and means leave none out.

    Args:
        a: PIL image, uint8 array (H, W, 3), or tensor (3, H, W) or (1, 3, H, W), uint8 or floats in [-1, 1], which are
            rounded to 8 bits first.
        b: the other image, of the same size.

    Returns:
        dB, 80 at most.

    Raises:
        ValueError: if the sizes differ.
        ImageError: if one of them is not such an image.
    """
    a, b = equal_arrays(a, b)
    difference = a.astype(np.int64) - b
    error = int((difference * difference).sum())  # in integers: exact
    return -10 * math.log10(error / (255**2 * a.size) + 1e-8)


def ms_ssim(a: ImageLike, b: ImageLike) -> float | None:
    """Multi-scale structural similarity (Wang et al. 2003) over the RGB channels, 1 for equal images.

    Five scales, Gaussian window of 11x11 pixels, 2x2 averages between scales. Conventions are pyiqa's: at each scale
    negative contrast terms count as 0 pixel by pixel, and the mean is over pixels and channels together, before the
    product over scales. `pytorch_msssim`, which CompressAI uses, cuts off below 0 after the mean over pixels, and
    averages the channels' products: up to 1e-3 away. `ms_ssim_y` is some 0.05 higher on JPEG at quality 5. The window
    is applied by rows and columns in float32, within 3e-5 of float64; pyiqa's own two-dimensional one takes a hundred
    times as long in float64, and in float32 is up to 4e-4 off on flat images.

    Args:
        a: as for `psnr`.
        b: the other image, of the same size.

    Returns:
        The similarity, or None where a side is under 161 pixels: the metric's five scales do not exist there
        (`MS_SSIM_UNAVAILABLE` says so in words).

    Raises:
        ValueError: if the sizes differ.
        ImageError: if one of them is not such an image.
    """
    return _ms_ssim(a, b, lambda pixels: pixels)


def ms_ssim_y(a: ImageLike, b: ImageLike) -> float | None:
    """Multi-scale structural similarity of the luma alone, as pyiqa's default has it and the published code reports it.

    Luma is Y of YIQ, rounded to 8 bits; the rest is as in `ms_ssim`, in float64: within 1e-6 of pyiqa's own call, in a
    tenth of its time.

    Args, Returns, Raises: as for `ms_ssim`.
    """
    return _ms_ssim(a, b, _luma)


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    """RGB (1, 3, H, W) in [0, 1] -> Y (1, 1, H, W), likewise, in float64."""
    weights = pixels.new_tensor([[0.299], [0.587], [0.114]])
    return ((pixels.movedim(1, -1) @ weights).movedim(-1, 1) * 255).round().double() / 255


def _ms_ssim(a: ImageLike, b: ImageLike, channels: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
    a, b = equal_arrays(a, b)
    if min(a.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    import torch
    import torch.nn.functional as F

    from oscar.metrics.ssim import MS_SSIM_WEIGHTS, ssim_parts

    product = 1.0
    with torch.inference_mode():
        x, y = channels(unit_tensor(a)), channels(unit_tensor(b))
        for scale, weight in enumerate(MS_SSIM_WEIGHTS):
            if scale:
                padding = [side % 2 for side in x.shape[-2:]]
                x, y = F.avg_pool2d(x, 2, padding=padding), F.avg_pool2d(y, 2, padding=padding)
            luminance, contrast = ssim_parts(x, y)
            similarity = contrast.relu()
            if scale == len(MS_SSIM_WEIGHTS) - 1:
                similarity *= luminance
            product *= similarity.mean(dtype=torch.float64).item() ** weight
    return product


def ssimulacra2(a: ImageLike, b: ImageLike) -> float | None:
    """SSIMULACRA2 (Sneyers 2023), tuned to opinions of people on compressed images, by the package `ssimulacra2`.

    Structure, edges that came and edges that went at six scales of the colour space XYB, weighted. 100 for equal
    images, 90 visually lossless, 70 high, 50 medium, 30 low quality; it goes below 0. Under 225 pixels a side some of
    the scales do not exist: compare such images with none but their like.

    Args, Raises: as for `psnr`.

    Returns:
        The score, or None where a side is under 8 pixels.
    """
    a, b = equal_arrays(a, b)
    if min(a.shape[:2]) < SSIMULACRA2_MIN_SIDE:
        return None
    from PIL import Image
    from ssimulacra2 import compute_ssimulacra2

    files = [io.BytesIO(), io.BytesIO()]  # it takes nothing but files
    for pixels, file in zip((a, b), files, strict=True):
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return float(compute_ssimulacra2(*files))


def equal_arrays(*images: ImageLike) -> list[np.ndarray]:
    """The images as uint8 (H, W, 3), all of one size."""
    arrays = [_to_array(image) for image in images]
    if len({array.shape for array in arrays}) > 1:
        sizes = " and ".join(f"{array.shape[1]}x{array.shape[0]}" for array in arrays)
        raise ValueError(f"images of {sizes} pixels cannot be compared; allowed: equal sizes")
    return arrays


def _to_array(image: ImageLike) -> np.ndarray:
    rgb = to_rgb(image) if hasattr(image, "getexif") else to_pil(to_tensor(image))  # PIL needs no torch
    return np.array(rgb)


def unit_tensor(pixels: np.ndarray) -> torch.Tensor:
    """A uint8 array (H, W, 3) as float32 (1, 3, H, W) in [0, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255
