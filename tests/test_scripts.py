"""scripts/train.py in its own process: a tiny run end to end, and mistakes answered in one line with exit code 2."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from oscar import OscarCodec

ROOT = Path(__file__).parents[1]


def train(*overrides: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), *overrides],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={"PATH": "", "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


MISTAKES = [
    (["data.train=[photos]", "trainer.max_steps=0"], ["trainer.max_steps", "0", "at least 1"]),
    (["data.train=[photos]", "trainer.max_steps=many"], ["trainer.max_steps", "many", "Integer"]),
    (["data.train=[photos]", "trainer.max_step=3"], ["max_step"]),
    (["data.train=[photos]", "max_steps"], ["max_steps"]),
    (["data.train=[]"], ["data.train", "one or more folders"]),
    (["data.train=[nowhere]"], ["data.train", "'nowhere'"]),
    (["data.train=[empty]"], ["empty", "no picture"]),
    (["data.train=[photos]", "experiment=tiny/none"], ["experiment/tiny/none"]),
    (["data.train=[photos]", "init_from=nowhere", "experiment=tiny/joint"], ["model 'nowhere'"]),
    (["data.train=[photos]", "backbone.source=nowhere"], ["backbone 'nowhere'"]),
    (["data.train=[photos]", "output=photos/0.png"], ["photos/0.png"]),
]


def with_experiment(overrides: list[str]) -> list[str]:
    experiment = [] if any("experiment" in override for override in overrides) else ["experiment=tiny/prior"]
    return experiment + overrides


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A working directory with pictures in photos/ and none in empty/."""
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def script(load_script, monkeypatch):
    """scripts/train.py as a module."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which it sets itself, and which would stay set
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # config_path is then relative to the script's file
    module = load_script("train")
    monkeypatch.setitem(sys.modules, "train_script", module)
    yield module
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(("overrides", "named"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES])
def test_mistakes(script, folder: Path, monkeypatch, capsys, overrides: list[str], named: list[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *with_experiment(overrides)])
    with pytest.raises(SystemExit) as end:
        script.run()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: ")
    for part in named:
        assert part in line


@pytest.mark.slow
def test_mistakes_end_the_process_with_one_line(folder: Path) -> None:
    for overrides, named in (MISTAKES[0], MISTAKES[2], MISTAKES[6], MISTAKES[7]):
        result = train(*with_experiment(overrides), folder=folder)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and line.startswith("train: ") and all(part in line for part in named)


@pytest.mark.slow
def test_a_tiny_run(photos: Path, tmp_path: Path) -> None:
    overrides = ("experiment=tiny/joint", f"data.train=[{photos}]", "output=run", "bottleneck.rates=[0.0019,0.125]")
    result = train(*overrides, "trainer.max_steps=2", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    result = train(*overrides, folder=tmp_path)  # the same command goes on, here to the experiment's four steps
    assert result.returncode == 0, result.stderr
    with (tmp_path / "run/log.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert OmegaConf.load(tmp_path / "run/config.yaml").trainer.max_steps == 4
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    codec = OscarCodec.from_pretrained(tmp_path / "run/final")
    assert [rate.bpp for rate in codec.bottleneck.rates] == [0.0019, 0.125]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", ".cache", ".config"}  # nothing beside the output
