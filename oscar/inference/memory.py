"""What this process may still take of the machine's memory, and how what it has freed goes back."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

AUTO_SHARE = 0.8  # of the free memory, for the budget "auto"

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


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that are free on the system, and no more than the process's control groups leave it.

    A container has a limit of its own, of which the system's numbers know nothing. Groups lie within groups (cgroup v1
    and v2), and the one that leaves least counts. Cached files that nobody reads any more are free, as for the system.

    Args:
        root: where `proc` and `sys` are.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            places = [root / "sys/fs/cgroup/memory"]
        elif number == "0":
            names = ("memory.max", "memory.current", "inactive_file")
            places = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]  # there, beside groups of v1
        else:
            continue
        # A container may see its own group at the top, and the path that its host has for it.
        path = Path(group.strip("/")) if ".." not in Path(group).parts else Path()
        for place in places:
            for folder in (place / path, *((place / part) for part in path.parents)):
                left = _left(folder, *names)
                if left is not None:
                    yield left


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Bytes that a group leaves, None without a limit; what cannot be read is none."""
    try:
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())  # ValueError for "max"
    except (OSError, ValueError):
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return left + int(stat.get(reclaimable, 0))
    except (OSError, ValueError):
        return left


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
