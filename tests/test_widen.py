"""scripts/widen.py: a model with more channels and blocks that makes of an image what it made before."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from oscar import OscarCodec
from oscar.data.tensors import as_batch
from oscar.operating_points import Quality


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script("widen")


@pytest.fixture(scope="module")
def nano() -> OscarCodec:
    codec = OscarCodec.from_pretrained("nano")
    codec.bottleneck.update()  # of the weights as they are now, rounded to float16
    return codec


@pytest.fixture(scope="module")
def wide(script: ModuleType, nano: OscarCodec) -> OscarCodec:
    blocks = [count + 1 for count in nano.backbone.vae.config.decoder_blocks]
    return script.widen(nano, nano.bottleneck.latent_channels + 20, blocks)


@torch.no_grad()
def test_what_was_there_is_as_it_was(nano: OscarCodec, wide: OscarCodec, astronaut: Image.Image) -> None:
    images = as_batch(astronaut.crop((160, 32, 320, 160)))
    had = nano.bottleneck.latent_channels
    latent, own = nano.backbone.encode(images), wide.backbone.encode(images)
    torch.testing.assert_close(own[:, :had], latent, rtol=1e-4, atol=1e-4)
    assert own[:, had:].abs().mean() > 0.01
    empty = torch.cat([latent, torch.zeros_like(own[:, had:])], dim=1)
    torch.testing.assert_close(wide.backbone.decode(empty), nano.backbone.decode(latent), rtol=1e-4, atol=1e-4)
    timestep = nano.mapping.at(0.5)
    x0, restored = nano.denoiser(latent, timestep), wide.denoiser(own, timestep)
    torch.testing.assert_close(restored[:, :had], x0, rtol=1e-4, atol=1e-4)
    for value in (0.0, 0.5, 1.0):
        point = Quality.of(value)
        expected = nano.bottleneck.quantise(latent, point).values
        found = wide.bottleneck.quantise(own, point).values
        # what is rounded differs by a step of the coder's, 1/64, here and there, since sums are in another order
        assert ((found[:, :had] - expected).abs() > 1).float().mean() < 0.002


@torch.no_grad()
def test_the_new_channels_are_further_frequencies(nano: OscarCodec, wide: OscarCodec) -> None:
    had = nano.bottleneck.latent_channels
    down = wide.backbone.vae.encoder.blocks[1].weight[:, :, 0, 0]
    new = down[had:] / down[had:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(new @ new.t(), torch.eye(20), rtol=0, atol=1e-5)
    assert wide.bottleneck.groups == (*nano.bottleneck.groups, 20)
    assert wide.provenance == nano.provenance


def test_they_make_the_image_better(nano: OscarCodec, wide: OscarCodec, astronaut: Image.Image) -> None:
    image, errors = as_batch(astronaut), []
    for codec in (nano, wide):
        (decoded,) = codec.decompress_tensor(codec.compress_tensor(image, 1.0))
        errors.append((decoded - image).square().mean().item())
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano", "--channels", "8"], "channels is 8; allowed: "),
        (["nano", "--channels", "200", "--decoder-blocks", "1"], "decoder_blocks are .1.; allowed: 3 numbers"),
        (["nano-vq", "--channels", "200"], "has AutoencoderDC and a bottleneck of kind vq; allowed: AutoencoderConv"),
    ],
)
def test_what_cannot_be_widened_is_refused(
    script: ModuleType, words: list[str], message: str, tmp_path: Path, capsys
) -> None:
    assert script.main([*words, "--out", str(tmp_path / "wide")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert not (tmp_path / "wide").exists()


def test_the_command_writes_what_training_starts_from(
    script: ModuleType, nano: OscarCodec, tmp_path: Path, capsys
) -> None:
    had = nano.bottleneck.latent_channels
    assert script.main(["nano", "--channels", str(had + 4), "--out", str(tmp_path / "wide")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'wide'}: {had + 4} latent channels\n"
    assert OscarCodec.from_pretrained(tmp_path / "wide").bottleneck.latent_channels == had + 4
