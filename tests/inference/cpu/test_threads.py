"""Sharing work among threads."""

from __future__ import annotations

import threading

import pytest
import torch

from oscar.inference.cpu.threads import each, share


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param  # as it was
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_item_once_and_in_order(threads: int, count: int) -> None:
    assert each(lambda item: item * item, range(count)) == [item * item for item in range(count)]


def test_each_thread_computes_alone_and_as_the_caller(threads: int) -> None:
    barrier, seen = threading.Barrier(threads, timeout=20), []

    def work(items) -> None:
        for _ in items:
            barrier.wait()  # so that each thread gets one
            seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with torch.inference_mode():
        share(work, range(threads))
    assert seen == [(1, True, False)] * threads


def test_errors_reach_the_caller(threads: int) -> None:
    def fail(item: int) -> None:
        if item == 5:
            raise ValueError("item 5")

    with pytest.raises(ValueError, match="item 5"):
        each(fail, range(8))
