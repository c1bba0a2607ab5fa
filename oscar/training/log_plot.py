"""Loss curves from the CSV logs of training runs, a panel for each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from oscar.utils.figures import open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG = "log.csv"
SMOOTHING = 0.04  # of the rows: width of the running mean
RATE_SMOOTHING = 0.15  # of the rows of a rate, which are fewer
_COLUMNS = 3  # panels side by side
_ALL_RATES = "#222222"


class LogError(ValueError):
    """A log that is not there or cannot be drawn; the message is one line."""


def read_log(path: Path, column: str = "loss") -> pd.DataFrame:
    """The rows of a log that have the column.

    Args:
        path: log.csv, or the folder of a run.
        column: to draw.

    Raises:
        LogError: if there is no such log, or no such column or number in it.
    """
    path = path / LOG if path.is_dir() else path
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise LogError(f"{path}: {reason}; allowed: the log of a training run") from None
    drawable = [name for name in rows if name != "step" and pd.api.types.is_numeric_dtype(rows[name])]
    if "step" not in rows or column not in drawable:
        missing = column if "step" in rows else "step"
        raise LogError(f"{path}: no column {missing} of numbers; allowed: {', '.join(drawable)}")
    rows = rows.dropna(subset=column)
    if not len(rows):
        raise LogError(f"{path}: no row has a {column}")
    return rows


def curves(rows: pd.DataFrame, column: str = "loss") -> dict[float, pd.Series]:
    """The column by nominal bpp, each a series over steps; empty for a run without rates.

    Taken from columns such as loss_0.0625 or, in logs of older versions, whose rows are of one rate, from `rate`.
    """
    rows = rows.set_index("step")
    by_rate = {}
    for name in rows:
        try:
            rate = float(name.removeprefix(f"{column}_")) if name.startswith(f"{column}_") else None
        except ValueError:  # some other column with this beginning
            continue
        if rate is not None:
            by_rate[rate] = rows[name].dropna()
    if not by_rate and "rate" in rows:
        by_rate = {round(float(rate), 4): group for rate, group in rows[column].groupby(rows["rate"])}
    return {rate: by_rate[rate] for rate in sorted(by_rate) if len(by_rate[rate])}


def smooth(values: pd.Series, share: float = SMOOTHING) -> pd.Series:
    """Running mean over a share of the rows, centred."""
    return values.rolling(max(1, round(share * len(values))), min_periods=1, center=True).mean()


def plot_logs(
    path: Path, runs: Mapping[str, pd.DataFrame], column: str = "loss", formats: Sequence[str] | None = None
) -> None:
    """Draw a column against steps: what was logged, faintly, and its running mean; of runs with rates, a mean for each.

    Args:
        path: of the files, without suffix.
        runs: rows of `read_log` by the panel's title.
        column: a column of all.
        formats: as of `open_figure`.
    """
    import matplotlib

    by_rate = {name: curves(rows, column) for name, rows in runs.items()}
    rates = sorted({rate for found in by_rate.values() for rate in found})
    shades = matplotlib.colormaps["plasma_r"]
    colours = {rate: shades(0.15 + 0.75 * place / max(len(rates) - 1, 1)) for place, rate in enumerate(rates)}
    width = min(_COLUMNS, len(runs))
    height = math.ceil(len(runs) / width)
    with open_figure(path, (3.3 * width + 0.3, 2.3 * height + 0.6), formats) as figure:
        panels = figure.subplots(height, width, squeeze=False).flatten()
        handles: dict = {}
        for panel, (name, rows) in zip(panels, runs.items(), strict=False):
            handles |= _draw(panel, rows, by_rate[name], column, colours)
            panel.set_title(f"{name}  ({rows['step'].max():,} steps)", loc="left", fontsize=9)
        for panel in panels[len(runs) :]:
            panel.set_axis_off()
        figure.supxlabel("step", fontsize=9)
        figure.supylabel(f"{column}, running mean", fontsize=9)
        if rates:
            labels = [*(f"{rate:.4f}" for rate in rates), "all"]
            figure.legend(
                [handles[label] for label in labels if label in handles],
                [f"{label} bpp" if label != "all" else "all rates" for label in labels if label in handles],
                loc="outside upper center",
                ncols=len(labels),
                fontsize=7.5,
                handlelength=1.2,
                columnspacing=1.1,
            )


def _draw(axes: Axes, rows: pd.DataFrame, by_rate: Mapping[float, pd.Series], column: str, colours: Mapping) -> dict:
    """One panel; its lines by label."""
    values = rows.set_index("step")[column]
    mean = smooth(values)
    means = {rate: smooth(series, RATE_SMOOTHING) for rate, series in by_rate.items()}
    lines = {}
    for rate, series in means.items():
        (lines[f"{rate:.4f}"],) = axes.plot(series.index, series, color=colours[rate], linewidth=1.1, zorder=2)
    if not by_rate:
        axes.plot(values.index, values, color="#9A9A9A", linewidth=0.6, alpha=0.6, zorder=1)
    (lines["all"],) = axes.plot(mean.index, mean, color=_ALL_RATES, linewidth=1.6, zorder=3)
    shown = pd.concat([mean, *means.values()])
    shown = shown[shown.index > 0.02 * values.index.max()] if len(values) > 50 else shown  # the first steps stand out
    low, high = shown.min(), shown.max()
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, values.index.max())
    return lines
