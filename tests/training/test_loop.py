"""The loop: a resumed run repeats an uninterrupted one bit for bit, and whatever stops it leaves it resumable."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from oscar import OscarCodec
from oscar.config import TrainConfig
from oscar.models.backbone import Backbone
from oscar.training.build import build_stage
from oscar.training.loop import NonFiniteLossError, Trainer, find_checkpoints
from oscar.training.prior import PriorStage

STAGES = ["vae", "prior", "hyper", "joint"]
# what makes a resume hard: averages, several passes per step, and random draws inside the quantiser
HARD = ("trainer.accumulation=2", "trainer.ema_decay=0.9")
QUANTISER = ("bottleneck.kmeans_init=true", "bottleneck.dead_code_threshold=0.5")


@pytest.fixture(autouse=True)
def fresh_accelerate(quick_tables):
    """Accelerate keeps its state per process and refuses to change it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, steps: int, output: str = "run", *overrides: str) -> TrainConfig:
        if not any("rates=" in override for override in overrides):
            overrides = ("bottleneck.rates=[0.0019,0.0313,0.125]", *overrides)
        return compose(
            f"experiment=tiny/{stage}", f"data.train=[{photos}]", f"output={tmp_path / output}",
            f"trainer.max_steps={steps}", "trainer.checkpoint_every=100", "logger.tensorboard=false", *overrides,
        )  # fmt: skip

    return make


def run(config: TrainConfig) -> Trainer:
    trainer = Trainer(build_stage(config), config)
    assert trainer.run()
    return trainer


def rows(config: TrainConfig) -> list[dict[str, str]]:
    with (Path(config.output) / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def newest(config: TrainConfig) -> dict:
    return torch.load(find_checkpoints(Path(config.output))[-1], weights_only=True)


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Equality to the bit of nested states."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_run(one: TrainConfig, other: TrainConfig) -> None:
    assert_equal(newest(one), newest(other))
    for a, b in zip(rows(one), rows(other), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    files = [
        {path.relative_to(config.output): path.read_bytes() for path in Path(config.output, "final").rglob("*.*")}
        for config in (one, other)
    ]
    assert files[0] == files[1] and files[0]


@pytest.mark.parametrize("overrides", [(), (*HARD, *QUANTISER)], ids=["plain", "hard"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(configure, stage: str, overrides: tuple[str, ...]) -> None:
    if stage in ("vae", "prior"):
        overrides = tuple(override for override in overrides if override not in QUANTISER)
    run(configure(stage, 3, "resumed", *overrides))
    torch.manual_seed(99)  # nothing may depend on what ran before in this process
    resumed, whole = configure(stage, 6, "resumed", *overrides), configure(stage, 6, "whole", *overrides)
    assert run(resumed).step == 6
    run(whole)
    assert_same_run(resumed, whole)
    assert [row["step"] for row in rows(resumed)] == ["1", "2", "3", "4", "5", "6"]


def test_rows_after_the_checkpoint_are_dropped(configure) -> None:
    """A run that died between two checkpoints repeats the steps in between, and its log holds each once."""
    config = configure("prior", 5, "run", "trainer.checkpoint_every=2", "trainer.keep_last=5")
    run(config)
    assert [path.name for path in find_checkpoints(Path(config.output))] == [
        "step-0000002.pt", "step-0000004.pt", "step-0000005.pt"
    ]  # fmt: skip
    before = rows(config)
    find_checkpoints(Path(config.output))[-1].unlink()
    run(config)
    after = rows(config)
    assert [row["step"] for row in after] == ["1", "2", "3", "4", "5"]
    assert [row["loss"] for row in after] == [row["loss"] for row in before]


def test_old_checkpoints_are_deleted(configure) -> None:
    config = configure("prior", 5, "run", "trainer.checkpoint_every=1", "trainer.keep_last=2")
    run(config)
    names = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert names == ["step-0000004.pt", "step-0000005.pt"]


def test_a_finished_run_is_only_saved_anew(configure) -> None:
    config = configure("prior", 2)
    run(config)
    before = newest(config)
    assert run(config).step == 2
    assert_equal(newest(config), before)
    assert len(rows(config)) == 2


def test_without_resume_a_run_starts_over(configure) -> None:
    run(configure("prior", 3))
    config = configure("prior", 2, "run", "trainer.resume=false")
    run(config)
    assert len(rows(config)) == 2 and len(find_checkpoints(Path(config.output))) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint(configure, monkeypatch, number: signal.Signals) -> None:
    config = configure("prior", 6)
    optimise = Trainer._optimise

    def interrupted(trainer: Trainer, batches):
        if trainer.step == 1:
            os.kill(os.getpid(), number)
        return optimise(trainer, batches)

    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "_optimise", interrupted)
    trainer = Trainer(build_stage(config), config)
    assert trainer.run() is False
    assert trainer.step == 2 and newest(config)["step"] == 2
    assert not (Path(config.output) / "final").exists()
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    whole = configure("prior", 6, "whole")
    assert run(config).step == run(whole).step == 6
    assert_same_run(config, whole)


def test_the_result_is_a_codec(configure, picture) -> None:
    config = configure("joint", 2)
    trainer = run(config)
    codec = OscarCodec.from_pretrained(Path(config.output) / "final")
    assert codec.model_tag == int(codec.fingerprint[:4], 16)
    for rate in codec.rates:
        data = codec.compress(picture(70, 50), rate)
        assert codec.decompress(data).size == (70, 50)
        assert codec.frequencies[rate.id].sum() == 2**16 - 1
    assert codec.rates == trainer.stage.codec.rates


def test_the_average_is_saved_and_not_trained_on(configure) -> None:
    config = configure("prior", 4, "run", "trainer.ema_decay=0.9")
    trainer = run(config)
    final = Backbone.from_pretrained(Path(config.output) / "final")
    state = newest(config)
    averages = dict(
        zip([name for name, p in trainer.stage.named_parameters() if p.requires_grad], state["ema"]["shadow_params"],
            strict=True)
    )  # fmt: skip
    moved = 0
    for name, average in averages.items():
        saved = final.state_dict()[name.removeprefix("backbone.")]
        assert torch.equal(saved, average), name
        moved += not torch.equal(state["learner"]["model"][name], average)
        assert torch.equal(trainer.stage.state_dict()[name], state["learner"]["model"][name])  # put back
    assert moved > len(averages) / 2


def test_accumulated_passes_are_one_larger_batch(configure) -> None:
    """Two passes of one picture make the step of one pass of both, for a loss without random draws."""
    common = ("data.augment=false", "data.workers=0", "stage.kl=0", "stage.image_losses={l1:1,ms_ssim:0}")
    once = configure("vae", 1, "once", "data.batch_size=2", *common)
    twice = configure("vae", 1, "twice", "data.batch_size=1", "trainer.accumulation=2", *common)
    states = [run(config).stage.state_dict() for config in (once, twice)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_mixed_precision(configure, stage: str) -> None:
    config = configure(stage, 2, "run", "trainer.mixed_precision=bf16")
    run(config)
    assert all(float(row["loss"]) == float(row["loss"]) for row in rows(config))


def test_channels_last_and_threads(configure) -> None:
    run(configure("joint", 1, "run", "trainer.channels_last=true", "trainer.threads=1"))


def test_a_loss_that_is_no_number_names_the_pictures(configure, monkeypatch, photos: Path) -> None:
    config = configure("prior", 4, "run", "trainer.checkpoint_every=1")
    forward = PriorStage.forward

    def broken(stage, images, turn):
        metrics = forward(stage, images, turn)
        return {name: value * (float("nan") if turn.number == 2 else 1) for name, value in metrics.items()}

    monkeypatch.setattr(PriorStage, "forward", broken)
    with pytest.raises(NonFiniteLossError, match=rf"loss is nan at step 3; pictures .*{photos}/\d\.png, ") as error:
        run(config)
    assert "\n" not in str(error.value)
    assert newest(config)["step"] == 2  # of before the damage


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("hyper", "bottleneck.width=16", "does not fit this configuration"),
        ("hyper", "bottleneck.rates=[0.0019]", "does not fit this configuration"),
        ("prior", "trainer.ema_decay=0.9", "ema does not fit this configuration"),
        ("joint", "stage.gan=0", "critic does not fit this configuration"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(configure, stage: str, override: str, message: str) -> None:
    config = configure(stage, 1)
    run(config)
    before = newest(config)
    with pytest.raises(ValueError, match=message) as error:
        run(configure(stage, 2, "run", override))
    assert "\n" not in str(error.value)
    assert_equal(newest(config), before)


def test_more_rates_than_the_checkpoint_are_refused(configure) -> None:
    run(configure("hyper", 1, "run", "bottleneck.rates=[0.0019]"))
    with pytest.raises(ValueError, match="does not fit this configuration"):
        run(configure("hyper", 2, "run", "bottleneck.rates=[0.0019,0.125]"))


def test_a_damaged_checkpoint_is_refused(configure) -> None:
    config = configure("prior", 1)
    run(config)
    path = find_checkpoints(Path(config.output))[-1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"checkpoint {path} cannot be read"):
        run(configure("prior", 2))
