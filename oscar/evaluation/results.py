"""The folder of an evaluation: its rows as a table, what they lack, and where images and files of a row are kept.

OUTPUT/results.csv, results.parquet     the rows, sorted by image and point
OUTPUT/results.json                     where they come from: codec, images left out, commit, versions, hardware
OUTPUT/images/, files/                  decoded images and files, where they are kept
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from oscar.metrics.image import METRICS
from oscar.utils import former
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write

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


class EvaluationError(ValueError):
    """An evaluation that cannot run or has no result; the message is one line for the user."""


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


def make_table(rows: list[dict], metrics: Sequence[str]) -> pd.DataFrame:
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


def write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """The table as Parquet; where pyarrow is missing or does not go with this NumPy, a line on stderr instead."""
    try:
        import pyarrow  # noqa: F401 (pandas' own message hides why it cannot be imported)
    except ImportError as error:
        path.unlink(missing_ok=True)  # of an earlier run, with fewer rows
        print(f"{path.name} is not written, {path.stem}.csv is: {first_line(error)}", file=sys.stderr)
        return
    data = io.BytesIO()
    frame.to_parquet(data, index=False)
    write_file(path, data.getvalue())
