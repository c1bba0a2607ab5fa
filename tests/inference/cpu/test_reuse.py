"""Memory that is used again: never while a tensor has it, and no more of it is kept than was agreed on."""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from oscar.inference.cpu.reuse import Pool
from oscar.inference.memory import release_host_memory

MIB = 2**20
SIDE = 512  # a map of 512x512 numbers is of 1 MiB


@pytest.fixture
def pool():
    return Pool(kept=8 * MIB)


def test_memory_comes_back_when_the_last_tensor_is_gone(pool):
    first = pool.empty(SIDE, SIDE)
    place, row = first.data_ptr(), first[3]
    del first
    second = pool.empty(SIDE, SIDE)
    assert second.data_ptr() != place  # a view still has the memory
    del row
    assert pool.empty(SIDE, SIDE).data_ptr() == place


def test_a_tensor_gets_the_smallest_piece_that_fits(pool):
    small, large = pool.empty(SIDE, SIDE), pool.empty(2, SIDE, SIDE)
    places = small.data_ptr(), large.data_ptr()
    del small, large
    first, second = pool.empty(3 * SIDE // 2, SIDE // 2), pool.empty(SIDE, SIDE)
    assert (first.data_ptr(), second.data_ptr()) == places
    assert first.shape == (3 * SIDE // 2, SIDE // 2) and first.is_contiguous()


def test_pieces_much_larger_than_asked_for_wait_for_a_large_tensor(pool):
    large = pool.empty(4, SIDE, SIDE)
    place = large.data_ptr()
    del large
    small = pool.empty(SIDE, SIDE)
    assert not place <= small.data_ptr() < place + 4 * MIB


def test_no_more_is_kept_than_agreed_and_the_oldest_goes_first(pool):
    tensors = [pool.empty(4, SIDE, SIDE) for _ in range(4)]  # 16 MiB
    assert pool.waiting == 0
    for number in range(4):
        tensors[number] = None
    assert pool.waiting == 8 * MIB
    with pool.keeping(0):
        assert pool.waiting == 0
        pool.empty(4, SIDE, SIDE)
        assert pool.waiting == 0
    pool.empty(4, SIDE, SIDE)
    assert pool.waiting == 4 * MIB


def test_tensors_of_several_threads_never_share_memory(pool):
    def work(value: int) -> bool:
        held = []
        for step in range(200):
            held.append(pool.empty(1 + (step + value) % 3, SIDE, SIDE).fill_(value))
            if any((tensor != value).any() for tensor in held):
                return False
            held = held[-2:]
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def test_tensors_serve_in_inference_mode_and_out_of_it(pool):
    with torch.inference_mode():
        inside = pool.empty(SIDE, SIDE).zero_().add_(1)
    outside = pool.empty(SIDE, SIDE).copy_(inside)
    assert outside.sum() == SIDE * SIDE


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")


FREED = """
import contextlib, os
import psutil, torch
from oscar.inference.cpu.reuse import nothing_kept

for kept in ("much", "nothing"):
    if os.fork():  # the rest is the child's, whose heap is as it was after the imports
        os.wait()
        continue
    with nothing_kept() if kept == "nothing" else contextlib.nullcontext():
        if kept == "much":
            torch.ones(7 * 2**20)  # is freed at once: glibc takes pieces of up to 28 MiB to be worth keeping
        parts = [torch.ones(2**19) for _ in range(100)]
        last = parts.pop()  # the end of the heap stays in use
        full = psutil.Process().memory_info().rss
        del parts
        print((full - psutil.Process().memory_info().rss) // 2**20, flush=True)
    os._exit(0)
"""


@GLIBC
@pytest.mark.slow
def test_nothing_is_kept() -> None:
    """Of 198 MiB in pieces of 2 MiB; in processes of their own, whose heaps hold no room that others have left.

    Python may take some for itself meanwhile, hence less than nothing.
    """
    much, nothing = map(int, subprocess.check_output([sys.executable, "-c", FREED], text=True).split())
    assert -20 <= much <= 50 and 150 <= nothing <= 200


@GLIBC
def test_freed_memory_goes_back_to_the_system() -> None:
    parts = [torch.ones(2**14) for _ in range(4000)]  # 64 KiB each, 250 MiB
    last = parts.pop()  # the end of the heap stays in use
    del parts
    before = psutil.Process().memory_info().rss
    release_host_memory()
    assert before - psutil.Process().memory_info().rss > 150 * MIB
    assert last.sum() == 2**14
