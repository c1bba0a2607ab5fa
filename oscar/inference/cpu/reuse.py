"""Memory for the maps of networks on a CPU that is kept and used again, as torch does it for GPUs.

The C library gives large pieces back to the system as soon as nothing holds them, and a new piece costs a page fault
for every 4 KiB that is written: a fifth of the time of a plain decoder of 512x512 pixels in float32.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import Tensor

from oscar.inference import memory

_SMALLEST = 2**16  # numbers below which the C library keeps what is freed


class Pool:
    """Pieces of memory, each lent to one tensor at a time. Safe to use from several threads.

    Args:
        kept: bytes of pieces that no tensor has, at most; beyond them those go that have waited longest.
    """

    def __init__(self, kept: int):
        self.kept = kept
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor with arbitrary values, whose memory comes back when nothing holds the tensor any more."""
        count = prod(shape)
        if count < _SMALLEST:
            return torch.empty(shape)
        with self._lock:
            fitting = [place for place, piece in enumerate(self._free) if count <= piece.size <= 2 * count]
            if fitting:
                piece = self._free.pop(min(fitting, key=lambda place: self._free[place].size))
            else:
                piece = torch.empty(count).numpy()
        view = piece[:count]  # which the tensor holds
        weakref.finalize(view, self._give_back, piece).atexit = False
        return torch.from_numpy(view).view(shape)

    @property
    def waiting(self) -> int:
        """Bytes of the pieces that no tensor has."""
        return sum(piece.nbytes for piece in list(self._free))

    @contextlib.contextmanager
    def keeping(self, kept: int) -> Iterator[None]:
        """Keep another number of bytes as long as the context lasts."""
        before, self.kept = self.kept, kept
        self._trim()
        try:
            yield
        finally:
            self.kept = before

    def _give_back(self, piece: np.ndarray) -> None:
        self._free.append(piece)
        self._trim()

    def _trim(self) -> None:
        if not self._lock.acquire(blocking=False):  # tensors may die at any time, in `empty` too
            return
        try:
            while self.waiting > self.kept:
                del self._free[0]
        finally:
            self._lock.release()


POOL = Pool(3 * 2**29)  # what a decoder of Stable Diffusion's shape takes for 768x512 pixels


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """`oscar.inference.memory.nothing_kept`, for the pool too."""
    with POOL.keeping(0), memory.nothing_kept():
        yield
