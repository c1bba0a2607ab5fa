"""What a codec costs: latency, time per stage of the flow, throughput, peak memory, parameters, multiply-accumulates.

Speeds are compared in turns: `interleaved` runs every candidate once per round, so that a change of the machine's load
or clock meets all of them, and ratios are medians over rounds. Stages are measured on the codec's own calls: for the
time of a measurement `stage_costs` wraps the methods that `OscarCodec` calls, so that no second copy of the flow can
drift from it. Peak memory is that of a process of its own, `python -m oscar.benchmark.speed.timing`.
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
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from unittest.mock import patch

import numpy as np
from PIL import Image
from tqdm import tqdm

from oscar.baselines.base import CodecError, ImageCodec
from oscar.data.images import to_tensor
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
WHOLE, OTHER = "whole call", "other"  # rows of the stage tables beside the stages
MEMORY_TIMEOUT = 600.0  # seconds that one measurement of memory may take, loading included
_MIB = 2**20
Name = TypeVar("Name", bound=Hashable)


class TimingError(RuntimeError):
    """A measurement that could not be made; the message is one line."""


@dataclass(frozen=True)
class TimingResult:
    """Tables of one run on one picture; units are in the column names, a `note` says why a figure is missing.

    Attributes:
        latency: per codec and point: percentiles of encode and decode in ms, and `encode_ratio`, `decode_ratio`: the
            median over rounds of its time divided by that of the first row with figures, in the same round.
        stages: per model, point, direction and stage: percentiles and mean in ms, share of the whole call.
            "other" is what the whole call does outside the stages: picture to tensor and back, padding, norms.
        throughput: per model, point, direction and batch size: pictures and megapixels per second, at the median time.
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
    """Measure codecs on one RGB picture; all but latency is measured for OSCAR models only.

    OSCAR is always timed by its files, whatever the codec's protocol.

    Args:
        codecs: at least one; the first one's first point is what ratios are to.
        image: the picture.
        points: points by codec name; by default, and for codecs not named, the codec's own.
        repeats: measurements of each kind, at least 1. With few, a high percentile is little else than the maximum.
        warmup: calls before them that do not count.
        batch_sizes: of the throughput, in copies of the picture.
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
        run = _Run(image, repeats, warmup, bar.update)
        return TimingResult(
            latency=_latency_table(run, candidates),
            stages=_stage_table(run, ours),
            throughput=_throughput_table(run, ours, batch_sizes),
            memory=_memory_table(run, ours if memory else []),
            parameters=_parameter_table({codec.name: codec.codec for codec, _ in ours}),
            macs=_mac_table(run, ours),
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


def latency(
    call: Callable[[], object], repeats: int, warmup: int = 1, sync: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Seconds (repeats,) of one call, warm-up excluded; see `interleaved`."""
    return interleaved({"call": call}, repeats, warmup, sync)["call"]


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
    if not cuda:
        return lambda: None
    import torch

    def wait() -> None:
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

    def measure(direction: str, call: Callable[[], object]) -> dict[str, float]:
        costs = stage_costs(codec, direction, call, clock)
        tick()
        return costs

    result = {}
    for direction, call in _codec_calls(codec, image, point).items():
        rounds = [measure(direction, call) for _ in range(warmup + repeats)][warmup:]
        result[direction] = {stage: np.array([costs[stage] for costs in rounds]) for stage in rounds[0]}
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


def _compress(codec: OscarCodec, image: Image.Image, point: float) -> bytes:
    """The file of an image at a rate, or at a quality of a model with a hyperprior."""
    return codec.compress_batch([image], point)[0]


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
            path.write_bytes(_compress(codec.codec, image, point))
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
    """What the process does: load, forget the peak of loading, call once, report."""
    import torch

    from oscar.inference.load import load

    torch.set_num_threads(request["threads"])
    codec = load(request["model"], request["device"], getattr(torch, request["dtype"]))
    path = Path(request["input"])
    if request["direction"] == "encode":
        with Image.open(path) as file:
            image = file.convert("RGB")
        call = partial(_compress, codec, image, request["point"])
    else:
        call = partial(codec.decompress, path.read_bytes())
    cuda = codec.device.type == "cuda"
    loaded, loading_peak = resident_memory()
    row: dict[str, float | None] = {"loaded_mib": loaded}
    is_forgotten = forget_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats(codec.device)
        row["cuda_loaded_mib"] = torch.cuda.memory_allocated(codec.device) / _MIB
    call()
    peak = resident_memory()[1]
    row["call_peak_mib"] = peak if is_forgotten else None
    row["process_peak_mib"] = max(loading_peak, peak)
    if cuda:
        row["cuda_call_peak_mib"] = torch.cuda.max_memory_allocated(codec.device) / _MIB
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
    repeats: int
    warmup: int
    tick: Callable[[], object]

    @property
    def size(self) -> dict[str, int]:
        return {"width": self.image.width, "height": self.image.height}

    @property
    def counts(self) -> dict[str, int]:
        return {"repeats": self.repeats, "warmup": self.warmup}


def _is_oscar(codec: ImageCodec) -> bool:
    from oscar.evaluation.codecs import OscarImageCodec

    return isinstance(codec, OscarImageCodec)


def _codec_calls(codec: OscarCodec, image: Image.Image, point: float) -> dict[str, Callable[[], object]]:
    """By direction: picture in memory -> bytes in memory, and back."""
    encode = partial(_compress, codec, image, point)
    return {"encode": encode, "decode": partial(codec.decompress, encode())}


def _calls(codec: ImageCodec, image: Image.Image, point: float) -> dict[str, Callable[[], object]]:
    if _is_oscar(codec):
        return _codec_calls(codec.codec, image, point)
    encode = partial(codec.encode, image, point)
    return {"encode": encode, "decode": partial(codec.decode, encode().data)}


def _latency_table(run: _Run, candidates: list[tuple[ImageCodec, float]]) -> pd.DataFrame:
    calls, notes = {}, {}
    for codec, point in candidates:
        try:
            for direction, call in _calls(codec, run.image, point).items():
                calls[codec.name, point, direction] = call
        except CodecError as error:
            notes[codec.name, point] = first_line(error)
    ours = {codec.name: codec.codec for codec, _ in candidates if _is_oscar(codec)}
    sync = synchroniser(codec.device for codec in ours.values())
    seconds = interleaved(calls, run.repeats, run.warmup, sync, run.tick)
    reference: dict[str, np.ndarray] = {}
    rows = []
    for codec, point in candidates:
        row = {"codec": codec.name, "label": codec.label, "point": point, **run.size, **run.counts}
        if codec.name in ours:
            row |= {"device": str(ours[codec.name].device), "dtype": _dtype_name(ours[codec.name])}
        if (codec.name, point) in notes:
            row["note"] = notes[codec.name, point]
        else:
            for direction in DIRECTIONS:
                own = seconds[codec.name, point, direction]
                row |= percentiles(own, f"{direction}_")
                row[f"{direction}_ratio"] = paired_ratio(own, reference.setdefault(direction, own))
        rows.append(row)
    figures = [f"{d}_{what}" for d in DIRECTIONS for what in (*(f"p{p}_ms" for p in PERCENTILES), "ratio")]
    return _table(rows, "codec", "label", "point", *run.size, "device", "dtype", *figures, *run.counts, "note")


def _stage_table(run: _Run, ours: list[tuple[OscarImageCodec, float]]) -> pd.DataFrame:
    rows = [
        {
            "codec": codec.name,
            "point": point,
            "direction": direction,
            "stage": stage,
            **run.size,
            **percentiles(seconds),
            "mean_ms": 1000 * seconds.mean(),
            "share_percent": 100 * seconds.mean() / stages[WHOLE].mean(),
            **run.counts,
        }
        for codec, point in ours
        for direction, stages in stage_times(codec.codec, run.image, point, run.repeats, run.warmup, run.tick).items()
        for stage, seconds in stages.items()
    ]
    figures = (*(f"p{percent}_ms" for percent in PERCENTILES), "mean_ms", "share_percent")
    return _table(rows, *_CALL, "stage", *run.size, *figures, *run.counts)


def _throughput_table(run: _Run, ours: list[tuple[OscarImageCodec, float]], batch_sizes: Sequence[int]) -> pd.DataFrame:
    calls, notes = {}, {}
    keys = [(codec, point, size) for codec, point in ours for size in batch_sizes]
    for codec, point, size in keys:
        encode = partial(codec.codec.compress_tensor, to_tensor(run.image).repeat(size, 1, 1, 1), point)
        try:
            decode = partial(codec.codec.decompress_tensor, encode())
            decode()
        except RuntimeError as error:  # memory that does not suffice for this batch; smaller ones are still measured
            notes[codec.name, point, size] = first_line(error)
            continue
        calls[codec.name, point, size, "encode"] = encode
        calls[codec.name, point, size, "decode"] = decode
    sync = synchroniser(codec.codec.device for codec, _ in ours)
    seconds = interleaved(calls, run.repeats, run.warmup, sync, run.tick)
    megapixels = run.image.width * run.image.height / 1e6
    rows = []
    for codec, point, size in keys:
        for direction in DIRECTIONS:
            row = {"codec": codec.name, "point": point, "direction": direction}
            row |= {"batch_size": size, **run.size, **run.counts}
            if (codec.name, point, size) in notes:
                row["note"] = notes[codec.name, point, size]
            else:
                median = float(np.median(seconds[codec.name, point, size, direction]))
                row["batch_p50_ms"] = 1000 * median
                row["pictures_per_s"] = size / median
                row["megapixels_per_s"] = size * megapixels / median
            rows.append(row)
    figures = ("batch_p50_ms", "pictures_per_s", "megapixels_per_s")
    return _table(rows, *_CALL, "batch_size", *run.size, *figures, *run.counts, "note")


def _memory_table(run: _Run, ours: list[tuple[OscarImageCodec, float]]) -> pd.DataFrame:
    rows = []
    for codec, point in ours:
        for direction in DIRECTIONS:
            try:
                figures = peak_memory(codec, run.image, point, direction)
            except TimingError as error:
                figures = {"note": str(error)}
            rows.append({"codec": codec.name, "point": point, "direction": direction, **run.size, **figures})
            run.tick()
    figures = ("loaded_mib", "call_peak_mib", "process_peak_mib", "cuda_loaded_mib", "cuda_call_peak_mib")
    return _table(rows, *_CALL, *run.size, *figures, "note")


def _parameter_table(codecs: dict[str, OscarCodec]) -> pd.DataFrame:
    rows = [{"codec": name, **row} for name, codec in codecs.items() for row in parameter_counts(codec)]
    return _table(rows, "codec", "part", "rate", "parameters", "note")


def _mac_table(run: _Run, ours: list[tuple[OscarImageCodec, float]]) -> pd.DataFrame:
    pixels = run.image.width * run.image.height
    rows = []
    for codec, point in ours:
        for direction, stages in stage_macs(codec.codec, run.image, point).items():
            for stage, macs in stages.items():
                row = {"codec": codec.name, "point": point, "direction": direction, "stage": stage, **run.size}
                rows.append({**row, "gmacs": macs / 1e9, "kmacs_per_pixel": macs / 1e3 / pixels})
        run.tick()
    return _table(rows, *_CALL, "stage", *run.size, "gmacs", "kmacs_per_pixel")


def _table(rows: list[dict], *columns: str) -> pd.DataFrame:
    import pandas as pd  # here: the process that measures memory shall not hold it

    return pd.DataFrame(rows, columns=list(columns))  # these columns whether or not there are rows and figures


def _dtype_name(codec: OscarCodec) -> str:
    return str(codec.dtype).removeprefix("torch.")


if __name__ == "__main__":
    print(dumps(_child(json.loads(sys.argv[1]))))
