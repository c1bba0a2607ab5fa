"""Rate-distortion plots in vector form, ours beside the baselines and, dashed, what has been published."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import pandas as pd

from oscar.benchmark.tables import named
from oscar.evaluation.curves import DATASETS, rate_column
from oscar.metrics.image import METRICS, Metric
from oscar.utils.figures import COLOURS, MARKERS, log_rate_axis, open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

OURS, _OURS_TOO = COLOURS[1], "#7A3300"  # kept for OSCAR, whose models take turns
_COLOURS = tuple(colour for colour in COLOURS if colour != OURS)
_MARKERS = MARKERS[1:]  # the first, a dot, is ours


@dataclass(frozen=True)
class Series:
    """A curve to draw.

    Attributes:
        label: in the legend.
        bpp: bits per pixel.
        value: of the metric.
        ours: whether it is an OSCAR model.
        published: whether it was read somewhere, rather than measured.
    """

    label: str
    bpp: Sequence[float]
    value: Sequence[float]
    ours: bool = False
    published: bool = False


def measured_series(means: pd.DataFrame, metric: str) -> list[Series]:
    """The curves of a metric in a frame of means (`oscar.benchmark.tables.means_frame`)."""
    series = []
    for codec, group in means.groupby("codec", sort=False) if metric in means else ():
        rate = rate_column(group)
        points = group[[rate, metric]].dropna().sort_values(rate)
        points = points[points[metric].map(math.isfinite)]
        if len(points):
            label = group["label"].iloc[0] + (" (nominal bpp)" if rate == "nominal_bpp" else "")
            series.append(Series(label, list(points[rate]), list(points[metric]), ours=codec.startswith("oscar-")))
    return series


def published_series(curves: pd.DataFrame, metric: str) -> list[Series]:
    """The curves of a metric in a frame of published ones (`oscar.evaluation.curves.published_curves`)."""
    groups = curves[curves["metric"] == metric].sort_values("bpp").groupby(["codec", "label"])
    series = [
        Series(label, list(group["bpp"]), list(group["value"]), ours=codec == "oscar", published=True)
        for (codec, label), group in groups
    ]
    return sorted(series, key=lambda curve: not curve.ours)


def plot_rates(
    folder: Path,
    means: pd.DataFrame,
    published: pd.DataFrame,
    title: str,
    unavailable: Mapping[str, str] | None = None,
    protocol: str = "bitstream",
) -> list[Path]:
    """Draw every metric against rate, one figure each, as PDF, SVG and PNG: FOLDER/rd_<metric>.pdf, or _paper.pdf.

    A metric that has published curves but was not measured is drawn from these alone, and the figure says so.

    Args:
        folder: of the files.
        means: of the codecs measured under the protocol.
        published: `published_curves` of the data set and protocol, or an empty frame.
        title: what the curves are means over.
        unavailable: metrics that could not be had, with the reason.
        protocol: that all curves are of.

    Returns:
        The PDF files.
    """
    names = [name for name in METRICS if name in means or (published["metric"] == name).any()]
    written = []
    for name in names:
        series = [*measured_series(means, name), *published_series(published, name)]
        if not series:
            continue
        reading = published.loc[published["metric"] == name, "reading"]
        heading = ""
        if len(reading):
            heading = fill(f"Dashed: {DATASETS[published['dataset'].iloc[0]]}, {reading.iloc[0]}", 20)
        text = title
        if all(curve.published for curve in series):
            reason = (unavailable or {}).get(name, "not among the metrics of this run")
            text = fill(f"Published curves only; not measured here: {reason}", 90)
        elif protocol == "paper":
            text += ", protocol paper"
        written.append(_write(folder / named(f"rd_{_safe(name)}", protocol), METRICS[name], series, text, heading))
    return written


def _write(path: Path, metric: Metric, series: list[Series], title: str, heading: str) -> Path:
    height = max(4.2, 1.6 + 0.19 * len(series))  # inches: the legend has a line or two for each
    with open_figure(path, (7.2, height)) as figure:
        axes, side = figure.subplots(1, 2, width_ratios=(3.3, 1))
        lines = _draw(axes, series)
        _axis(axes, metric, series)
        axes.set_title(title, loc="left", fontsize=10, pad=10)
        _legend(side, lines, heading)
    return path.with_name(f"{path.name}.pdf")


def _draw(axes: Axes, series: list[Series]) -> list[tuple[Series, Line2D]]:
    """Draw published curves beneath, baselines, and ours on top; returns the lines in the order of the legend."""
    styles = {published: _styles() for published in (False, True)}
    ours = {published: 0 for published in (False, True)}
    lines = []
    for curve in series:
        if curve.ours:
            number = ours[curve.published]
            marker, colour = "oP*X"[number % 4], (OURS, _OURS_TOO)[number % 2]
            ours[curve.published] += 1
        else:
            marker, colour = next(styles[curve.published])
        (line,) = axes.plot(
            curve.bpp,
            curve.value,
            color=colour,
            marker=marker,
            markersize=(6 if curve.ours else 4.5) - 1.5 * curve.published,
            markerfacecolor="white" if curve.published else colour,
            linewidth=(2.2 if curve.ours else 1.4) - 0.4 * curve.published,
            linestyle=(0, (4, 2)) if curve.published else "-",
            alpha=0.85 if curve.published and not curve.ours else 1,
            zorder=2 + 2 * curve.ours + (not curve.published),
            label=curve.label,
        )
        lines.append((curve, line))
    return lines


def _styles() -> Iterator[tuple[str, str]]:
    for index in range(10**6):
        yield _MARKERS[index % len(_MARKERS)], _COLOURS[index % len(_COLOURS)]


def _axis(axes: Axes, metric: Metric, series: list[Series]) -> None:
    rates = [rate for curve in series for rate in curve.bpp if rate > 0]
    if max(rates) > 10 * min(rates):
        log_rate_axis(axes)
    unit = f", {metric.unit}" if metric.unit else ""
    axes.set_ylabel(f"{metric.label}{unit}  ({'higher' if metric.higher_is_better else 'lower'} is better)")
    axes.set_xlabel("rate, bits per pixel")


def _legend(side: Axes, lines: list[tuple[Series, Line2D]], heading: str) -> None:
    """Beside the plot: above what was measured, below what was published."""
    from matplotlib.legend import Legend

    side.set_axis_off()
    for title, published, place in (("Measured here", False, "upper"), (heading, True, "lower")):
        group = [line for curve, line in lines if curve.published is published]
        if group:
            labels = [fill(line.get_label(), 18) for line in group]
            legend = Legend(
                side,
                group,
                labels,
                title=title,
                loc=f"{place} left",
                alignment="left",
                borderaxespad=0,
                handlelength=3,
                fontsize=8.5,
            )
            legend.get_title().set_fontweight("bold")
            side.add_artist(legend)


def _safe(name: str) -> str:
    return re.sub(r"[^\w]", "_", name.replace("+", "_plus"))
