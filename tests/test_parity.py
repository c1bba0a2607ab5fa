"""A converted checkpoint against the published implementation's own outputs, at every rate."""

from __future__ import annotations

import pytest
import torch

from oscar.codec import OscarCodec
from oscar.convert.published import convert
from oscar.inference.load import load
from oscar.rates import PAPER_RATES


@pytest.fixture(scope="module")
def converted(golden, golden_pkl, tmp_path_factory) -> OscarCodec:
    """The tiny published checkpoint as a user gets it: converted, saved, loaded with merged adapters."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert([golden_pkl], folder, golden / "sd_tiny")
    return load(folder, dtype=torch.float32)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of images in [-1, 1], in dB."""
    return 10 * torch.log10(4 / (one - other).square().mean()).item()


@pytest.mark.parametrize("rate", PAPER_RATES, ids=str)
def test_outputs_of_the_published_implementation(converted: OscarCodec, golden_cases, rate) -> None:
    """The original latent's norms, and no file; of the posterior the mode, since the published draws are unseeded."""
    with torch.inference_mode():
        encoded = converted.quantise(converted.encode_latent(golden_cases["image"], rate), rate)
        found = converted.decode(encoded.symbols, rate)
        z_hat = converted.bottleneck.at(rate).decode(encoded.symbols.indices)
    assert torch.equal(encoded.symbols.indices.flatten(), golden_cases[f"{rate.id}.indices"].long().flatten())
    for part, value in (("z_hat", z_hat), ("x0", found.x0), ("image", found.image)):
        assert distance(value, golden_cases[f"{rate.id}.{part}"]) < 1e-4, part


@pytest.mark.parametrize("rate", PAPER_RATES, ids=str)
def test_a_real_file_costs_what_rounding_the_norms_costs(converted: OscarCodec, golden_cases, rate) -> None:
    (data,) = converted.compress_tensor(golden_cases["image"], rate)
    (image,) = converted.decompress_tensor([data])
    assert psnr(image, golden_cases[f"{rate.id}.image"][0]) >= 45  # a byte for each norm
