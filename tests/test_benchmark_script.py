"""scripts/benchmark.py: its configuration, and in processes of their own mistakes answered in one line, and sweeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from oscar.baselines.registry import BASELINES
from oscar.config import BenchmarkConfig, parse, register
from oscar.utils.errors import one_line

ROOT = Path(__file__).parents[1]
SMALL = ["data.images=photos", "data.limit=1", "rates=[0.0625]", "baselines=[jpeg]", "baselines.jpeg.points=[50]"]


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A working directory with images in photos/ and none in empty/."""
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "empty").mkdir()
    return tmp_path


def composed(*overrides: str) -> BenchmarkConfig:
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse(compose("benchmark", overrides=list(overrides)), BenchmarkConfig)


def benchmark(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *overrides]
    env = {"PATH": "", "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=env)


def test_by_default_nano_meets_five_baselines_on_packaged_photographs():
    config = composed()
    assert config.models == {"nano": "nano"} and config.data.images is None and config.output == "benchmark"
    assert [options["name"] for options in config.baselines.values()] == ["jpeg", "jpeg2000", "webp", "avif", "jxl"]
    assert config.parts == ["quality", "matched", "timing", "report"] and config.report_images == 6


def test_a_setting_that_was_renamed_is_named(capsys):
    with pytest.raises(SystemExit), one_line("benchmark"):
        composed("report_pictures=3")
    assert capsys.readouterr().err == "benchmark: report_pictures is not there; it is called report_images now\n"


def test_models_baselines_and_metrics_are_chosen_on_the_command_line():
    config = composed("+models.mine=runs/mine/final", "baselines=[avif,avif_x4,bpg]", "metrics=paper", "threads=1")
    assert config.models == {"nano": "nano", "mine": "runs/mine/final"}
    assert set(config.baselines) == {"avif", "avif-x4", "bpg"}
    assert "dists" in config.metrics.names


@pytest.mark.parametrize("path", sorted((ROOT / "configs/baselines").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_baseline_can_be_chosen(path):
    (options,) = composed(f"baselines=[{path.stem}]").baselines.values()
    assert options["name"] in BASELINES


@pytest.mark.slow
def test_mistakes_are_one_line_and_exit_2(folder):
    for overrides, words in (
        (["data.images=empty"], "empty: no images in this folder"),
        (["parts=[quality,tables]"], "parts is 'tables'; allowed: quality, matched, timing, report"),
        (["modles.x=y"], "modles"),
    ):
        done = benchmark(folder, *overrides)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("benchmark: ") and words in line
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "photos"]


@pytest.mark.slow
def test_a_sweep_writes_each_run_into_its_own_folder(folder):
    done = benchmark(
        folder,
        "--multirun",
        *SMALL,
        "parts=[quality,matched,report]",
        "dtype=float32,bfloat16",
        "output=sweep/${dtype}",
    )
    assert done.returncode == 0, done.stderr
    for dtype in ("float32", "bfloat16"):
        assert f"report page: sweep/{dtype}/report.html" in done.stdout
        rows = pd.read_csv(folder / f"sweep/{dtype}/tables/rows.csv")
        assert set(rows["codec"]) == {"oscar-nano", "jpeg"}
    kept = {path.name for path in folder.iterdir()} - {".cache", ".config"}  # of libraries
    assert kept == {"empty", "photos", "runs", "sweep"}
    assert [path.name for path in (folder / "runs").rglob("*") if path.is_file()] == ["multirun.yaml"]
