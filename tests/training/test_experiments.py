"""Every experiment file trains two steps on a CPU, on random backbones, and what does not fit together is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from oscar import OscarCodec
from oscar.config import TrainConfig
from oscar.convert.merge import merge_rates
from oscar.metrics.weights import WeightsUnavailable
from oscar.models.backbone import Backbone
from oscar.training.build import build_stage
from oscar.training.trainer import Trainer

FOLDER = Path(__file__).parents[2] / "configs/experiment"
EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
# Stable Diffusion's shape at small width for the paper's; nano-vq's own, untrained; what is configured for tiny.
BACKBONES = {
    "paper": ["backbone=standin"],
    "paper_corrected": ["backbone=standin"],
    "sd21_hyperprior": ["backbone=standin"],
    "nano": ["backbone.source=null"],
    "nano_vq": ["backbone.source=null"],
    "tiny": [],
}
QUICK = (
    "data.crop=64",
    "data.batch_size=1",
    "data.total_batch_size=null",
    "data.workers=0",
    "data.cache=false",
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "trainer.threads=1",
    "logger.tensorboard=false",
)


pytestmark = pytest.mark.usefixtures("quick_tables")


def calibration(folder: Path) -> Path:
    """A calibration.json of nano-vq's rates."""
    rates = (0, 1, 2, 3, 6, 7, 9, 11)
    cosine = {
        "kind": "cosine",
        "timesteps": {str(rate): 100 + rate for rate in rates},
        "values": {str(rate): 0.5 for rate in rates},
    }
    path = folder / "calibration.json"
    path.write_text(json.dumps({"mappings": {"cosine": cosine}}))
    return path


def dry_run(compose, photos: Path, output: Path, experiment: str, *overrides: str) -> TrainConfig:
    options = [f"experiment={experiment}", f"data.train=[{photos}]", f"output={output}", *QUICK]
    if not experiment.endswith(("vae", "diffusion_pretrain")):
        options.append("init_from=null")
        if "hyperprior" not in experiment and not experiment.startswith("nano/"):
            options += ["bottleneck.width=8", "bottleneck.features=8"]
    if experiment.endswith("stage2"):  # their weights are not here
        options += ["stage.image_losses.dists=0", "stage.image_losses.edges_dists=0"]
    if experiment == "nano_vq/further":  # where `oscar calibrate-timesteps` would write
        options.append(f"timesteps.calibration={calibration(output.parent)}")
    if experiment == "sd21_hyperprior/stage1":  # no batches of the tables' size
        options.append("stage.table_batches=1")
    if experiment == "paper/stage2":  # its critic's head needs features of 3x3
        options.append("data.crop=192")
    config = compose(*options, *overrides)
    assert Trainer(build_stage(config), config).run()
    return config


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(("paper", "sd21"))) for name in EXPERIMENTS],
)
def test_two_steps(compose, photos: Path, tmp_path: Path, experiment: str) -> None:
    config = dry_run(compose, photos, tmp_path, experiment, *BACKBONES[experiment.split("/")[0]])
    with (tmp_path / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if config.stage.name in ("vae", "diffusion_pretrain"):
        Backbone.from_pretrained(tmp_path / "final")
    else:
        bottleneck = OscarCodec.from_pretrained(tmp_path / "final").bottleneck
        assert getattr(bottleneck, "rates", ()) == config.bottleneck.rate_points()  # none with a hyperprior


@pytest.mark.slow
def test_the_papers_stages_follow_one_another(compose, photos: Path, tmp_path: Path) -> None:
    small = ("backbone=tiny", "denoiser.lora_rank=2", "denoiser.prompt_tokens=4")  # 258 adapters take seconds to make
    parts = []
    for rate in ("0.0625", "0.125"):  # rate by rate, as published
        parts.append(tmp_path / rate)
        dry_run(compose, photos, parts[-1], "paper/stage1", f"bottleneck.rates=[{rate}]", *small)
    merge_rates([part / "final" for part in parts], tmp_path / "stage1")
    start = (f"init_from={tmp_path / 'stage1'}", "bottleneck.rates=null")  # those that it has, of the paper's eight
    dry_run(compose, photos, tmp_path / "stage2", "paper/stage2", *start, *small)
    rates = OscarCodec.from_pretrained(tmp_path / "stage2/final").bottleneck.rates
    assert [rate.bpp for rate in rates] == [0.0625, 0.125]


def test_without_the_weights_of_dists_nothing_starts(compose, photos: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "empty"))
    options = (
        "experiment=paper/stage2",
        "backbone=standin",
        "init_from=null",
        "bottleneck=tiny",
        "data.crop=192",
        f"data.train=[{photos}]",
        f"output={tmp_path / 'run'}",
    )
    config = compose(*options)
    with pytest.raises(WeightsUnavailable, match=r"^dists and vgg16 weights are not in torch's cache") as error:
        build_stage(config)
    message = str(error.value)
    assert "\n" not in message and not (tmp_path / "run").exists()
    files, download = message.partition("; allowed: ")[2].split(", or ")
    composed = compose(*options, *(item.replace("FILE", "/a.pth") for item in files.split()), download.split()[0])
    assert composed.stage.network_files == {"dists": "/a.pth", "vgg16": "/a.pth"} and composed.stage.download
