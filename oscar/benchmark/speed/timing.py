"""What a codec costs: time, time by stage, throughput, peak memory, parameters; what torch's own tools do not measure.

`torch.utils.benchmark` measures one call after the other, and warms each up anew. Here `interleaved` runs every
candidate once per round, so that a change of the machine's load or clock meets all of them, and ratios are medians over
rounds. `torch.profiler` records every operation, which makes a small model's call slower and its measurement several
times as long, does not wait for a GPU between stages, and counts no attention. Here `stage_costs` wraps the methods
that `OscarCodec` calls, for the time of a measurement, so that no second copy of the flow can drift from it, and reads
any meter around them: a clock, or the counter of `torch.utils.flop_counter`. Peak memory is that of a process of its
own, `python -m oscar.benchmark.speed.timing`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from unittest.mock import patch

import numpy as np
from PIL import Image
from tqdm import tqdm

from oscar.baselines.base import CodecError, ImageCodec
from oscar.data.tensors import to_tensor
from oscar.utils.environment import hardware
from oscar.utils.errors import first_line
from oscar.utils.strict_json import dumps

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from oscar.codec import OscarCodec
    from oscar.evaluation.codecs import OscarImageCodec

PERCENTILES = (50, 90, 99)
DIRECTIONS = ("encode", "decode")
_CALL = ("codec", "point", "direction")  # columns that name one direction of one codec at one point
_SIZE, _COUNTS = ("width", "height"), ("repeats", "warmup")  # columns that are the same in all rows of a run
WHOLE, OTHER = "whole call", "other"  # rows of the stage tables beside the stages
MEMORY_TIMEOUT = 600.0  # seconds that one measurement of memory may take, loading included
_MIB = 2**20
Name = TypeVar("Name", bound=Hashable)


class TimingError(RuntimeError):
    """A measurement that could not be made; the message is one line."""


@dataclass(frozen=True)
class TimingResult:
    """Tables of one run on one image; units are in the column names, a `note` says why a figure is missing.

    Attributes:
        latency: per codec and point: percentiles of encode and decode in ms, and `encode_ratio`, `decode_ratio`: the
            median over rounds of its time divided by that of the first row with figures, in the same round.
        stages: per model, point, direction and stage: percentiles and mean in ms, share of the whole call.
            "other" is what the whole call does outside the stages: image to tensor and back, padding, norms.
        throughput: per model, point, direction and batch size: images and megapixels per second, at the median time.
        memory: per model, point and direction, each in a process of its own, in MiB: resident after loading the model,
            the peak during the call, the peak of the whole process with loading; on CUDA the allocator's as well.
        parameters: per model, part and, for the bottleneck, rate. Codebooks are counted, and belong to both halves.
        macs: per model, point, direction and stage: multiply-accumulates of convolutions, matrix products and
            attention (those of torch.utils.flop_counter, halved); element-wise operations are not counted.
        hardware: the machine, as `oscar.utils.environment.hardware` describes it.
    """

    latency: pd.DataFrame
    stages: pd.DataFrame
    throughput: pd.DataFrame
    memory: pd.DataFrame
    parameters: pd.DataFrame
    macs: pd.DataFrame
    hardware: dict


def run_timing(
    codecs: Sequence[ImageCodec],
    image: Image.Image,
    points: Mapping[str, Sequence[float]] | None = None,
    repeats: int = 10,
    warmup: int = 2,
    batch_sizes: Sequence[int] = (1, 4),
    memory: bool = True,
    progress: bool = True,
) -> TimingResult:
    """Measure codecs on one RGB image; all but latency is measured for OSCAR models only.

    OSCAR is always timed by its files, whatever the codec's protocol.

    Args:
        codecs: at least one; the first one's first point is what ratios are to.
        image: the image.
        points: points by codec name; by default, and for codecs not named, the codec's own.
        repeats: measurements of each kind, at least 1. With few, a high percentile is little else than the maximum.
        warmup: calls before them that do not count.
        batch_sizes: of the throughput, in copies of the image.
        memory: whether to measure memory, which loads the model anew for each point and direction.
        progress: whether to show a bar.

    Raises:
        ValueError: for a point that a codec does not have, an unknown codec in `points`, or a count that is too small.
    """
    names = [codec.name for codec in codecs]
    unknown = sorted(set(points or {}) - set(names))
    if unknown:
        raise ValueError(f"points of codec {unknown[0]!r}: no such codec here; allowed: {', '.join(names)}")
    if not codecs or repeats < 1 or warmup < 0 or min(batch_sizes, default=1) < 1:
        raise ValueError(
            f"timing of {len(codecs)} codecs with repeats {repeats}, warmup {warmup}, batch sizes "
            f"{list(batch_sizes)} is not allowed; allowed: from 1, 1, 0 and 1 up"
        )
    candidates = [
        (codec, codec.check_point(point)) for codec in codecs for point in (points or {}).get(codec.name, codec.points)
    ]
    ours = [(codec, point) for codec, point in candidates if _is_oscar(codec)]
    rounds = len(DIRECTIONS) * (warmup + repeats)
    steps = rounds * (len(candidates) + len(ours) * (1 + len(batch_sizes)))
    steps += len(ours) * (1 + len(DIRECTIONS) * memory)
    with tqdm(total=steps, desc="timing", unit="call", disable=not progress) as bar:
        run = _Run(image, candidates, ours, repeats, warmup, bar.update)
        return TimingResult(
            latency=_latency_table(run),
            stages=_stage_table(run),
            throughput=_throughput_table(run, batch_sizes),
            memory=_memory_table(run, ours if memory else []),
            parameters=_parameter_table(run),
            macs=_mac_table(run),
            hardware=hardware(),
        )


# Clocks.


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    sync: Callable[[], None] = lambda: None,
    tick: Callable[[], object] = lambda: None,
) -> dict[Name, np.ndarray]:
    """Seconds of several calls, measured in turns: each once per round, the first in turn moving on by one each round.

    Args:
        calls: what to measure, by name.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        sync: waits for the device; called around each measurement.
        tick: called after each call.

    Returns:
        Seconds (repeats,) by name; the same place in two arrays is the same round.
    """
    names = list(calls)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            sync()
            begin = time.perf_counter()
            calls[name]()
            sync()
            elapsed = time.perf_counter() - begin
            if turn >= 0:
                seconds[name].append(elapsed)
            tick()
    return {name: np.array(values) for name, values in seconds.items()}


def percentiles(seconds: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Columns `<prefix>p50_ms`, p90 and p99; linear between measurements."""
    values = 1000 * np.percentile(seconds, PERCENTILES)
    return {f"{prefix}p{percent}_ms": float(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def paired_ratio(seconds: np.ndarray, reference: np.ndarray) -> float:
    """Median over rounds of `interleaved` of one candidate's time divided by another's."""
    return float(np.median(seconds / reference))


def synchroniser(devices: Iterable[torch.device]) -> Callable[[], None]:
    """A function that waits for what the CUDA devices among `devices` have been given to do."""
    cuda = [device for device in devices if device.type == "cuda"]

    def wait() -> None:
        import torch

        for device in cuda:
            torch.cuda.synchronize(device)

    return wait


# Stages of the flow.


def _stages(codec: OscarCodec, direction: str) -> tuple[tuple[str, object, str], ...]:
    """Stage, and the owner and name of the function that is this stage; a stage's time is without those it calls."""
    if direction == "encode":
        return (
            ("vae_encode", codec, "encode_latent"),
            ("bottleneck_quantise", codec.bottleneck, "quantise"),
            ("entropy_encode", codec.bottleneck, "write"),
            ("container_write", codec, "write"),
        )
    return (
        ("container_read", codec, "open"),
        ("entropy_decode", codec.bottleneck, "read"),
        ("bottleneck_dequantise", codec.bottleneck, "dequantise"),
        ("unet_step", codec.denoiser, "forward"),
        ("vae_decode", codec, "decode_image"),
    )


def stage_costs(
    codec: OscarCodec, direction: str, call: Callable[[], object], read: Callable[[], float]
) -> dict[str, float]:
    """Share one call's cost among the stages of the flow.

    Args:
        codec: the codec that `call` uses.
        direction: "encode" or "decode".
        call: compresses or decompresses.
        read: a meter that only rises: a clock, a counter of operations.

    Returns:
        What the meter rose by in each stage, in `OTHER`, and in `WHOLE`, which is their sum.

    Raises:
        TimingError: if the call did not pass through one of the stages.
    """
    spent: dict[str, float] = {}
    nested = [0.0]  # by depth: cost of the stages within the present one

    def metered(stage: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            nested.append(0.0)
            begin = read()
            result = function(*args, **kwargs)
            cost = read() - begin
            spent[stage] = spent.get(stage, 0.0) + cost - nested.pop()
            nested[-1] += cost
            return result

        return run

    stages = _stages(codec, direction)
    with ExitStack() as stack:
        for stage, owner, name in stages:
            stack.enter_context(patch.object(owner, name, metered(stage, getattr(owner, name))))
        metered(OTHER, call)()
    missing = [stage for stage, _, _ in stages if stage not in spent]
    if missing:
        raise TimingError(f"{direction} did not pass through stage {missing[0]}")
    return {stage: spent[stage] for stage in (*(stage for stage, _, _ in stages), OTHER)} | {WHOLE: nested[0]}


def stage_times(
    codec: OscarCodec,
    image: Image.Image,
    point: float,
    repeats: int,
    warmup: int = 1,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds (repeats,) by direction and stage, waiting for the device between stages; see `stage_costs`."""
    wait = synchroniser([codec.device])

    def clock() -> float:
        wait()
        return time.perf_counter()

    result = {}
    for direction, call in _codec_calls(codec, image, point).items():
        rounds = []
        for _ in range(warmup + repeats):
            rounds.append(stage_costs(codec, direction, call, clock))
            tick()
        result[direction] = {stage: np.array([costs[stage] for costs in rounds[warmup:]]) for stage in rounds[0]}
    return result


def stage_macs(codec: OscarCodec, image: Image.Image, point: float) -> dict[str, dict[str, float]]:
    """Multiply-accumulates by direction and stage: convolutions, matrix products, attention; nothing element-wise.

    Convolutions count as they are written, also where they are computed with fewer multiplications.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from oscar.inference.kernels import every_multiplication

    def attention(query, key, value, *args, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # unknown to older torch
    result = {}
    for direction, call in _codec_calls(codec, image, point).items():
        counter = FlopCounterMode(display=False, custom_mapping=cpu_attention)
        with every_multiplication(codec), counter:
            flops = stage_costs(codec, direction, call, counter.get_total_flops)
        result[direction] = {stage: value / 2 for stage, value in flops.items()}
    return result


# Memory, in a process of its own.


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
            "dtype": _dtype_name(codec.codec),
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


# Parameters.


def parameter_counts(codec: OscarCodec) -> list[dict[str, str | float | int | None]]:
    """Rows `part`, `rate`, `parameters` and `note`; all but those with a note sum to the model's parameters."""
    backbone, denoiser = codec.backbone, codec.denoiser
    vae_decoder = _count(*backbone.decoder_modules())
    adapters = sum(value.numel() for name, value in denoiser.unet.named_parameters() if "lora_" in name)
    rows = [
        ("vae_encoder", None, _count(backbone.vae) - vae_decoder, None),
        ("vae_decoder", None, vae_decoder, None),
        ("unet", None, _count(denoiser.unet) - adapters, None),
        ("prompt", None, 0 if denoiser.prompt is None else denoiser.prompt.numel(), None),
    ]
    if denoiser.tuning == "lora" and denoiser.merged:
        rows.append(("adapters", None, _merged_adapters(denoiser), "merged into the unet, not in its total"))
    else:
        rows.append(("adapters", None, adapters, None))
    rows += codec.bottleneck.parameter_counts()
    return [dict(zip(("part", "rate", "parameters", "note"), row, strict=True)) for row in rows]


def _count(*modules) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _merged_adapters(denoiser) -> int:
    """Parameters that the adapters had: rank * (inputs + outputs) of each layer, of a convolution's kernel too."""
    from oscar.models.denoiser import lora_targets

    weights = [
        denoiser.unet.get_submodule(name).weight for names in lora_targets(denoiser.unet).values() for name in names
    ]
    return denoiser.options["lora_rank"] * sum(weight[0].numel() + weight.shape[0] for weight in weights)


# Tables.


@dataclass(frozen=True)
class _Run:
    """What all tables of a run share."""

    image: Image.Image
    candidates: list[tuple[ImageCodec, float]]
    ours: list[tuple[OscarImageCodec, float]]
    repeats: int
    warmup: int
    tick: Callable[[], object]

    def in_turns(
        self, candidates: Mapping[tuple, Callable[[], Mapping[str, Callable]]], failure: type[Exception]
    ) -> tuple[dict[tuple, np.ndarray], dict[tuple, str]]:
        """Seconds by name of candidate and direction; by name, why a candidate's calls could not be made."""
        calls, notes = {}, {}
        for name, make in candidates.items():
            try:
                calls |= {(*name, direction): call for direction, call in make().items()}
            except failure as error:
                notes[name] = first_line(error)
        sync = synchroniser(codec.codec.device for codec, _ in self.ours)
        return interleaved(calls, self.repeats, self.warmup, sync, self.tick), notes

    def table(self, rows: list[dict], *columns: str) -> pd.DataFrame:
        """These columns whether or not there are rows and figures; those of size and counts need not be in the rows."""
        import pandas as pd  # here: the process that measures memory shall not hold it

        same = (self.image.width, self.image.height, self.repeats, self.warmup)
        shared = dict(zip((*_SIZE, *_COUNTS), same, strict=True))
        return pd.DataFrame([row | shared for row in rows], columns=list(columns))


def _is_oscar(codec: ImageCodec) -> bool:
    from oscar.evaluation.codecs import OscarImageCodec

    return isinstance(codec, OscarImageCodec)


def _codec_calls(codec: OscarCodec, image: Image.Image, point: float) -> dict[str, Callable[[], object]]:
    """By direction: image in memory -> bytes in memory, and back."""
    encode = partial(codec.compress, image, point)
    return {"encode": encode, "decode": partial(codec.decompress, encode())}


def _calls(codec: ImageCodec, image: Image.Image, point: float) -> dict[str, Callable[[], object]]:
    if _is_oscar(codec):
        return _codec_calls(codec.codec, image, point)
    encode = partial(codec.encode, image, point)
    return {"encode": encode, "decode": partial(codec.decode, encode().data)}


def _batch_calls(codec: OscarCodec, image: Image.Image, point: float, size: int) -> dict[str, Callable[[], object]]:
    encode = partial(codec.compress_tensor, to_tensor(image).repeat(size, 1, 1, 1), point)
    decode = partial(codec.decompress_tensor, encode())
    decode()  # once before all others: memory may not suffice
    return {"encode": encode, "decode": decode}


def _latency_table(run: _Run) -> pd.DataFrame:
    makers = {(codec.name, point): partial(_calls, codec, run.image, point) for codec, point in run.candidates}
    seconds, notes = run.in_turns(makers, CodecError)
    reference: dict[str, np.ndarray] = {}
    rows = []
    for codec, point in run.candidates:
        row = {"codec": codec.name, "label": codec.label, "point": point, "note": notes.get((codec.name, point))}
        if _is_oscar(codec):
            row |= {"device": str(codec.codec.device), "dtype": _dtype_name(codec.codec)}
        for direction in DIRECTIONS if row["note"] is None else ():
            own = seconds[codec.name, point, direction]
            row |= percentiles(own, f"{direction}_")
            row[f"{direction}_ratio"] = paired_ratio(own, reference.setdefault(direction, own))
        rows.append(row)
    figures = [f"{d}_{what}" for d in DIRECTIONS for what in (*(f"p{p}_ms" for p in PERCENTILES), "ratio")]
    return run.table(rows, "codec", "label", "point", *_SIZE, "device", "dtype", *figures, *_COUNTS, "note")


def _stage_table(run: _Run) -> pd.DataFrame:
    rows = [
        {
            **dict(zip((*_CALL, "stage"), (codec.name, point, direction, stage), strict=True)),
            **percentiles(seconds),
            "mean_ms": 1000 * seconds.mean(),
            "share_percent": 100 * seconds.mean() / stages[WHOLE].mean(),
        }
        for codec, point in run.ours
        for direction, stages in stage_times(codec.codec, run.image, point, run.repeats, run.warmup, run.tick).items()
        for stage, seconds in stages.items()
    ]
    figures = (*(f"p{percent}_ms" for percent in PERCENTILES), "mean_ms", "share_percent")
    return run.table(rows, *_CALL, "stage", *_SIZE, *figures, *_COUNTS)


def _throughput_table(run: _Run, batch_sizes: Sequence[int]) -> pd.DataFrame:
    makers = {
        (codec.name, point, size): partial(_batch_calls, codec.codec, run.image, point, size)
        for codec, point in run.ours
        for size in batch_sizes
    }
    seconds, notes = run.in_turns(makers, RuntimeError)  # too little memory: smaller batches are still measured
    megapixels = run.image.width * run.image.height / 1e6
    rows = []
    for (codec, point, size), direction in product(makers, DIRECTIONS):
        row = {"codec": codec, "point": point, "direction": direction, "batch_size": size}
        row["note"] = notes.get((codec, point, size))
        if row["note"] is None:
            median = float(np.median(seconds[codec, point, size, direction]))
            row |= {"batch_p50_ms": 1000 * median, "images_per_s": size / median}
            row["megapixels_per_s"] = size * megapixels / median
        rows.append(row)
    figures = ("batch_p50_ms", "images_per_s", "megapixels_per_s")
    return run.table(rows, *_CALL, "batch_size", *_SIZE, *figures, *_COUNTS, "note")


def _memory_table(run: _Run, ours: list[tuple[OscarImageCodec, float]]) -> pd.DataFrame:
    rows = []
    for (codec, point), direction in product(ours, DIRECTIONS):
        try:
            figures = peak_memory(codec, run.image, point, direction)
        except TimingError as error:
            figures = {"note": str(error)}
        rows.append({"codec": codec.name, "point": point, "direction": direction, **figures})
        run.tick()
    figures = ("loaded_mib", "call_peak_mib", "process_peak_mib", "cuda_loaded_mib", "cuda_call_peak_mib")
    return run.table(rows, *_CALL, *_SIZE, *figures, "note")


def _parameter_table(run: _Run) -> pd.DataFrame:
    codecs = {codec.name: codec.codec for codec, _ in run.ours}
    rows = [{"codec": name, **row} for name, codec in codecs.items() for row in parameter_counts(codec)]
    return run.table(rows, "codec", "part", "rate", "parameters", "note")


def _mac_table(run: _Run) -> pd.DataFrame:
    pixels, rows = run.image.width * run.image.height, []
    for codec, point in run.ours:
        rows += [
            {
                **dict(zip((*_CALL, "stage"), (codec.name, point, direction, stage), strict=True)),
                "gmacs": macs / 1e9,
                "kmacs_per_pixel": macs / 1e3 / pixels,
            }
            for direction, stages in stage_macs(codec.codec, run.image, point).items()
            for stage, macs in stages.items()
        ]
        run.tick()
    return run.table(rows, *_CALL, "stage", *_SIZE, "gmacs", "kmacs_per_pixel")


def _dtype_name(codec: OscarCodec) -> str:
    return str(codec.dtype).removeprefix("torch.")


if __name__ == "__main__":
    print(dumps(_child(json.loads(sys.argv[1]))))
