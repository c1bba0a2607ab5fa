"""Memory after loading; reading itself is tested with backbones and checkpoints."""

import platform

import psutil
import pytest
import torch

from oscar.models.loading import give_back_memory

MIB = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed, and gives it back")
def test_freed_memory_goes_back_to_the_system() -> None:
    parts = [torch.ones(2**14) for _ in range(4000)]  # 64 KiB each, 250 MiB
    last = parts.pop()  # the end of the heap stays in use
    del parts
    before = psutil.Process().memory_info().rss
    give_back_memory()
    assert before - psutil.Process().memory_info().rss > 150 * MIB
    assert last.sum() == 2**14
