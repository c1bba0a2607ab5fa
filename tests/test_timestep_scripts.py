"""scripts/calibrate_timesteps.py and scripts/ablate_timesteps.py: mistakes in one line, sweeps, the whole way round."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra

NAMES = ("calibrate_timesteps", "ablate_timesteps")


@pytest.fixture
def folder(photos: Path, tiny_folder: Path, tmp_path: Path) -> Path:
    """A working directory with images in photos/, none in empty/, and a checkpoint in tiny/."""
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def script(load_script, monkeypatch, folder: Path):
    """Runs one of the scripts in this process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which they set themselves, and which would stay set
    monkeypatch.chdir(folder)

    def run(name: str, *overrides: str) -> None:
        module = load_script(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *overrides])
        GlobalHydra.instance().clear()
        module.run()

    yield run
    GlobalHydra.instance().clear()


MISTAKES = [
    ("data.images=nowhere", ["nowhere", "no such folder"]),
    ("data.images=empty", ["empty", "no images"]),
    ("data.limit=0", ["data.limit is 0", "at least 1"]),
    ("model=nowhere", ["model 'nowhere'"]),
    ("threads=0", ["threads is 0", "at least 1"]),
    ("device=gpu", ["gpu"]),
    ("outputs=here", ["outputs"]),
]
OF_ONE = [
    ("calibrate_timesteps", "save_mapping=linear", ["save_mapping is 'linear'", "cosine, snr"]),
    ("calibrate_timesteps", "save_to=photos", ["photos", "not an OSCAR checkpoint"]),
    ("ablate_timesteps", "rates=[]", ["rates is empty"]),
    ("ablate_timesteps", "rates=[0.3]", ["rate 0.3 does not exist", "0.0019"]),
    ("ablate_timesteps", "sweep=[1.5]", ["sweep", "1.5"]),
    ("ablate_timesteps", "sweep=[-2]", ["timestep -2 is not allowed", "0 to 999"]),
    ("ablate_timesteps", "metrics.names=[fid]", ["metrics.names has fid"]),
    ("ablate_timesteps", "metrics.names=[psnrr]", ["metric 'psnrr' does not exist", "psnr"]),
    ("ablate_timesteps", "mappings.constant.timestep=2000", ["2000 of rate 0.0019", "0 to 999"]),
    ("ablate_timesteps", "+mappings.best={kind: table}", ["mappings.best"]),
    ("ablate_timesteps", "+timesteps@mappings.mine=none", ["timesteps/none"]),
]


@pytest.mark.parametrize(
    ("name", "override", "named"),
    [(name, *mistake) for name in NAMES for mistake in MISTAKES] + OF_ONE,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(script, folder: Path, capsys, name: str, override: str, named: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script(name, "data.images=photos", "model=tiny", "threads=1", "output=out", override)
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}: ")]
    for part in named:
        assert part in line
    assert not (folder / "out/sweep.csv").exists()


def test_from_calibration_to_ablation(script, folder: Path, capsys) -> None:
    here = ("data.images=photos", "data.limit=1", "model=tiny", "threads=1")
    script("calibrate_timesteps", *here, "output=calibration", "save_to=tuned")
    record = json.loads((folder / "calibration/calibration.json").read_text())
    file = "calibration/calibration.json"
    script(
        "ablate_timesteps",
        *here,
        "output=ablation",
        "rates=[0.125]",
        "sweep=[0,300]",
        "metrics.names=[psnr]",
        f"mappings.cosine.calibration={file}",
        "~mappings.shuffled",
        "+timesteps@mappings.mine=constant",
        "mappings.mine.timestep=7",
    )
    table = pd.read_csv(folder / "ablation/tables/timesteps.csv", dtype={"rate": str})
    assert table["rate"].to_list() == ["0.1250"] and "shuffled" not in table and table["mine"].item() == 7
    assert table["cosine"].item() == record["mappings"]["cosine"]["timesteps"]["7"]
    assert "| rate | paper t | paper PSNR dB |" in capsys.readouterr().out
    made = {"calibration", "ablation", "tuned", "photos", "tiny", "empty"}
    assert {path.name for path in folder.iterdir()} == made  # nothing beside the outputs


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_of_runs(script, folder: Path, name: str) -> None:
    here = ("data.images=photos", "data.limit=1,2", "model=tiny", "output=out/${data.limit}", "threads=1")
    extra = ["rates=[0.125]", "sweep=[]", "metrics.names=[psnr]"] if name == "ablate_timesteps" else []
    script(name, "--multirun", *here, *extra)
    file = "images.csv" if name == "calibrate_timesteps" else "sweep.csv"
    images = [pd.read_csv(folder / "out" / limit / file)["image"].nunique() for limit in ("1", "2")]
    assert images == [1, 2]
    left = [path for path in folder.rglob("*") if path.is_file() and "sweeps" in path.parts]
    assert {path.name for path in left} <= {"multirun.yaml"}
