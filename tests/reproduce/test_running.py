"""Studies as they are run: killed and resumed, by two processes, with a job that fails, and with bad input."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from oscar.config import ReproduceConfig, register
from oscar.reproduce.actions import Actions
from oscar.reproduce.study import run_study
from oscar.training.trainer import Trainer
from tests.processes import CONTEXT

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
LOSSES = ("seeds=[0]",)


def tables(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((output / "tables").iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(study, stage1, tmp_path_factory) -> Path:
    """Study losses in one go."""
    output = tmp_path_factory.mktemp("losses")
    assert study("losses", output, f"model={stage1}", *LOSSES) == 0
    means = pd.read_csv(output / "tables/mean_psnr_photos.csv")
    assert means["variant"].to_list() == ["all", "no_gan"] and means["value"].notna().all()
    return output


def weights(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("runs/*/final/*.safetensors")}


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(study, stage1, uninterrupted, tmp_path: Path, monkeypatch) -> None:
    run, calls = Trainer.run, []

    def signalled(self: Trainer) -> bool:
        calls.append(self.step)
        self._signalled = len(calls) == 2  # within the second run's first step
        return run(self)

    monkeypatch.setattr(Trainer, "run", signalled)
    with pytest.raises(KeyboardInterrupt):
        study("losses", tmp_path, f"model={stage1}", *LOSSES)
    assert sorted(path.stem for path in tmp_path.glob("jobs/*.json")) == ["all-seed0", "all-seed0-on-photos"]
    assert study("losses", tmp_path, f"model={stage1}", *LOSSES) == 0
    assert calls == [0, 0, 1]  # the first run is not done again, the second goes on
    assert tables(tmp_path) == tables(uninterrupted) and weights(tmp_path) == weights(uninterrupted)


def run_logged(config: ReproduceConfig, log: Path) -> None:
    """A process of a study, which ends with its exit code."""
    register()
    torch.set_num_threads(1)
    with log.open("w") as stream, contextlib.redirect_stdout(stream):
        code = run_study(config, CONFIGS)
    sys.exit(code)


@pytest.mark.slow
def test_two_processes_equal_one(make_config, stage1, uninterrupted, tmp_path: Path) -> None:
    config = make_config("losses", tmp_path / "out", f"model={stage1}", *LOSSES)
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    several = [CONTEXT.Process(target=run_logged, args=(config, log)) for log in logs]
    for process in several:
        process.start()
    for process in several:
        process.join(400)
    assert [process.exitcode for process in several] == [0, 0]
    done = [line.partition(": ")[2] for log in logs for line in log.read_text().splitlines() if line.startswith("job ")]
    assert len(done) == len(set(done)) == 4
    output = tmp_path / "out"
    assert tables(output) == tables(uninterrupted) and weights(output) == weights(uninterrupted)


@pytest.mark.slow
def test_a_failed_job_costs_its_row(study, stage1, tmp_path: Path, capsys) -> None:
    overrides = (f"model={stage1}", *LOSSES, "+recipe.losses.broken=[optimiser.lr=1e30]")
    assert study("losses", tmp_path, *overrides) == 1
    captured = capsys.readouterr()
    assert (
        "failed: broken-seed0: " in captured.err
        and "not run: broken-seed0-on-photos: broken-seed0 failed" in captured.err
    )
    means = pd.read_csv(tmp_path / "tables/mean_psnr_photos.csv")
    assert means["variant"].to_list() == ["all", "no_gan"]
    assert "No result of broken-seed0: " in (tmp_path / "index.html").read_text()


# Bad input.

MISTAKES = [
    ("study=none", ["study"]),
    ("data.root=null", ["data.root is unset"]),
    ("data.root=nowhere", ["data.root is 'nowhere'"]),
    ("data.datasets=[kodak]", ["data set kodak", "does not exist", "oscar prepare-data kodak"]),
    ("data.datasets=[mine]", ["data.datasets has 'mine'", "kodak"]),
    ("data.datasets=[empty]", ["no images"]),
    ("model=nowhere", ["model 'nowhere'"]),
    ("model=nano", ["model is 'nano'", "no rates"]),
    ("seeds=[0,0]", ["seeds is [0, 0]"]),
    ("protocols=[files]", ["protocols", "paper, bitstream"]),
    ("metrics.names=[psnrr]", ["psnrr"]),
    ("metrics.names=[dists]", ["metrics.names has none", "dists"]),
    ("data.train=[nowhere]", ["data.train", "nowhere"]),
]
OF_ONE = [
    ("timesteps", "reference=none", ["reference is 'none'", "paper"]),
    ("timesteps", "+grid={0.0313: [100]}", ["grid has rate 0.0313", "0.0019, 0.1250"]),
    ("timesteps", "calibrated=[linear]", ["calibrated is 'linear'", "cosine, snr"]),
    ("timesteps", "data.train=[]", ["data.calibration"]),
    ("timesteps", "+variants.odd=[timesteps=none]", ["timesteps/none"]),
    ("losses", "+recipe.losses.odd=[stage.gann=0]", ["gann"]),
    ("losses", "+recipe.losses.odd=[stage.image_losses.dists=1]", ["dists", "weights"]),
    ("losses", "recipe.joint=[experiment=tiny/joint,bottleneck.width=7]", ["bottleneck.width is 7"]),
    ("losses", "train=[backbone.source=nowhere]", ["backbone"]),
    ("stages", "rates=[0.0313]", ["rates has 0.0313", "0.0019, 0.1250"]),
    ("design", "seeds=[0]", ["variants is empty"]),
    ("design_nano", "reference=none", ["reference is 'none'", "all, one_group"]),
    ("design_nano", "model=nowhere", ["model is 'nowhere'", "VAE and UNet", "allowed: a folder with vae"]),
    ("unseen_rates", "rates=[]", ["rates is empty"]),
    ("unseen_rates", "rates=[0.125]", ["rates has 0.1250", "was trained on"]),
    ("unseen_rates", "rates=[0.3]", ["rate 0.3 does not exist"]),
    ("unseen_rates", "rates_checkpoint=nano-vq", ["rates has 0.0024", "rates_checkpoint lacks"]),
]


@pytest.mark.parametrize(
    ("name", "override", "named"),
    [("losses", *mistake) for mistake in MISTAKES] + OF_ONE,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(
    load_script, stage1, root: Path, tmp_path: Path, monkeypatch, capsys, name: str, override: str, named: list[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which it sets itself, and which would stay set
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root/empty").mkdir(parents=True)
    (tmp_path / "root/photos").symlink_to(root / "photos")
    words = [
        f"study={name}", "recipe=tiny", f"model={stage1}", "data.root=root", "data.datasets=[photos]",
        f"data.train=[{root}/train]", "metrics.names=[psnr]", "output=out",
    ]  # fmt: skip
    key = override.lstrip("+").partition("=")[0]
    words = [word for word in words if not word.startswith(f"{key}=")] + [override]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
    module = load_script("reproduce")
    with pytest.raises(SystemExit) as end:
        module.run()
    GlobalHydra.instance().clear()
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reproduce: ")]
    for part in named:
        assert part in line
    assert not (tmp_path / "out").exists()


def test_dry_run_does_nothing(study, stage1, tmp_path: Path, capsys) -> None:
    times = ("+recipe.seconds={joint: 1800, evaluate: 100}", "recipe.measured_on=a desk")
    assert study("losses", tmp_path / "out", f"model={stage1}", "dry_run=true", *LOSSES, *times) == 0
    *jobs, last = capsys.readouterr().out.splitlines()
    assert len(jobs) == 4 and jobs[0].startswith(" to do     1.00 h  python scripts/train.py experiment=tiny/joint")
    hours = 2 * (2 * 1800 + 3 * 2 * 100) / 3600  # variants; steps, and images at two rates
    assert last == f"4 jobs; to do: about {hours:.2f} hours of one process (times measured on a desk)"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["paper", "paper_corrected", "nano", "nano_vq", "tiny"])
def test_recipes_are_configurations(make_config, root: Path, tmp_path: Path, name: str) -> None:
    recipe, actions = make_config("losses", tmp_path, f"recipe={name}").recipe, Actions(CONFIGS)
    words = {"bottleneck": recipe.bottleneck, "joint": recipe.joint, "context": [*recipe.context, "init_from=nano-vq"]}
    if not recipe.context:  # of a hyperprior
        del words["context"]
    losses = [[*recipe.joint, *changes] for changes in recipe.losses.values()]
    found = {
        key: actions.compose("train", [*arguments, f"data.train=[{root}/train]"]).stage
        for key, arguments in [*words.items(), *enumerate(losses)]
    }
    assert {key: stage.name for key, stage in found.items()} == {
        **{name: name for name in words}, **dict.fromkeys(range(len(losses)), "joint")
    }  # fmt: skip
    first, *others = [found[number] for number in range(len(losses))] or [found["joint"]]
    assert first == found["joint"] and found["joint"] not in others  # all; each other is a change
