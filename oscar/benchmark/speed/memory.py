"""Peak memory of a call in a process of its own: `python -m oscar.benchmark.speed.memory REQUEST`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from oscar.utils.strict_json import dumps

if TYPE_CHECKING:
    import torch

    from oscar.evaluation.codecs import OscarImageCodec

MEMORY_TIMEOUT = 600.0  # seconds that one measurement of memory may take, loading included
_MIB = 2**20


class TimingError(RuntimeError):
    """A measurement that could not be made; the message is one line."""


def peak_memory(
    codec: OscarImageCodec, image: Image.Image, point: float, direction: str, timeout: float = MEMORY_TIMEOUT
) -> dict[str, float | None]:
    """Memory of one call in a fresh process that loads the model, in MiB: columns of `TimingResult.memory`.

    Raises:
        TimingError: if the codec has no source to be loaded from, or the process fails or does not end within `timeout`
            seconds.
    """
    import torch

    if codec.source is None:
        raise TimingError(f"{codec.name} was not loaded from a checkpoint, so that no other process can load it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        if direction == "encode":
            image.save(path, format="PNG")
        else:
            path.write_bytes(codec.codec.compress(image, point))
        request = {
            "model": str(codec.source),
            "device": str(codec.codec.device),
            "dtype": str(codec.codec.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "direction": direction,
            "point": point,
            "input": str(path),
        }
        return run_child(__name__, request, f"memory of {direction} at {codec.name} {point:g}", timeout)


def run_child(module: str, request: dict, what: str, timeout: float) -> dict:
    """The JSON that `python -m MODULE REQUEST` prints last: a measurement in a process of its own.

    Args:
        module: by its full name.
        request: JSON-able; the module's only argument.
        what: is measured, in words.
        timeout: seconds.

    Raises:
        TimingError: if the process fails or does not end in time.
    """
    root = str(Path(__file__).parents[2])  # of the package, for a checkout that is not installed
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, dumps(request)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise TimingError(f"{what}: not done after {timeout:g} s") from None
    if done.returncode < 0:
        raise TimingError(f"{what}: the process was ended by signal {-done.returncode} (9: perhaps out of memory)")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise TimingError(f"{what}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])  # libraries may print before it


def _child(request: dict) -> dict[str, float | None]:
    """What the process does: load, then measure one call."""
    import torch

    from oscar.inference.load import load

    torch.set_num_threads(request["threads"])
    codec = load(request["model"], request["device"], getattr(torch, request["dtype"]))
    path = Path(request["input"])
    if request["direction"] == "decode":
        return memory_of(partial(codec.decompress, path.read_bytes()), codec.device)
    with Image.open(path) as file:
        return memory_of(partial(codec.compress, file.convert("RGB"), request["point"]), codec.device)


def memory_of(call: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Memory of this process before and during a call, in MiB: columns of `TimingResult.memory`.

    The call's peak is None where the system cannot tell it from that of what was before.
    """
    import torch

    earlier_peak = resident_memory()[1]
    is_forgotten = forget_peak()
    row: dict[str, float | None] = {"loaded_mib": resident_memory()[0]}  # only now: what was freed must not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        row["cuda_loaded_mib"] = torch.cuda.memory_allocated(device) / _MIB
    call()
    peak = resident_memory()[1]
    row |= {"call_peak_mib": peak if is_forgotten else None, "process_peak_mib": max(earlier_peak, peak)}
    if device.type == "cuda":
        row["cuda_call_peak_mib"] = torch.cuda.max_memory_allocated(device) / _MIB
    return row


def resident_memory() -> tuple[float, float]:
    """Resident memory of this process and its peak, in MiB.

    On Linux not by getrusage: its peak is inherited over fork and exec, so that a child's is at least its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    import resource

    import psutil

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return psutil.Process().memory_info().rss / _MIB, peak / _MIB


def forget_peak() -> bool:
    """Start this process's peak of resident memory anew; False where the system has no such means."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    print(dumps(_child(json.loads(sys.argv[1]))))
