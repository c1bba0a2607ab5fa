"""Rates that the denoiser was not trained on: stage 1 of them alone, joined to a trained model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from oscar.config import ConfigError
from oscar.evaluation.curves import metric_title
from oscar.metrics.image import METRICS
from oscar.rates import find_rate
from oscar.reproduce.jobs import Job
from oscar.reproduce.study import Study, Summary, read_rows
from oscar.utils.tables import Table, plain_minus

STAGE1, CALIBRATION, JOINED = "stage1", "calibration", "joined"


class UnseenRates(Study):
    """The model's own rates and the added ones on one curve."""

    title = "Rates that the denoiser never saw"

    def check(self) -> None:
        super().check()
        own = self.rates_of(self.config.model)
        if not self.config.rates:
            raise ConfigError("rates is empty; allowed for study unseen_rates: one or more that the model lacks")
        for bpp in self.config.rates:
            find_rate(bpp)
            if any(abs(bpp - other) < 5e-5 for other in own):
                raise ConfigError(f"rates has {bpp:.4f}, which {self.config.model} was trained on; allowed: others")
        if self.config.rates_checkpoint is not None:
            there = self.rates_of(self.config.rates_checkpoint)
            for bpp in self.config.rates:
                if not any(abs(bpp - other) < 5e-5 for other in there):
                    raise ConfigError(
                        f"rates has {bpp:.4f}, which rates_checkpoint lacks; allowed: "
                        f"{', '.join(f'{rate:.4f}' for rate in there)}"
                    )
        elif self.config.timesteps == "calibrated" and not self.config.data.train:
            raise ConfigError(
                "timesteps is 'calibrated', but data.train is empty; allowed: a folder of training images"
            )

    def jobs(self) -> list[Job]:
        config = self.config
        rates, jobs, needs = config.rates_checkpoint, [], ()
        if rates is None:
            jobs.append(self.stage1_job())
            rates, needs = self.result_of(STAGE1), (STAGE1,)
        calibration = []
        if config.timesteps == "calibrated":
            folder = config.data.calibration or config.data.train[0]
            limit = [] if config.data.calibration_limit is None else [f"data.limit={config.data.calibration_limit}"]
            arguments = (f"model={rates}", f"data.images={folder}", *limit)
            jobs.append(Job(CALIBRATION, "calibrate_timesteps", arguments, needs, (rates,)))
            needs = (*needs, CALIBRATION)
            calibration = ["--calibration", str(self.output / "runs" / CALIBRATION / "calibration.json")]
        jobs.append(Job(JOINED, "add-rates", (config.model, rates, *calibration), needs, (config.model, rates)))
        joined = str(self.output / "runs" / JOINED)
        points = len(self.rates_of(config.model)) + len(config.rates)
        for dataset in config.data.datasets:
            for protocol in config.protocols:
                name, extra = f"{protocol}-on-{dataset}", [f"protocol={protocol}"]
                jobs.append(self.evaluate_job(name, joined, dataset, points, (JOINED,), extra))
        return jobs

    def stage1_job(self) -> Job:
        """Stage 1 of the added rates, on the model's own VAE."""
        config = self.config
        start = (
            f"backbone.source={self.backbone_of(config.model)}",
            f"bottleneck.rates=[{','.join(map(str, config.rates))}]",
        )
        arguments = self.train_arguments("bottleneck", start, config.train)
        return Job(STAGE1, "train", arguments, (), (config.model,), ("bottleneck", 0))

    def summarise(self, done: Sequence[str]) -> Summary:
        from oscar.reproduce.figures import plot_unseen

        summary = Summary()
        for dataset in self.config.data.datasets:
            for protocol in self.config.protocols:
                if f"{protocol}-on-{dataset}" not in done:
                    continue
                rows = read_rows(self.output / "runs" / f"{protocol}-on-{dataset}")
                rate = "nominal_bpp" if protocol == "paper" else "actual_bpp"
                metrics = [name for name in METRICS if name in rows and rows[name].notna().any()]
                means = rows.groupby("point")[[rate, *metrics]].mean().reset_index().rename(columns={rate: "bpp"})
                means["seen"] = [
                    not any(abs(point - bpp) < 5e-5 for bpp in self.config.rates) for point in means["point"]
                ]
                summary.tables.append(unseen_table(means, metrics, dataset, protocol))
                for metric in metrics:
                    name = f"unseen_{metric.replace('+', '_plus')}_{protocol}_{dataset}"
                    plot_unseen(self.plots / name, means, metric)
                    summary.figures[f"{metric_title(metric)} on {dataset}, protocol {protocol}"] = name
        return summary


def unseen_table(means: pd.DataFrame, metrics: Sequence[str], dataset: str, protocol: str) -> Table:
    """Each point with its distance to the curve through the rates that the denoiser was trained on.

    Args:
        means: point, bpp, seen and metrics, a row per rate.
        metrics: columns.
        dataset, protocol: for the caption.
    """
    frame = means.sort_values("bpp", ignore_index=True)
    seen = frame[frame["seen"]]
    titles, formats = {"rate": "rate", "bpp": "bpp", "kind": "denoiser"}, {"bpp": "{:.4f}".format}
    frame = frame.assign(
        rate=frame["point"].map("{:.4f}".format), kind=["trained on it" if value else "not" for value in frame["seen"]]
    )
    for metric in metrics:
        frame[f"{metric}_off"] = [
            math.nan if row.seen else value - _between(seen, row.bpp, metric)
            for row, value in zip(frame.itertuples(), frame[metric], strict=True)
        ]
        titles |= {metric: metric_title(metric), f"{metric}_off": "− curve"}
        digits = 3 if METRICS[metric].unit == "dB" else 4
        formats |= {metric: f"{{:.{digits}f}}".format, f"{metric}_off": _signed(digits)}
    how = "nominal" if protocol == "paper" else "of files"
    return Table(
        f"unseen_{protocol}_{dataset}",
        f"Rates that the denoiser was not trained on, on {dataset}, protocol {protocol} (bpp {how}).",
        frame,
        titles,
        formats,
        ["− curve: less the line over log(bpp) between the trained rates around it; none beyond their ends."],
    )


def _signed(digits: int):
    return lambda value: plain_minus(f"{value:+.{digits}f}")


def _between(seen: pd.DataFrame, bpp: float, metric: str) -> float:
    """The line through the trained rates over log(bpp); NaN beyond them."""
    import numpy as np

    points = seen.dropna(subset=[metric]).sort_values("bpp")
    return float(np.interp(math.log(bpp), np.log(points["bpp"]), points[metric], left=math.nan, right=math.nan))
