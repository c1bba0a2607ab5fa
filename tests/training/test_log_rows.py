"""Rows of the log: means over an interval's passes, by rate over those that drew it, and times over resumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from oscar.config import TrainConfig
from oscar.training import trainer as trainer_module
from oscar.training.build import build_stage
from oscar.training.interval import Interval
from oscar.training.stages.bottleneck import BottleneckStage
from oscar.training.trainer import Trainer
from oscar.utils.rng import StepRng

pytestmark = pytest.mark.usefixtures("quick_tables")


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, steps: int, output: str, *overrides: str) -> TrainConfig:
        return compose(
            f"experiment=tiny/{stage}",
            f"data.train=[{photos}]",
            f"output={tmp_path / output}",
            f"trainer.max_steps={steps}",
            "bottleneck.rates=[0.0019,0.0313,0.125]",
            "logger.tensorboard=false",
            "trainer.threads=1",
            *overrides,
        )

    return make


def run(config: TrainConfig) -> Trainer:
    trainer = Trainer(build_stage(config), config)
    trainer.run()
    return trainer


def stop_at(trainer: Trainer, step: int) -> None:
    """What a signal does, in the middle of a step."""
    optimise = trainer._optimise

    def stopped(batches) -> None:
        trainer._signalled = trainer.step == step - 1
        optimise(batches)

    trainer._optimise = stopped
    assert not trainer.run()


def test_a_value_is_a_mean_over_the_passes_that_gave_it() -> None:
    interval = Interval()
    for values in ({"loss": 1.0, "loss_0.0019": 1.0}, {"loss": 2.0}, {"loss": 6.0, "loss_0.0019": 4.0}):
        interval.add(values)
    interval.add_time(4, 0.5)
    interval.add_time(4, 1.5)
    assert interval.means() == {"loss": 3.0, "loss_0.0019": 2.5} and interval.images_per_second == 4
    interval.clear()
    assert interval.means() == {} and interval.images_per_second == 0


def test_rows_are_means_over_the_passes(configure, runs, monkeypatch) -> None:
    """Of all passes of all steps since the last row; a rate's only of those that drew it."""
    seen: list[dict[str, float]] = []
    forward = BottleneckStage.forward

    def watched(stage, images, rng):
        metrics = forward(stage, images, rng)
        seen.append({name: value.item() for name, value in metrics.items()})
        return metrics

    monkeypatch.setattr(BottleneckStage, "forward", watched)
    config = configure(
        "bottleneck", 5, "run", "trainer.log_every=2", "trainer.accumulation=2", "stage.rates_per_step=1"
    )
    run(config)
    rows = runs.rows(config)
    assert [row["step"] for row in rows] == ["2", "4", "5"] and len(seen) == 10
    empty = 0
    for row, passes in zip(rows, (seen[:4], seen[4:8], seen[8:]), strict=True):
        for name in BottleneckStage(build_stage(config).codec, config).metrics:
            values = [found[name] for found in passes if name in found]
            empty += not values
            assert row[name] == "" if not values else float(row[name]) == pytest.approx(sum(values) / len(values))
    assert empty  # so few passes do not draw every rate


def test_the_norm_is_that_before_the_clip(configure, runs) -> None:
    """A mean over the interval's steps, and the same whether gradients are clipped or not."""
    each, threes = (
        configure("diffusion_pretrain", 3, f"run-{every}", f"trainer.log_every={every}", "optimiser.grad_clip=null")
        for every in (1, 3)
    )
    clipped = configure("diffusion_pretrain", 1, "clipped", "optimiser.grad_clip=1e-3")
    for config in (each, threes, clipped):
        run(config)
    norms = [float(row["grad_norm"]) for row in runs.rows(each)]
    assert float(runs.rows(threes)[0]["grad_norm"]) == pytest.approx(sum(norms) / 3)
    assert float(runs.rows(clipped)[0]["grad_norm"]) == norms[0] > 0.1
    stage = build_stage(each).train()
    batch = next(Trainer(stage, configure("diffusion_pretrain", 1, "other"))._batches(0))
    stage(batch["image"], StepRng(0, each.seed))["loss"].backward()
    gradients = [parameter.grad.flatten() for parameter in stage.parameters() if parameter.grad is not None]
    assert norms[0] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-5)


@pytest.mark.slow
def test_a_run_stopped_within_an_interval_logs_as_an_uninterrupted_one(configure, runs) -> None:
    """Of the stage that has a critic beside the losses of all others."""
    options = ("trainer.log_every=3", "trainer.accumulation=2", "trainer.checkpoint_every=100")
    whole, parts = (configure("joint", 6, name, *options) for name in ("whole", "parts"))
    run(whole)
    for step in (2, 4):
        stop_at(Trainer(build_stage(parts), parts), step)
    run(parts)
    assert [row["step"] for row in runs.rows(parts)] == ["3", "6"]
    runs.assert_same(whole, parts)


def test_a_finished_run_goes_on_within_its_interval(configure, runs) -> None:
    """The row of its last step stays, and that of the whole interval is as if there had been no end."""
    options = ("trainer.log_every=2", "optimiser.warmup_steps=0")
    whole = configure("diffusion_pretrain", 4, "whole", *options)
    run(whole)
    for steps in (3, 4):
        run(configure("diffusion_pretrain", steps, "parts", *options))
    rows = runs.rows(configure("diffusion_pretrain", 4, "parts"))
    assert [row["step"] for row in rows] == ["2", "3", "4"]
    assert [rows[place]["loss"] for place in (0, 2)] == [row["loss"] for row in runs.rows(whole)]


def test_times_go_on_after_a_resume(configure, runs) -> None:
    config = configure(
        "diffusion_pretrain", 4, "run", "trainer.log_every=2", "trainer.checkpoint_every=3", "data.batch_size=3"
    )
    stop_at(Trainer(build_stage(config), config), 3)
    (path,) = Path(config.output, "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    assert 0 < state["clock"][1] < state["clock"][0] and state["interval"]["images"] == 3
    torch.save({**state, "clock": [1000.0, 500.0]}, path)
    run(config)
    first, second = runs.rows(config)
    assert 0 < float(first["seconds"]) < 1000 < float(second["seconds"]) < 1400
    assert float(first["images_per_second"]) > 6 / float(first["seconds"]) * 0.9
    assert float(second["images_per_second"]) == pytest.approx(6 / 500, abs=0.001)


def test_the_bar_counts_a_resumed_runs_own_steps(configure, monkeypatch) -> None:
    """Steps before the resume took none of its time, so that rate and remaining time are right."""
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(trainer_module, "tqdm", Bar)
    config = configure("diffusion_pretrain", 6, "run", "trainer.log_every=2")
    stop_at(Trainer(build_stage(config), config), 4)
    run(config)
    bar = {**bars[1].format_dict, "elapsed": 4.0, "rate": None}
    assert (bar["initial"], bar["n"], bar["total"]) == (4, 6, 6)
    assert "00:04<00:06,  2.00s/" in tqdm.format_meter(**{**bar, "total": 9}) and "loss=" in bar["postfix"]


def test_an_interval_that_was_skipped_leaves_its_cells_empty(configure, runs, monkeypatch) -> None:
    forward = BottleneckStage.forward

    def broken(stage, images, rng):
        factor = float("nan") if rng.number < 3 else 1
        return {name: value * factor for name, value in forward(stage, images, rng).items()}

    monkeypatch.setattr(BottleneckStage, "forward", broken)
    config = configure("bottleneck", 4, "run", "trainer.log_every=2", "trainer.non_finite=skip")
    run(config)
    first, second = runs.rows(config)
    assert first["loss"] == first["grad_norm"] == first["cosine_0.0313"] == "" and first["skipped"] == "2"
    assert math.isfinite(float(second["loss"])) and second["skipped"] == "3"  # of the one pass that counts
