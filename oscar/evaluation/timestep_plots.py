"""Figures of the timestep mappings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from oscar.diffusion import NoiseSchedule
from oscar.evaluation.curves import metric_title
from oscar.metrics.image import METRICS
from oscar.utils.figures import COLOURS, MARKERS, log_rate_axis, open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN = -1.0  # the point at which an image is decoded at its own timestep
BEST = "best"  # stands in tables beside the mappings
_COLUMNS = 4  # panels side by side
_CURVE = "#9A9A9A"


def plot_calibration(path: Path, rates: pd.DataFrame, schedule: NoiseSchedule, images: int) -> None:
    """Draw measured cosine against sqrt(alpha_bar_t) at the paper's timesteps, and the timesteps that would match.

    Args:
        path: of the files, without suffix.
        rates: of `oscar.evaluation.calibration.summarise`.
        schedule: the backbone's.
        images: how many were measured.
    """
    with open_figure(path, (10, 4.4)) as figure:
        left, right = figure.subplots(1, 2)
        _draw_cosines(left, rates.dropna(subset="timestep_paper"), schedule)
        _draw_timesteps(right, rates)
        several = f"{images} image{'s' * (images != 1)}"
        left.set_title(
            rf"Is $\hat z$ as noisy as the table says? Mean and deviation over {several}", loc="left", fontsize=9
        )
        right.set_title("The timesteps that follow", loc="left", fontsize=9)


def _draw_cosines(axes: Axes, rates: pd.DataFrame, schedule: NoiseSchedule) -> None:
    expected = schedule.alpha_bar(torch.tensor(rates["timestep_paper"].astype(int).to_list())).sqrt().tolist()
    lines = [*expected, *rates["cosine"] - rates["cosine_std"], *rates["cosine"] + rates["cosine_std"]]
    low, high = min(lines) - 0.07, min(max(lines) + 0.04, 1.02)
    axes.plot([low, high], [low, high], color=_CURVE, linewidth=1, linestyle=(0, (4, 2)), label="equal")
    axes.errorbar(
        expected,
        rates["cosine"],
        rates["cosine_std"],
        color=COLOURS[0],
        marker="o",
        linestyle="none",
        capsize=3,
        linewidth=1.2,
        label="measured",
    )
    for x, row in zip(expected, rates.itertuples(), strict=True):
        side, align = (-7, "right") if row.cosine > x else (7, "left")  # away from the diagonal
        axes.annotate(
            f"{row.rate:.4f}",
            (x, row.cosine),
            (side, -3),
            ha=align,
            textcoords="offset points",
            fontsize=7.5,
            color="#444444",
        )
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_xlabel(r"$\sqrt{\bar\alpha_t}$ at the paper's timestep of the rate")
    axes.set_ylabel(r"cosine similarity of $\hat z$ and $z_0$")
    axes.legend(loc="lower right")


def _draw_timesteps(axes: Axes, rates: pd.DataFrame) -> None:
    paper, own = (rates[f"timestep_{name}"].astype(float) for name in ("paper", "own"))
    own = [] if own.equals(paper.rename(own.name)) or own.isna().all() else ["own"]
    labels = {"paper": "paper's table", "own": "the checkpoint's own", "cosine": "cosine", "snr": "snr"}
    for index, name in enumerate(("paper", *own, "cosine", "snr")):
        points = rates[["rate", f"timestep_{name}"]].dropna().astype(float)
        axes.plot(
            *points.to_numpy().T,
            color=COLOURS[index],
            marker=MARKERS[index],
            markersize=5,
            linewidth=1.4,
            label=labels[name],
        )
    axes.errorbar(
        rates["rate"],
        rates["timestep_per_image"],
        rates["timestep_per_image_std"],
        color=COLOURS[6],
        marker="x",
        linestyle="none",
        capsize=3,
        linewidth=1,
        label="per_image, mean and deviation",
        zorder=1,
    )
    log_rate_axis(axes)
    axes.set_xlabel("rate, nominal bits per pixel")
    axes.set_ylabel("timestep")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def plot_ablation(path: Path, rows: pd.DataFrame, choices: pd.DataFrame, metric: str, images: int) -> None:
    """Draw a metric against timestep, a panel for each rate, with every mapping's choice and the best marked.

    Args:
        path: of the files, without suffix.
        rows: of `oscar.evaluation.ablation.sweep`.
        choices: of `oscar.evaluation.ablation.choose`.
        metric: a column of both.
        images: how many were scored.
    """
    curves = rows[rows["timestep"] != OWN].groupby(["rate", "timestep"])[metric].mean()
    rates = sorted(choices["rate"].unique())
    columns = min(_COLUMNS, len(rates))
    height = math.ceil(len(rates) / columns)
    with open_figure(path, (3.1 * columns + 0.4, 2.5 * height + 0.9)) as figure:
        panels = figure.subplots(height, columns, squeeze=False).flatten()
        handles: dict = {}
        for panel, rate in zip(panels, rates, strict=False):
            curve = curves[rate].dropna()
            panel.plot(curve.index, curve, color=_CURVE, linewidth=1.5, marker=".", markersize=3, zorder=1)
            handles |= _draw_choices(panel, choices[choices["rate"] == rate], metric)
            panel.set_title(f"{rate:.4f} bpp", loc="left", fontsize=9)
        for panel in panels[len(rates) :]:
            panel.set_axis_off()
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        several = f"{images} image{'s' * (images != 1)}"
        figure.supylabel(f"{metric_title(metric)}  ({better} is better), mean over {several}", fontsize=9)
        figure.supxlabel("timestep", fontsize=9)
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2 * columns + 2)


def _draw_choices(axes: Axes, choices: pd.DataFrame, metric: str) -> dict:
    """The marks by label; later ones are smaller, so that equal choices stay visible."""
    choices = choices.dropna(subset=metric)
    names = [name for name in choices["mapping"].unique() if name != BEST]
    best = choices[choices["mapping"] == BEST]
    handles = {
        BEST: axes.scatter(
            best["timestep"],
            best[metric],
            s=190,
            marker="*",
            color="#F0C000",
            edgecolors="#8A6D00",
            linewidths=0.6,
            zorder=2,
        )
    }
    for index, name in enumerate(names):
        chosen = choices[choices["mapping"] == name]
        handles[name] = axes.scatter(
            chosen["timestep"],
            chosen[metric],
            s=70 * (1 - 0.7 * index / len(names)),
            zorder=3 + index,
            marker=MARKERS[index % len(MARKERS)],
            facecolors="none" if index % 2 else COLOURS[index % len(COLOURS)],
            edgecolors=COLOURS[index % len(COLOURS)],
            linewidths=1.2,
        )
    return handles
