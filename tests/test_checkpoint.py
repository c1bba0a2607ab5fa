"""Checkpoints are whole or absent, account for every tensor, and carry the identity of what decoding depends on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from oscar import OscarCodec, checkpoint, model_folder
from oscar.bitstream.entropy import normalise_counts
from oscar.checkpoint import CONFIG, WEIGHTS, CheckpointError
from oscar.cli.main import main
from oscar.data.tensors import to_tensor
from oscar.inference.load import load
from oscar.rates import PAPER_RATES

TOP = PAPER_RATES[7]
UNET_WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refused(source: Path | str) -> str:
    with pytest.raises(CheckpointError) as error:
        load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def edit_weights(folder: Path, change) -> None:
    """Change the tensors of the weights file and make its hash right again."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    hashes = json.loads((folder / CONFIG).read_text())["sha256"]
    edit_config(folder, sha256={**hashes, WEIGHTS: checkpoint.sha256(folder / WEIGHTS)})


def assert_same_outputs(one: OscarCodec, other: OscarCodec, image: torch.Tensor, tolerance: float = 0.0) -> None:
    for rate in one.bottleneck.rates:
        a, b = one.reconstruct(image, rate), other.reconstruct(image, rate)
        assert torch.equal(a.symbols.indices, b.symbols.indices)
        assert (a.image - b.image).abs().max() <= tolerance


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_round_trip(make_codec, make_image, tmp_path: Path, tuning: str) -> None:
    codec = make_codec(tuning=tuning)
    codec.bottleneck.frequencies[7] = normalise_counts(np.arange(256))
    codec.save_pretrained(tmp_path / "model")
    loaded = OscarCodec.from_pretrained(tmp_path / "model").eval()
    assert checkpoint.describe(loaded) == checkpoint.describe(codec)
    assert loaded.fingerprint == codec.fingerprint == checkpoint.fingerprint(loaded)
    assert loaded.bottleneck.rates == codec.bottleneck.rates and loaded.mapping == codec.mapping
    for rate in codec.bottleneck.rates:
        assert np.array_equal(loaded.bottleneck.frequencies[rate.id], codec.bottleneck.frequencies[rate.id])
    assert_same_outputs(codec, loaded, to_tensor(make_image(64, 80)))
    merged = load(tmp_path / "model", dtype=torch.float32)
    assert merged.model_tag == codec.model_tag
    assert_same_outputs(codec, merged, to_tensor(make_image(64, 80)), tolerance=1e-4)
    image = make_image(64, 80)
    assert merged.compress(image, TOP) == codec.compress(image, TOP)


def test_a_second_round_trip_writes_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    OscarCodec.from_pretrained(tiny_folder).save_pretrained(tmp_path / "again")
    files = sorted(path.relative_to(tiny_folder) for path in tiny_folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    for path in files:
        assert (tmp_path / "again" / path).read_bytes() == (tiny_folder / path).read_bytes(), path


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_half_precision_file(make_codec, make_image, tmp_path: Path, tuning: str) -> None:
    codec = make_codec(tuning=tuning)
    codec.save_pretrained(tmp_path / "whole")
    codec.save_pretrained(tmp_path / "half", dtype=torch.float16)
    size = {name: sum(p.stat().st_size for p in (tmp_path / name).rglob("*.safetensors")) for name in ("whole", "half")}
    assert size["half"] < 0.75 * size["whole"]
    assert load_file(tmp_path / "half" / UNET_WEIGHTS)["conv_in.weight"].dtype == torch.float16
    assert load_file(tmp_path / "half" / WEIGHTS)["frequencies.7"].dtype == torch.int32
    half = load(tmp_path / "half", dtype=torch.float32)
    assert half.dtype == torch.float32 and half.model_tag != codec.model_tag  # other weights decode otherwise
    assert half.fingerprint == checkpoint.fingerprint(codec, torch.float16)
    assert codec.dtype == torch.float32  # saving changed nothing
    image = make_image(64, 80)
    assert half.decompress(half.compress(image, TOP)).size == image.size


def test_a_backbone_that_is_only_named(make_codec, make_backbone, make_image, tmp_path: Path) -> None:
    from oscar.models.backbone import Backbone

    make_backbone().save_pretrained(tmp_path / "backbone")
    codec = make_codec()
    backbone = Backbone.from_pretrained(tmp_path / "backbone")
    named = OscarCodec(*checkpoint.build(checkpoint.describe(codec), backbone)).eval()
    named.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model/unet").exists()
    loaded = OscarCodec.from_pretrained(tmp_path / "model").eval()
    assert loaded.backbone.source == str(tmp_path / "backbone") and loaded.fingerprint == named.fingerprint
    assert_same_outputs(named, loaded, to_tensor(make_image(64, 64)))
    shutil.rmtree(tmp_path / "backbone")
    assert str(tmp_path / "backbone") in refused(tmp_path / "model")


# Damage.


@pytest.mark.parametrize("name", [WEIGHTS, str(UNET_WEIGHTS), "vae/diffusion_pytorch_model.safetensors"])
def test_damaged_weights(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)
    assert f"{name} is damaged" in refused(folder)
    (folder / name).write_bytes(data[:100])
    refused(folder)
    (folder / name).unlink()
    refused(folder)


def test_a_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda state: state.pop("denoiser.prompt"))
    assert f"{WEIGHTS} lacks denoiser.prompt (1 tensors in all)" in refused(folder)


def test_an_unknown_tensor(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({"bottleneck.extra": torch.zeros(1)}))
    assert f"{WEIGHTS} has unknown bottleneck.extra (1 tensors in all)" in refused(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({"denoiser.prompt": torch.zeros(1, 5, 8)}))
    assert "denoiser.prompt has shape (1, 5, 8); allowed: (1, 4, 8)" in refused(folder)


@pytest.mark.parametrize("table", [torch.zeros(256, dtype=torch.int32), torch.full((256,), 255, dtype=torch.int32)])
def test_a_table_that_is_none(folder: Path, table: torch.Tensor) -> None:
    edit_weights(folder, lambda state: state.update({"frequencies.7": table}))
    assert "frequencies.7" in refused(folder)


def test_a_missing_part_of_the_backbone(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    assert "scheduler" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_a_damaged_description(folder: Path, text: str) -> None:
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert str(folder) in refused(folder)


def test_a_description_of_another_format(folder: Path) -> None:
    edit_config(folder, format=2)
    assert "format is 2; allowed: 1" in refused(folder)


@pytest.mark.parametrize("key", ["bottleneck", "denoiser", "timesteps", "backbone", "fingerprint", "sha256"])
def test_an_incomplete_description(folder: Path, key: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[key]
    (folder / CONFIG).write_text(json.dumps(config))
    assert key in refused(folder)


def test_a_description_that_does_not_fit(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for key, value in (("bottleneck", {"rates": [12]}), ("timesteps", {"kind": "x"}), ("denoiser", {"rank": 3})):
        edit_config(folder, **{key: {**config[key], **value}})
        refused(folder)
        edit_config(folder, **{key: config[key]})
    load(folder)


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    assert "is a folder without oscar.json; allowed: an OSCAR checkpoint" in refused(tmp_path)
    for name in (tmp_path / "none", "no/such/model", "nan0"):
        message = refused(name)
        assert message.startswith(f"model '{name}'") and "a checkpoint folder, a hub id" in message


# Saving.


def test_a_foreign_folder_is_left_alone(make_codec, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("photos", "file"):
        with pytest.raises(CheckpointError, match="exists and is not an OSCAR checkpoint"):
            make_codec().save_pretrained(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "file", "photos"]


def test_an_empty_folder_and_an_old_checkpoint_are_replaced(make_codec, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    first, second = make_codec(), make_codec(seed=1)
    for codec in (first, second):
        codec.save_pretrained(tmp_path / "model")
        assert OscarCodec.from_pretrained(tmp_path / "model").model_tag == codec.model_tag
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("function", ["save_file", "fingerprint", "_replace", "rename"])
def test_an_interrupted_save_leaves_the_old_checkpoint(make_codec, tmp_path: Path, monkeypatch, function: str) -> None:
    codec = make_codec()
    codec.save_pretrained(tmp_path / "model")
    tag = codec.model_tag

    def interrupt(*args) -> None:
        raise OSError("no space left on device")

    if function == "rename":  # of the new folder, after the old one was moved away
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if "-old-" in f"{a}{b}" else interrupt())
    else:
        monkeypatch.setattr(model_folder if function == "_replace" else checkpoint, function, interrupt)
    with pytest.raises(OSError, match="no space"):
        make_codec(seed=1).save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert OscarCodec.from_pretrained(tmp_path / "model").model_tag == tag


def test_merged_adapters_cannot_be_saved(tiny: OscarCodec, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save the checkpoint before merging"):
        tiny.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# Identity.

DECODER_WEIGHTS = [
    "bottleneck.hyper_encoders.3.proj.0.weight",
    "bottleneck.hyper_encoders.3.quantizer.project_out.weight",
    "bottleneck.hyper_encoders.3.quantizer._codebook.embed",
    "denoiser.prompt",
    "backbone.unet.conv_in.base_layer.weight",
    "backbone.unet.conv_out.lora_B.default_decoder.weight",
    "backbone.vae.decoder.conv_out.bias",
    "backbone.vae.post_quant_conv.weight",
]
ENCODER_WEIGHTS = [
    "bottleneck.hyper_encoders.3.backbone.0.weight",
    "bottleneck.hyper_encoders.3.quantizer.project_in.weight",
    "bottleneck.hyper_encoders.3.quantizer._codebook.embed_avg",
    "bottleneck.hyper_encoders.3.quantizer._codebook.cluster_size",
    "backbone.vae.encoder.conv_in.weight",
    "backbone.vae.quant_conv.weight",
]


@pytest.mark.parametrize("name", DECODER_WEIGHTS + ENCODER_WEIGHTS)
@torch.no_grad()
def test_the_tag_covers_what_decoding_depends_on(make_codec, name: str) -> None:
    codec = make_codec()
    before = codec.fingerprint
    codec.state_dict()[name].view(-1)[-1].add_(1e-3)
    after = checkpoint.fingerprint(codec)
    assert (after != before) == (name in DECODER_WEIGHTS)


def test_the_tag_covers_tables_schedule_and_mapping(make_codec) -> None:
    codec = make_codec()
    before = checkpoint.fingerprint(codec)
    assert checkpoint.fingerprint(make_codec()) == before
    codec.bottleneck.frequencies[3] = normalise_counts(np.arange(2048))
    assert checkpoint.fingerprint(codec) != before
    codec = make_codec()
    codec.backbone.vae.register_to_config(scaling_factor=0.5)
    assert checkpoint.fingerprint(codec) != before
    codec = make_codec()
    codec.backbone.schedule.config["prediction_type"] = "epsilon"
    assert checkpoint.fingerprint(codec) != before
    codec = make_codec()
    codec.mapping = type(codec.mapping)({**codec.mapping.timesteps, 0: 501})
    assert checkpoint.fingerprint(codec) != before


def test_the_tag_is_that_of_the_stored_weights(tiny: OscarCodec, tiny_folder: Path) -> None:
    stored = json.loads((tiny_folder / CONFIG).read_text())["fingerprint"]
    assert tiny.denoiser.merged and tiny.fingerprint == stored  # merging rounds, and does not change the tag
    assert tiny.model_tag == int(stored[:4], 16)


def test_training_takes_the_tag_away(make_codec) -> None:
    codec = make_codec()
    before = codec.fingerprint
    codec.train()
    with torch.no_grad():
        codec.denoiser.prompt.add_(1)
    assert codec.fingerprint != before


# Going on from a checkpoint.


def test_training_goes_on_from_the_stored_codes(make_codec, tmp_path: Path) -> None:
    """A loaded codebook is neither initialised nor revived anew, which would throw the trained codes away."""
    options = {"kmeans_init": True, "dead_code_threshold": 0.05, "decay": 0.95}
    codec = make_codec(rates=[7], bottleneck=options)
    latent = torch.randn(4, 4, 16, 16)
    for _ in range(3):
        codec.bottleneck.train()(latent, TOP)
    codec.save_pretrained(tmp_path / "model")
    loaded = OscarCodec.from_pretrained(tmp_path / "model")
    before = loaded.bottleneck.at(TOP).quantizer.codebook.clone()
    assert torch.equal(before, codec.bottleneck.at(TOP).quantizer.codebook)
    loaded.bottleneck.train()(latent, TOP)
    cosine = torch.nn.functional.cosine_similarity(before, loaded.bottleneck.at(TOP).quantizer.codebook)
    assert cosine.min() > 0.9


@pytest.mark.parametrize(("field", "value"), [("dither", {"4": 0.25}), ("stages", {"4": 4})])
def test_models_with_what_rates_no_longer_have_are_refused(
    tiny_folder, photos: Path, tmp_path: Path, capsys, field, value
) -> None:
    """In one line that names the field, by all that reads a model."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = json.loads((folder / CONFIG).read_text())
    config["bottleneck"][field] = value
    (folder / CONFIG).write_text(json.dumps(config))
    for read in (load, OscarCodec.from_pretrained, checkpoint.read_description):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert str(error.value) == (
            f"model {str(folder)!r}: bottleneck.{field} is {value}, which is there no more: a rate has one plain "
            "codebook and one index a position, as in the paper; allowed: models without it"
        )
    command = ["compress", str(photos / "0.png"), str(tmp_path / "a.oscar"), "--model", str(folder)]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"bottleneck.{field} is {value}, which is there no more" in line


def test_an_untrained_codebook_is_still_initialised(make_codec, tmp_path: Path) -> None:
    make_codec(rates=[7], bottleneck={"kmeans_init": True}).save_pretrained(tmp_path / "model")
    loaded = OscarCodec.from_pretrained(tmp_path / "model")
    loaded.bottleneck.train()(torch.randn(4, 4, 16, 16), TOP)
    assert loaded.bottleneck.at(TOP).quantizer.codebook.norm(dim=-1).min() > 0.99
