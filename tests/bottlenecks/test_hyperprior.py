"""The hyperprior bottleneck: its float networks say what its integers do, and gradients reach all that is trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from oscar.bitstream import MAX_QUALITY
from oscar.bitstream.hyperprior_weights import KNOTS
from oscar.bottlenecks import Payload, concatenate, from_config
from oscar.bottlenecks.hyperprior import Estimate, HyperpriorBottleneck
from oscar.bottlenecks.rounded_layers import knot_weights, scale_frequencies
from oscar.operating_points import Quality

CODES = (0, 1234, MAX_QUALITY)


def latents(batch: int = 2) -> Tensor:
    """Smooth along the rows, so that there is something to predict."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 6, 10, 14, generator=generator).cumsum(dim=3) / 3


def cost(estimate: Estimate) -> Tensor:
    return estimate.bits.mean() / 1000 + 10 * (estimate.z_hat - latents()).square().mean()


def encode(bottleneck: HyperpriorBottleneck, latent: Tensor, code: int) -> list[Payload]:
    return bottleneck.write(bottleneck.quantise(latent, Quality(code)), Quality(code))


def decode(bottleneck: HyperpriorBottleneck, payloads: list[Payload], shape: tuple[int, int], code: int) -> Tensor:
    symbols = [bottleneck.read(payload, Quality(code), shape) for payload in payloads]
    return bottleneck.dequantise(concatenate(symbols), Quality(code))


@pytest.fixture(scope="module")
def bottleneck() -> HyperpriorBottleneck:
    """Trained for a moment, with biases that differ from knot to knot, and the integers of that."""
    torch.manual_seed(0)
    made = HyperpriorBottleneck(6, [2, 4], hidden=16, features=8, side_channels=5, side_features=7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name and "side_model" not in name:
                parameter += 0.3 * torch.randn_like(parameter)
    optimiser = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 5e-3)
    for _ in range(150):
        estimate = made.estimate(latents(), torch.rand(2))
        optimiser.zero_grad()
        cost(estimate).backward()
        optimiser.step()
    made.eval().update()
    return made


def test_gradients_reach_everything_that_is_trained() -> None:
    torch.manual_seed(0)
    made = HyperpriorBottleneck(6, [2, 4], hidden=16, features=8, side_channels=5, side_features=7)
    latent = (9 * latents()).requires_grad_()  # not all side information is 0
    estimate = made.estimate(latent, torch.tensor([0.1, 0.9]))
    (estimate.bits.sum() + estimate.z_hat.square().sum()).backward()
    without = {name for name, value in made.named_parameters() if value.grad is None or not value.grad.any()}
    assert without == {"side_model.quantiles"} and latent.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_leaves_it_exact(bottleneck, dtype) -> None:
    """The rounding of weights and activations must be the integers', whatever precision the networks around it have."""
    latent, quality = latents().to(dtype), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        plain = bottleneck.estimate(latent.float(), quality)
        with torch.autocast("cpu", dtype):
            mixed = bottleneck.estimate(latent, quality)
    assert torch.equal(plain.z_hat, mixed.z_hat) and torch.equal(plain.bits, mixed.bits)


def test_it_learns(bottleneck) -> None:
    torch.manual_seed(0)
    new = HyperpriorBottleneck(6, [2, 4], hidden=16, features=8, side_channels=5, side_features=7).eval()
    quality = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        assert cost(bottleneck.estimate(latents(), quality)) < 0.8 * cost(new.estimate(latents(), quality))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", [(10, 14), (1, 1), (9, 7)])
def test_estimates_are_of_the_file(bottleneck, code: int, shape: tuple[int, int]) -> None:
    latent = latents()[..., : shape[0], : shape[1]]
    with torch.no_grad():
        estimate = bottleneck.estimate(latent, torch.full((2,), code / MAX_QUALITY))
    payloads = encode(bottleneck, latent, code)
    with torch.no_grad():
        z_hat = decode(bottleneck, payloads, shape, code)
    # Sums in float32 may fall to the other side.
    assert (z_hat - estimate.z_hat).abs().mean() < 0.01 * latent.abs().mean()
    for payload, bits in zip(payloads, estimate.bits.tolist(), strict=True):
        assert abs(8 * len(payload.data) - bits) <= 0.02 * bits + 64  # the coder's last state


def test_images_of_a_batch_are_independent(bottleneck) -> None:
    latent, code = latents(3), 2000
    together = encode(bottleneck, latent, code)
    assert together == [encode(bottleneck, one[None], code)[0] for one in latent]
    quality = torch.tensor([0.0, 0.4, 1.0])
    with torch.no_grad():
        bits = bottleneck.estimate(latent, quality).bits
        alone = torch.cat([bottleneck.estimate(latent[i : i + 1], quality[i : i + 1]).bits for i in range(3)])
    torch.testing.assert_close(bits, alone)


def test_rate_and_accuracy_rise_with_quality(bottleneck) -> None:
    latent = latents()
    lengths = [sum(len(payload.data) for payload in encode(bottleneck, latent, code)) for code in CODES]
    errors = [
        (decode(bottleneck, encode(bottleneck, latent, code), (10, 14), code) - latent).square().mean()
        for code in CODES
    ]
    assert lengths == sorted(lengths) and errors == sorted(errors, reverse=True)


def test_knots() -> None:
    torch.testing.assert_close(knot_weights(torch.tensor([0.0, 1.0])), torch.eye(KNOTS)[[0, -1]])
    between = knot_weights(torch.tensor([0.25 / (KNOTS - 1)]))[0]
    torch.testing.assert_close(between[:2], torch.tensor([0.75, 0.25]))
    assert not between[2:].any()


def test_tables_of_scales() -> None:
    tables = scale_frequencies()
    centre = tables.shape[1] // 2
    assert (tables.sum(axis=1) == 2**16).all() and np.abs(tables - tables[:, ::-1]).max() <= 1
    assert (np.diff(tables[:, centre]) < 0).sum() > 55  # wider and wider
    assert (tables[:, centre - 8 : centre + 9] > 0).all()


def test_groups_must_fit() -> None:
    with pytest.raises(ValueError, match=r"bottleneck\.groups are \[2, 5\]; allowed: .* 6 latent channels$"):
        HyperpriorBottleneck(6, [2, 5])


def test_its_description_makes_it_anew(bottleneck) -> None:
    described = json.loads(json.dumps(bottleneck.to_config()))
    assert described["kind"] == HyperpriorBottleneck.kind
    from_config(described, 6).load_state_dict(bottleneck.state_dict())
