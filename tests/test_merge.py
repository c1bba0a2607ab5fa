"""Rates trained apart become one checkpoint, which decodes as each of them does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from oscar import OscarCodec
from oscar.checkpoint import CheckpointError
from oscar.convert.merge import add_rates, merge_rates
from oscar.inference.load import load
from oscar.timesteps import ConstantMapping


@pytest.fixture
def save(make_codec, tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of stage bottleneck at some rates, with a prompt and hyper-encoders of its own."""

    def make(name: str, rates: list[int], change: Callable = lambda codec: None, **options) -> Path:
        codec = make_codec(rates=rates, **options)
        torch.manual_seed(len(name))
        with torch.no_grad():
            for key, parameter in codec.named_parameters():
                if "lora_B" in key:
                    parameter.zero_()
                elif "lora_A" in key or "prompt" in key or "hyper_encoders" in key:
                    parameter.normal_(std=0.2)
        images = torch.rand(2, 3, 64, 64) * 2 - 1
        with torch.no_grad():
            codec.bottleneck.finish([codec.backbone.encode(images)])
        change(codec)
        codec.forget_fingerprint()
        codec.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def test_merged_rates_are_those_of_their_sources(save, tmp_path: Path, make_image) -> None:
    sources = [
        save("low", [0, 1]),
        save("high", [7]),
        save("middle", [3, 4], bottleneck={"codebook_sizes": {"4": 19}}),
    ]
    merge_rates(sources, tmp_path / "all")
    merged = load(tmp_path / "all", dtype=torch.float32)
    assert [rate.id for rate in merged.bottleneck.rates] == [0, 1, 3, 4, 7]
    latent = torch.randn(1, 4, 8, 8)
    for path in sources:
        codec = load(path, dtype=torch.float32)
        for rate in codec.bottleneck.rates:
            one, other = codec.bottleneck.at(rate), merged.bottleneck.at(rate)
            assert one.codebook_size == other.codebook_size
            assert torch.equal(one.encode(latent), other.encode(latent))
            assert torch.equal(one.decode(one.encode(latent)), other.decode(other.encode(latent)))
            assert np.array_equal(codec.bottleneck.frequencies[rate.id], merged.bottleneck.frequencies[rate.id])
    first = OscarCodec.from_pretrained(sources[0])
    assert torch.equal(first.denoiser.prompt, merged.denoiser.prompt)
    image = make_image(70, 50)
    for rate in merged.bottleneck.rates:
        assert merged.decompress(merged.compress(image, rate)).size == image.size


def test_merged_rates_can_be_trained_on(save, tmp_path: Path) -> None:
    merged = merge_rates([save("one", [4]), save("two", [7])], tmp_path / "both")
    again = OscarCodec.from_pretrained(tmp_path / "both")
    assert again.fingerprint == merged.fingerprint
    for rate in again.bottleneck.rates:
        codebook = again.bottleneck.at(rate).quantizer._codebook
        assert codebook.initted
        assert torch.equal(codebook.embed, merged.bottleneck.at(rate).quantizer._codebook.embed)


def shift(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.add_(1e-3)


@pytest.mark.parametrize(
    ("what", "rates", "change", "options"),
    [
        ("rate 0.0625 is in both .*first and .*second", [4], lambda codec: None, {}),
        ("different backbones", [7], lambda codec: shift(codec.backbone.vae.encoder.conv_in.weight), {}),
        ("different backbones", [7], lambda codec: shift(codec.backbone.unet.conv_out.base_layer.bias), {}),
        ("different hyper-encoders", [7], lambda codec: None, {"bottleneck": {"features": 12}}),
        ("different timesteps", [7], lambda codec: codec.set_mapping(ConstantMapping(100)), {}),
        ("different denoisers", [7], lambda codec: None, {"lora_rank": 3}),
        ("different denoisers", [7], lambda codec: shift(codec.denoiser.unet.conv_in.lora_B["default_encoder"].weight),
         {}),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_go_together(save, tmp_path: Path, what: str, rates, change, options) -> None:
    sources = [save("first", [4]), save("second", rates, change, **options)]
    with pytest.raises(CheckpointError, match=what) as error:
        merge_rates(sources, tmp_path / "out")
    assert "\n" not in str(error.value) and "allowed: " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_is_no_merge(save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two or more"):
        merge_rates([save("one", [4])], tmp_path / "out")
    with pytest.raises(CheckpointError, match="rate 0.0625 is in both"):
        merge_rates([tmp_path / "one", tmp_path / "one"], tmp_path / "out")


def test_other_folders_are_not_replaced(save, tmp_path: Path) -> None:
    sources = [save("one", [4]), save("two", [7])]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists and is not an OSCAR checkpoint"):
        merge_rates(sources, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


# Rates for a trained model.


def tune(codec: OscarCodec) -> None:
    """A denoiser that was trained, and so a UNet that is not that of stage 1."""
    shift(codec.denoiser.unet.conv_in.lora_B["default_encoder"].weight)


def test_added_rates_decode_by_the_model_s_denoiser(save, tmp_path: Path, make_image) -> None:
    model, rates = save("model", [1, 7], tune), save("rates", [8, 11])
    add_rates(model, rates, tmp_path / "out")
    before, encoders = OscarCodec.from_pretrained(model), OscarCodec.from_pretrained(rates)
    joined = OscarCodec.from_pretrained(tmp_path / "out")
    assert [rate.id for rate in joined.bottleneck.rates] == [1, 7, 8, 11]
    # 0.0024 lies below the model's lowest rate; 0.1093 between its two, over log(bpp)
    share = np.log(0.1093 / 0.0098) / np.log(0.125 / 0.0098)
    expected = {1: 400, 7: 150, 8: 400, 11: round(400 + share * (150 - 400))}
    assert joined.mapping.timesteps == expected
    latent = torch.randn(1, 4, 8, 8)
    for source in (before, encoders):
        for rate in source.bottleneck.rates:
            one, other = source.bottleneck.at(rate), joined.bottleneck.at(rate)
            assert torch.equal(one.decode(one.encode(latent)), other.decode(other.encode(latent)))
            assert np.array_equal(source.bottleneck.frequencies[rate.id], joined.bottleneck.frequencies[rate.id])
    for timestep in (150, 300):
        with torch.no_grad():
            assert torch.equal(before.denoiser(latent, timestep), joined.denoiser(latent, timestep))
    image = make_image(70, 50)
    codec = load(tmp_path / "out", dtype=torch.float32)
    for rate in codec.bottleneck.rates:
        assert codec.decompress(codec.compress(image, rate)).size == image.size


def test_timesteps_of_added_rates_can_be_measured(save, tmp_path: Path) -> None:
    from oscar.rates import RATES
    from oscar.timesteps import CalibratedMapping

    mapping = CalibratedMapping({8: 610}, {8: 0.4}, "cosine").to_config()
    (tmp_path / "calibration.json").write_text(json.dumps({"mappings": {"cosine": mapping}}))
    sources = save("model", [1, 7], tune), save("rates", [8])
    joined = add_rates(*sources, tmp_path / "out", tmp_path / "calibration.json")
    assert [joined.mapping(RATES[id_]) for id_ in (1, 7, 8)] == [400, 150, 610]
    with pytest.raises(ValueError, match="no pseudo-timestep for rate 0.0507"):
        add_rates(sources[0], save("others", [10]), tmp_path / "no", tmp_path / "calibration.json")


def test_a_mapping_that_knows_every_rate_stays(save, tmp_path: Path) -> None:
    model = save("model", [1, 7], lambda codec: codec.set_mapping(ConstantMapping(100)))
    assert add_rates(model, save("rates", [8]), tmp_path / "out").mapping == ConstantMapping(100)


@pytest.mark.parametrize(
    ("what", "rates", "change", "options"),
    [
        ("rate 0.0625 is in both .*model and .*rates; allowed: rates that .*model lacks", [4], lambda codec: None, {}),
        ("different VAE encoders", [8], lambda codec: shift(codec.backbone.vae.encoder.conv_in.weight), {}),
        ("different hyper-encoders", [8], lambda codec: None, {"bottleneck": {"features": 12}}),
    ],
)
def test_rates_that_cannot_be_added(save, tmp_path: Path, what: str, rates, change, options) -> None:
    with pytest.raises(CheckpointError, match=what) as error:
        add_rates(save("model", [4, 7], tune), save("rates", rates, change, **options), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_stage_1_does_not_know_of_may_differ(save, tmp_path: Path) -> None:
    """The VAE's decoder and the UNet, which the model may have trained in full, and the prompt."""
    model = save("model", [7], lambda codec: shift(codec.backbone.vae.decoder.conv_in.weight))
    add_rates(model, save("rates", [8], lora_rank=3), tmp_path / "out")


def test_the_command_adds_rates(save, tmp_path: Path, capsys) -> None:
    from oscar.cli.main import main

    words = ["add-rates", str(save("model", [7])), str(save("rates", [8])), "--out", str(tmp_path / "out")]
    assert main(words) == 0 and capsys.readouterr().out == f"{tmp_path / 'out'}: rates 0.0024, 0.1250\n"
    assert main(words) == 2 and "exists already; allow it with --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
