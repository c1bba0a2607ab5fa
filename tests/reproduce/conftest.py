"""What the tests of studies share: images, a checkpoint of stage 1, and running a study in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from oscar.config import ReproduceConfig, parse, register
from oscar.reproduce.actions import Actions
from oscar.reproduce.jobs import Job
from oscar.reproduce.study import run_study
from oscar.utils.overrides import quote_overrides

CONFIGS = Path(__file__).parents[2] / "configs"
RATES = "[0.0019,0.125]"


@pytest.fixture(scope="package")
def root(make_image, tmp_path_factory) -> Path:
    """A folder of data sets: photos/, and train/."""
    folder = tmp_path_factory.mktemp("root")
    for name, seeds in (("photos", (0, 1, 2)), ("train", (3, 4))):
        (folder / name).mkdir()
        for seed in seeds:
            make_image(176, 168, seed).save(folder / name / f"{seed}.png")
    return folder


@pytest.fixture(scope="package")
def stage1(root: Path, tmp_path_factory) -> Path:
    """A tiny checkpoint of stage 1. Not to be changed by tests."""
    output = tmp_path_factory.mktemp("stage1")
    arguments = (
        "experiment=tiny/bottleneck", f"bottleneck.rates={RATES}", f"data.train=[{root}/train]", "trainer.max_steps=2",
        "stage.table_batches=1", "logger.tensorboard=false",
    )  # fmt: skip
    job = Job("stage1", "train", arguments)
    register()
    Actions(CONFIGS, threads=1)(job, output)
    return output / "final"


@pytest.fixture(scope="package")
def make_config(root: Path) -> Callable[..., ReproduceConfig]:
    """The configuration of a study on tiny models, as scripts/reproduce.py composes it."""
    register()

    def make(study: str, output: Path, *overrides: str) -> ReproduceConfig:
        words = [
            f"study={study}", "recipe=tiny", f"output={output}", f"data.root={root}", "data.datasets=[photos]",
            f"data.train=[{root}/train]", "train=[logger.tensorboard=false]", "metrics.names=[psnr]", "device=cpu",
            "threads=1",
        ]  # fmt: skip
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return parse(compose("reproduce", overrides=quote_overrides([*words, *overrides])), ReproduceConfig)

    return make


@pytest.fixture(scope="package")
def study(make_config) -> Callable[..., int]:
    """Runs a study."""
    return lambda name, output, *overrides: run_study(make_config(name, output, *overrides), CONFIGS)
