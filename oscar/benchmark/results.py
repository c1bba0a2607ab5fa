"""What the report page of a benchmark shows: its sentences, its environment and the images of its browser."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from oscar.baselines.base import ImageCodec
from oscar.benchmark.report.data import MetricInfo, ReportData, ReportEntry, ReportImage
from oscar.benchmark.setup import Benchmark
from oscar.benchmark.tables import matched_tables
from oscar.data.images import ImageError, read_image
from oscar.evaluation.curves import bd_name, metric_of, paper_curves
from oscar.metrics.image import METRICS
from oscar.utils.environment import describe_environment
from oscar.utils.files import atomic_write


def report_data(bench: Benchmark) -> ReportData:
    """Everything for the report page; decodes the images of its browser."""
    empty = pd.DataFrame()
    names = list(bench.metrics.names)
    names += [bd_name(name) for name in names if bd_name(name) != name]  # for the table of BD-rates
    infos = [_info(name) for name in names] + [_info(name, PAPER) for name in names]
    measured = len(bench.rows) > 0
    curves = paper_curves(bench.dataset) if bench.dataset else empty
    return ReportData(
        title=f"OSCAR benchmark: {bench.title}",
        summary=summary(bench),
        environment=environment(bench),
        metrics=infos,
        unavailable=bench.unavailable | bench.failed,
        means=_apart(bench.means, names) if measured else empty,
        rows=_apart(bench.rows, names),
        bd=bench.bd if measured else empty,
        reference_curves=curves.assign(metric=curves["metric"] + PAPER) if len(curves) else empty,
        images=list(browser_images(bench)) if measured else [],
        timing=_timing(bench),
        matched=_matched(bench) if len(bench.matched) and measured else None,
    )


PAPER = "@paper"  # ends the names of metrics that were measured under protocol paper, which has plots of its own


def _info(name: str, protocol: str = "") -> MetricInfo:
    metric = metric_of(name)
    return MetricInfo(
        name + protocol, metric.label + (", protocol paper" if protocol else ""), metric.unit, metric.higher_is_better
    )


def _apart(frame: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """A frame in which the metrics of rows of protocol paper have columns of their own."""
    if not len(frame):
        return frame
    is_paper = frame["protocol"] == "paper"
    for name in [name for name in metrics if name in frame and is_paper.any()]:
        frame = frame.assign(**{name + PAPER: frame[name].where(is_paper), name: frame[name].mask(is_paper)})
    return frame


def summary(bench: Benchmark) -> list[str]:
    """The result in sentences, for each OSCAR model with the first metric that there is."""
    lines = [f"{len(bench.codecs)} codecs. Rate is the length of whole files, everything included."]
    names = [name for name in bench.metrics.names if name in bench.rows]
    for codec in bench.ours if names else ():
        lines += [line for line in (_matched_line(bench, codec, names[0]), _bd_line(bench, codec, names[0])) if line]
    left_out = [*bench.unavailable, *bench.failed]
    if left_out:
        lines.append(f"Left out, for the reasons given below: {', '.join(left_out)}.")
    return lines


def _matched_line(bench: Benchmark, codec: ImageCodec, metric: str) -> str:
    if not len(bench.matched):
        return ""
    means, spec = bench.matched_means, METRICS[metric]
    parts = []
    for label, group in means[means["target"] == codec.name].groupby("label", sort=False):
        fits, total = group["fits"].sum(), group["images"].sum()
        delta = (group[f"delta_{metric}"].fillna(0) * group["fits"]).sum() / max(fits, 1)
        parts.append(f"{label} {fits} of {total}" + (f", {_signed(delta, 2 if spec.unit else 4)}" if fits else ""))
    return (
        f"How often a baseline has a file no larger than that of {codec.label}, over all images and rates, and "
        f"how its {spec.label} differs there{f' in {spec.unit}' if spec.unit else ''}: {'; '.join(parts)}."
    )


def _bd_line(bench: Benchmark, codec: ImageCodec, metric: str) -> str:
    bd = bench.bd
    if not len(bd):
        return ""
    rows = bd[(bd["codec"] == codec.name) & (bd["metric"] == bd_name(metric))]
    found, missing = rows[rows["bd_rate_percent"].notna()], rows[rows["bd_rate_percent"].isna()]
    parts = [
        f"{_signed(row['bd_rate_percent'], 0)} % against {row['anchor_label']} (overlap {row['overlap_percent']:.0f} %)"
        for row in found.to_dict("records")
    ]
    if len(missing):
        parts.append(f"none against {', '.join(missing['anchor_label'])}")
    return f"BD-rate of {codec.label} by {METRICS[metric].label}: {'; '.join(parts)}."


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def environment(bench: Benchmark) -> dict[str, str]:
    """What was run, where and when, by name."""
    state = describe_environment()
    machine = state["hardware"]
    commit = (state["commit"] or "unknown")[:12] + (" with changes" if state["dirty"] else "")
    described = {codec.label: codec.describe() for codec in bench.codecs}
    return {
        "commit": commit,
        "processor": f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        "GPU": machine["gpu"] or "none",
        "memory": f"{machine['memory_gib']} GiB",
        "libraries": ", ".join(f"{name} {version}" for name, version in state["versions"].items() if version),
        **{
            label: ", ".join(f"{key} {value}" for key, value in about.items() if key in _SHOWN and value)
            for label, about in described.items()
        },
    }


_SHOWN = ("protocol", "fingerprint", "device", "dtype", "library", "codec_version", "version", "settings")


def _timing(bench: Benchmark) -> pd.DataFrame | None:
    if bench.timing is None:
        return None
    table = bench.timing_table
    titles = {name: title for name, title in table.shown.items() if name not in ("label", "point")}
    return table.frame[["codec", *table.shown]].rename(columns=titles)


def _matched(bench: Benchmark) -> pd.DataFrame:
    """The tables that people read, of all metrics under each other."""
    _, *made = matched_tables(bench.matched_means, bench.rows, bench.metrics.names)
    return pd.concat([table.frame for table in made], ignore_index=True)


# Images.


def browser_images(bench: Benchmark) -> Iterator[ReportImage]:
    """Some images, spread over the data set, with OSCAR's files and the baselines' at matched bytes, decoded."""
    count = min(bench.config.report_images, len(bench.images))
    names = list(bench.images)
    chosen = sorted({round(place) for place in np.linspace(0, len(names) - 1, count)}) if count else []
    for index in chosen:
        name = names[index]
        try:
            image = read_image(bench.images[name])
        except ImageError:
            continue  # it is among the failures already
        entries = list(_our_entries(bench, name, image)) + list(_baseline_entries(bench, name, image))
        if entries:
            yield ReportImage(Path(name).stem, *image.size, bench.images[name], entries)


def _our_entries(bench: Benchmark, name: str, image: Image.Image) -> Iterator[ReportEntry]:
    for codec in bench.ours:
        rows = bench.rows[(bench.rows["codec"] == codec.name) & (bench.rows["image"] == name)]
        for row in rows[rows["file_bytes"].notna()].to_dict("records"):
            yield _entry(bench, codec, row, image, None)


def _baseline_entries(bench: Benchmark, name: str, image: Image.Image) -> Iterator[ReportEntry]:
    """The baselines that can be as small as most of our files first: the page shows the first one at its start."""
    if not len(bench.matched):
        return
    rows = bench.matched[bench.matched["image"] == name]
    fits = bench.matched.groupby("codec")["fits"].mean()
    for codec in sorted(bench.baselines, key=lambda codec: -fits.get(codec.name, 0)):
        for row in rows[rows["codec"] == codec.name].to_dict("records"):
            yield _entry(bench, codec, row, image, row["target_point"])


def _entry(bench: Benchmark, codec: ImageCodec, row: dict, image: Image.Image, matched_to: float | None) -> ReportEntry:
    path = bench.output / "images" / codec.name / f"{row['image']}_{row['point']:g}.png"
    if not path.exists():
        png = io.BytesIO()
        codec.decode(codec.encode(image, row["point"]).data).save(png, "PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, png.getvalue())
    return ReportEntry(
        codec=codec.name,
        label=codec.label,
        point=row["point"],
        is_ours=matched_to is None,
        matched_to=matched_to,
        file_bytes=int(row["file_bytes"]),
        actual_bpp=row["actual_bpp"],
        metrics={name: row[name] for name in bench.metrics.names if name in row and not math.isnan(row[name])},
        image=path,
    )
