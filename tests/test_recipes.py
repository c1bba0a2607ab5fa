"""`make train-nano` and `make train-nano-vq`: steps in order, each from the result of the one before it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = {
    "train-nano": "vae diffusion_pretrain bottleneck joint longer further more wide large_batch settle".split(),
    "train-nano-vq": "vae diffusion_pretrain bottleneck joint finetune further more large_batch context".split(),
}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(target: str, folder: Path, *words: str) -> list[list[str]]:
    """The commands that make would run in a folder, as words."""
    for name in ("Makefile", "pyproject.toml", "constraints"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    (folder / "venv").mkdir(exist_ok=True)
    (folder / "venv/.installed").touch()
    command = ["make", "-n", "--no-print-directory", target, "VENV=venv", *words]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)  # not as a part of `make test`
    if done.returncode:
        raise ValueError(done.stderr)
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("target", STEPS)
def test_every_step_begins_where_the_last_ended(target: str, tmp_path: Path, photos: Path, compose) -> None:
    model = target.removeprefix("train-")
    commands = make(target, tmp_path, "IMAGES=/my images")
    assert commands[0][1:] == ["scripts/nano_images.py", "/my images", "--out", "runs/nano"]
    steps, ended, calibrated = [], None, []
    for command in commands[1:-2]:
        if command[1] == "scripts/calibrate_timesteps.py":
            options = dict(word.split("=", 1) for word in command[2:])
            assert options["model"] == ended and options["data.images"] == "'/my images'"
            calibrated = ["timesteps=paper"]  # in place of a file that is not here
            continue
        if command[1] == "scripts/widen.py":
            assert command[2] == ended
            ended = command[command.index("--out") + 1]
            continue
        assert command[1] == "scripts/train.py" and not command[3:]
        steps.append(command[2].rpartition("/")[2])
        config = compose(command[2], f"data.train=[{photos}]", *calibrated)
        assert ended in (config.init_from, config.backbone.source) and config.output == f"runs/{model}/{steps[-1]}"
        ended = f"runs/{model}/{steps[-1]}/final"
    assert steps == STEPS[target]
    assert f"from_pretrained('{ended}').save_pretrained('models/{model}', torch.float16)" in commands[-2][2]
    assert commands[-1][1:] == ["export", f"models/{model}", f"models/{model}", "--overwrite"]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    for step in STEPS["train-nano"][:2]:
        (tmp_path / f"runs/nano/{step}/final").mkdir(parents=True)
    (tmp_path / "runs/nano/train.txt").touch()  # later than the results
    steps = [command[2] for command in make("train-nano", tmp_path) if command[1] == "scripts/train.py"]
    assert steps == [f"experiment=nano/{step}" for step in STEPS["train-nano"][2:]]


def test_without_images_nothing_begins(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="IMAGES is unset; allowed: a folder of the images that oscar/assets/images.csv"
    ):
        make("train-nano", tmp_path)
