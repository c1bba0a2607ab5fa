"""Nothing is printed on stderr that is not ours, whatever libraries have to say, even where all warnings are shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRESS = re.compile(r"[\w /.,=-]*:? +\d+%\|.*|[\w /]*: \d+\w+ \[.*")
# From Python, and then by command, in one process: what an import has to say appears at the first of them.
CALLS_AND_COMMANDS = """
import sys
from PIL import Image
from oscar import OscarCodec
for model in ("nano", "nano-vq"):
    codec = OscarCodec.from_pretrained(model)
    assert codec.decompress(codec.compress(Image.open(sys.argv[1]))).size == (96, 80)
from oscar.cli.main import main
for command in [line.split() for line in sys.stdin.read().splitlines()]:
    assert main(command) == 0, command
"""


def stderr_of(*args: str, cwd: Path, feed: str = "", code: int = 0) -> str:
    """Of a Python process that shows every warning."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, *args], input=feed, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == code, done.stderr
    lines = re.split(r"[\r\n]+", done.stderr)
    return "\n".join(line for line in lines if line.strip() and not PROGRESS.fullmatch(line))


@pytest.mark.slow
def test_python_and_commands(photos, tiny_folder, tmp_path):
    lines = [
        f"compress {photos}/0.png a.oscar",
        f"compress {photos} files --batch-size 2 --engine torch",
        "decompress a.oscar a.png",
        "decompress files images --dtype bfloat16",
        "info a.oscar",
        "doctor",
        f"convert --back {tiny_folder} tiny.pkl",
        f"convert tiny.pkl tiny --backbone {tiny_folder}",
    ]
    assert stderr_of("-c", CALLS_AND_COMMANDS, f"{photos}/0.png", cwd=tmp_path, feed="\n".join(lines)) == ""


def test_errors_and_notes_are_one_line_each(photos, tmp_path):
    for command, line in (
        (["compress", "none.png", "a.oscar"], "oscar: error: none.png: no such file or folder"),
        (
            ["compress", f"{photos}/0.png", "a.oscar", "--model", str(tmp_path)],
            f"oscar: error: model {str(tmp_path)!r} is a folder without oscar.json; allowed: an OSCAR checkpoint",
        ),
    ):
        assert stderr_of("-m", "oscar", *command, cwd=tmp_path, code=2) == line


# Scripts one after another, each as if it were alone.
SCRIPTS = """
import importlib.util, json, os, sys
for path, overrides in json.load(sys.stdin):
    from accelerate.state import AcceleratorState, GradientState
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    name = os.path.basename(path)[:-3] + "_script"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [path, *overrides]
    module.run()
"""


@pytest.mark.slow
def test_scripts(photos, tiny_folder, tmp_path):
    """In one process, which a script that is started once more would add nothing to."""
    train = [f"data.train=[{photos}]", "trainer.max_steps=1", "data.crop=64", "data.batch_size=1"]
    some = [f"model={tiny_folder}", f"data.images={photos}", "data.limit=1"]
    small = ["rates=[0.0019]", "sweep=[0]", "metrics.names=[psnr]"]
    codecs = [f"models.nano={tiny_folder}", "parts=[quality]", "baselines=[jpeg]", "baselines.jpeg.points=[50]"]
    runs = [
        ("train", ["experiment=tiny/joint", *train, "data.workers=0", "output=run"]),
        ("train", ["experiment=tiny/hyperprior_bottleneck", *train, "data.workers=1", "output=other"]),
        ("evaluate", [*some, "metrics.names=[psnr]", "output=results"]),
        ("calibrate_timesteps", [*some, "output=calibration"]),
        ("ablate_timesteps", [*some, *small, "output=ablation"]),
        ("ablate_denoiser", [*some, "points=[0.0019]", "metrics.names=[psnr]", "output=denoiser"]),
        ("benchmark", [*codecs, f"data.images={photos}", "data.limit=1", "rates=[0.0625]", "output=benchmark"]),
        ("cache_latents", ["backbone=nano", f"data.train=[{photos}]", "data.crop=64", "crops=1", "output=cache"]),
    ]
    feed = json.dumps([(str(ROOT / f"scripts/{script}.py"), overrides) for script, overrides in runs])
    assert stderr_of("-c", SCRIPTS, cwd=tmp_path, feed=feed) == ""
    results = ("run/final", "other/final", "results", "calibration", "ablation", "denoiser", "benchmark", "cache")
    assert all((tmp_path / result).is_dir() for result in results)


@pytest.mark.slow
def test_what_others_cause_is_not_hidden(tmp_path):
    """The messages that our imports keep back appear where a program of one's own causes them."""
    code = """
import logging, warnings, oscar.models, torch
warnings.warn("`torch.jit.script` is deprecated. Please switch", FutureWarning)
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
"""
    found = stderr_of("-c", code, cwd=tmp_path)
    assert "`torch.jit.script` is deprecated" in found and "Failed to load CPU gemm_4bit_forward" in found
