"""The bottleneck against the paper's sizes, the published key table and the published implementation's outputs."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from torch import nn

from oscar.bottlenecks.hyper_encoder import HyperEncoder
from oscar.bottlenecks.vq import VQBottleneck
from oscar.rates import PAPER_RATES, RATES, RatePoint

PARAMETERS = {8: 16_572_068, 16: 14_096_036, 32: 10_753_700, 64: 7_411_364}  # by grid; 81.8 M for the eight


@pytest.fixture(scope="module")
def paper() -> VQBottleneck:
    """The paper's bottleneck at full size, without storage."""
    with torch.device("meta"):
        return VQBottleneck(PAPER_RATES)


@pytest.fixture
def bottleneck() -> VQBottleneck:
    torch.manual_seed(0)
    return VQBottleneck(PAPER_RATES, width=8, features=8, codebook_dim=4)


def latent(height: int = 16, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(seed))


def test_parameter_counts_of_the_paper(paper: VQBottleneck) -> None:
    counts = {rate: sum(parameter.numel() for parameter in paper.at(rate).parameters()) for rate in PAPER_RATES}
    assert counts == {rate: PARAMETERS[rate.grid] for rate in PAPER_RATES}
    assert round(sum(counts.values()) / 1e6, 1) == 81.8


def test_keys_and_shapes_of_the_published_checkpoint(paper: VQBottleneck, golden) -> None:
    manifest = json.loads((golden / "official_manifest.json").read_text())["hyper_encoders"]
    ours = {name: list(value.shape) for name, value in paper.hyper_encoders.state_dict().items()}
    assert ours == {name: shape for name, (shape, _) in manifest.items()}


def test_parameter_counts_follow_from_the_published_checkpoint(golden) -> None:
    manifest = json.loads((golden / "official_manifest.json").read_text())["hyper_encoders"]
    counts: Counter = Counter()
    for name, (shape, _) in manifest.items():
        if "_codebook" not in name:  # buffers
            counts[int(name.split(".")[0])] += math.prod(shape)
    assert counts == {rate.id: PARAMETERS[rate.grid] for rate in PAPER_RATES}


@pytest.mark.parametrize("rate", PAPER_RATES, ids=str)
@torch.inference_mode()
def test_outputs_of_the_published_implementation(golden_codec, golden_cases, rate) -> None:
    indices = golden_cases[f"{rate.id}.indices"].long()
    encoder = golden_codec.bottleneck.at(rate)
    found = encoder.encode(golden_cases["latent"])
    assert torch.equal(found, indices.reshape(found.shape))
    z_hat = encoder.decode(found)
    assert (z_hat - golden_cases[f"{rate.id}.z_hat"]).abs().max() < 1e-4


def assert_halves_agree(encoder: torch.nn.Module, rate: RatePoint) -> None:
    whole = encoder(latent())
    indices = encoder.encode(latent())
    assert indices.dtype == torch.int64
    assert indices.shape == (2, 16 // rate.downsample, 24 // rate.downsample)
    assert torch.equal(indices, whole.indices)
    torch.testing.assert_close(encoder.decode(indices), whole.z_hat)
    assert whole.z_hat.shape == latent().shape and whole.commitment == 0
    assert 0 <= indices.min() and indices.max() < rate.codebook_size


@pytest.mark.parametrize(("rate", "codebook_dim"), [*((rate, 4) for rate in RATES), (RATES[0], 8)], ids=str)
@torch.no_grad()
def test_halves_agree_with_the_forward_pass(rate, codebook_dim: int) -> None:
    encoder = VQBottleneck([rate], width=8, features=8, codebook_dim=codebook_dim).at(rate).eval()
    assert_halves_agree(encoder, rate)


@pytest.mark.parametrize("rate", [PAPER_RATES[0], PAPER_RATES[7]], ids=str)
@pytest.mark.parametrize("rotation_trick", [True, False])
def test_gradient_passes_the_quantiser(rate, rotation_trick: bool) -> None:
    torch.manual_seed(0)
    encoder = HyperEncoder(rate, width=8, features=8, codebook_dim=4, rotation_trick=rotation_trick)
    source = latent().requires_grad_()
    output = encoder.train()(source)
    output.z_hat.square().mean().backward()
    assert source.grad.abs().max() > 0
    for part in (encoder.backbone, encoder.quantizer.project_in, encoder.quantizer.project_out, encoder.proj):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
        assert max(gradient.abs().max() for gradient in gradients) > 0


def test_commitment_reaches_the_encoder_alone(bottleneck: VQBottleneck) -> None:
    encoder = bottleneck.at(PAPER_RATES[7]).train()
    commitment = encoder(latent()).commitment
    assert commitment.shape == () and 0 < commitment < 4  # a mean squared distance of vectors on the sphere
    commitment.backward()
    assert encoder.backbone[0].weight.grad.abs().max() > 0
    assert encoder.proj[0].weight.grad is None


def test_training_moves_codes_and_revives_dead_ones() -> None:
    torch.manual_seed(0)
    rate = PAPER_RATES[7]
    encoder = HyperEncoder(rate, 8, 8, 4, kmeans_init=True, dead_code_threshold=0.05, decay=0.5).train()
    for step in range(6):
        before = encoder.quantizer.codebook.clone()
        encoder(latent(seed=step))
        assert not torch.equal(before, encoder.quantizer.codebook)
    norms = encoder.quantizer.codebook.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    used = torch.cat([encoder.eval().encode(latent(seed=step)).flatten() for step in range(6)])
    assert len(used.unique()) > rate.codebook_size / 4


def test_rates_are_independent(bottleneck: VQBottleneck) -> None:
    bottleneck.at(PAPER_RATES[3])(latent()).z_hat.sum().backward()
    touched = {name.split(".")[1] for name, parameter in bottleneck.named_parameters() if parameter.grad is not None}
    assert touched == {"3"}


def test_codebook_sizes_may_depart_from_the_rates() -> None:
    bottleneck = VQBottleneck([RATES[10]], codebook_sizes={10: 8196}, width=8, features=8, codebook_dim=4)
    assert bottleneck.at(RATES[10]).codebook_size == 8196
    described = json.loads(json.dumps(bottleneck.to_config()))
    assert described == {"rates": [10], "codebook_sizes": {"10": 8196}, "width": 8, "features": 8, "codebook_dim": 4}


@torch.no_grad()
def test_half_precision_runs(bottleneck: VQBottleneck) -> None:
    bottleneck.eval().to(torch.bfloat16)
    symbols = bottleneck.quantise(latent().bfloat16(), PAPER_RATES[7])
    assert bottleneck.dequantise(symbols, PAPER_RATES[7]).dtype == torch.float32  # whatever the networks compute in


def test_modules_of_the_paper(paper: VQBottleneck) -> None:
    """The last of the three steps come first: a grid of 32 halves once, at the third."""
    for rate in PAPER_RATES:
        strides = [m.stride[0] for m in paper.at(rate).backbone if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        assert strides == [2] * (rate.downsample.bit_length() - 1)
    assert paper.at(PAPER_RATES[2]).backbone[0].kernel_size == (1, 1)
