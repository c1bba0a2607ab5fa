"""What this process may still take of the machine's memory, and how what it has freed goes back."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from oscar.utils.free_memory import AUTO_SHARE, available_memory

_PREFIXES = " KMGT"
_MMAP_THRESHOLD = -3  # mallopt's name for the size from which a piece comes from the system and goes back to it
_LARGE_PIECE, _MOST = 2**20, 2**25  # the latter is what glibc comes to by itself


@dataclass(frozen=True)
class MemoryBudget:
    """What the networks may take for the maps between their layers: beyond the weights, the image and the result.

    Attributes:
        limit: in bytes; None is "auto": a share of what is free on the device when an image comes.
    """

    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit <= 0:
            raise ValueError(_not_allowed(self.limit))

    @classmethod
    def parse(cls, value: int | str | MemoryBudget | None) -> MemoryBudget | None:
        """From "auto", a number of bytes, or a size such as "4GB" (10^9 bytes each) or "2.5GiB"; None is no limit.

        Raises:
            ValueError: for anything else.
        """
        if value is None or isinstance(value, MemoryBudget):
            return value
        text = str(value).strip()
        if text.lower() == "auto":
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", text.upper())
        if match is None:
            raise ValueError(_not_allowed(value))
        power = _PREFIXES.index(match[2] or " ")
        return cls(int(float(match[1]) * (1024 if match[3] else 1000) ** power))

    def bytes(self, device: torch.device) -> int:
        """The limit, which for "auto" is that of this moment."""
        if self.limit is not None:
            return self.limit
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(AUTO_SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
        return int(AUTO_SHARE * available_memory())


def _not_allowed(value: object) -> str:
    return f"memory is {value!r}; allowed: auto, or a size above 0 such as 4GB or 1500000000"


def release_host_memory() -> None:
    """Give the system what was freed and the C library (glibc) keeps: pieces of less than 32 MiB between others."""
    _c_library("malloc_trim", 0)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Have what is freed go back to the system at once, from now to the end of the context: for large images.

    glibc keeps pieces of up to 32 MiB and finds no use for many of them, since torch's are aligned: without this,
    blocks of a few MiB that come and go end up taking several times what is alive. Gaps that its heap has already are
    filled as before.
    """
    release_host_memory()
    _c_library("mallopt", _MMAP_THRESHOLD, _LARGE_PIECE)
    try:
        yield
    finally:
        _c_library("mallopt", _MMAP_THRESHOLD, _MOST)


def _c_library(function: str, *args: int) -> None:
    """Call a function of glibc; another C library has none of that name, and does without."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            getattr(ctypes.CDLL(None), function)(*args)
