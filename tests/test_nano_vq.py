"""The shipped vector-quantised model: what the README claims of it, on real photographs and real files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from oscar import OscarCodec
from oscar.baselines import make_baseline
from oscar.bitstream import Container
from oscar.inference.load import load
from oscar.metrics.image import ms_ssim, psnr
from oscar.rates import RATES
from oscar.utils.provenance import SHIPPED

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def nano() -> OscarCodec:
    return load("nano-vq", dtype=torch.float32)


def test_it_is_small_and_has_eight_rates(nano):
    sizes = {path: path.stat().st_size for path in (SHIPPED / "nano-vq").rglob("*") if path.is_file()}
    weights = sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    assert weights <= 20 * MEGABYTE and sum(sizes.values()) - weights <= 1.5 * MEGABYTE  # graphs hold no weights
    assert nano.bottleneck.rates == tuple(RATES[rate_id] for rate_id in (0, 1, 2, 3, 6, 7, 9, 11))
    assert Container.unpack(nano.compress(Image.new("RGB", (8, 8)))).rate.bpp == 0.043  # the middle one


def curve(codec: OscarCodec, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes, PSNR and MS-SSIM at each rate, means over the images."""
    points = []
    rates = codec.bottleneck.points
    for rate in rates:
        for image in images:
            data = codec.compress(image, rate)
            decoded = codec.decompress(data)
            assert decoded.size == image.size
            points.append((len(data), psnr(image, decoded), ms_ssim(image, decoded)))
    return tuple(np.reshape(points, (len(rates), len(images), 3)).mean(axis=1).T)


def check_curve(sizes: np.ndarray, decibels: np.ndarray, similarity: np.ndarray) -> None:
    """Quality rises with the rate, and so do sizes."""
    assert (np.diff(decibels) > 0).all()
    assert (np.diff(similarity) > 0).all()
    assert (np.diff(sizes) > 0).all()


def test_rate_and_quality_rise_together_on_a_photograph(nano, astronaut):
    sizes, decibels, similarity = curve(nano, [astronaut])
    check_curve(sizes, decibels, similarity)
    assert decibels[-1] > 21
    assert similarity[-1] > 0.85


@pytest.mark.slow
def test_rate_and_quality_rise_together_on_photographs(nano, photographs):
    check_curve(*curve(nano, [image for name, image in photographs.items() if name != "astronaut"]))


@pytest.mark.parametrize("rate", [0.0937, 0.125])
@pytest.mark.parametrize(("size", "limit"), [((1, 1), 60), ((7, 5), 60), ((333, 517), 20), ((64, 2048), 30)])
def test_any_size(nano, astronaut, size, limit, rate):
    """Mean absolute error in levels of 255; the two smallest images are a single index of 6 or 8 bits."""
    image = astronaut.resize(size)
    decoded = nano.decompress(nano.compress(image, rate))
    assert decoded.size == size
    error = np.abs(np.asarray(decoded, dtype=int) - np.asarray(image, dtype=int))
    assert error.mean() < limit


@pytest.fixture(scope="module")
def beside_jpeg(nano, photographs) -> tuple[np.ndarray, np.ndarray]:
    """Means of bpp, PSNR and MS-SSIM over the photographs: nano-vq at its top rate, JPEG at quality 5."""
    baseline = make_baseline("jpeg")
    ours, theirs = [], []
    for image in photographs.values():
        pixels = image.width * image.height
        data = nano.compress(image, 0.125)
        decoded = nano.decompress(data)
        ours.append((8 * len(data) / pixels, psnr(image, decoded), ms_ssim(image, decoded)))
        encoded = baseline.encode(image, 5)
        decoded = baseline.decode(encoded.data)
        theirs.append((8 * len(encoded.data) / pixels, psnr(image, decoded), ms_ssim(image, decoded)))
    return np.mean(ours, 0), np.mean(theirs, 0)


@pytest.mark.slow
def test_fewer_bits_and_better_quality_than_jpeg_at_quality_5(beside_jpeg):
    (bpp, decibels, similarity), (jpeg_bpp, jpeg_decibels, jpeg_similarity) = beside_jpeg
    assert bpp <= 0.1 < jpeg_bpp
    assert decibels > jpeg_decibels
    assert similarity > jpeg_similarity
