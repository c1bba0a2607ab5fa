"""scripts/train.py: a tiny run end to end, and mistakes answered in one line with exit code 2."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from oscar.cli import scripts
from oscar.cli.main import main
from oscar.cli.scripts import SCRIPTS, Job
from oscar.config import ConfigError, job_name
from oscar.inference.load import load

ROOT = Path(__file__).parents[1]


def train(*overrides: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "", "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


MISTAKES = [
    (["data.train=[photos]", "trainer.max_steps=0"], ["trainer.max_steps", "0", "at least 1"]),
    (["data.train=[photos]", "trainer.max_steps=many"], ["trainer.max_steps", "many", "Integer"]),
    (["data.train=[photos]", "trainer.max_step=3"], ["max_step"]),
    (["data.train=[photos]", "max_steps"], ["max_steps"]),
    (["data.train=[]"], ["data.train", "one or more folders"]),
    (["data.train=[nowhere]"], ["data.train", "'nowhere'"]),
    (["data.train=[empty]"], ["empty", "no image"]),
    (["data.train=[photos]", "experiment=tiny/none"], ["experiment/tiny/none"]),
    (["experiment=tiny/hyper"], ["experiment=tiny/hyper is not there", "called experiment=tiny/bottleneck now"]),
    (["experiment=tiny/joint", "stage=prior"], ["stage=prior is not there", "called stage=diffusion_pretrain now"]),
    (["experiment=nano_vq/stages"], ["experiment=nano_vq/stages is there no more", "allowed: without it"]),
    (["bottleneck.dither={0.0625: 0.25}"], ["bottleneck.dither is there no more", "allowed: without it"]),
    (["data.train=[photos]", "stage.name=hyper"], ["stage.name is 'hyper', which is called 'bottleneck' now"]),
    (["data.train=[photos]", "init_from=nowhere", "experiment=tiny/joint"], ["model 'nowhere'"]),
    (["data.train=[photos]", "backbone.source=nowhere"], ["backbone 'nowhere'"]),
    (["data.train=[photos]", "output=photos/0.png"], ["photos/0.png"]),
]


def with_experiment(overrides: list[str]) -> list[str]:
    experiment = (
        [] if any("experiment" in override for override in overrides) else ["experiment=tiny/diffusion_pretrain"]
    )
    return experiment + overrides


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A working directory with images in photos/ and none in empty/."""
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def script(load_script, monkeypatch):
    """scripts/train.py as a module."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which it sets itself, and which would stay set
    module = load_script("train")
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
    overrides, named = MISTAKES[2]
    result = train(*with_experiment(overrides), folder=folder)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("train: ") and all(part in line for part in named)


def run(script) -> None:
    """Runs scripts/train.py in this process."""
    from accelerate.state import AcceleratorState, GradientState

    try:
        script.run()
    finally:
        GlobalHydra.instance().clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_a_tiny_run(script, photos: Path, tmp_path: Path, monkeypatch) -> None:
    overrides = ("experiment=tiny/joint", f"data.train=[{photos}]", "output=run", "bottleneck.rates=[0.0019,0.125]")
    monkeypatch.chdir(tmp_path)
    for words in (("trainer.max_steps=2",), ()):  # the same command goes on, here to the experiment's four steps
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides, *words])
        run(script)
    with (tmp_path / "run/log.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert OmegaConf.load(tmp_path / "run/config.yaml").trainer.max_steps == 4
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    codec = load(tmp_path / "run/final")
    assert [rate.bpp for rate in codec.bottleneck.rates] == [0.0019, 0.125]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", ".cache", ".config"}  # nothing beside the output


def sweep(script, monkeypatch, *overrides: str) -> None:
    """Runs scripts/train.py in this process as a sweep of one step each."""
    quick = (
        "experiment=tiny/diffusion_pretrain",
        "data.train=[photos]",
        "trainer.max_steps=1",
        "logger.tensorboard=false",
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--multirun", *quick, *overrides])
    run(script)


def test_every_job_of_a_sweep_has_its_own_output(script, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    sweep(script, monkeypatch, "seed=0,1", "optimiser.lr=1e-3")
    outputs = sorted((folder / "runs/tiny/diffusion_pretrain").iterdir())
    assert [len(output.name.split("seed=")) for output in outputs] == [2, 2]
    seeds, weights = [], []
    for output in outputs:
        config = OmegaConf.load(output / "config.yaml")
        assert config.output == str(output.relative_to(folder)) and config.optimiser.lr == 1e-3
        seeds.append(config.seed)
        weights.append((output / "final/unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert sorted(seeds) == [0, 1] and weights[0] != weights[1]
    before = {path: path.stat().st_mtime_ns for path in folder.joinpath("runs/tiny").rglob("*") if path.is_file()}
    sweep(script, monkeypatch, "seed=0,1", "optimiser.lr=1e-3")  # the same again does nothing
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_jobs_of_a_sweep_that_share_an_output_are_refused(script, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises((SystemExit, ConfigError)):
        sweep(script, monkeypatch, "seed=0,1", "output=same")
    assert "output is same, which holds another run: seed was 0, is 1" in capsys.readouterr().err
    assert OmegaConf.load(folder / "same/config.yaml").seed == 0


def test_names_of_jobs() -> None:
    assert job_name(["seed=1", "data.train=[/data/DIV2K]"]) == "data.train=_data_DIV2K_,seed=1"
    long = [job_name([f"data.train=[{'x' * 200}{end}]"]) for end in "ab"]
    assert all(len(name) == 120 for name in long) and long[0] != long[1]


# As subcommands of `oscar`.


@pytest.mark.slow
def test_a_subcommand_does_what_the_script_does(folder: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    outputs = {}
    for way, run in (("script", SCRIPTS["train"].main), ("command", lambda words: main(["train", *words]))):
        for words in (["--help"], ["--cfg", "job", "experiment=tiny/vae"], with_experiment(["trainer.max_steps=0"])):
            code = run(words)
            outputs.setdefault(way, []).append((code, *capfd.readouterr()))
    assert outputs["script"] == outputs["command"]
    codes, texts, errors = zip(*outputs["command"], strict=True)
    assert codes == (0, 0, 2) and errors[:2] == ("", "") and errors[2].startswith("train: data.train is empty")
    assert texts[0].startswith("train is powered by Hydra")
    assert "name: vae" in texts[1]


def test_a_job_can_be_sent_elsewhere() -> None:
    """As launchers of sweeps do."""
    job = Job("evaluate", scripts._evaluate)
    assert pickle.loads(pickle.dumps(job)) == job


@pytest.mark.slow
def test_a_wheel_needs_no_clone(tmp_path: Path, photos: Path) -> None:
    """It has configurations and scripts in it, and finds them."""
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site", [name for name in files.namelist() if "/assets/nano" not in name])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    overrides = ["codec=jpeg", "points=[5]", "data.limit=1", f"data.images={photos}"]
    for words in (["train", "--cfg", "job", "experiment=nano/vae"], ["evaluate", *overrides]):
        command = [sys.executable, "-m", "oscar", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs/evaluate/jpeg").iterdir())
