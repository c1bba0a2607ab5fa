"""The loop: a resumed run repeats an uninterrupted one bit for bit, and whatever stops it leaves it resumable."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oscar import OscarCodec
from oscar.config import CacheLatentsConfig, ConfigError, TrainConfig
from oscar.inference.load import load
from oscar.models.backbone import Backbone
from oscar.training.build import build_stage
from oscar.training.checkpoints import find_checkpoints
from oscar.training.latent_cache import cache_latents
from oscar.training.losses import critic_loss
from oscar.training.stages.bottleneck import BottleneckStage
from oscar.training.stages.diffusion_pretrain import PriorStage
from oscar.training.train_state import NonFiniteError
from oscar.training.trainer import Trainer
from oscar.training.validation import Validator

PARTS = ("learner", "critic")
STAGES = ["vae", "diffusion_pretrain", "bottleneck", "joint"]
# what makes a resume hard: averages, several passes per step, and random draws inside the quantiser
HARD = ("trainer.accumulation=2", "trainer.ema_decay=0.9")
QUANTISER = ("bottleneck.kmeans_init=true", "bottleneck.dead_code_threshold=0.5")


pytestmark = pytest.mark.usefixtures("quick_tables")


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, steps: int, output: str = "run", *overrides: str) -> TrainConfig:
        if not any("rates=" in override for override in overrides):
            overrides = ("bottleneck.rates=[0.0019,0.0313,0.125]", *overrides)
        return compose(
            f"experiment=tiny/{stage}",
            f"data.train=[{photos}]",
            f"output={tmp_path / output}",
            f"trainer.max_steps={steps}",
            "trainer.checkpoint_every=100",
            "logger.tensorboard=false",
            *overrides,
        )

    return make


def run(config: TrainConfig) -> Trainer:
    trainer = Trainer(build_stage(config), config)
    assert trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [("joint", ()), *((stage, (*HARD, *QUANTISER)) for stage in STAGES)],
    ids=["joint, plain", *STAGES],
)
def test_a_resumed_run_equals_an_uninterrupted_one(configure, runs, stage: str, overrides: tuple[str, ...]) -> None:
    if stage in ("vae", "diffusion_pretrain"):
        overrides = tuple(override for override in overrides if override not in QUANTISER)
    run(configure(stage, 3, "resumed", *overrides))
    torch.manual_seed(99)  # nothing may depend on what ran before in this process
    resumed, whole = configure(stage, 6, "resumed", *overrides), configure(stage, 6, "whole", *overrides)
    assert run(resumed).step == 6
    run(whole)
    runs.assert_same(resumed, whole)
    assert [row["step"] for row in runs.rows(resumed)] == ["1", "2", "3", "4", "5", "6"]


def test_rows_after_the_checkpoint_are_dropped(configure, runs) -> None:
    """A run that died between two checkpoints repeats the steps in between, and its log holds each once."""
    config = configure("diffusion_pretrain", 5, "run", "trainer.checkpoint_every=2", "trainer.keep_last=5")
    run(config)
    assert [path.name for path in find_checkpoints(Path(config.output))] == [
        "step-0000002.pt",
        "step-0000004.pt",
        "step-0000005.pt",
    ]
    before = runs.rows(config)
    find_checkpoints(Path(config.output))[-1].unlink()
    run(config)
    after = runs.rows(config)
    assert [row["step"] for row in after] == ["1", "2", "3", "4", "5"]
    assert [row["loss"] for row in after] == [row["loss"] for row in before]


def test_old_checkpoints_are_deleted(configure) -> None:
    config = configure("diffusion_pretrain", 5, "run", "trainer.checkpoint_every=1", "trainer.keep_last=2")
    run(config)
    names = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert names == ["step-0000004.pt", "step-0000005.pt"]


def test_a_finished_run_does_nothing_more(configure, runs, caplog) -> None:
    config = configure("diffusion_pretrain", 2)
    run(config)

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file()}

    before = files()
    caplog.set_level("INFO")
    assert run(config).step == 2
    assert files() == before
    assert f"finished already: {config.output}/final, 2 steps; nothing to do" in caplog.text
    assert run(configure("diffusion_pretrain", 3)).step == 3
    assert [row["step"] for row in runs.rows(config)] == ["1", "2", "3"]


def test_without_resume_a_run_starts_over(configure, runs) -> None:
    run(configure("diffusion_pretrain", 3))
    config = configure("diffusion_pretrain", 2, "run", "trainer.resume=false")
    run(config)
    assert len(runs.rows(config)) == 2 and len(find_checkpoints(Path(config.output))) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint(configure, runs, monkeypatch, number: signal.Signals) -> None:
    config = configure("diffusion_pretrain", 6)
    optimise = Trainer._optimise

    def interrupted(trainer: Trainer, batches):
        if trainer.step == 1:
            os.kill(os.getpid(), number)
        return optimise(trainer, batches)

    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "_optimise", interrupted)
    trainer = Trainer(build_stage(config), config)
    assert trainer.run() is False
    assert trainer.step == 2 and runs.newest(config)["step"] == 2
    assert not (Path(config.output) / "final").exists()
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    whole = configure("diffusion_pretrain", 6, "whole")
    assert run(config).step == run(whole).step == 6
    runs.assert_same(config, whole)


def test_the_result_is_a_codec(configure, make_image) -> None:
    config = configure("joint", 2)
    trainer = run(config)
    codec = load(Path(config.output) / "final")
    assert codec.model_tag == int(codec.fingerprint[:4], 16)
    for rate in codec.bottleneck.rates:
        data = codec.compress(make_image(70, 50), rate)
        assert codec.decompress(data).size == (70, 50)
        assert codec.bottleneck.frequencies[rate.id].sum() == 2**16 - 1
    assert codec.bottleneck.rates == trainer.stage.codec.bottleneck.rates


def test_the_average_is_saved_and_not_trained_on(configure, runs) -> None:
    config = configure("diffusion_pretrain", 4, "run", "trainer.ema_decay=0.9")
    trainer = run(config)
    final = Backbone.from_pretrained(Path(config.output) / "final")
    state = runs.newest(config)
    averages = dict(
        zip(
            [name for name, p in trainer.stage.named_parameters() if p.requires_grad],
            state["ema"]["shadow_params"],
            strict=True,
        )
    )
    moved = 0
    for name, average in averages.items():
        saved = final.state_dict()[name.removeprefix("backbone.")]
        assert torch.equal(saved, average), name
        moved += not torch.equal(state["learner"]["model"][name], average)
        assert torch.equal(trainer.stage.state_dict()[name], state["learner"]["model"][name])  # put back
    assert moved > len(averages) / 2


def test_accumulated_passes_are_one_larger_batch(configure) -> None:
    """Two passes of one image make the step of one pass of both, for a loss without random draws."""
    common = ("data.augment=false", "data.workers=0", "stage.kl=0", "stage.image_losses={l1:1,ms_ssim:0}")
    once = configure("vae", 1, "once", "data.batch_size=2", *common)
    twice = configure("vae", 1, "twice", "data.batch_size=1", "trainer.accumulation=2", *common)
    states = [run(config).stage.state_dict() for config in (once, twice)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_channels_last_and_threads(configure) -> None:
    run(configure("joint", 1, "run", "trainer.channels_last=true", "trainer.threads=1"))


def test_a_loss_that_is_no_number_names_the_images(configure, runs, monkeypatch, photos: Path) -> None:
    config = configure("diffusion_pretrain", 4, "run", "trainer.checkpoint_every=1")
    forward = PriorStage.forward

    def broken(stage, images, rng):
        metrics = forward(stage, images, rng)
        return {name: value * (float("nan") if rng.number == 2 else 1) for name, value in metrics.items()}

    monkeypatch.setattr(PriorStage, "forward", broken)
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step 3; images .*{photos}/\d\.png, ") as error:
        run(config)
    assert "\n" not in str(error.value)
    assert runs.newest(config)["step"] == 2  # of before the damage


@pytest.fixture
def broken(monkeypatch) -> Callable[..., None]:
    """Makes stage bottleneck's loss NaN in some passes, after the codebooks were updated."""

    def make(*passes: int) -> None:
        forward = BottleneckStage.forward

        def wrong(stage, images, rng):
            metrics = forward(stage, images, rng)
            factor = float("nan") if rng.number in passes else 1
            return {name: value * factor for name, value in metrics.items()}

        monkeypatch.setattr(BottleneckStage, "forward", wrong)

    return make


def test_a_skipped_step_changes_nothing(configure, runs, broken, caplog) -> None:
    options = ("trainer.non_finite=skip", "trainer.ema_decay=0.9", "trainer.accumulation=2", "optimiser.warmup_steps=9")
    config = configure("bottleneck", 1, "run", *options)
    run(config)
    before = runs.newest(config)
    broken(3)  # the second pass of the second step
    config = configure("bottleneck", 2, "run", *options)
    run(config)
    after = runs.newest(config)
    assert (before["step"], before["skipped"], after["step"], after["skipped"]) == (1, [0, 0], 2, [1, 1])
    runs.assert_equal(after["ema"], before["ema"])
    runs.assert_equal(after["learner"]["model"], before["learner"]["model"])
    runs.assert_equal(after["learner"]["optimiser"]["state"], before["learner"]["optimiser"]["state"])
    assert after["learner"]["schedule"]["last_epoch"] == 2  # the learning rate stays a function of the step
    assert [(row["step"], row["skipped"]) for row in runs.rows(config)] == [("1", "0"), ("2", "1")]
    assert "step skipped: loss is nan at step 2; images of the batch: " in caplog.text


def test_a_critic_without_a_number_is_skipped_too(configure, runs, monkeypatch) -> None:
    """Its update is left out, while the codec's stands; both learning rates stay functions of the step."""
    options = (
        "trainer.non_finite=skip",
        "trainer.accumulation=2",
        "trainer.ema_decay=0.9",
        "optimiser.warmup_steps=9",
        "trainer.checkpoint_every=1",
        "trainer.keep_last=9",
    )
    calls = []

    def broken(*logits):
        calls.append(logits)
        return critic_loss(*logits) * float("nan" if len(calls) == 3 else 1)  # the first pass of the second step

    monkeypatch.setattr("oscar.training.stages.base.critic_loss", broken)
    config = configure("joint", 3, "run", *options)
    trainer = run(config)
    assert (trainer.skipped, trainer.skipped_in_a_row) == (1, 0)
    states = [torch.load(path, weights_only=True) for path in find_checkpoints(Path(config.output))]
    assert all(state[part]["schedule"]["last_epoch"] == state["step"] for state in states for part in PARTS)
    runs.assert_equal(states[1]["critic"]["model"], states[0]["critic"]["model"])
    runs.assert_equal(states[1]["critic"]["optimiser"]["state"], states[0]["critic"]["optimiser"]["state"])
    moved = {
        name
        for name, value in states[1]["learner"]["model"].items()
        if not torch.equal(value, states[0]["learner"]["model"][name])
    }
    assert "codec.denoiser.prompt" in moved and any("_codebook.embed" in name for name in moved)
    assert [state["ema"]["optimization_step"] for state in states] == [1, 2, 3]
    assert [row["critic_grad_norm"] != "" for row in runs.rows(config)] == [True, False, True]
    assert all(row["loss"] and row["grad_norm"] for row in runs.rows(config))


def test_too_many_skips_stop_the_run(configure, runs, broken) -> None:
    broken(1, 2, 4)
    with pytest.raises(NonFiniteError, match="2 steps in a row were skipped; loss is nan at step 3; images"):
        run(configure("bottleneck", 5, "run", "trainer.non_finite=skip", "trainer.max_skipped=2"))
    config = configure("bottleneck", 6, "other", "trainer.non_finite=skip", "trainer.max_skipped=3")
    run(config)
    assert runs.newest(config)["skipped"] == [3, 0]


@pytest.fixture
def scores(monkeypatch) -> Callable[..., list[int]]:
    """Replaces validation by given scores, and makes the list of the steps at which it was asked for one."""

    def make(*values: float) -> list[int]:
        seen, steps = iter(values), []

        def validate(validator: Validator, stage, step: int) -> dict[str, float]:
            steps.append(step)
            return {"cosine": next(seen)}

        monkeypatch.setattr(Validator, "run", validate)
        return steps

    return make


def best(config: TrainConfig) -> dict:
    return torch.load(Path(config.output, "checkpoints/best.pt"), weights_only=True)


def test_the_best_checkpoint_is_kept(configure, runs, photos: Path, scores) -> None:
    """It stays when later ones are worse, also after a resume; no number is no best."""
    options = (f"validation.images={photos}", "validation.every=2", "trainer.keep_last=1")
    steps = scores(0.5, 0.7, 0.6, float("nan"), 0.65)
    run(configure("bottleneck", 5, "run", *options))
    config = configure("bottleneck", 8, "run", *options)
    run(config)
    assert steps == [2, 4, 5, 6, 8]
    assert (best(config)["step"], best(config)["best"], runs.newest(config)["best"]) == (4, 0.7, 0.7)
    lines = Path(config.output, "validation.csv").read_text().splitlines()
    assert lines == ["step,cosine", "2,0.5", "4,0.7", "5,0.6", "6,nan", "8,0.65"]
    run(config)
    assert len(steps) == 5  # what is finished is not validated anew


def test_the_best_weights_can_be_the_result(configure, runs, photos: Path, scores) -> None:
    scores(0.5, 0.7, 0.6)
    options = (f"validation.images={photos}", "validation.every=1", "trainer.ema_decay=0.5", "trainer.final=best")
    config = configure("bottleneck", 3, "run", *options)
    trainer = run(config)
    averages = best(config)["ema"]["shadow_params"]
    assert best(config)["step"] == 2 and runs.newest(config)["step"] == 3
    final = OscarCodec.from_pretrained(Path(config.output) / "final").state_dict()
    names = [name for name, parameter in trainer.stage.named_parameters() if parameter.requires_grad]
    for name, average in zip(names, averages, strict=True):
        assert torch.equal(final[name.removeprefix("codec.")], average), name


def test_validation_sees_the_averages(configure, runs, photos: Path, monkeypatch) -> None:
    def validate(validator: Validator, stage, step: int) -> dict[str, float]:
        parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        matches.append(all(map(torch.equal, parameters, trainer.ema.shadow_params)))
        return {"cosine": 0.5}

    matches: list[bool] = []
    monkeypatch.setattr(Validator, "run", validate)
    config = configure(
        "bottleneck", 2, "run", f"validation.images={photos}", "validation.every=1", "trainer.ema_decay=0.5"
    )
    trainer = Trainer(build_stage(config), config)
    trainer.run()
    assert matches == [True, True]
    plain = configure("bottleneck", 2, "plain", "trainer.ema_decay=0.5")
    run(plain)
    runs.assert_equal(runs.newest(config)["learner"], runs.newest(plain)["learner"])  # and training does not notice


def test_a_validation_that_was_cut_off_is_made_up_for(configure, photos: Path, scores) -> None:
    options = (f"validation.images={photos}", "validation.every=1", "trainer.checkpoint_every=1")
    config = configure("bottleneck", 3, "run", *options)
    scores(0.5)  # and an error at the next
    with pytest.raises(StopIteration):
        run(config)
    with Path(config.output, "validation.csv").open("a") as file:
        file.write("2,0.")  # half a row
    steps = scores(0.6, 0.7)
    run(config)
    assert steps == [2, 3]
    lines = Path(config.output, "validation.csv").read_text().splitlines()
    assert lines == ["step,cosine", "1,0.5", "2,0.6", "3,0.7"]


@pytest.mark.parametrize("stage", ["vae", "diffusion_pretrain", "joint"])
def test_gradient_checkpointing_changes_no_gradient(configure, monkeypatch, stage: str) -> None:
    options = ("bottleneck.rotation_trick=false", *(["stage.vae=all"] if stage == "joint" else []))
    plain = configure(stage, 1, "plain", *options)
    thrifty = configure(stage, 1, "thrifty", "trainer.gradient_checkpointing=true", *options)
    calls = []
    kept = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", lambda *a, **k: calls.append(a[0]) or kept(*a, **k))
    states = []
    for config in (plain, thrifty):
        assert not calls
        states.append(run(config).stage.state_dict())
    names = {type(block).__name__ for block in calls}
    assert (
        names
        >= {
            "vae": {"UpDecoderBlock2D", "DownEncoderBlock2D"},
            "diffusion_pretrain": {"ResnetBlock2D"},
            "joint": {"UpDecoderBlock2D", "DownEncoderBlock2D", "ResnetBlock2D"},
        }[stage]
    )
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_reaches_the_critic(configure) -> None:
    stage = build_stage(configure("joint", 1, "run", "trainer.gradient_checkpointing=true"))
    blocks = [module for module in stage.critic.modules() if hasattr(module, "gradient_checkpointing")]
    assert blocks and all(block.gradient_checkpointing for block in blocks)


@pytest.mark.parametrize("stage", STAGES)
def test_networks_are_compiled_by_switch(configure, runs, monkeypatch, stage: str) -> None:
    """Every network that takes time runs compiled; the compiler, which takes minutes, is replaced."""
    called = set()

    def compile(function, **options):
        network = type(function.__self__).__name__

        def compiled(*args, **kwargs):
            called.add(network)
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr("torch.compile", compile)
    plain, compiled = configure(stage, 1, "plain"), configure(stage, 1, "compiled", "trainer.compile=true")
    one = run(plain).stage.state_dict()
    assert not called
    other = run(compiled).stage.state_dict()
    assert (
        called
        == {
            "vae": {"Encoder", "Decoder"},
            "diffusion_pretrain": {"Encoder", "UNet2DConditionModel"},
            "bottleneck": {"Encoder", "Sequential"},
            "joint": {"Encoder", "Decoder", "Sequential", "UNet2DConditionModel", "UNetFirstHalf"},
        }[stage]
    )
    runs.assert_equal(dict(one), dict(other))


def test_several_processes_on_the_cpu_are_not_started_by_one(configure, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # what `accelerate launch --cpu --num_processes 2` sets
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="starts one process.*allowed: .*configs/accelerate/cpu.yaml"):
        Trainer(build_stage(configure("diffusion_pretrain", 1)), configure("diffusion_pretrain", 1))


def test_a_run_on_cached_latents_repeats_that_on_images(configure, runs, tmp_path: Path) -> None:
    images = configure("bottleneck", 2, "images")
    cache = CacheLatentsConfig(
        output=str(tmp_path / "latents"),
        crops=1,
        seed=images.seed,
        dtype="float32",
        backbone=images.backbone,
        data=images.data,
        device="cpu",
    )
    cache_latents(cache, progress=False)
    cached = configure("bottleneck", 2, "cached", f"data.latents={tmp_path / 'latents'}")
    run(images)
    run(cached)
    for one, other in zip(runs.rows(images), runs.rows(cached), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)


def test_a_checkpoint_of_another_number_of_crops_per_step_is_refused(configure) -> None:
    run(configure("diffusion_pretrain", 1))
    message = r"made with 2 crops per step, but this run has 3 .*data.batch_size 3 .*; allowed: a product of 2"
    with pytest.raises(ValueError, match=message):
        run(configure("diffusion_pretrain", 2, "run", "data.batch_size=3"))
    run(configure("diffusion_pretrain", 2, "run", "data.batch_size=1", "trainer.accumulation=2"))


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("bottleneck", "bottleneck.width=16", "bottleneck.width was 8, is 16"),
        ("bottleneck", "bottleneck.rates=[0.0019]", r"bottleneck.rates was \[.*\], is \[0.0019\]"),
        ("diffusion_pretrain", "trainer.ema_decay=0.9", "trainer.ema_decay was None, is 0.9"),
        ("joint", "stage.gan=0", "stage.gan was 0.005, is 0.0"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    configure, runs, stage: str, override: str, message: str
) -> None:
    config = configure(stage, 1)
    run(config)
    before = runs.newest(config)
    with pytest.raises(ValueError, match=message) as error:
        run(configure(stage, 2, "run", override))
    assert "\n" not in str(error.value)
    runs.assert_equal(runs.newest(config), before)


def test_more_rates_than_the_checkpoint_are_refused(configure) -> None:
    run(configure("bottleneck", 1, "run", "bottleneck.rates=[0.0019]"))
    with pytest.raises(ConfigError, match=r"bottleneck.rates was \[0.0019\], is \[0.0019, 0.125\]"):
        run(configure("bottleneck", 2, "run", "bottleneck.rates=[0.0019,0.125]"))


def test_a_damaged_checkpoint_is_refused(configure) -> None:
    config = configure("diffusion_pretrain", 1)
    run(config)
    path = find_checkpoints(Path(config.output))[-1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"checkpoint {path} cannot be read"):
        run(configure("diffusion_pretrain", 2))
