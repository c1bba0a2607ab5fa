"""Fixtures of the tests of large images."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def standin_vae(backbone_config):
    """Stable Diffusion's autoencoder, narrow and random. Not to be changed by tests."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL.from_config(backbone_config("standin")["vae"]).eval().requires_grad_(False)
