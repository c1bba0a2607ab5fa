"""Baselines at the sizes of OSCAR's files: for each image and rate the largest file that is not larger.

What is done so far stands in OUTPUT/<baseline>/<image>.json, a row per file that was matched.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from tqdm import tqdm

from oscar.baselines.base import Encoded, ImageCodec, encode_to_size
from oscar.data.images import ImageError, read_image
from oscar.utils.errors import first_line
from oscar.utils.strict_json import dumps, write_json

if TYPE_CHECKING:
    from PIL import Image

    from oscar.metrics.image import MetricSet


def match_bytes(
    codec: ImageCodec,
    targets: pd.DataFrame,
    images: Mapping[str, Path],
    metrics: MetricSet,
    output: Path,
    progress: bool = True,
    make: bool = True,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Match a baseline to files of other codecs; goes on where an earlier run stopped.

    A row is found again as long as baseline, metrics and the target's size are the same, and made anew otherwise.

    Args:
        codec: the baseline.
        targets: rows of `evaluate`; those without a file are left out.
        images: files by the name under which the rows know them.
        metrics: what is scored.
        output: folder of the results; they go below the baseline's name.
        progress: show a progress bar.
        make: match what is not there yet; otherwise it is left out.

    Returns:
        The rows: image, width, height, target (codec), target_point, target_bytes, codec, label, point, file_bytes,
        actual_bpp, fits, and the metrics. `fits` is false where even the baseline's smallest file is larger than the
        target; the row is then that of the smallest. And the reason by name of images at which it failed.
    """
    targets = targets[targets["file_bytes"].notna()]
    described = dumps([codec.describe(), metrics.names, sorted(metrics.unavailable)], sort_keys=True)
    identity = hashlib.sha256(described.encode()).hexdigest()
    rows: list[dict] = []
    failed: dict[str, str] = {}
    every = 0.1 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    with tqdm(total=len(targets), desc=codec.name, mininterval=every, disable=not progress) as bar:
        for name, wanted in targets.groupby("image", sort=False):
            record = _Record(Path(output) / codec.name / f"{name}.json", identity)
            try:
                for target in wanted.to_dict("records"):
                    row = record.find(target)
                    if row is None and make:
                        row = record.add(_match(codec, record, target, images[name], metrics))
                    rows += [] if row is None else [row]
                    bar.update()
            except (ImageError, ValueError, RuntimeError, OSError) as error:
                failed[name] = first_line(error)
                tqdm.write(f"left out: {codec.name} on {name}: {failed[name]}", file=sys.stderr)
    frame = pd.DataFrame(rows)
    for metric in set(metrics.names) & set(frame):
        frame[metric] = pd.to_numeric(frame[metric])  # None becomes NaN
    if len(frame):
        frame.insert(frame.columns.get_loc("codec") + 1, "label", codec.label)
    return frame, failed


class _Record:
    """The rows of one baseline and image on disk, and what was encoded of it in this run."""

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.rows: list[dict] = stored["rows"] if stored.get("identity") == identity else []
        self.image: Image.Image | None = None
        self.files: dict[float, Encoded] = {}
        self.scores: dict[float, dict[str, float | None]] = {}

    def find(self, target: dict) -> dict | None:
        wanted = {"target": target["codec"], "target_point": target["point"], "target_bytes": int(target["file_bytes"])}
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, row: dict) -> dict:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"identity": self.identity, "rows": self.rows}
        write_json(self.path, content, indent=1)
        return row


class _Remembering(ImageCodec):
    """A codec that encodes one image once per point, since the searches for several sizes meet the same points."""

    def __init__(self, codec: ImageCodec, files: dict[float, Encoded]):
        self.codec, self.files, self.grid = codec, files, codec.grid

    def encode(self, image: Image.Image, point: float) -> Encoded:
        if point not in self.files:
            self.files[point] = self.codec.encode(image, point)
        return self.files[point]

    def decode(self, data: bytes) -> Image.Image:
        return self.codec.decode(data)


def _match(codec: ImageCodec, record: _Record, target: dict, path: Path, metrics: MetricSet) -> dict:
    if record.image is None:
        record.image = read_image(path)
    image, size = record.image, int(target["file_bytes"])
    point, encoded = encode_to_size(_Remembering(codec, record.files), image, size)
    if point not in record.scores:
        record.scores[point] = metrics.score(image, codec.decode(encoded.data))
    return {
        "image": target["image"],
        "width": image.width,
        "height": image.height,
        "target": target["codec"],
        "target_point": target["point"],
        "target_bytes": size,
        "codec": codec.name,
        "point": point,
        "file_bytes": len(encoded.data),
        "actual_bpp": 8 * len(encoded.data) / (image.width * image.height),
        "fits": len(encoded.data) <= size,
        **record.scores[point],
    }
