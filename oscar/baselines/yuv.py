"""RGB images to raw planar Y'CbCr files of 10 bits and back: what VVC programs read and write.

BT.709, full range; 10 bits so that rounding stays far below what the codecs lose. Samples are 16-bit little endian.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

CHROMAS = ("4:2:0", "4:4:4")
_PEAK = 1023
_RED, _BLUE = 0.2126, 0.0722  # luma weights of BT.709
_TO_YUV = np.array(
    [
        [_RED, 1 - _RED - _BLUE, _BLUE],
        [-_RED / (2 - 2 * _BLUE), -(1 - _RED - _BLUE) / (2 - 2 * _BLUE), 0.5],
        [0.5, -(1 - _RED - _BLUE) / (2 - 2 * _RED), -_BLUE / (2 - 2 * _RED)],
    ]
)
_TO_RGB = np.linalg.inv(_TO_YUV)
_OFFSET = np.array([0, 512, 512])


def to_yuv(image: Image.Image, chroma: str) -> bytes:
    """Planes Y, Cb, Cr of an RGB image, whose sides must be even for "4:2:0" (2x2 means)."""
    yuv = np.asarray(image, dtype=np.float64) @ _TO_YUV.T * (_PEAK / 255) + _OFFSET
    planes = [yuv[..., 0], yuv[..., 1], yuv[..., 2]]
    if chroma == "4:2:0":
        rows, columns = image.height // 2, image.width // 2
        planes[1:] = [plane.reshape(rows, 2, columns, 2).mean(axis=(1, 3)) for plane in planes[1:]]
    return b"".join(plane.round().clip(0, _PEAK).astype("<u2").tobytes() for plane in planes)


def from_yuv(data: bytes, width: int, height: int, chroma: str) -> Image.Image:
    """RGB image of the planes; chroma of "4:2:0" is interpolated linearly.

    Raises:
        ValueError: if the data is not of this size.
    """
    shape = (height // 2, width // 2) if chroma == "4:2:0" else (height, width)
    luma, expected = height * width, height * width + 2 * shape[0] * shape[1]
    if len(data) != 2 * expected:
        raise ValueError(f"{len(data)} bytes of decoded samples; {width}x{height} in {chroma} has {2 * expected}")
    samples = np.frombuffer(data, dtype="<u2").astype(np.float32)
    yuv = np.empty((height, width, 3))
    yuv[..., 0] = samples[:luma].reshape(height, width)
    for channel, plane in enumerate(samples[luma:].reshape(2, *shape), start=1):
        yuv[..., channel] = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
    rgb = (yuv - _OFFSET) @ _TO_RGB.T * (255 / _PEAK)
    return Image.fromarray(rgb.round().clip(0, 255).astype(np.uint8))
