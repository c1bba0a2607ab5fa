"""Seconds of calls, measured in turns, and what is made of them.

`torch.utils.benchmark` measures one call after the other, and warms each up anew. Here `interleaved` runs every
candidate once per round, so that a change of the machine's load or clock meets all of them, and ratios are medians over
rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

PERCENTILES = (50, 90, 99)
Name = TypeVar("Name", bound=Hashable)


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    sync: Callable[[], None] = lambda: None,
    tick: Callable[[], object] = lambda: None,
) -> dict[Name, np.ndarray]:
    """Seconds of several calls, measured in turns: each once per round, the first in turn moving on by one each round.

    Args:
        calls: what to measure, by name.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        sync: waits for the device; called around each measurement.
        tick: called after each call.

    Returns:
        Seconds (repeats,) by name; the same place in two arrays is the same round.
    """
    names = list(calls)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            sync()
            begin = time.perf_counter()
            calls[name]()
            sync()
            elapsed = time.perf_counter() - begin
            if turn >= 0:
                seconds[name].append(elapsed)
            tick()
    return {name: np.array(values) for name, values in seconds.items()}


def percentiles(seconds: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Columns `<prefix>p50_ms`, p90 and p99; linear between measurements."""
    values = 1000 * np.percentile(seconds, PERCENTILES)
    return {f"{prefix}p{percent}_ms": float(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def paired_ratio(seconds: np.ndarray, reference: np.ndarray) -> float:
    """Median over rounds of `interleaved` of one candidate's time divided by another's."""
    return float(np.median(seconds / reference))


def synchroniser(devices: Iterable[torch.device]) -> Callable[[], None]:
    """A function that waits for what the CUDA devices among `devices` have been given to do."""
    cuda = [device for device in devices if device.type == "cuda"]

    def wait() -> None:
        import torch

        for device in cuda:
            torch.cuda.synchronize(device)

    return wait
