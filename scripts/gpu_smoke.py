"""Two steps of every stage on this machine's GPUs, a file and back, and all GPUs together: once on a new machine.

    python scripts/gpu_smoke.py                                   # or make gpu-smoke: small random models, minutes
    python scripts/gpu_smoke.py --backbone sd21_random            # in the shape of Stable Diffusion 2.1

Every stage runs in bf16 and fp16, with and without torch.compile. What fails is a row of the table; then the exit code
is 1.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
# By name: the experiment, and the run whose result it starts from.
STAGES = {
    "vae": ("tiny/vae", None),
    "diffusion_pretrain": ("tiny/diffusion_pretrain", None),
    "bottleneck": ("tiny/bottleneck", None),
    "joint": ("tiny/joint", None),
    "context": (None, "joint"),
    "hyperprior bottleneck": ("tiny/hyperprior_bottleneck", None),
    "hyperprior joint": ("tiny/hyperprior_joint", None),
}
CODING = ("joint", "hyperprior joint")  # whose results code a file
SMALL = [
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "data.workers=2",
    "data.batch_size=2",
    "logger.tensorboard=false",
    "trainer.channels_last=true",
]
COLUMNS = ("what", "precision", "compile", "seconds", "peak MiB", "result")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}


class NoGPU(ValueError):
    """There is none."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only tries this script")
    parser.add_argument("--backbone", default="tiny", help="of configs/backbone, with random weights")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"], choices=DTYPES)
    parser.add_argument("--compile", nargs="+", default=["off", "on"], choices=("off", "on"))
    options = parser.parse_args(arguments)
    from oscar.utils.errors import exit_code

    failures: list[str] = []
    code = exit_code("gpu_smoke", lambda: failures.extend(run(options)))
    return code or int(bool(failures))


def run(options: argparse.Namespace) -> list[str]:
    """Print the table; returns the names of what failed.

    Raises:
        NoGPU: if one is wanted and there is none.
    """
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise NoGPU("no GPU that torch finds (oscar doctor says more); allowed: a machine with one, or --device cpu")
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    failed, rows = [], [COLUMNS]
    for index in range(torch.cuda.device_count() if options.device == "cuda" else 0):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")

    def attempt(name: str, precision: str, compiled: str, call: Callable[[], str]) -> None:
        begin, result = time.perf_counter(), ""
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            result = call()
        except Exception as error:  # whatever it is, the other rows are worth having
            lines = str(error).strip().splitlines() or [""]
            result = f"FAILED: {type(error).__name__}: {lines[0]}"
            failed.append(name)
        peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if options.device == "cuda" else "-"
        rows.append((name, precision, compiled, f"{time.perf_counter() - begin:.1f}", peak, result))
        print("  ".join(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for precision in options.precisions:
            for compiled in options.compile:
                folder = Path(temporary) / f"{precision}-{compiled}"
                for name in options.stages:
                    attempt(name, precision, compiled, partial(train, name, folder, precision, compiled, options))
                for name in CODING:
                    if name in options.stages:
                        file = partial(code, folder / name, precision, compiled, options)
                        attempt(f"file of {name}", precision, compiled, file)
        if options.device == "cuda" and torch.cuda.device_count() > 1:
            count = torch.cuda.device_count()
            attempt(f"joint on {count} GPUs", "bf16", "off", lambda: train_on_all(count, Path(temporary), options))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    print("\n" + "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
    return failed


def overrides(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Of scripts/train.py, for a stage."""
    from oscar.data.folders import find_images

    experiment, start = STAGES[name]
    images = ",".join(f'"{path}"' for path in find_images())
    found = [f"output={folder / name}", f"data.train=[{images}]", *SMALL]
    if experiment is None:
        return [*found, f"stage={name}", f"init_from={folder / start}/final", "data.crop=64", "stage.context.hidden=12"]
    found.append(f"experiment={experiment}")
    if options.backbone != "tiny":
        found += [f"backbone={options.backbone}", "data.crop=256"]
        found += ["trainer.gradient_checkpointing=true"] if name != "bottleneck" and "hyperprior b" not in name else []
    if name in ("bottleneck", "joint", "hyperprior bottleneck"):
        found.append("stage.table_batches=1")
    return found


def train(name: str, folder: Path, precision: str, compiled: str, options: argparse.Namespace) -> str:
    """Two steps of a stage in this process; its last loss."""
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from hydra import compose, initialize_config_dir

    from oscar.config import parse, register
    from oscar.training.build import build_stage
    from oscar.training.trainer import Trainer, make_accelerator

    register()
    own = [f"trainer.mixed_precision={precision}", f"trainer.compile={str(compiled == 'on').lower()}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = parse(compose("train", overrides=[*overrides(name, folder, options), *own]))
    try:
        accelerator = make_accelerator(config)
        if accelerator.device.type != options.device:
            raise RuntimeError(f"ran on {accelerator.device.type}")
        trainer = Trainer(build_stage(config), config, accelerator)
        trainer.run()
        last = (folder / name / "log.csv").read_text().splitlines()
        loss = float(last[-1].split(",")[last[0].split(",").index("loss")])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch._dynamo.reset()
    if not math.isfinite(loss):
        raise RuntimeError(f"loss is {loss}")
    return f"loss {loss:.4f}"


def code(folder: Path, precision: str, compiled: str, options: argparse.Namespace) -> str:
    """A file and back, with the model that a stage made."""
    import torch
    from PIL import Image

    import oscar
    from oscar.data.folders import find_images

    dtype = getattr(torch, DTYPES[precision])
    codec = oscar.load(folder / "final", device=options.device, dtype=dtype, compile=compiled == "on")
    image = Image.open(find_images()[0]).convert("RGB").crop((0, 0, 250, 190))
    data = codec.compress(image)
    decoded = codec.decompress(data)
    if decoded.size != image.size:
        raise RuntimeError(f"{image.size} became {decoded.size}")
    return f"{len(data)} bytes"


def train_on_all(count: int, folder: Path, options: argparse.Namespace) -> str:
    """Stage joint on all GPUs, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [
        str(ROOT / "scripts/train.py"),
        *overrides("joint", folder / "all", options),
        "trainer.mixed_precision=bf16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return "done"


if __name__ == "__main__":
    sys.exit(main())
