"""The rows of an evaluation as its processes make them: each on disk before the next, merged when all are done.

OUTPUT/rows/            what is done so far: run.json and a list of rows per process
OUTPUT/features/        features of set metrics (FID, KID), per image and point
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from oscar.data.images import ImageError, read_image, srgb_mark
from oscar.evaluation.results import (
    EvaluationError,
    make_table,
    missing_values,
    saved_file,
    saved_image,
    write_file,
    write_parquet,
)
from oscar.metrics.image import METRICS
from oscar.utils import former
from oscar.utils.errors import first_line
from oscar.utils.strict_json import as_read, dumps, write_json

if TYPE_CHECKING:
    from PIL import Image

    from oscar.baselines.base import ImageCodec
    from oscar.metrics.image import MetricSet


_WARM_UP_SIDE = 256  # pixels; large enough to set up every stage, small enough for slow codecs


def _change(key: str, old: object, new: object) -> str:
    """A key that differs, with both values if they are short."""
    known = all(value is None or len(str(value)) <= 20 for value in (old, new)) and old is not None and new is not None
    return f"{key}: {old}, now {new}" if known else key


@dataclass
class Run:
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
            write_file(saved_image(self.output, name, point), _png(trip.decoded))
            if trip.encoded:
                write_file(saved_file(self.output, name, point, self.codec.name), trip.encoded.data)
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
            write_file(path, data.getvalue())

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
        frame = make_table(rows, self.metrics.names)
        write_file(self.output / "results.csv", frame.to_csv(index=False).encode())
        write_parquet(self.output / "results.parquet", frame)
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


def _open_shard(path: Path) -> io.TextIOWrapper:
    """A list of rows, opened at its end; an unfinished last line is cut off first."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
    return path.open("a", encoding="utf-8")


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
