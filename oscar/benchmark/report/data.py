"""What the report page of a benchmark is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class MetricInfo:
    """A metric as the page names it.

    Attributes:
        name: column of the tables and key of `ReportEntry.metrics`.
        label: for people.
        unit: of its values, "" if none.
        higher_is_better: whether larger values are better ones.
    """

    name: str
    label: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class ReportEntry:
    """One decoded image of the browser.

    Attributes:
        codec: its name.
        label: for people.
        point: the codec's setting.
        is_ours: whether it is an OSCAR model, whose points are the browser's rates.
        matched_to: the point of ours whose file size this file was made to match; None if it was made at a set point.
        file_bytes: length of the file, None where the protocol writes none.
        actual_bpp: of the file, likewise.
        metrics: by name; None, NaN and infinities are allowed.
        image: file of the decoded image.
    """

    codec: str
    label: str
    point: float
    is_ours: bool
    matched_to: float | None
    file_bytes: int | None
    actual_bpp: float | None
    metrics: Mapping[str, float | None]
    image: Path


@dataclass(frozen=True)
class ReportImage:
    """An image of the browser: its size in pixels, the file of the original and what codecs made of it."""

    name: str
    width: int
    height: int
    original: Path
    entries: list[ReportEntry]


@dataclass(frozen=True)
class ReportData:
    """All that a report page shows. Frames may be empty; columns that are missing are left out.

    Attributes:
        title: heading.
        summary: sentences under it.
        environment: what was run, where and when, by name.
        metrics: those asked for, in order; ones without any value are not shown.
        unavailable: codecs and metrics that could not be had, with the reason.
        means: a row per codec and point: codec, label, point, images, nominal_bpp, estimated_bpp, actual_bpp,
            metrics, encode_seconds, decode_seconds.
        rows: a row per image, codec and point, as `evaluate` gives them, and label.
        bd: Bjontegaard deltas: codec, label, anchor, metric, bd_rate_percent, bd_metric, overlap_low, overlap_high,
            overlap_percent (of the range that the curves span together), note. Of these three, rows of different
            protocols (column protocol) stand in tables of their own.
        reference_curves: curves of the paper, read off its figures: dataset, codec, metric, bpp, value.
        images: of the browser.
        timing: any columns; None without a timing part.
        matched: means at matched bytes, any columns; None without that part.
    """

    title: str
    summary: list[str]
    environment: dict[str, str]
    metrics: list[MetricInfo]
    unavailable: dict[str, str]
    means: pd.DataFrame
    rows: pd.DataFrame
    bd: pd.DataFrame
    reference_curves: pd.DataFrame
    images: list[ReportImage] = field(default_factory=list)
    timing: pd.DataFrame | None = None
    matched: pd.DataFrame | None = None
