"""Which timestep belongs to which rate: mappings trained from one checkpoint of stage 1, and the same without training.

Calibrated mappings are measured on training images alone. A sweep decodes the reference, as it is, at other timesteps;
a grid trains a model of one rate at each timestep. Both stand in one plot with the mappings that were trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from oscar import checkpoint
from oscar.config import ConfigError
from oscar.data.folders import find_images
from oscar.evaluation.curves import metric_title
from oscar.rates import rate_by_id
from oscar.reproduce.jobs import Job
from oscar.reproduce.retrain import Retrain
from oscar.reproduce.study import Summary
from oscar.timesteps import mapping_from_config
from oscar.utils.tables import Table

CALIBRATION, SWEEP, GRID = "calibration", "sweep", "grid"


class Timesteps(Retrain):
    """Mappings from rate to timestep, retrained."""

    title = "Timesteps"

    def variants(self) -> Mapping[str, Sequence[str]]:
        file = self.output / "runs" / CALIBRATION / "calibration.json"
        measured = {kind: [f"timesteps={kind}", f"timesteps.calibration={file}"] for kind in self.config.calibrated}
        return {**self.config.variants, **measured}

    @property
    def grid(self) -> dict[str, tuple[float, int]]:
        """Rate and timestep of each run of the grid."""
        return {f"{GRID}-{rate:.4f}-t{t}": (rate, t) for rate, steps in self.config.grid.items() for t in steps}

    def check(self) -> None:
        super().check()
        self.need_rates("grid has rate", self.config.grid)
        if self.config.calibrated:
            find_images(self.calibration_folder())

    def calibration_folder(self) -> Path:
        data = self.config.data
        folder = data.calibration or next(iter(data.train), None)
        if folder is None or not Path(folder).is_dir():
            raise ConfigError(
                f"data.calibration is {data.calibration!r} and data.train is {list(data.train)}, but mappings are to "
                "be calibrated; allowed: a folder of training images as data.calibration or first in data.train"
            )
        return Path(folder)

    def jobs(self) -> list[Job]:
        config, jobs = self.config, []
        if config.calibrated:
            limit = config.data.calibration_limit
            arguments = [f"model={config.model}", f"data.images={self.calibration_folder()}"]
            arguments += [] if limit is None else [f"data.limit={limit}"]
            count = len(find_images(self.calibration_folder())[:limit]) * len(self.rates_of(config.model))
            work = ("evaluate", count)
            jobs.append(Job(CALIBRATION, "calibrate_timesteps", tuple(arguments), (), (config.model,), work))
        training = [
            self.train_job(
                f"{name}-seed{seed}",
                "joint",
                [f"seed={seed}", *overrides],
                (CALIBRATION,) if name in config.calibrated else (),
            )
            for seed in config.seeds
            for name, overrides in self.variants().items()
        ]
        grid = [
            self.train_job(
                name,
                "joint",
                [
                    f"seed={config.seeds[0]}",
                    f"bottleneck.rates=[{rate}]",
                    "timesteps=constant",
                    f"timesteps.timestep={t}",
                ],
            )
            for name, (rate, t) in self.grid.items()
        ]
        jobs += [*self.with_evaluations(training), *self.with_evaluations(grid, points=1)]
        if config.sweep:
            jobs += [self.sweep_job(dataset) for dataset in config.data.datasets]
        return jobs

    def sweep_job(self, dataset: str) -> Job:
        """The reference of the first seed, decoded at other timesteps than it was trained with."""
        run = f"{self.reference}-seed{self.config.seeds[0]}"
        model = self.result_of(run)
        dropped = ("cosine", "snr", "linear", "log", "constant", "shuffled", "per_image")
        arguments = [
            f"model={model}",
            *self.images_arguments(dataset),
            *self.metric_arguments(),
            f"sweep=[{','.join(map(str, self.config.sweep))}]",
            *(f"~mappings.{name}" for name in dropped),
        ]
        points = (len(self.config.sweep) + 1) * len(self.rates_of(self.config.model))
        work = ("evaluate", points * self.count_images(dataset))
        return Job(f"{SWEEP}-on-{dataset}", "ablate_timesteps", tuple(arguments), (run,), (model,), work)

    def summarise(self, done: Sequence[str]) -> Summary:
        from oscar.reproduce.figures import plot_timesteps

        summary = Summary()
        chosen = self.timesteps(done)
        if len(chosen):
            summary.tables.append(self.timesteps_table(chosen))
        for dataset in self.config.data.datasets:
            rows, grid = self.rows(done, dataset), self.rows(done, dataset, {name: (name, 0) for name in self.grid})
            if not len(rows):
                continue
            self.add_comparison(summary, rows, dataset)
            sweep = self.output / "runs" / f"{SWEEP}-on-{dataset}" / "sweep.csv"
            swept = pd.read_csv(sweep) if f"{SWEEP}-on-{dataset}" in done else pd.DataFrame()
            if len(grid):
                grid = grid.assign(timestep=grid["variant"].map(lambda name: self.grid[name][1]))
            placed = rows.merge(chosen, on=["variant", "seed", "rate"])
            for metric in self.metrics_of(rows):
                name = f"timesteps_{metric.replace('+', '_plus')}_{dataset}"
                plot_timesteps(self.plots / name, metric, placed, swept, grid, self.reference)
                caption = (
                    f"{metric_title(metric)} against timestep on {dataset}: trained with it, and only decoded at it"
                )
                summary.figures[caption] = name
        return summary

    def timesteps(self, done: Sequence[str]) -> pd.DataFrame:
        """The timestep of each rate in each trained model: variant, seed, rate, timestep; none of per_image."""
        rows = []
        for variant in self.variants():
            for seed in self.config.seeds:
                run = f"{variant}-seed{seed}"
                if run in done:
                    _, description = checkpoint.read_description(self.result_of(run))
                    mapping = mapping_from_config(description["timesteps"])
                    rates = sorted(map(rate_by_id, description["bottleneck"]["rates"]), key=lambda rate: rate.bpp)
                    rows += [
                        {"variant": variant, "seed": seed, "rate": rate.bpp, "timestep": float(mapping(rate))}
                        for rate in rates
                        if not mapping.per_image
                    ]
        return pd.DataFrame(rows, columns=["variant", "seed", "rate", "timestep"])

    def timesteps_table(self, chosen: pd.DataFrame) -> Table:
        names = [name for name in self.variants() if name in set(chosen["variant"])]
        frame = chosen.pivot_table(index="rate", columns="variant", values="timestep")[names].reset_index()
        limit = self.config.data.calibration_limit
        notes = [f"{', '.join(self.config.calibrated)}: measured on at most {limit} training images, with the model of "
                 "stage 1."] if self.config.calibrated else []  # fmt: skip
        return Table(
            "timesteps",
            "Timestep of each mapping by rate; of learned ones the mean over seeds.",
            frame.assign(rate=frame["rate"].map("{:.4f}".format)),
            {name: name for name in ("rate", *names)},
            dict.fromkeys(names, "{:.0f}".format),
            notes,
        )
