"""What a codec costs, as tables: time, time by stage, throughput, peak memory, parameters, multiply-accumulates.

How each is measured is said where it is: `clocks`, `stages`, `memory`, `parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from oscar.baselines.base import CodecError, ImageCodec
from oscar.benchmark.speed.clocks import PERCENTILES, interleaved, paired_ratio, percentiles, synchroniser
from oscar.benchmark.speed.memory import TimingError, peak_memory
from oscar.benchmark.speed.parameters import parameter_counts
from oscar.benchmark.speed.stages import WHOLE, codec_calls, stage_macs, stage_times
from oscar.data.tensors import to_tensor
from oscar.utils.environment import hardware
from oscar.utils.errors import first_line

if TYPE_CHECKING:
    import pandas as pd

    from oscar.codec import OscarCodec
    from oscar.evaluation.codecs import OscarImageCodec

DIRECTIONS = ("encode", "decode")
_CALL = ("codec", "point", "direction")  # columns that name one direction of one codec at one point
_SIZE, _COUNTS = ("width", "height"), ("repeats", "warmup")  # columns that are the same in all rows of a run


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


def _calls(codec: ImageCodec, image: Image.Image, point: float) -> dict[str, Callable[[], object]]:
    if _is_oscar(codec):
        return codec_calls(codec.codec, image, point)
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
