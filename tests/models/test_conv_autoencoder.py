"""The autoencoder that begins as a block transform."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oscar.inference import tiling
from oscar.models.backbone import Backbone, vae_factor
from oscar.models.conv_autoencoder import AutoencoderConv, lowest_frequencies


@pytest.fixture
def vae() -> AutoencoderConv:
    """Small and trained in no way, but with all of its layers at work."""
    torch.manual_seed(0)
    made = AutoencoderConv(latent_channels=8, widths=(6, 8, 10), encoder_blocks=(1, 0, 1), decoder_blocks=(0, 1, 1))
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return made.eval().requires_grad_(False)


def test_frequencies_are_orthonormal_and_begin_with_grey() -> None:
    basis = lowest_frequencies(64, 16)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis[0], torch.full((768,), 768**-0.5))
    grey = torch.rand(40) @ basis[:40]  # luminance alone
    torch.testing.assert_close(grey[:256], grey[256:512])


def test_it_begins_as_the_transform(make_images) -> None:
    torch.manual_seed(0)
    made = AutoencoderConv(latent_channels=32, widths=(8, 8, 8)).requires_grad_(False)
    images = nn.functional.avg_pool2d(make_images(2, 64, 96), 9, 1, 4)
    decoded = made.decode(made.encode(images).latent).sample
    assert (decoded - images).square().mean() < 0.05 * images.var()
    torch.testing.assert_close(made.decode(made.encode(decoded).latent).sample, decoded, atol=1e-5, rtol=0)


def test_shapes(vae, make_images) -> None:
    latent = vae.encode(make_images(2, 64, 96)).latent
    assert latent.shape == (2, 8, 4, 6) and vae.decode(latent).sample.shape == (2, 3, 64, 96)
    assert vae.spatial_compression_ratio == vae_factor(vae) == 16


def test_a_backbone_of_it_is_stored(vae, backbone_config, tmp_path: Path, make_images) -> None:
    config = backbone_config("tiny")
    unet = {**config["unet"], "in_channels": 8, "out_channels": 8}
    backbone = Backbone.from_configs({"_class_name": "AutoencoderConv", **vae.config}, unet, config["scheduler"])
    backbone.vae.load_state_dict(vae.state_dict())
    assert backbone.factor == 16
    backbone.save_pretrained(tmp_path)
    restored = Backbone.from_pretrained(tmp_path)
    images = make_images(1, 48, 32)
    with torch.no_grad():
        assert torch.equal(restored.decode(restored.encode(images)), backbone.decode(backbone.encode(images)))


@pytest.mark.usefixtures("small_limits")
def test_strips_of_large_images(vae, make_images) -> None:
    images: Tensor = make_images(1, 640, 48)
    with torch.no_grad():
        latent = vae.encoder(images)
        assert tiling.can_be_cut(vae)
        torch.testing.assert_close(tiling.encode(vae, images), latent, atol=1e-5, rtol=0)
        torch.testing.assert_close(tiling.decode(vae, latent), vae.decoder(latent), atol=1e-5, rtol=0)
