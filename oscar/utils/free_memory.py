"""How much of the machine's memory this process may still take. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

AUTO_SHARE = 0.8  # of the free memory, that is taken where nothing else is said


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
