from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from oscar.diffusion import PREDICTION_TYPES
from oscar.inference import tiling
from oscar.inference.memory import MemoryBudget
from oscar.models.backbone import Backbone, BackboneError, read_configs

ROOT = Path(__file__).parents[2]
UNET_WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def folder(make_backbone, tmp_path: Path) -> Path:
    make_backbone().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(source: Path | str) -> str:
    with pytest.raises(BackboneError) as error:
        Backbone.from_pretrained(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_from_configs(make_backbone) -> None:
    backbone = make_backbone()
    assert backbone.source is None and backbone.latent_channels == 4 and backbone.unet_multiple == 2
    images = torch.rand(2, 3, 64, 128) * 2 - 1
    with torch.no_grad():
        latent = backbone.encode(images)
        assert latent.shape == (2, 4, 8, 16)
        assert backbone.decode(latent).shape == images.shape


def test_encoding_is_a_function_of_the_image(make_backbone) -> None:
    backbone = make_backbone()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(backbone.encode(images), backbone.encode(images))  # the mode, not a sample
        mode = backbone.vae.encode(images).latent_dist.mean
    assert torch.equal(backbone.encode(images), mode * backbone.vae.config.scaling_factor)


def test_folder_round_trip(make_backbone, folder: Path) -> None:
    backbone, loaded = make_backbone(), Backbone.from_pretrained(folder)
    assert loaded.source == str(folder)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.schedule.config == backbone.schedule.config
    assert torch.equal(loaded.schedule.alphas_cumprod, backbone.schedule.alphas_cumprod)


@torch.no_grad()
def test_an_autoencoder_without_posterior(tmp_path: Path) -> None:
    """The nano-vq backbone's kind, from configurations and from a folder."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/backbone/nano_vq.yaml"))
    backbone = Backbone.from_configs(config["vae"], config["unet"], config["scheduler"])
    assert type(backbone.vae).__name__ == "AutoencoderDC"
    backbone.vae.register_to_config(scaling_factor=0.5)
    backbone.save_pretrained(tmp_path)
    loaded = Backbone.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 128) * 2 - 1
    latent = backbone.encode(images)
    assert latent.shape == (1, 4, 8, 16) and torch.equal(loaded.encode(images), latent)
    assert backbone.decode(latent).shape == images.shape
    assert torch.equal(loaded.decode(latent), backbone.decode(latent))
    assert backbone.decoder_modules() == [backbone.vae.decoder]


def test_an_unknown_autoencoder_is_refused(folder: Path) -> None:
    edit(folder / "vae/config.json", _class_name="VQModel")
    assert "VQModel" in refused(folder)


def test_no_path_is_written(folder: Path, tmp_path: Path) -> None:
    Backbone.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_prediction_type_comes_from_the_scheduler(folder: Path, prediction_type: str) -> None:
    edit(folder / "scheduler/scheduler_config.json", prediction_type=prediction_type)
    assert Backbone.from_pretrained(folder).schedule.prediction_type == prediction_type


def test_scheduler_without_a_prediction_type_is_epsilon(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "prediction_type"}))
    assert Backbone.from_pretrained(folder).schedule.prediction_type == "epsilon"


@torch.no_grad()
def test_scaling_factor_is_honoured(folder: Path) -> None:
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    plain = Backbone.from_pretrained(folder)
    edit(folder / "vae/config.json", scaling_factor=0.25)
    scaled = Backbone.from_pretrained(folder)
    latent = plain.encode(images)
    torch.testing.assert_close(scaled.encode(images), 0.25 * latent)
    torch.testing.assert_close(scaled.decode(0.25 * latent), plain.decode(latent))


@torch.no_grad()
def test_golden_backbone(golden, golden_cases) -> None:
    backbone = Backbone.from_pretrained(golden / "sd_tiny")
    latent = backbone.encode(golden_cases["image"])
    assert (latent - golden_cases["latent"]).abs().max() < 1e-4


def test_stable_diffusion_schedules(sd21) -> None:
    from oscar.models.backbone import read_config
    from oscar.timesteps import TableMapping

    assert read_config(str(sd21), "scheduler")["prediction_type"] == "v_prediction"
    assert read_config(f"{sd21}-base", "scheduler").get("prediction_type", "epsilon") == "epsilon"
    assert TableMapping.paper().timesteps[0] < read_config(str(sd21), "scheduler")["num_train_timesteps"]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path)
    assert message.startswith(f"backbone '{tmp_path}' could not be read as a diffusers folder or hub id with vae, unet")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("org/model-that-is-not-here", "is no folder, not in the hub's cache, and the hub cannot be reached: "),
        ("/no/such/folder", "is no folder and no hub id; "),
    ],
)
def test_without_the_hub_the_way_out_is_named(source: str, reason: str) -> None:
    message = refused(source)
    assert reason in message
    assert message.endswith(
        "; allowed: a folder with vae, unet, scheduler, in training as backbone.source=FOLDER, for "
        "the command as --backbone FOLDER"
    )
    with pytest.raises(BackboneError) as error:
        read_configs(source)
    assert reason in str(error.value) and "backbone.source=FOLDER" in str(error.value)


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler"])
def test_a_missing_part_is_refused(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    assert refused(folder).startswith(f"backbone '{folder}' could not be read")


@pytest.mark.parametrize("path", ["vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_json_is_refused(folder: Path, path: str) -> None:
    (folder / path).write_text("{")
    refused(folder)


def test_cut_weights_are_refused(folder: Path) -> None:
    data = (folder / UNET_WEIGHTS).read_bytes()
    (folder / UNET_WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(folder)


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    state = load_file(folder / UNET_WEIGHTS)
    del state["conv_in.weight"]
    save_file(state, folder / UNET_WEIGHTS, metadata={"format": "pt"})
    assert "the weights of unet lack conv_in.weight (1 tensors in all)" in refused(folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    state = load_file(folder / UNET_WEIGHTS)
    state["conv_in.weight"] = torch.zeros(8, 5, 3, 3)
    save_file(state, folder / UNET_WEIGHTS, metadata={"format": "pt"})
    refused(folder)


def test_unknown_prediction_type_is_refused(folder: Path) -> None:
    edit(folder / "scheduler/scheduler_config.json", prediction_type="flow")
    assert "prediction_type 'flow' is not supported; allowed: epsilon" in refused(folder)


def test_wrong_channels_are_refused(make_backbone) -> None:
    backbone = make_backbone()
    with pytest.raises(BackboneError, match="4 channels in and 8 out; allowed: the vae's 4 for both"):
        Backbone.from_configs(backbone.vae.config, {**backbone.unet.config, "out_channels": 8}, {})
    with pytest.raises(BackboneError, match="allowed: the vae's 16 for both"):
        Backbone.from_configs({**backbone.vae.config, "latent_channels": 16}, backbone.unet.config, {})


def test_wrong_reduction_is_refused(make_backbone) -> None:
    backbone = make_backbone()
    smaller = {
        **backbone.vae.config,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    with pytest.raises(BackboneError, match="reduces each side by 2; allowed: 8, 16"):
        Backbone.from_configs(smaller, backbone.unet.config, {})


def test_adapters_are_not_written(make_codec, tmp_path: Path) -> None:
    codec = make_codec()
    codec.backbone.save_pretrained(tmp_path)
    plain = codec.backbone.plain_unet().state_dict()
    written = load_file(tmp_path / UNET_WEIGHTS)
    assert written.keys() == plain.keys()
    assert not any("lora" in name or "base_layer" in name for name in written)
    assert torch.equal(written["conv_in.weight"], codec.backbone.unet.conv_in.base_layer.weight)
    assert any("lora" in name for name in codec.backbone.unet.state_dict())  # and they are still there


@torch.no_grad()
def test_samples_of_the_posterior(make_backbone, monkeypatch) -> None:
    """Also of an image that is worked on in blocks; one draw moves the mode by the standard deviation."""
    monkeypatch.setattr(tiling, "WHOLE", 0)
    backbone = make_backbone().eval()
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    posterior = backbone.vae.encode(images).latent_dist
    scale = backbone.vae.config.scaling_factor
    for kind, memory in ((Backbone, None), (tiling.TiledBackbone, None), (tiling.TiledBackbone, MemoryBudget(1))):
        backbone.__class__, backbone.memory = kind, memory
        torch.testing.assert_close(backbone.encode(images), posterior.mode() * scale, rtol=1e-4, atol=1e-5)
        sample = backbone.encode(images, torch.ones_like)
        torch.testing.assert_close(sample, (posterior.mean + posterior.std) * scale, rtol=1e-4, atol=1e-5)
    assert posterior.std.min() > 0
