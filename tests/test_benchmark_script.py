"""scripts/benchmark.py: its configuration, mistakes answered in one line, and sweeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

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


@pytest.fixture
def benchmark(load_script, monkeypatch, folder: Path):
    """Runs scripts/benchmark.py in this process with some overrides."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which it sets itself, and which would stay set
    monkeypatch.chdir(folder)
    module = load_script("benchmark")

    def run(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *overrides])
        GlobalHydra.instance().clear()
        module.run()

    yield run
    GlobalHydra.instance().clear()


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
    assert composed("~models.nano", "+models.nano-vq=nano-vq").models == {"nano-vq": "nano-vq"}
    assert composed("~models.nano").models == {}
    assert set(config.baselines) == {"avif", "avif-x4", "bpg"}
    assert "dists" in config.metrics.names


@pytest.mark.parametrize("path", sorted((ROOT / "configs/baselines").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_baseline_can_be_chosen(path):
    (options,) = composed(f"baselines=[{path.stem}]").baselines.values()
    assert options["name"] in BASELINES


def test_mistakes_are_one_line_and_exit_2(benchmark, folder, capsys):
    for overrides, words in (
        (["data.images=empty"], "empty: no images in this folder"),
        (["parts=[quality,tables]"], "parts is 'tables'; allowed: quality, matched, timing, report"),
        (["modles.x=y"], "modles"),
    ):
        with pytest.raises(SystemExit) as end:
            benchmark(*overrides)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("benchmark: ") and words in line
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "photos"]


@pytest.mark.slow
def test_a_sweep_writes_each_run_into_its_own_folder(benchmark, folder, tiny_folder, capsys):
    parts = ("parts=[quality,matched,report]", "dtype=float32,bfloat16")
    benchmark("--multirun", *SMALL, f"models.nano={tiny_folder}", *parts, "output=sweep/${dtype}")
    shown = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        assert f"report page: sweep/{dtype}/report.html" in shown
        rows = pd.read_csv(folder / f"sweep/{dtype}/tables/rows.csv")
        assert set(rows["codec"]) == {"oscar-nano", "jpeg"}
    kept = {path.name for path in folder.iterdir()} - {".cache", ".config"}  # of libraries
    assert kept == {"empty", "photos", "runs", "sweep"}
    assert [path.name for path in (folder / "runs").rglob("*") if path.is_file()] == ["multirun.yaml"]
