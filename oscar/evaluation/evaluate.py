"""Evaluation of one codec: one row per image and operating point, over several processes, resumed where it stopped.

    OUTPUT/results.csv, results.parquet     the rows, sorted by image and point
    OUTPUT/results.json                     where they come from: codec, images left out, commit, versions, hardware
    OUTPUT/images/, files/                  decoded images and files, where they are kept
    OUTPUT/rows/                            what is done so far: run.json and a list of rows per process
    OUTPUT/features/                        features of set metrics (FID, KID), per image and point

Every row is on disk before the next image is touched, and a pair of image and point that has one is never scored
again. Tables are merged from the rows by the main process when all are done, whoever scored them and in which order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from oscar.data.images import ImageError, list_images, read_image, srgb_mark
from oscar.metrics.image import METRICS, metrics_of
from oscar.utils import former
from oscar.utils.environment import describe_environment
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write
from oscar.utils.strict_json import as_read, dumps, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from oscar.baselines.base import ImageCodec
    from oscar.config import EvaluateConfig
    from oscar.metrics.image import MetricSet

BEFORE = (
    "image",
    "width",
    "height",
    "codec",
    "point",
    "protocol",
    "nominal_bpp",
    "estimated_bpp",
    "actual_bpp",
    "file_bytes",
)
AFTER = ("encode_seconds", "decode_seconds", "scored_width", "scored_height")
_TEXT = ("image", "codec", "protocol")
_WARM_UP_SIDE = 256  # pixels; large enough to set up every stage, small enough for slow codecs


class EvaluationError(ValueError):
    """An evaluation that cannot run or has no result; the message is one line for the user."""


def evaluate_config(config: EvaluateConfig) -> pd.DataFrame:
    """Run the evaluation of a configuration, with progress, and print the means per point; returns the rows.

    Raises:
        ValueError: for an unknown codec, metric, point or device, or a folder without images.
        BaselineUnavailable: if the codec cannot run here.
    """
    import torch

    from oscar.evaluation.codecs import make_codec
    from oscar.metrics.image import MetricSet

    folder = Path(config.data.images)
    images = list_images(folder)[: config.data.limit]
    if not images:
        raise EvaluationError(f"data.images: {folder} holds no image")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config.device)
    device = config.device or accelerator.device
    options = config.options
    if config.codec == "oscar":
        options = {"model": config.model, "device": device, "dtype": config.dtype, "protocol": config.protocol}
    with accelerator.main_process_first():  # it downloads what is to be downloaded
        codec = make_codec(config.codec, **options)
        names = metrics_of(config.protocol, config.metrics.names)
        metrics = MetricSet(names, device, files=config.metrics.files, download=config.metrics.download)
    if accelerator.is_main_process:
        print(f"{codec.label} on {len(images)} images of {folder}, {accelerator.num_processes} process(es)")
        for name, reason in metrics.unavailable.items():
            print(f"metric {name} is unavailable: {reason}", file=sys.stderr)
    output = Path(config.output)
    frame = evaluate(
        codec,
        images,
        metrics,
        output,
        config.points,
        config.save_images,
        accelerator,
        root=folder,
        config=asdict(config),
    )
    if accelerator.is_main_process:
        print(means_per_point(frame).to_string(float_format="{:.4f}".format))
        record = load_results(output)[1]
        if record["failed"]:
            print(
                f"left out of these means: {len(record['failed'])} failure(s), listed in results.json", file=sys.stderr
            )
        for note in missing_notes(frame, metrics.names):
            print(note, file=sys.stderr)
        print(f"rows: {output / 'results.csv'}")
    return frame


def make_accelerator(device: str | None = None) -> Accelerator:
    """The processes of this run, which wait for each other for as long as it takes.

    Processes share the images whether or not there are GPUs: Accelerate itself takes processes without a GPU for
    unrelated ones unless it is told to use the CPU.

    Raises:
        EvaluationError: for a device that does not exist here.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            raise EvaluationError(f"device {device!r} cannot be used: {first_line(error)}") from None
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    on_cpu = device is not None and torch.device(device).type == "cpu"
    cpu = on_cpu or (several and not torch.cuda.is_available())
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])


def evaluate(
    codec: ImageCodec,
    images: Sequence[Path],
    metrics: MetricSet,
    output: Path,
    points: Sequence[float] | None = None,
    save_images: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    root: Path | None = None,
    config: dict | None = None,
) -> pd.DataFrame:
    """Score a codec on images at some points and write the results; goes on where an earlier run stopped.

    An image that cannot be read, or at which the codec fails, costs one line on stderr and is listed under `failed`
    in results.json; it is tried again when the run is repeated. Points may be added to finished results.

    Args:
        codec: the codec.
        images: image files; a row names each by its path below `root`.
        metrics: what is scored.
        output: folder of the results.
        points: operating points, None for the codec's own.
        save_images: keep decoded images and files; see `saved_image` and `saved_file`.
        accelerator: the processes among which images are divided; None for this one alone.
        progress: show a progress bar.
        root: folder of the images, None for the one that they share.
        config: what results.json records as the resolved configuration.

    Returns:
        The rows, sorted by image and point: image, width, height, codec, point, protocol, nominal_bpp, estimated_bpp,
        actual_bpp (8 * file_bytes over the image's pixels), file_bytes, bytes_<part> ..., <metric> ...,
        encode_seconds, decode_seconds, scored_width, scored_height. What does not exist is NaN.

    Raises:
        EvaluationError: if `output` holds results of another codec, or of other metrics or images, or if no image
            could be scored.
        ValueError: for a point that the codec does not have.
    """
    points = sorted({codec.check_point(point) for point in (codec.points if points is None else points)})
    run = _Run(codec, metrics, Path(output), save_images, _names(images, root))
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    def wait() -> None:
        if accelerator is not None:
            accelerator.wait_for_everyone()

    record = run.open_record()
    done = {(row["image"], row["point"]) for row in run.read_rows() if "error" not in row}
    todo = {name: [point for point in points if (name, point) not in done] for name in run.images}
    todo = {name: missing for name, missing in todo.items() if missing}
    wait()  # nobody writes before all have read, so that all divide the same images
    if todo and rank == 0:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record["sessions"].append({"date": date, "processes": processes, **describe_environment()})
        run.write_json(run.record_path, record)
    mine = dict(list(todo.items())[rank::processes])
    total = sum(map(len, mine.values()))
    every = 0.1 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    with tqdm(total=total, desc=codec.name, mininterval=every, disable=rank > 0 or not progress or not total) as bar:
        run.score(mine, rank, bar)
    wait()
    if rank == 0:
        run.merge(record, config)
    wait()
    return load_results(output)[0]


def check_results(
    codec: ImageCodec, images: Sequence[Path], metrics: MetricSet, output: Path, root: Path | None = None
) -> None:
    """Refuse results that `evaluate` with these arguments would not go on with.

    Raises:
        EvaluationError: if `output` holds results of another codec, or of other metrics or images.
    """
    _Run(codec, metrics, Path(output), False, _names(images, root)).open_record()


def _change(key: str, old: object, new: object) -> str:
    """A key that differs, with both values if they are short."""
    known = all(value is None or len(str(value)) <= 20 for value in (old, new)) and old is not None and new is not None
    return f"{key}: {old}, now {new}" if known else key


def load_results(folder: str | Path) -> tuple[pd.DataFrame, dict]:
    """The rows that `evaluate` wrote into a folder, and the contents of results.json.

    Raises:
        EvaluationError: if there are none.
    """
    folder = Path(folder)
    try:
        text = dict.fromkeys(_TEXT, str)
        frame = pd.read_csv(folder / "results.csv", dtype=text, float_precision="round_trip")
        record = former.with_new_keys(json.loads((folder / "results.json").read_text()))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{folder}: no results of an evaluation can be read: {first_line(error)}") from None
    record["set_metrics"] = [former.with_new_keys(row) for row in record["set_metrics"]]
    return frame, record


def means_per_point(frame: pd.DataFrame) -> pd.DataFrame:
    """Number of images, and means over them of rates, metrics and seconds, by point."""
    sizes = [name for name in frame if name in ("width", "height", "scored_width", "scored_height", "file_bytes")]
    parts = [name for name in frame if name.startswith("bytes_")]
    groups = frame.drop(columns=[*_TEXT, *sizes, *parts]).groupby("point")
    means = groups.mean().dropna(axis="columns", how="all")
    means.insert(0, "images", groups.size())
    return means


def missing_values(frame: pd.DataFrame, metrics: Sequence[str]) -> dict[str, list[str]]:
    """By metric the images that have no value of it, in the order of the rows; metrics that all have are left out."""
    lacking = {name: list(dict.fromkeys(frame.loc[frame[name].isna(), "image"])) for name in metrics if name in frame}
    return {name: images for name, images in lacking.items() if images}


def missing_notes(frame: pd.DataFrame, metrics: Sequence[str], start: str = "") -> list[str]:
    """A line for each metric whose means leave images out: how many, and why; each begins with `start`."""
    total = frame["image"].nunique()
    return [
        f"{start}{METRICS[name].label if name in METRICS else name}: {len(images)} of {total} images have no value and "
        f"are left out of its means{_needs(name)}"
        for name, images in missing_values(frame, metrics).items()
    ]


def _needs(metric: str) -> str:
    needs = METRICS[metric].needs if metric in METRICS else ""
    return f" (needed: {needs})" if needs else ""


def saved_image(output: Path, image: str, point: float) -> Path:
    """Where `evaluate(save_images=True)` keeps the decoded image of a row."""
    return Path(output) / "images" / f"{image}_{point:g}.png"


def saved_file(output: Path, image: str, point: float, codec: str) -> Path:
    """Where it keeps the file of a row; the suffix is the first word of the codec's name (oscar, jpeg, mbt2018)."""
    return Path(output) / "files" / f"{image}_{point:g}.{codec.split('-')[0]}"


def _names(images: Sequence[Path], root: Path | None) -> dict[str, Path]:
    """Images by their path below `root`, sorted."""
    if not images:
        raise EvaluationError("no images; allowed: one or more")
    paths = [Path(os.path.abspath(path)) for path in images]
    root = Path(os.path.abspath(root)) if root is not None else Path(os.path.commonpath([p.parent for p in paths]))
    return {name: path for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths)}


@dataclass
class _Run:
    """What the processes of one evaluation share: inputs, and the files in which they leave their rows."""

    codec: ImageCodec
    metrics: MetricSet
    output: Path
    save_images: bool
    images: dict[str, Path]

    def __post_init__(self) -> None:
        self.record_path = self.output / "rows/run.json"
        self.protocol = getattr(self.codec, "protocol", "bitstream")
        self.warm = False

    # What the rows belong to.

    def identity(self) -> dict[str, dict]:
        """What must be the same for rows to stand in one table."""
        identity = {
            "codec": self.codec.describe(),
            "metrics": {
                "names": list(self.metrics.names),
                "unavailable": sorted(self.metrics.unavailable),
                **({"files": self.metrics.files} if getattr(self.metrics, "files", None) else {}),
            },
            "images": {name: _sha256(path) for name, path in self.images.items()},
            "settings": {"save_images": self.save_images},
        }
        return as_read(identity)

    def open_record(self) -> dict:
        """The record of an earlier run in this folder, if it is of the same things, or a new one."""
        identity = self.identity()
        self.record_path.parent.mkdir(parents=True, exist_ok=True)
        if not self.record_path.exists():
            return {**identity, "sessions": []}
        record = former.with_new_keys(json.loads(self.record_path.read_text()))
        for field, new in identity.items():
            old = record.get(field, {})
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            if changed:
                some = ", ".join(_change(key, old.get(key), new.get(key)) for key in changed[:3])
                some += f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise EvaluationError(
                    f"{self.output}: its results are of other {field} ({some}); allowed: the same, or a new output"
                )
        return record

    # Scoring.

    def score(self, todo: dict[str, list[float]], rank: int, bar: tqdm) -> None:
        """Score the points of each image, each row written and flushed before the next."""
        with _open_shard(self.record_path.parent / f"{rank}.jsonl") as shard:
            for name, points in todo.items():
                for row in self.rows(name, points):
                    shard.write(dumps(row) + "\n")
                    shard.flush()
                    if "error" in row:
                        at = "" if row["point"] is None else f" at {row['point']:g}"
                        tqdm.write(f"left out: {name}{at}: {row['error']}", file=sys.stderr)
                    bar.update(len(points) if row["point"] is None else 1)

    def rows(self, name: str, points: list[float]) -> Iterator[dict]:
        """One row per point; one with `error` where there is no result, with point None if the image is at fault."""
        try:
            image = read_image(self.images[name])
        except ImageError as error:
            yield {"image": name, "point": None, "error": first_line(error)}
            return
        for point in points:
            try:
                row = self.row(name, image, point)
            except ImageError as error:  # at no point is this image allowed
                yield {"image": name, "point": None, "error": first_line(error)}
                return
            except (ValueError, RuntimeError, OSError) as error:
                row = {"image": name, "point": point, "error": first_line(error)}
            yield row

    def row(self, name: str, image: Image.Image, point: float) -> dict:
        if not self.warm:  # the first call sets up memory and threads: not to be counted as the codec's time
            self.codec.round_trip(image.crop((0, 0, *(min(side, _WARM_UP_SIDE) for side in image.size))), point)
            self.warm = True
        trip = self.codec.round_trip(image, point)
        size = len(trip.encoded.data) if trip.encoded else None
        scores = self.metrics.score(trip.reference, trip.decoded)
        if self.metrics.has_set_metrics:
            self.write_features(self.features_path(name), image)  # as it came, also where a protocol resizes it
            self.write_features(self.features_path(name, point), trip.decoded)
        if self.save_images:
            _write(saved_image(self.output, name, point), _png(trip.decoded))
            if trip.encoded:
                _write(saved_file(self.output, name, point, self.codec.name), trip.encoded.data)
        return {
            "image": name,
            "width": image.width,
            "height": image.height,
            "codec": self.codec.name,
            "point": point,
            "protocol": self.protocol,
            "nominal_bpp": trip.nominal_bpp,
            "estimated_bpp": trip.estimated_bpp,
            "actual_bpp": 8 * size / (image.width * image.height) if trip.encoded else None,
            "file_bytes": size,
            "parts": trip.encoded.parts if trip.encoded else {},
            "metrics": scores,
            "encode_seconds": trip.encode_seconds,
            "decode_seconds": trip.decode_seconds,
            "scored_width": trip.reference.width,
            "scored_height": trip.reference.height,
        }

    def features_path(self, name: str, point: float | None = None) -> Path:
        """Features of the decoded image, or of the reference, which is the same at all points."""
        where = f"reference/{name}.npz" if point is None else f"decoded/{name}_{point:g}.npz"
        return self.output / "features" / where

    def write_features(self, path: Path, image: Image.Image) -> None:
        if not path.exists():
            data = io.BytesIO()
            np.savez(data, **self.metrics.features(image))
            _write(path, data.getvalue())

    # Merging.

    def read_rows(self) -> list[dict]:
        """All whole rows of all processes, sorted by image and point."""
        rows: dict[tuple, dict] = {}
        for path in sorted(self.record_path.parent.glob("*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # an interruption left it unfinished
                row = json.loads(line)
                if "error" not in row or (row["image"], row["point"]) not in rows:
                    rows[row["image"], row["point"]] = row
        return sorted(rows.values(), key=lambda row: (row["image"], -1 if row["point"] is None else row["point"]))

    def merge(self, record: dict, config: dict | None) -> None:
        """Write the tables and results.json."""
        everything = self.read_rows()
        rows = [row for row in everything if "error" not in row]
        scored = {row["image"] for row in rows}
        errors = [row for row in everything if "error" in row]
        failed = [row for row in errors if row["point"] is not None or row["image"] not in scored]
        if not rows:
            raise EvaluationError(f"none of the {len(self.images)} images could be scored: {failed[0]['error']}")
        frame = _table(rows, self.metrics.names)
        _write(self.output / "results.csv", frame.to_csv(index=False).encode())
        _write_parquet(self.output / "results.parquet", frame)
        result = {
            "codec": record["codec"],
            "protocol": self.protocol,
            "points": sorted({row["point"] for row in rows}),
            "images": len(scored),
            "failed": [{key: row[key] for key in ("image", "point", "error")} for row in failed],
            "metrics": list(self.metrics.names),
            "unavailable": self.metrics.unavailable,
            "without_value": {
                name: {"images": images, "needed": METRICS[name].needs if name in METRICS else ""}
                for name, images in missing_values(frame, self.metrics.names).items()
            },
            "set_metrics": self.set_scores(rows) if self.metrics.has_set_metrics else [],
            "config": config,
            **record["sessions"][-1],
            "sessions": record["sessions"],
        }
        self.write_json(self.output / "results.json", result)

    def set_scores(self, rows: list[dict]) -> list[dict]:
        """The set metrics of each point over its images."""
        result = []
        for point in sorted({row["point"] for row in rows}):
            names = [row["image"] for row in rows if row["point"] == point]
            reference = [_read_features(self.features_path(name)) for name in names]
            decoded = [_read_features(self.features_path(name, point)) for name in names]
            scores = self.metrics.set_scores(reference, decoded)
            result.append({"point": point, "images": len(names), **scores})
        return result

    @staticmethod
    def write_json(path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def _table(rows: list[dict], metrics: Sequence[str]) -> pd.DataFrame:
    """Rows as columns in a fixed order; numbers that are missing become NaN."""
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    scored = [name for name in metrics if any(name in row["metrics"] for row in rows)]
    columns: dict[str, list] = {name: [row[name] for row in rows] for name in BEFORE}
    columns |= {f"bytes_{part}": [row["parts"].get(part, 0) for row in rows] for part in parts}
    columns |= {name: [row["metrics"].get(name) for row in rows] for name in scored}
    columns |= {name: [row[name] for row in rows] for name in AFTER}
    return pd.DataFrame(
        {
            name: values if name in _TEXT else pd.to_numeric(pd.Series(values, dtype=object))
            for name, values in columns.items()
        }
    )


def _open_shard(path: Path) -> io.TextIOWrapper:
    """A list of rows, opened at its end; an unfinished last line is cut off first."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
    return path.open("a", encoding="utf-8")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)


def _write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """The table as Parquet; where pyarrow is missing or does not go with this NumPy, a line on stderr instead."""
    try:
        import pyarrow  # noqa: F401 (pandas' own message hides why it cannot be imported)
    except ImportError as error:
        path.unlink(missing_ok=True)  # of an earlier run, with fewer rows
        print(f"{path.name} is not written, {path.stem}.csv is: {first_line(error)}", file=sys.stderr)
        return
    data = io.BytesIO()
    frame.to_parquet(data, index=False)
    _write(path, data.getvalue())


def _read_features(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as features:
        return dict(features)


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", **srgb_mark("PNG"))
    return data.getvalue()


def _sha256(path: Path) -> str | None:
    """Hash of a file's contents; None if it cannot be read, which reading the image will say."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
