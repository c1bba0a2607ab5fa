"""Metrics: known values, every kind of input, agreement with other implementations, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from oscar.evaluation.metrics import MS_SSIM_MIN_SIDE, ms_ssim, psnr
from oscar.images import ImageError


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A smooth colour picture of 203x181 and a noisy form of it."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:181, 0:203]
    smooth = np.stack([127 + 90 * np.sin(x / 9 + c) * np.cos(y / (11 + c)) for c in range(3)], axis=-1)
    noisy = smooth + generator.normal(0, 12, smooth.shape)
    return smooth.round().astype(np.uint8), noisy.round().clip(0, 255).astype(np.uint8)


def forms(pixels: np.ndarray) -> list:
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    return [pixels, Image.fromarray(pixels), tensor, tensor[None].float() / 127.5 - 1]


def test_psnr_of_known_errors():
    black = np.zeros((4, 5, 3), np.uint8)
    one_off = black.copy()
    one_off[0, 0, 0] = 30
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 255) == 0
    assert psnr(black, one_off) == pytest.approx(10 * math.log10(255**2 / (900 / 60)))


def test_every_kind_of_input_gives_the_same(pair):
    a, b = pair
    for metric in (psnr, ms_ssim):
        values = [metric(x, y) for x, y in zip(forms(a), reversed(forms(b)), strict=True)]
        assert len(set(values)) == 1


def test_ms_ssim_of_equal_and_worse(pair):
    a, b = pair
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert 0.5 < ms_ssim(a, b) < 0.99


def test_small_pictures_have_no_ms_ssim():
    small = np.zeros((MS_SSIM_MIN_SIDE - 1, 300, 3), np.uint8)
    assert ms_ssim(small, small) is None
    assert psnr(small, small) == math.inf
    assert ms_ssim(np.zeros((161, 161, 3), np.uint8), np.zeros((161, 161, 3), np.uint8)) == pytest.approx(1)


def test_agreement_with_pyiqa_on_rgb(pair):
    psnr_arch = pytest.importorskip("pyiqa.archs.psnr_arch")
    ssim_arch = pytest.importorskip("pyiqa.archs.ssim_arch")
    tensors = [torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 for pixels in pair]
    assert psnr(*pair) == pytest.approx(psnr_arch.psnr(*(tensor.double() for tensor in tensors)).item(), abs=1e-4)
    assert ms_ssim(*pair) == pytest.approx(ssim_arch.MS_SSIM(test_y_channel=False)(*tensors).item(), abs=1e-3)


def test_refusals(pair):
    a, b = pair
    for metric in (psnr, ms_ssim):
        with pytest.raises(ValueError, match="203x181 and 203x180 pixels"):
            metric(a, b[:-1])
        with pytest.raises(ImageError):
            metric(a.astype(np.float32), b)
