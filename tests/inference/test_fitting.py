"""How many images a network works on together: decided from numbers, and from memory that is found without images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from oscar.inference.fitting import images_at_once, on_meta, peak_bytes
from oscar.models.backbone import Backbone

SMALL = 2**20


@pytest.mark.parametrize(
    ("device", "count", "size", "needed", "limit", "expected"),
    [
        ("cuda", 8, 2**22, 1e9, 80e9, 8),  # whole and batched while that fits
        ("cuda", 8, 2**22, 1e9, 3.5e9, 3),
        ("cuda", 8, 2**22, 1e9, 0.9e9, 0),  # one must be cut
        ("cuda", 8, 2**22, 1e9, math.inf, 8),
        ("cuda", 64, 2**18, 1e9, 5e9, 5),
        ("cuda", 64, 2**18, 1e9, 0.5e9, 1),  # a small image is never cut
        ("mps", 2, 2**24, 1e9, 8e9, 2),
        ("cpu", 8, 2**22, 1e9, 80e9, 1),  # large images one by one
        ("cpu", 8, 2**22, 1e9, 0.9e9, 0),
        ("cpu", 8, 2**22, 1e9, math.inf, 1),
        ("cpu", 8, 2**20, 1e9, 1, 8),  # the result of a small one does not depend on memory
        ("cpu", 1, 2**20 + 1, 1e9, 1, 0),
    ],
)
def test_decisions(device: str, count: int, size: int, needed: float, limit: float, expected: int) -> None:
    assert images_at_once(device, count, size, SMALL, needed, limit) == expected


def run(network: nn.Module, value: Tensor) -> Tensor:
    return network(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_the_maps_that_are_alive(dtype: torch.dtype) -> None:
    """Two neighbouring maps of a chain, with views for nothing; the input is not counted."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten(2)]
    network = nn.Sequential(*layers).to(dtype)
    positions = 32 * 32 * dtype.itemsize
    assert peak_bytes(network, run, 1, 3, 32, 32, dtype=dtype) == (8 + 8) * positions
    assert peak_bytes(network, run, 2, 3, 64, 32, dtype=dtype) == 4 * (8 + 8) * positions
    assert network[0].weight.device.type == "cpu"


def test_attention_keeps_no_scores() -> None:
    class Attention(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert peak_bytes(Attention(), run, 1, 1, 10**6, 8, dtype=torch.float32) == 32 * 10**6


def test_full_size_without_its_weights(backbone_config) -> None:
    """Stable Diffusion's decoder holds three maps of 256 channels at the image's resolution."""
    config = backbone_config("sd21_random")
    with torch.device("meta"):
        backbone = Backbone.from_configs(config["vae"], config["unet"], config["scheduler"])
    needed = peak_bytes(backbone.vae, backbone.run_decoder, 1, 4, 64, 64, dtype=torch.float32)
    assert 3 * 256 * 4 <= needed / 512**2 < 3.1 * 256 * 4


def test_a_copy_without_memory_keeps_what_layers_made_for_themselves() -> None:
    conv = nn.Conv2d(2, 2, 1)
    conv.made, conv.note = [torch.ones(3)], "text"
    copy = on_meta(conv)
    assert copy.weight.is_meta and copy.made[0].is_meta and copy.note == "text"
    assert isinstance(copy.weight, nn.Parameter) and not conv.weight.is_meta
