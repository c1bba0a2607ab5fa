"""scripts/train.py in its own process: a tiny run end to end, and mistakes answered in one line with exit code 2."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from oscar import OscarCodec

ROOT = Path(__file__).parents[1]


def train(*overrides: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), *overrides],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={"PATH": "", "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.train=[photos]", "trainer.max_steps=0"], ["trainer.max_steps", "0", "at least 1"]),
        (["data.train=[photos]", "trainer.max_steps=many"], ["trainer.max_steps", "many", "Integer"]),
        (["data.train=[photos]", "trainer.max_step=3"], ["max_step"]),
        (["data.train=[photos]", "max_steps"], ["max_steps"]),
        (["data.train=[]"], ["data.train", "one or more folders"]),
        (["data.train=[nowhere]"], ["data.train", "'nowhere'"]),
        (["data.train=[photos]", "experiment=tiny/none"], ["experiment/tiny/none"]),
        (["data.train=[empty]"], ["empty", "no picture"]),
        (["data.train=[photos]", "backbone.source=nowhere"], ["backbone 'nowhere'"]),
        (["data.train=[photos]", "output=photos/0.png"], ["photos/0.png"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistakes(photos: Path, tmp_path: Path, overrides: list[str], named: list[str]) -> None:
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "empty").mkdir()
    experiment = [] if any("experiment" in override for override in overrides) else ["experiment=tiny/prior"]
    result = train(*experiment, *overrides, folder=tmp_path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("train: ")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in named:
        assert part in lines[0]


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
    assert [rate.bpp for rate in codec.rates] == [0.0019, 0.125]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", ".cache", ".config"}  # nothing beside the output
