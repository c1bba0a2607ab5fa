"""The benchmark's part training: what is counted and compared, on tiny networks; the counts at full size."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from oscar.benchmark.runs import run_benchmark
from oscar.benchmark.speed import joint_step
from oscar.benchmark.speed import training as training_speed
from oscar.benchmark.speed.joint_step import PUBLISHED_PARAMETERS, advance, available_losses, measure_joint
from oscar.benchmark.speed.training import SCHEDULES, Feed, SpeedBench, make_images, run_training_speed
from oscar.config import BenchmarkConfig, ConfigError, parse, register
from oscar.rates import PAPER_RATES

ROOT = Path(__file__).parents[2]
TINY = ["backbone@training.backbone=tiny", "bottleneck@training.bottleneck=tiny", "training.crop=64"]
SMALL = [
    "training.batch_size=2",
    "training.workers=1",
    "training.repeats=1",
    "training.warmup=0",
    "training.loader_steps=2",
    "training.joint_steps=2",
    "device=cpu",
    "parts=[training]",
]


@pytest.fixture(scope="module")
def composed():
    register()

    def make(*overrides: str) -> BenchmarkConfig:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return parse(compose("benchmark", overrides=list(overrides)), BenchmarkConfig)

    return make


@pytest.fixture
def config(composed, photos, tmp_path) -> BenchmarkConfig:
    return composed(*TINY, *SMALL, f"training.images={photos}", f"output={tmp_path / 'out'}")


@pytest.fixture
def bench(config, tmp_path) -> SpeedBench:
    from accelerate import Accelerator

    return SpeedBench(config.training, Accelerator(cpu=True), tmp_path)


# What is asked for.


def test_it_is_off_by_default_and_is_then_of_stable_diffusions_shape(composed):
    config = composed()
    assert "training" not in config.parts
    training = config.training
    training.check()
    assert training.backbone.vae["block_out_channels"] == [128, 256, 512, 512] and training.backbone.source is None
    assert (training.bottleneck.width, training.bottleneck.features) == (192, 320)
    assert training.joint.image_losses == {"l1": 1, "dists": 1, "edges_dists": 1} and training.crop == 256


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.measure=[speed]", "training.measure is 'speed'; allowed: schedules, loader, joint"),
        ("training.crop=100", "training.crop is 100; allowed: multiples of 64"),
        ("training.repeats=0", "training.repeats is 0; allowed: at least 1"),
        ("training.images=nowhere", "training.images is 'nowhere'"),
        ("stage@training.joint=bottleneck", "training.joint.name is 'bottleneck'; allowed: joint"),
    ],
)
def test_mistakes_are_named_before_anything_runs(composed, override, words):
    with pytest.raises(ConfigError, match=words):
        composed("parts=[training]", override)


# Schedules.


def test_schedules_train_all_rates_alike_with_other_passes_of_the_vae(bench, monkeypatch):
    """In a round, every schedule steps every rate's parameters once, by as many passes of the VAE as it says."""
    passes: list[int] = []
    trainers = bench.trainers(tuple(SCHEDULES))
    codec = trainers["shared"].stage.codec
    assert all(trainer.stage.codec is codec for trainer in trainers.values())
    encode = codec.backbone.encode
    monkeypatch.setattr(codec.backbone, "encode", lambda images: passes.append(len(images)) or encode(images))
    for name, vae_passes in (("published", 8), ("shared", 1), ("cached", 0)):
        trainer = trainers[name]
        stepped: list[str] = []
        coders = {str(rate.id): codec.bottleneck.at(rate) for rate in codec.bottleneck.rates}
        hooks = [
            coder.register_forward_hook(lambda *_, key=key, found=stepped: found.append(key))
            for key, coder in coders.items()
        ]
        before = {key: coder.proj[-1].weight.clone() for key, coder in coders.items()}
        passes.clear()
        advance(trainer, trainer._batches(0), 8 if name == "published" else 1)
        for hook in hooks:
            hook.remove()
        assert sorted(stepped) == sorted(coders), name
        assert passes == [2] * vae_passes, name
        assert all((coder.proj[-1].weight != before[key]).any() for key, coder in coders.items()), name


def test_steps_per_second_and_ratios_follow_from_the_seconds(bench, monkeypatch):
    seconds = {
        "published": torch.tensor([9.0, 8, 80]).numpy(),
        "shared": torch.tensor([3.0, 4, 20]).numpy(),
        "cached": torch.tensor([1.0, 1, 10]).numpy(),
    }
    monkeypatch.setattr(training_speed, "interleaved", lambda calls, *args: {name: seconds[name] for name in calls})
    frame = training_speed.measure_schedules(bench).set_index("schedule")
    assert frame["vae_passes"].to_dict() == {"published": 8, "shared": 1, "cached": 0}
    assert frame["steps_per_s"].to_dict() == {"published": 8 / 9, "shared": 2, "cached": 8}
    assert frame["speedup"].to_dict() == {"published": 1, "shared": 3, "cached": 8}


# Loader.


def test_waiting_is_counted_and_work_is_not():
    class Slow:
        def __iter__(self):
            for number in count():
                time.sleep(0.02)
                yield {"number": number}

    feed = Feed(iter(Slow()), lambda: time.sleep(0.05))  # waiting for the device does not count
    begin = time.perf_counter()
    assert [batch["number"] for batch in islice(feed, 3)] == [0, 1, 2]
    assert 0.06 <= feed.waited <= time.perf_counter() - begin - 3 * 0.05


def test_images_are_as_large_as_photographs(tmp_path):
    pytest.importorskip("skimage")
    make_images(tmp_path, 2, (510, 339))
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["00.jpg", "01.jpg"]
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (510, 339) and image.format == "JPEG"
        assert 1 < 8 * path.stat().st_size / (510 * 339) < 6  # bits per pixel, as cameras and DIV2K at this quality


# Joint.


def test_published_counts_are_those_of_the_manifest():
    manifest = json.loads((ROOT / "tests/golden/published/official_manifest.json").read_text())
    hyper = {name: shape for name, (shape, _) in manifest["hyper_encoders"].items() if "_codebook" not in name}
    adapters = {name: shape for name, (shape, _) in manifest["state_dict_unet"].items() if "lora_" in name}
    counts = [sum(math.prod(shape) for shape in shapes) for shapes in (hyper.values(), adapters.values())]
    assert PUBLISHED_PARAMETERS == dict(
        zip(("hyper_encoders", "adapters", "prompt"), [*counts, math.prod(manifest["embeddings"][0])], strict=True)
    )


def test_stage_joint_at_full_size_trains_the_published_number_of_parameters(composed):
    """On the meta device, without memory for the weights."""
    from oscar.config import DataConfig, TrainConfig
    from oscar.training.build import build_codec
    from oscar.training.resolve import resolve
    from oscar.training.stages.joint import JointStage

    training = composed("parts=[training]").training
    losses, _ = available_losses(training.joint)
    config = resolve(
        TrainConfig(
            backbone=training.backbone,
            bottleneck=training.bottleneck,
            data=DataConfig(["."]),
            stage=replace(training.joint, image_losses=losses, gan=0.0),
        )
    )
    with torch.device("meta"):
        codec = build_codec(config)
    counts = joint_step.trained_parameters(JointStage(codec, config))
    assert counts == {**PUBLISHED_PARAMETERS, "critic": 0}
    assert len(codec.bottleneck.rates) == len(PAPER_RATES)


def test_losses_without_weights_are_left_out_and_named(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights, missing = available_losses(config.training.joint)
    assert weights == {"l1": 1.0} and set(missing) == {"dists", "edges_dists"}
    assert all("\n" not in reason and reason for reason in missing.values())


def test_a_joint_step_is_measured(config, photos, tmp_path, monkeypatch):
    """The process's own work, in this one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # without weights, wherever the tests run
    asked = {}

    def run_here(module, request, what, timeout):
        asked.update(module=module, request=json.loads(json.dumps(request)))
        return joint_step._child(asked["request"])

    monkeypatch.setattr(joint_step, "run_child", run_here)
    path = sorted(photos.iterdir())[0]
    frame, parameters = measure_joint(config.training, path, tmp_path / "joint", torch.device("cpu"))
    assert asked["module"] == "oscar.benchmark.speed.joint_step"
    assert asked["request"]["config"]["trainer"]["gradient_checkpointing"] is True
    row = frame.iloc[0]
    assert row["first_step_seconds"] > 0 and row["step_seconds"] > 0
    assert row["process_peak_mib"] >= row["built_mib"] > 0
    assert (row["losses"], row["left_out"]) == ("l1, cosine, gan", "dists, edges_dists")
    counts = parameters.set_index("part")["trained"]
    assert counts["critic"] > 0 and counts["prompt"] == 77 * 8
    assert parameters.set_index("part")["published"].dropna().to_dict() == PUBLISHED_PARAMETERS


@pytest.mark.slow
def test_the_process_that_is_measured_answers(config, photos, tmp_path):
    path = sorted(photos.iterdir())[0]
    frame, _ = measure_joint(config.training, path, tmp_path / "joint", torch.device("cpu"))
    assert 100 < frame["process_peak_mib"].item() < 4000


# The part.


@pytest.mark.slow
def test_part_training_writes_its_tables_and_measures_nothing_twice(config, monkeypatch, capsys):
    memory = {"built_mib": 5.0, "steps_peak_mib": None, "process_peak_mib": 6.0, "cuda_peak_mib": None}
    figures = {"parameters": {"prompt": 1}, "step_seconds": [2.0], **memory}
    monkeypatch.setattr(joint_step, "run_child", lambda *args: dict(figures))
    config.models, config.baselines = {"none": "nowhere"}, {}  # it needs no codecs
    assert run_benchmark(config) is None
    out = Path(config.output)
    tables = {path.name for path in (out / "tables").iterdir()}
    names = ("schedules", "loader", "joint", "parameters")
    assert tables == {f"training_{name}{suffix}" for name in names for suffix in (".csv", ".md", ".tex")}
    assert {path.name for path in out.iterdir()} == {"tables", "training"}
    loader = pd.read_csv(out / "training/loader.csv")
    assert list(loader["schedule"]) == ["shared", "cached"] and (loader["images"] == 5).all()
    assert ((loader["waited_percent"] >= 0) & (loader["waited_percent"] <= 100)).all()
    schedules = (out / "tables/training_schedules.md").read_text()
    assert "batch 2, crops of 64×64" in schedules and "backbone tiny" in schedules and "× published" in schedules
    assert "MiB on the GPU" not in (out / "tables/training_joint.md").read_text()
    assert f"training: {out / 'tables/training_joint.md'}" in capsys.readouterr().out

    measured = []
    monkeypatch.setattr(SpeedBench, "measure", lambda self, name: measured.append(name) or [])
    assert len(run_training_speed(config.training, out, "cpu")) == 4 and not measured
    (out / "training/parameters.csv").unlink()
    with pytest.raises(ValueError):  # the stand-in measures nothing
        run_training_speed(config.training, out, "cpu")
    assert measured == ["joint"]
    config.training.batch_size, config.training.measure = 1, ["loader"]  # other settings: nothing is kept
    with pytest.raises(ValueError):
        run_training_speed(config.training, out, "cpu")
    assert measured == ["joint", "loader"] and not list((out / "training").glob("*.csv"))
