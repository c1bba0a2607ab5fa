"""Nothing is printed on stderr that is not ours, whatever libraries have to say, even where all warnings are shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRESS = re.compile(r"[\w /.,=-]*:? +\d+%\|.*|[\w /]*: \d+\w+ \[.*")
COMMANDS = """
import contextlib, io, sys
from oscar.cli.main import main
for command in [line.split() for line in sys.stdin.read().splitlines()]:
    assert main(command) == 0, command
"""
CALLS = """
import sys
from PIL import Image
from oscar import OscarCodec
for model in ("nano", "nano-hyperprior"):
    codec = OscarCodec.from_pretrained(model)
    assert codec.decompress(codec.compress(Image.open(sys.argv[1]))).size == (96, 80)
"""


def stderr_of(*args: str, cwd: Path, feed: str = "", code: int = 0) -> str:
    """Of a Python process that shows every warning."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, *args], input=feed, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == code, done.stderr
    lines = re.split(r"[\r\n]+", done.stderr)
    return "\n".join(line for line in lines if line.strip() and not PROGRESS.fullmatch(line))


def test_commands(photos, tiny_folder, tmp_path):
    lines = [
        f"compress {photos}/0.png a.oscar",
        f"compress {photos} files --model nano-hyperprior --batch-size 2",
        "decompress a.oscar a.png",
        "decompress files images --dtype bfloat16",
        "info a.oscar",
        "doctor",
        f"convert --back {tiny_folder} tiny.pkl",
        f"convert tiny.pkl tiny --backbone {tiny_folder}",
    ]
    assert stderr_of("-c", COMMANDS, cwd=tmp_path, feed="\n".join(lines)) == ""


def test_errors_and_notes_are_one_line_each(photos, tmp_path):
    for command, line in (
        (["compress", "none.png", "a.oscar"], "oscar: error: none.png: no such file or folder"),
        (
            ["compress", f"{photos}/0.png", "a.oscar", "--model", str(tmp_path)],
            f"oscar: error: model {str(tmp_path)!r} is a folder without oscar.json; allowed: an OSCAR checkpoint",
        ),
    ):
        assert stderr_of("-m", "oscar", *command, cwd=tmp_path, code=2) == line


def test_python(photos, tmp_path):
    assert stderr_of("-c", CALLS, str(photos / "0.png"), cwd=tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("script", "overrides"), [
    ("train", ["experiment=tiny/joint", "data.train=[{photos}]", "trainer.max_steps=1", "data.crop=64", "output=run",
               "data.batch_size=1", "data.workers=0"]),
    ("train", ["experiment=tiny/hyperprior_bottleneck", "data.train=[{photos}]", "trainer.max_steps=1", "data.crop=64",
               "output=run", "data.batch_size=1", "data.workers=1"]),
    ("evaluate", ["model={model}", "data.images={photos}", "data.limit=1", "metrics.names=[psnr]", "output=results"]),
    ("calibrate_timesteps", ["model={model}", "data.images={photos}", "data.limit=1", "output=results"]),
    ("ablate_timesteps", ["model={model}", "data.images={photos}", "data.limit=1", "rates=[0.0019]", "sweep=[0]",
                          "metrics.names=[psnr]", "output=results"]),
    ("benchmark", ["models.nano={model}", "data.images={photos}", "data.limit=1", "parts=[quality]", "baselines=[jpeg]",
                   "baselines.jpeg.points=[50]", "rates=[0.0625]", "output=results"]),
    ("cache_latents", ["backbone=nano", "data.train=[{photos}]", "data.crop=64", "crops=1", "output=cache"]),
])  # fmt: skip
def test_scripts(photos, tiny_folder, tmp_path, script, overrides):
    filled = [override.format(photos=photos, model=tiny_folder) for override in overrides]
    assert stderr_of(str(ROOT / f"scripts/{script}.py"), *filled, cwd=tmp_path) == ""


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
