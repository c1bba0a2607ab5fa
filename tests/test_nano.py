"""The shipped model with a hyperprior: what the README claims of it, on real photographs and real files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oscar.baselines import make_baseline
from oscar.codec import OscarCodec
from oscar.data.tensors import to_tensor
from oscar.evaluation.codecs import OscarImageCodec
from oscar.inference.load import load
from oscar.metrics.image import ms_ssim, psnr
from oscar.utils.provenance import SHIPPED

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def nano() -> OscarCodec:
    return load("nano", dtype=torch.float32)


def test_it_is_small() -> None:
    files = [path for path in (SHIPPED / "nano").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * MEGABYTE


def test_a_photograph_at_all_qualities(nano, astronaut) -> None:
    files = [nano.compress(astronaut, quality=quality) for quality in nano.points]
    bpp = [8 * len(data) / (astronaut.width * astronaut.height) for data in files]
    assert bpp == sorted(set(bpp))
    assert bpp[0] <= 0.02 and bpp[-1] >= 0.3
    decoded = [nano.decompress(data) for data in (files[0], files[12], files[24])]
    for metric in (psnr, ms_ssim):
        low, middle, high = (metric(astronaut, image) for image in decoded)
        assert low < middle < high
    for data in files:
        container, point, symbols = nano.read(data)
        (bits,) = nano.bottleneck.estimated_bits(symbols, point)
        assert 8 * (len(data) - len(container.payload)) + bits == pytest.approx(8 * len(data), rel=0.02)


@pytest.mark.parametrize("max_bytes", [600, 4000, 11000])
def test_targets_are_used(nano, astronaut, max_bytes) -> None:
    assert 0.98 * max_bytes <= len(nano.compress(astronaut, max_bytes=max_bytes)) <= max_bytes


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (333, 517), (64, 2048)])
def test_any_size(nano, astronaut, size) -> None:
    image = astronaut.resize(size)
    decoded = nano.decompress(nano.compress(image, quality=0.7))
    assert decoded.size == size
    if min(size) > 16:
        assert psnr(image, decoded) > 20


@pytest.mark.slow
def test_rates_of_photographs(nano, photographs) -> None:
    """They rise strictly with the quality on each, from at most about 0.01 bpp to above 0.3."""
    ends = []
    for name, image in photographs.items():
        latent = nano.encode_latent(to_tensor(image), nano.bottleneck.default_point)
        sizes = [
            len(nano.write(nano.quantise(latent, point), point, image.height, image.width)[0])
            for point in nano.bottleneck.points
        ]
        assert sizes == sorted(set(sizes)), name
        ends.append((8 * sizes[0] / (image.width * image.height), 8 * sizes[-1] / (image.width * image.height)))
    lowest, highest = np.mean(ends, axis=0)
    assert lowest <= 0.0105 and highest >= 0.3


@pytest.mark.slow
def test_better_than_webp_at_its_smallest(nano, photographs) -> None:
    """MS-SSIM, mean over the photographs, at WebP's own bytes."""
    webp, ours, theirs = make_baseline("webp"), [], []
    under_test = OscarImageCodec(nano, "nano")
    for image in photographs.values():
        encoded = webp.encode(image, 0)
        theirs.append(ms_ssim(image, webp.decode(encoded.data)))
        data = under_test.codec.compress(image, max_bytes=len(encoded.data))
        ours.append(ms_ssim(image, nano.decompress(data)))
    assert np.mean(ours) > np.mean(theirs)
