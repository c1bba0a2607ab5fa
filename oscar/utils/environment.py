"""Where and with what results were made: commit, libraries, hardware."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from oscar.utils.extras import is_installed
from oscar.utils.strict_json import as_read, write_json

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("torch", "diffusers", "compressai", "pyiqa", "lpips", "pillow", "numpy", "onnxruntime")


def describe_environment() -> dict:
    """Commit, versions and hardware of this process, JSON-able."""
    return {**git_state(), "versions": versions(), "hardware": hardware()}


def open_record(folder: Path, settings: Mapping, device: object) -> dict:
    """Say in run.json of a folder what its figures belong to; figures of other settings or machines are removed.

    Args:
        folder: of CSV files; made if it is not there.
        settings: JSON-able.
        device: that is measured.

    Returns:
        `settings`, `device` and `hardware`, as read back from JSON.
    """
    identity = {"settings": settings, "device": str(device), "hardware": hardware()}
    identity = as_read(identity)
    record = folder / "run.json"
    if not record.exists() or json.loads(record.read_text())["identity"] != identity:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.csv"):
            old.unlink()
        state = {"identity": identity, **describe_environment()}
        write_json(record, state)
    return identity


def git_state() -> dict[str, str | bool | None]:
    """The `commit` of this code and whether tracked files differ from it (`dirty`); None outside a repository."""
    inside = _git("ls-files", "--error-unmatch", "__init__.py") is not None  # and not only below someone else's
    commit, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")) if inside else (None, None)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that results depend on; None where one is not installed."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = None
    if is_installed("torch"):
        import torch

        result["torch"] = torch.__version__  # with its build, which the metadata may lack
    return result


def hardware() -> dict:
    """Processor, cores that this process may use, threads of torch, memory in GiB, and name of the GPU or None."""
    import psutil
    import torch

    return {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cores() -> int | None:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """Output of git in the package's folder; None if it fails or is not there."""
    try:
        result = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
