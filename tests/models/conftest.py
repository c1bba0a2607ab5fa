"""Fixtures of the tests of large pictures: limits under which small ones count as large, and a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def backbone_config() -> Callable[[str], dict]:
    """Reads one of the configurations of backbones by its name."""
    return lambda name: OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/backbone/{name}.yaml"))


@pytest.fixture
def small_limits(monkeypatch) -> None:
    """Small pictures are cut into blocks and strips."""
    from oscar.inference import row_blocks, tiling

    monkeypatch.setattr(tiling, "WHOLE", 2**10)
    monkeypatch.setattr(tiling, "STRIP", 2**12)
    monkeypatch.setattr(row_blocks, "BLOCK", {"cpu": 2**10})
    monkeypatch.setattr(row_blocks, "QUERIES", 50)


@pytest.fixture(scope="session")
def standin_vae(backbone_config):
    """Stable Diffusion's autoencoder, narrow and random. Not to be changed by tests."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL.from_config(backbone_config("standin")["vae"]).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def pictures() -> Callable[..., Tensor]:
    """Makes a batch of pictures from its size: smooth, with noise, and another brightness on each side."""

    def make(count: int = 1, height: int = 152, width: int = 136) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 6, 6, generator=generator) * 1.6 - 0.8
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)

    return make
