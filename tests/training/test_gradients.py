"""Gradients that are not finite, loss scaling, and half precision in every stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from oscar.bottlenecks.hyper_encoder import HyperEncoder
from oscar.config import TrainConfig
from oscar.rates import PAPER_RATES
from oscar.training.build import build_stage
from oscar.training.checkpoints import find_checkpoints
from oscar.training.processes import make_accelerator
from oscar.training.train_state import NonFiniteError
from oscar.training.trainer import Trainer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STAGES = ["vae", "diffusion_pretrain", "bottleneck", "joint", "hyperprior_bottleneck", "hyperprior_joint", "context"]
SMALL = ("stage.context.neighbours=6", "stage.context.hidden=12", "stage.context.features=8")


@pytest.fixture(autouse=True)
def fresh_accelerate(quick_tables):
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def configure(compose, photos: Path, tiny_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, steps: int, output: str, *overrides: str) -> TrainConfig:
        if stage == "context":
            options = [
                "experiment=nano_vq/context",
                "backbone=tiny",
                "bottleneck=tiny",
                f"init_from={tiny_folder}",
                "data.crop=64",
                "data.batch_size=2",
                "data.workers=0",
                *SMALL,
            ]
            overrides = ("trainer.log_every=1", *overrides)
        else:
            options = [f"experiment=tiny/{stage}"]
            if not stage.startswith("hyperprior"):
                options.append("bottleneck.rates=[0.0019,0.0313,0.125]")
        options += [
            f"data.train=[{photos}]",
            f"output={tmp_path / output}",
            f"trainer.max_steps={steps}",
            "trainer.checkpoint_every=1",
            "trainer.threads=1",
            "logger.tensorboard=false",
        ]
        return compose(*options, *overrides)

    return make


def make_trainer(config: TrainConfig, autocast: bool = True, **scaling) -> Trainer:
    """A trainer that computes in float16 where the configuration says so, which Accelerate itself does on GPUs only."""
    accelerator = make_accelerator(config)
    if config.trainer.mixed_precision == "fp16":
        accelerator.native_amp, accelerator.scaler = autocast, torch.amp.GradScaler("cpu", **scaling)
    return Trainer(build_stage(config), config, accelerator)


def spoil(parameter: nn.Parameter, when: Callable[[], bool], value: float = math.nan) -> None:
    """Have a parameter's gradient be no number whenever the condition holds."""
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value) if when() else gradient)


def states(config: TrainConfig) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in find_checkpoints(Path(config.output))]


def norms(config: TrainConfig, runs) -> dict[str, list[float]]:
    rows = runs.rows(config)
    return {name: [float(row[name]) for row in rows] for name in ("grad_norm", "critic_grad_norm") if name in rows[0]}


# Gradients that are not finite, of a finite loss.


@pytest.mark.parametrize(("clip", "value"), [("1.0", math.nan), ("null", math.inf)])
def test_a_gradient_without_a_number_stops_the_run(configure, runs, photos: Path, clip: str, value: float) -> None:
    config = configure(
        "diffusion_pretrain", 5, "run", f"optimiser.grad_clip={clip}", "trainer.ema_decay=0.9", "trainer.accumulation=2"
    )
    trainer = make_trainer(config)
    spoil(trainer.train_state.parameters[3], lambda: trainer.step == 2, value)
    message = f"^norm of the gradients is {value} at step 3; images of the batch: "
    with pytest.raises(NonFiniteError, match=message) as error:
        trainer.run()
    assert str(error.value).count(".png") == 4  # of both passes
    found = states(config)
    assert [state["step"] for state in found] == [1, 2]
    assert all(value.isfinite().all() for state in found for value in state["learner"]["model"].values())
    assert all(parameter.isfinite().all() for parameter in trainer.train_state.parameters)
    reset()
    whole = configure(
        "diffusion_pretrain",
        5,
        "whole",
        f"optimiser.grad_clip={clip}",
        "trainer.ema_decay=0.9",
        "trainer.accumulation=2",
    )
    for each in (config, whole):
        make_trainer(each).run()
    runs.assert_same(config, whole)


def test_a_skipped_gradient_changes_nothing(configure, runs) -> None:
    config = configure(
        "joint",
        3,
        "run",
        "trainer.non_finite=skip",
        "trainer.ema_decay=0.9",
        "trainer.accumulation=2",
        "trainer.keep_last=9",
        "optimiser.warmup_steps=9",
    )
    trainer = make_trainer(config)
    spoil(trainer.stage.codec.denoiser.prompt, lambda: trainer.step == 1)
    assert trainer.run()
    before, skipped, after = states(config)
    assert (skipped["skipped"], after["skipped"]) == ([1, 1], [1, 0])
    for part in ("learner", "critic"):
        for name in ("model", "optimiser"):
            one, other = before[part][name], skipped[part][name]
            runs.assert_equal(*((one, other) if name == "model" else (one["state"], other["state"])))
        assert [state[part]["schedule"]["last_epoch"] for state in (before, skipped, after)] == [1, 2, 3]
    runs.assert_equal(before["ema"], skipped["ema"])
    assert not torch.equal(*(state["learner"]["model"]["codec.denoiser.prompt"] for state in (skipped, after)))
    assert [row["loss"] != "" for row in runs.rows(config)] == [True, False, True]


def test_a_skipped_first_gradient_leaves_no_zero_behind(configure) -> None:
    """With gradients that are set to zero, such a zero would move the weights of a rate in the steps to come."""
    config = configure("joint", 1, "run", "trainer.non_finite=skip", "optimiser.set_to_none=false", "stage.gan=0")
    trainer = make_trainer(config)
    spoil(trainer.stage.codec.denoiser.prompt, lambda: True)
    assert trainer.run() and trainer.skipped == 1
    assert all(parameter.grad is None for parameter in trainer.train_state.parameters)


@pytest.mark.parametrize("handling", ["stop", "skip"])
def test_a_critics_gradient_without_a_number(configure, runs, handling: str) -> None:
    config = configure("joint", 3, "run", f"trainer.non_finite={handling}", "trainer.keep_last=9")
    trainer = make_trainer(config)
    spoil(trainer.critic.parameters[0], lambda: trainer.step == 1)
    if handling == "stop":
        with pytest.raises(NonFiniteError, match="^norm of the critic's gradients is nan at step 2; images of the"):
            trainer.run()
        assert [state["step"] for state in states(config)] == [1]
        return
    assert trainer.run()
    before, skipped, after = states(config)
    assert (skipped["skipped"], after["skipped"]) == ([1, 1], [1, 0])
    runs.assert_equal(before["critic"]["model"], skipped["critic"]["model"])
    names = ("critic_grad_norm", "grad_norm", "critic")
    assert [[row[name] != "" for name in names] for row in runs.rows(config)] == [
        [True, True, True],
        [False, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize("part", ["weight", "average", "codebook", "moment"])
def test_no_checkpoint_is_written_of_what_is_not_finite(configure, runs, part: str) -> None:
    config = configure("bottleneck", 4, "run", "trainer.ema_decay=0.9")
    trainer = make_trainer(config)
    optimise, names = (
        trainer._optimise,
        {
            "weight": "learner.model.codec.bottleneck.",
            "average": "ema.shadow_params.0",
            "codebook": "learner.model.codec.bottleneck.hyper_encoders.0.quantizer._codebook.cluster_size",
            "moment": "learner.optimiser.state.0.exp_avg",
        },
    )

    def damaged(batches) -> None:
        optimise(batches)
        if trainer.step == 2:
            parameter = trainer.train_state.parameters[0]
            tensor = {
                "weight": parameter.data,
                "average": trainer.ema.shadow_params[0],
                "moment": trainer.train_state.optimiser.state[parameter]["exp_avg"],
                "codebook": trainer.stage.codec.bottleneck.at(PAPER_RATES[0]).quantizer._codebook.cluster_size,
            }[part]
            tensor.view(-1)[0] = math.inf

    trainer._optimise = damaged
    message = rf"^checkpoint .*/step-0000003.pt is not written: {names[part]}.* holds values that are not finite; ear"
    with pytest.raises(NonFiniteError, match=message):
        trainer.run()
    assert {path.name for path in Path(config.output, "checkpoints").iterdir()} == {
        "step-0000001.pt",
        "step-0000002.pt",
    }
    assert not Path(config.output, "final").exists()
    reset()
    trainer = make_trainer(config)
    assert trainer.step == 2 and trainer.run()


# Loss scaling.


@pytest.mark.slow
def test_scaled_gradients_are_those_of_float32(configure, runs) -> None:
    """Of codec and critic, whose passes are interleaved: each is divided by its scale once, when all are added up."""
    plain, scaled = (
        configure("joint", 3, precision, "trainer.accumulation=4", f"trainer.mixed_precision={precision}")
        for precision in ("no", "fp16")
    )
    for config in (plain, scaled):
        make_trainer(config, autocast=False).run()
        reset()
    one, other = norms(plain, runs), norms(scaled, runs)
    assert one.keys() == {"grad_norm", "critic_grad_norm"}
    for name, values in one.items():
        assert other[name] == pytest.approx(values, rel=1e-3), name
    assert states(scaled)[-1]["critic"]["scaler"]["_growth_tracker"] == 3


def test_the_critics_gradients_in_float16(configure, runs) -> None:
    """What the codec's clipping once took most of: all but that of the last pass."""
    plain, half = (
        configure("joint", 1, precision, "trainer.accumulation=4", f"trainer.mixed_precision={precision}")
        for precision in ("no", "fp16")
    )
    for config in (plain, half):
        make_trainer(config, init_scale=1024.0).run()
        reset()
    one, other = (norms(config, runs)["critic_grad_norm"] for config in (plain, half))
    assert other == pytest.approx(one, rel=0.02)


def test_an_overflow_is_no_fault(configure, runs) -> None:
    """The scale is halved until gradients are finite; nothing else moves but the learning rate."""
    config = configure(
        "joint",
        4,
        "run",
        "trainer.mixed_precision=fp16",
        "trainer.ema_decay=0.9",
        "trainer.accumulation=2",
        "trainer.keep_last=9",
        "trainer.non_finite=skip",
        "trainer.max_skipped=1",
    )
    trainer = make_trainer(config, autocast=False, init_scale=8.0)
    spoil(trainer.stage.codec.denoiser.prompt, lambda: trainer.train_state.scaler.get_scale() > 2, math.inf)
    before = {name: value.clone() for name, value in trainer.stage.state_dict().items()}
    assert trainer.run()
    found = states(config)
    assert [state["learner"]["scaler"]["scale"] for state in found] == [4, 2, 2, 2]
    assert [state["critic"]["scaler"]["scale"] for state in found] == [8] * 4  # its own
    assert [state["critic"]["scaler"]["_growth_tracker"] for state in found] == [0, 0, 1, 2]
    assert [state["ema"]["optimization_step"] for state in found] == [0, 0, 1, 2]
    assert all(state["skipped"] == [0, 0] for state in found)
    for part in ("learner", "critic"):
        assert [state[part]["schedule"]["last_epoch"] for state in found] == [1, 2, 3, 4]
    for name, value in found[1]["learner"]["model"].items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(found[2]["learner"]["model"]["codec.denoiser.prompt"], before["codec.denoiser.prompt"])
    rows = runs.rows(config)
    assert [row["grad_norm"] == "" for row in rows] == [True, True, False, False] and all(row["loss"] for row in rows)
    assert [float(row["loss_scale"]) for row in rows] == [4, 2, 2, 2]


def test_the_critics_overflow_is_its_own(configure) -> None:
    config = configure("joint", 2, "run", "trainer.mixed_precision=fp16")
    trainer = make_trainer(config, autocast=False, init_scale=8.0)
    spoil(trainer.critic.parameters[0], lambda: trainer.critic.scaler.get_scale() > 4, math.inf)
    assert trainer.run()
    state = states(config)[-1]
    assert (state["learner"]["scaler"]["scale"], state["critic"]["scaler"]["scale"]) == (8, 4)
    assert (state["learner"]["scaler"]["_growth_tracker"], state["critic"]["scaler"]["_growth_tracker"]) == (2, 1)


def test_a_gradient_that_no_scale_makes_finite_is_a_fault(configure) -> None:
    config = configure("diffusion_pretrain", 9, "run", "trainer.mixed_precision=fp16")
    trainer = make_trainer(config, autocast=False, init_scale=4.0)
    spoil(trainer.train_state.parameters[3], lambda: trainer.step > 0, math.inf)
    with pytest.raises(NonFiniteError, match="norm of the gradients is inf at step 4"):  # at scale 1
        trainer.run()


def test_a_loss_without_a_number_leaves_the_scale_alone(configure) -> None:
    config = configure("diffusion_pretrain", 4, "run", "trainer.mixed_precision=fp16", "trainer.non_finite=skip")
    trainer = make_trainer(config, autocast=False)
    forward = trainer.train_state.module.forward

    def broken(images, rng):
        metrics = forward(images, rng)
        return {name: value * (math.nan if rng.number in (0, 2) else 1) for name, value in metrics.items()}

    trainer.train_state.module.forward = broken
    assert trainer.run()
    state = states(config)[-1]
    assert state["skipped"] == [2, 0] and state["learner"]["scaler"]["scale"] == 65536
    assert state["learner"]["scaler"]["_growth_tracker"] == 2


@pytest.mark.slow
def test_a_resumed_run_takes_over_the_scales(configure, runs) -> None:
    options = ("trainer.mixed_precision=fp16", "trainer.ema_decay=0.9", "trainer.log_every=4")
    whole, parts = (configure("joint", 4, name, *options) for name in ("whole", "parts"))
    for config in (whole, parts):
        trainer = make_trainer(config, autocast=False, growth_interval=3)
        if config is parts:
            trainer.checkpoints.save = partial(save_and_stop, trainer, trainer.checkpoints.save)
        trainer.run()
        reset()
    assert trainer.step == 2
    make_trainer(parts, autocast=False, growth_interval=3).run()
    runs.assert_same(whole, parts)
    assert states(parts)[-1]["critic"]["scaler"]["scale"] == 2 * 65536


def save_and_stop(trainer: Trainer, save: Callable, *args) -> None:
    save(*args)
    trainer._stopping = trainer.step == 2


# Half precision.


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_in_half_precision(configure, runs, stage: str, precision: str) -> None:
    config = configure(stage, 2, "run", f"trainer.mixed_precision={precision}", "trainer.ema_decay=0.9")
    trainer = make_trainer(config, init_scale=64.0)
    seen = set()
    for module in trainer.stage.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    before = [parameter.detach().clone() for parameter in trainer.train_state.parameters]
    assert trainer.run()
    assert DTYPES[precision] in seen
    assert {parameter.dtype for parameter in trainer.train_state.parameters} == {torch.float32}
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.train_state.parameters, strict=True))
    for row in runs.rows(config):
        assert math.isfinite(float(row["loss"])) and float(row["grad_norm"]) > 0
    assert len(runs.rows(config)) == 2 and trainer.ema.optimization_step == 2
    assert Path(config.output, "final").is_dir()


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_codes_are_chosen_and_averaged_in_float32(make_codec, dtype: torch.dtype) -> None:
    encoder = make_codec().bottleneck.at(PAPER_RATES[7]).train()
    assert isinstance(encoder, HyperEncoder)
    seen = []
    encoder.quantizer.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0].dtype, torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", dtype):
        z_hat = encoder(torch.randn(2, 4, 8, 8)).z_hat
    assert seen == [(torch.float32, False)] and z_hat.dtype == dtype


def test_float16_on_a_processor_is_said_to_be_float32(configure, runs, caplog) -> None:
    half, plain = (
        configure("diffusion_pretrain", 2, precision, f"trainer.mixed_precision={precision}")
        for precision in ("fp16", "no")
    )
    for config in (half, plain):
        with caplog.at_level(logging.WARNING):
            Trainer(build_stage(config), config).run()
        reset()
    (message,) = [record.getMessage() for record in caplog.records if "mixed_precision" in record.getMessage()]
    assert message == (
        "trainer.mixed_precision is 'fp16', which takes a GPU: on this CPU all is computed in float32; "
        "allowed on a CPU: no, bf16"
    )
    runs.assert_same(half, plain)
