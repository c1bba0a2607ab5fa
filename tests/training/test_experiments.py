"""Every experiment file trains two steps on a CPU, on random backbones, and what does not fit together is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from oscar import checkpoint
from oscar.config import StageConfig, TrainConfig
from oscar.convert.merge import merge_rates
from oscar.metrics.weights import WeightsUnavailable
from oscar.models.backbone import Backbone
from oscar.training.build import build_stage
from oscar.training.trainer import Trainer

FOLDER = Path(__file__).parents[2] / "configs/experiment"
EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
# Stable Diffusion's shape at small width for the paper's; nano's own, untrained; what is configured for tiny.
BACKBONES = {"paper": ["backbone=standin"], "nano": ["backbone.source=null"],
             "nano-hyperprior": ["backbone.source=null"], "tiny": []}  # fmt: skip
QUICK = ("data.crop=64", "data.batch_size=1", "data.workers=0", "data.cache=false", "trainer.max_steps=2",
         "trainer.log_every=1", "trainer.threads=1", "logger.tensorboard=false")  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate(quick_tables):
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def dry_run(compose, photos: Path, output: Path, experiment: str, *overrides: str) -> TrainConfig:
    options = [f"experiment={experiment}", f"data.train=[{photos}]", f"output={output}", *QUICK]
    if not experiment.endswith(("vae", "prior")):
        options.append("init_from=null")
        if "hyperprior" not in experiment:
            options += ["bottleneck.width=8", "bottleneck.features=8"]
    if experiment == "paper/stage2":  # their weights are not here
        options += ["stage.image_losses.dists=0", "stage.image_losses.edges_dists=0"]
    config = compose(*options, *overrides)
    assert Trainer(build_stage(config), config).run()
    return config


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("paper")) for name in EXPERIMENTS]
)
def test_two_steps(compose, photos: Path, tmp_path: Path, experiment: str) -> None:
    config = dry_run(compose, photos, tmp_path, experiment, *BACKBONES[experiment.split("/")[0]])
    with (tmp_path / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if config.stage.name in ("vae", "prior"):
        Backbone.from_pretrained(tmp_path / "final")
    else:
        assert OscarCodec.from_pretrained(tmp_path / "final").rates == config.bottleneck.rate_points()


@pytest.mark.slow
def test_the_papers_stages_follow_one_another(compose, photos: Path, tmp_path: Path) -> None:
    small = ("backbone=tiny", "denoiser.lora_rank=2", "denoiser.prompt_tokens=4")  # 258 adapters take seconds to make
    parts = []
    for rate in ("0.0625", "0.125"):  # rate by rate, as published
        parts.append(tmp_path / rate)
        dry_run(compose, photos, parts[-1], "paper/stage1", f"bottleneck.rates=[{rate}]", *small)
    merge_rates([part / "final" for part in parts], tmp_path / "stage1")
    dry_run(compose, photos, tmp_path / "stage2", "paper/stage2", f"init_from={tmp_path / 'stage1'}", *small)
    assert [rate.bpp for rate in OscarCodec.from_pretrained(tmp_path / "stage2/final").rates] == [0.0625, 0.125]


def test_without_the_weights_of_dists_nothing_starts(compose, photos: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "empty"))
    config = compose("experiment=paper/stage2", "backbone=standin", "init_from=null", "bottleneck=tiny",
                     f"data.train=[{photos}]", f"output={tmp_path / 'run'}")  # fmt: skip
    with pytest.raises(WeightsUnavailable, match=r"dists weights .*under stage\.network_files\.dists") as error:
        build_stage(config)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_stage1_is_the_published_one(compose, photos: Path) -> None:
    config = compose("experiment=paper/stage1", f"data.train=[{photos}]")
    assert (config.backbone.name, config.init_from) == ("sd21", None)
    assert (config.data.crop, config.data.batch_size, config.data.augment) == (256, 64, True)
    assert (config.optimiser.lr, config.optimiser.schedule, config.trainer.max_steps) == (5e-5, "constant", 10_000)
    assert config.trainer.accumulation == 1 and config.trainer.ema_decay is None
    assert config.stage == StageConfig(name="hyper", cosine=1.0)  # all else is as in the class: no commitment
    published_bottleneck(config)


def test_stage2_is_the_published_one(compose, photos: Path) -> None:
    config = compose("experiment=paper/stage2", f"data.train=[{photos}]")
    assert (config.backbone.name, config.init_from) == ("sd21", "runs/paper/stage1/final")
    assert (config.data.crop, config.data.batch_size, config.data.augment) == (256, 8, True)
    assert config.trainer.max_steps == 150_000 and config.trainer.accumulation == 1
    assert config.trainer.ema_decay is None and config.timesteps is None
    for optimiser in (config.optimiser, config.stage.critic.optimiser):
        assert (optimiser.lr, optimiser.betas, optimiser.weight_decay) == (5e-5, [0.9, 0.999], 1e-2)
        assert (optimiser.schedule, optimiser.warmup_steps, optimiser.grad_clip) == ("constant", 10, 1.0)
    stage = config.stage
    assert stage.image_losses == {"l1": 1.0, "dists": 1.0, "edges_dists": 1.0}
    assert (stage.gan, stage.cosine, stage.commitment, stage.latent, stage.kl) == (5e-3, 2.0, 0, 0, 0)
    assert (stage.critic.weight, stage.critic.timesteps) == (1e-2, [20, 980])
    assert (stage.vae, stage.rate_order, stage.rate_weights) == ("frozen", "random", {})
    assert config.denoiser.options() == {"tuning": "lora", "lora_rank": 16, "lora_alpha": 8.0, "prompt_tokens": 77}
    assert config.denoiser.prompt_init == "noise"
    published_bottleneck(config)


def published_bottleneck(config: TrainConfig) -> None:
    bottleneck = config.bottleneck
    assert [rate.id for rate in bottleneck.rate_points()] == list(range(8))
    assert (bottleneck.width, bottleneck.features, bottleneck.codebook_dim) == (192, 320, 32)
    assert (bottleneck.kmeans_init, bottleneck.dead_code_threshold, bottleneck.decay) == (False, 0, 0.8)
    assert bottleneck.rotation_trick and not bottleneck.dither
