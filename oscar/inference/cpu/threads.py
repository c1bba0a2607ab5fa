"""Work on a CPU in blocks, each by one thread from beginning to end, in place of each small layer by all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def share(work: Callable[[Iterator[Item]], None], items: Sequence[Item]) -> None:
    """Have as many threads as torch uses share items, for inference.

    Args:
        work: goes through the items that it is given; called once by each thread.
        items: each goes to the first thread that is free.
    """
    threads, waiting = torch.get_num_threads(), iter(items)
    count = min(threads, len(items))
    if count <= 1:
        return work(waiting)
    inference = torch.is_inference_mode_enabled()

    def run() -> None:
        torch.set_num_threads(1)  # of the layers that this thread calls
        with torch.inference_mode(inference), torch.no_grad():
            work(waiting)

    try:
        with ThreadPoolExecutor(count - 1) as pool:
            others = [pool.submit(run) for _ in range(count - 1)]
            run()
        for other in others:
            other.result()
    finally:
        torch.set_num_threads(threads)


def each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The function of each item, in their order; see `share`."""
    results: list[Result] = [None] * len(items)

    def work(positions: Iterator[int]) -> None:
        for position in positions:
            results[position] = function(items[position])

    share(work, range(len(items)))
    return results
