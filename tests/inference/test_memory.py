"""What containers allow counts, as their files say it: trees of both versions of control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from oscar.inference.memory import MemoryBudget
from oscar.utils.free_memory import AUTO_SHARE, available_memory

FREE = 8_000_000_000  # of the system
NO_LIMIT = "9223372036854771712"  # of version 1


@pytest.fixture(autouse=True)
def system(monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE, total=2 * FREE))


def make(root: Path, groups: str, files: dict[str, str]) -> Path:
    tree = {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v1(folder: str, limit: object, usage: object, stat: str = "cache 5\ntotal_inactive_file 0") -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": str(limit),
        f"{folder}/memory.usage_in_bytes": str(usage),
        f"{folder}/memory.stat": stat,
    }


def v2(folder: str, limit: object, usage: object, stat: str = "anon 5\ninactive_file 0") -> dict[str, str]:
    return {f"{folder}/memory.max": str(limit), f"{folder}/memory.current": str(usage), f"{folder}/memory.stat": stat}


GB = 10**9
HYBRID = "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n0::/job"
CASES = {
    # A container sees its own group at the top.
    "v2": ("0::/", v2(".", 4 * GB, 1 * GB), 3 * GB),
    "v2, no limit": ("0::/", v2(".", "max", 1 * GB), FREE),
    "v2, the system has less": ("0::/", v2(".", 64 * GB, 1 * GB), FREE),
    "v2, nested": ("0::/jobs/7", v2("jobs/7", 2 * GB, GB // 2), 3 * GB // 2),
    "v2, the limit is further out": ("0::/jobs/7", v2("jobs/7", "max", 1) | v2("jobs", 3 * GB, 1 * GB), 2 * GB),
    "v2, the nearer is larger": ("0::/jobs/7", v2("jobs/7", 6 * GB, 1) | v2("jobs", 3 * GB, 2 * GB), 1 * GB),
    "v2, root without files": ("0::/jobs", v2("jobs", 5 * GB, 1 * GB), 4 * GB),
    "v2, path of the host": ("0::/docker/0123", v2(".", 4 * GB, 3 * GB), 1 * GB),
    "v2, path outside the namespace": ("0::/../../other", v2(".", 4 * GB, 3 * GB), 1 * GB),
    "v2, cached files are free": ("0::/", v2(".", 4 * GB, 3 * GB, f"anon 1\ninactive_file {2 * GB}"), 3 * GB),
    "v2, without memory.stat": ("0::/", {"memory.max": str(4 * GB), "memory.current": str(GB)}, 3 * GB),
    "v2, above its limit": ("0::/", v2(".", 1 * GB, 2 * GB), 0),
    "v2, a path with a colon": ("0::/a:b", v2("a:b", 2 * GB, GB), 1 * GB),
    "v1": ("4:memory:/", v1("memory", 4 * GB, 1 * GB), 3 * GB),
    "v1, no limit": ("4:memory:/", v1("memory", NO_LIMIT, 1 * GB), FREE),
    "v1, path of the host": ("4:memory:/docker/0123\n0::/", v1("memory", 4 * GB, 1 * GB), 3 * GB),
    "v1, nested": ("4:memory:/a/b", v1("memory/a/b", 3 * GB, 1 * GB) | v1("memory", NO_LIMIT, 9 * GB), 2 * GB),
    "v1, joint controllers": ("9:cpu,memory:/a", v1("memory/a", 3 * GB, 1 * GB), 2 * GB),
    "v1, cached files are free": ("4:memory:/", v1("memory", 4 * GB, 3 * GB, f"total_inactive_file {GB}"), 2 * GB),
    "v1, of the processor alone": ("4:cpu:/", v1("memory", 4 * GB, 1 * GB), FREE),
    "hybrid, v1 limits": (HYBRID, v1("memory/job", 4 * GB, 1 * GB), 3 * GB),
    "hybrid, v2 limits": (HYBRID, v1("memory/job", NO_LIMIT, 0) | v2("unified/job", 2 * GB, 1 * GB), 1 * GB),
    "no files at all": ("0::/", {}, FREE),
    "nonsense": ("0::/", v2(".", "plenty", 0), FREE),
}


@pytest.mark.parametrize("name", CASES)
def test_limits_of_containers(tmp_path, name):
    groups, files, expected = CASES[name]
    assert available_memory(make(tmp_path, groups, files)) == expected


def test_without_control_groups_the_system_says(tmp_path):
    assert available_memory(tmp_path) == FREE


def test_budget_auto_is_a_share_of_it(monkeypatch):
    monkeypatch.setattr("oscar.inference.memory.available_memory", lambda: 3 * GB)
    assert MemoryBudget.parse("auto").bytes(torch.device("cpu")) == int(AUTO_SHARE * 3 * GB)
    assert MemoryBudget.parse("2GB").bytes(torch.device("cpu")) == 2 * GB
