"""Processes that tests start: forked from a server that has imported everything and has started no thread."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "oscar.training.trainer",
        "oscar.training.build",
        "oscar.training.stages.joint",
        "oscar.training.stages.bottleneck",
        "oscar.training.stages.vae",
        "oscar.training.validation",
        "oscar.reproduce.study",
        "oscar.reproduce.retrain",
        "oscar.evaluation.evaluate",
        "oscar.inference.load",
        "hydra.compose",
        "torch._dynamo",
        "torch.utils.tensorboard",
    ]
)


def read_elsewhere(folder: Path, file: Path) -> bytes:
    """The symbols of a file as a new process, with two threads, reads them with the decoder of a checkpoint."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(_read, folder, file).result()


def _read(folder: Path, file: Path) -> bytes:
    import torch

    from oscar.inference.load import load

    torch.set_num_threads(2)
    symbols = load(folder, components="decoder", dtype=torch.float32).read(file.read_bytes()).symbols
    values = symbols.values if hasattr(symbols, "values") else symbols.indices
    return values[0].numpy().tobytes()
