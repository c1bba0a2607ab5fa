"""Figures of studies."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from oscar.evaluation.curves import metric_title
from oscar.evaluation.timestep_plots import OWN
from oscar.metrics.image import METRICS
from oscar.utils.figures import COLOURS, MARKERS, log_rate_axis, open_figure

_COLUMNS = 4  # panels side by side


def plot_differences(path: Path, frame: pd.DataFrame, metric: str, reference: str) -> None:
    """Draw each variant's difference to the reference by rate, with its interval.

    Args:
        path: without suffix.
        frame: of `oscar.reproduce.statistics.compare`.
        metric: that it compares.
        reference: name of the reference.
    """
    rows = frame[frame["rate"].notna() & frame["difference"].notna()]
    with open_figure(path, (6.4, 3.8)) as figure:
        axes = figure.subplots()
        axes.axhline(0, color="#555555", linewidth=1)
        for index, (variant, part) in enumerate(rows.groupby("variant", sort=False)):
            part = part.sort_values("rate")
            axes.errorbar(
                part["rate"] * 1.02**index,  # so that intervals do not cover each other
                part["difference"],
                [part["difference"] - part["low"], part["high"] - part["difference"]],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linewidth=1.3,
                capsize=2.5,
                label=variant,
            )
        log_rate_axis(axes)
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        axes.set_xlabel("rate, nominal bits per pixel")
        axes.set_ylabel(f"{metric_title(metric)} − {reference}  ({better} is better)")
        axes.legend()


def plot_timesteps(
    path: Path, metric: str, trained: pd.DataFrame, swept: pd.DataFrame, grid: pd.DataFrame, reference: str
) -> None:
    """Draw quality against timestep, a panel for each rate: models trained with it, and one that is only decoded at it.

    Args:
        path: without suffix.
        metric: column of all frames.
        trained: variant, seed, image, rate and timestep of trained mappings.
        swept: image, rate and timestep of the sweep; may be empty.
        grid: image, rate and timestep of models of one rate; may be empty.
        reference: the variant that was swept.
    """
    rates = sorted(trained["rate"].unique())
    columns = min(_COLUMNS, max(len(rates), 1))
    height = max(math.ceil(len(rates) / columns), 1)
    seeds = trained.groupby(["rate", "variant", "seed"])[["timestep", metric]].mean()
    points = seeds.groupby(["rate", "variant"], sort=False).agg(["mean", "std"])
    variants = list(dict.fromkeys(trained["variant"]))
    with open_figure(path, (3.1 * columns + 0.4, 2.5 * height + 0.9)) as figure:
        panels = figure.subplots(height, columns, squeeze=False).flatten()
        handles: dict = {}
        for panel, rate in zip(panels, rates, strict=False):
            for frame, label, style in (
                (swept, f"{reference}, only decoded at t", {"color": "#9A9A9A", "linestyle": "-"}),
                (grid, "trained at t, one rate", {"color": "#333333", "linestyle": "--"}),
            ):
                curve = _curve(frame, rate, metric)
                if len(curve):
                    (handles[label],) = panel.plot(curve.index, curve, marker=".", markersize=3, linewidth=1.3, **style)
            for index, variant in enumerate(variants):
                if (rate, variant) not in points.index:
                    continue
                point = points.loc[(rate, variant)]
                handles[f"trained: {variant}"] = panel.errorbar(
                    point["timestep", "mean"],
                    point[metric, "mean"],
                    point[metric, "std"] if point[metric, "std"] == point[metric, "std"] else None,
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=6,
                    linestyle="none",
                    capsize=3,
                )
            panel.set_title(f"{rate:.4f} bpp", loc="left", fontsize=9)
        for panel in panels[len(rates) :]:
            panel.set_axis_off()
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        figure.supylabel(f"{metric_title(metric)}  ({better} is better); bars: deviation over seeds", fontsize=9)
        figure.supxlabel("timestep", fontsize=9)
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)


def _curve(frame: pd.DataFrame, rate: float, metric: str) -> pd.Series:
    """Means over images by timestep."""
    if not len(frame) or metric not in frame:
        return pd.Series(dtype=float)
    own = frame[(frame["rate"] == rate) & (frame["timestep"] != OWN)]
    return own.groupby("timestep")[metric].mean().dropna()


def plot_unseen(path: Path, means: pd.DataFrame, metric: str) -> None:
    """Draw the curve of the rates that a denoiser was trained on, and the others as points.

    Args:
        path: without suffix.
        means: bpp, seen and the metric, a row per rate.
        metric: column.
    """
    with open_figure(path, (6.0, 3.8)) as figure:
        axes = figure.subplots()
        for seen, style in ((True, {"marker": "o"}), (False, {"marker": "*", "markersize": 11, "linestyle": "none"})):
            part = means[means["seen"] == seen].dropna(subset=[metric]).sort_values("bpp")
            label = "trained on" if seen else "never seen"
            axes.plot(part["bpp"], part[metric], color=COLOURS[0 if seen else 1], label=label, **style)
        log_rate_axis(axes)
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        axes.set_xlabel("rate, bits per pixel")
        axes.set_ylabel(f"{metric_title(metric)}  ({better} is better)")
        axes.legend()


def plot_codings(path: Path, rows: pd.DataFrame) -> None:
    """Draw the length of files by coding, as a share of the nominal length.

    Args:
        path: without suffix.
        rows: of `oscar.evaluation.codings.compare`.
    """
    rows = rows[rows["effort"] == 0]
    codings = [name for name in rows if name.endswith("_bytes") and name != "nominal_bytes"]
    with open_figure(path, (6.0, 3.8)) as figure:
        axes = figure.subplots()
        axes.axhline(100, color="#555555", linewidth=1)
        for index, name in enumerate(codings):
            share = (100 * rows[name] / rows["nominal_bytes"]).groupby(rows["rate"]).mean()
            label = name.removesuffix("_bytes")
            axes.plot(share.index, share, color=COLOURS[index], marker=MARKERS[index], markersize=5, label=label)
        log_rate_axis(axes)
        axes.set_xlabel("rate, nominal bits per pixel")
        axes.set_ylabel("length of files, % of the nominal  (lower is better)")
        axes.legend()
