"""Studies that train variants of stage 2 from one checkpoint of stage 1, over several seeds, and compare them.

Every variant and seed is a run of its own, evaluated on images that it was not trained on. Runs of one seed meet the
same crops in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from oscar.config import ConfigError
from oscar.evaluation.curves import metric_title
from oscar.metrics.image import METRICS
from oscar.reproduce.jobs import Job
from oscar.reproduce.statistics import ALPHA, LEVEL, RESAMPLES, compare
from oscar.reproduce.study import Study, Summary, read_rows
from oscar.utils.tables import Table, plain_minus

NOTES = (
    f"from, to: {LEVEL:.0%} interval of the mean difference: pairs of images drawn again {RESAMPLES} times, each the "
    "mean over seeds.",
    "p: signs of the images' differences flipped at random, corrected after Holm over the rows of this table.",
    f"better, worse: corrected p below {ALPHA} and the same sign at every seed.",
)
_TITLES = {"lora_rank": "Rank of the adapters"}


class Retrain(Study):
    """Variants as the configuration names them (study lora_rank, and the base of the others)."""

    @property
    def title(self) -> str:  # type: ignore[override]
        return _TITLES[self.config.study]

    def variants(self) -> Mapping[str, Sequence[str]]:
        """What each variant changes of stage 2, by name."""
        return self.config.variants

    @property
    def reference(self) -> str:
        return self.config.reference or next(iter(self.variants()))

    def check(self) -> None:
        super().check()
        names = list(self.variants())
        if not names:
            raise ConfigError(f"variants is empty; allowed for study {self.config.study}: one or more")
        if self.reference not in names:
            raise ConfigError(f"reference is {self.reference!r}; allowed: {', '.join(names)}")
        self.check_model()

    def check_model(self) -> None:
        """Refuse a model that runs cannot start from."""
        self.rates_of(self.config.model)

    def jobs(self) -> list[Job]:
        trained = [
            self.train_job(f"{name}-seed{seed}", "joint", [f"seed={seed}", *overrides])
            for seed in self.config.seeds
            for name, overrides in self.variants().items()
        ]
        return self.with_evaluations(trained)

    def train_job(
        self, name: str, stage: str, overrides: Sequence[str], needs: tuple[str, ...] = (), init_from: bool = True
    ) -> Job:
        """A run of a stage of the recipe, from the checkpoint of stage 1 unless an override says otherwise."""
        config = self.config
        start = (
            f"init_from={config.model if init_from else 'null'}",
            f"bottleneck.rates=[{','.join(map(str, self.rates_of(config.model)))}]",
        )
        arguments = self.train_arguments(stage, start, [*config.train, *overrides])
        # the number of steps is looked up where they are composed
        return Job(name, "train", arguments, needs, (config.model,), (stage, 0))

    def with_evaluations(self, trained: Sequence[Job], points: int | None = None) -> list[Job]:
        """Runs, each followed by its evaluations, so that what is done early can be looked at early."""
        points = points or len(self.rates_of(self.config.model))
        return [job for run in trained for job in (run, *self.evaluations_of(run, points))]

    def evaluations_of(self, training: Job, points: int, extra: Sequence[str] = ()) -> list[Job]:
        """Its result on each data set."""
        model = self.result_of(training.name)
        return [
            self.evaluate_job(f"{training.name}-on-{dataset}", model, dataset, points, (training.name,), extra)
            for dataset in self.config.data.datasets
        ]

    def rows(
        self, done: Sequence[str], dataset: str, runs: Mapping[str, tuple[str, int]] | None = None
    ) -> pd.DataFrame:
        """Rows of all runs that were evaluated on a data set: variant, seed, image, rate, actual_bpp and metrics."""
        if runs is None:
            runs = {f"{name}-seed{seed}": (name, seed) for name in self.variants() for seed in self.config.seeds}
        frames = [
            read_rows(self.output / "runs" / f"{run}-on-{dataset}", variant=variant, seed=seed)
            for run, (variant, seed) in runs.items()
            if f"{run}-on-{dataset}" in done
        ]
        frames = [frame.rename(columns={"point": "rate"}) for frame in frames]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def summarise(self, done: Sequence[str]) -> Summary:
        summary = Summary()
        for dataset in self.config.data.datasets:
            self.add_comparison(summary, self.rows(done, dataset), dataset)
        return summary

    def metrics_of(self, rows: pd.DataFrame) -> list[str]:
        """Metrics that rows have."""
        return [name for name in self.config.metrics.names if name in rows and rows[name].notna().any()]

    def in_order(self) -> list[str]:
        """Variants, the reference first."""
        return list(dict.fromkeys([self.reference, *self.variants()]))

    def add_comparison(self, summary: Summary, rows: pd.DataFrame, dataset: str) -> None:
        """Tables and a figure of each metric on a data set."""
        from oscar.reproduce.figures import plot_differences

        for metric in self.metrics_of(rows):
            frame = compare(rows, metric, self.reference, self.in_order())
            summary.tables += comparison_tables(frame, metric, self.reference, dataset)
            if "difference" in frame:
                name = f"differences_{metric.replace('+', '_plus')}_{dataset}"
                plot_differences(self.plots / name, frame, metric, self.reference)
                summary.figures[f"{metric_title(metric)} beside {self.reference}, by rate, on {dataset}"] = name


class Losses(Retrain):
    """The recipe's losses without one of them each."""

    title = "Losses of stage 2"

    def variants(self) -> Mapping[str, Sequence[str]]:
        return self.config.variants or self.config.recipe.losses


class Stages(Retrain):
    """Stage 2 from stage 1, without it, and of single rates."""

    title = "Stages, and one model for all rates"
    names = ("both_stages", "without_stage1", "single_rate")

    def variants(self) -> Mapping[str, Sequence[str]]:
        return dict.fromkeys(self.names, ())

    def check(self) -> None:
        super().check()
        self.need_rates("rates has", self.config.rates)

    def runs(self) -> dict[str, tuple[str, int]]:
        """Variant and seed of each run by its name."""
        both, without, single = self.names
        found = {}
        for seed in self.config.seeds:
            found |= {f"{name}-seed{seed}": (name, seed) for name in (both, without)}
            found |= {f"{single}-{rate:.4f}-seed{seed}": (single, seed) for rate in self.config.rates}
        return found

    def jobs(self) -> list[Job]:
        backbone, jobs = self.backbone_of(self.config.model), []
        for run, (variant, seed) in self.runs().items():
            overrides, points = [f"seed={seed}"], None
            if variant == "without_stage1":
                overrides += [f"backbone.source={backbone}"]
            elif variant == "single_rate":
                overrides, points = [*overrides, f"bottleneck.rates=[{run.split('-')[1]}]"], 1
            job = self.train_job(run, "joint", overrides, init_from=variant != "without_stage1")
            jobs += self.with_evaluations([job], points)
        return jobs

    def rows(
        self, done: Sequence[str], dataset: str, runs: Mapping[str, tuple[str, int]] | None = None
    ) -> pd.DataFrame:
        return super().rows(done, dataset, self.runs() if runs is None else runs)


def comparison_tables(frame: pd.DataFrame, metric: str, reference: str, dataset: str) -> list[Table]:
    """Of a frame of `compare`: means over rates with intervals; and rate by rate."""
    title, higher = metric_title(metric), METRICS[metric].higher_is_better
    digits = 3 if METRICS[metric].unit == "dB" else 5
    signed = {
        name: lambda value, digits=digits: plain_minus(f"{value:+.{digits}f}") for name in ("difference", "low", "high")
    }
    formats = {
        **signed,
        **dict.fromkeys(("value", "seed_sd"), f"{{:.{digits}f}}".format),
        **dict.fromkeys(("p", "p_holm"), "{:.4f}".format),
        **dict.fromkeys(("seeds", "images"), "{:.0f}".format),
    }
    tables = []
    means = frame["rate"].isna()
    for name, part, where in (("mean", frame[means], "mean over rates"), ("by_rate", frame[~means], "rate by rate")):
        part = part.assign(verdict=[verdict(row, higher) for row in part.to_dict("records")])
        part = part.assign(rate_name=[f"{rate:.4f}" if rate == rate else "mean" for rate in part["rate"]])
        shown = {
            "rate_name": "rate", "variant": "variant", "value": title, "seed_sd": "sd over seeds",
            "difference": f"− {reference}", "low": "from", "high": "to", "p_holm": "p (Holm)", "verdict": "verdict",
            "seeds": "seeds", "images": "images",
        }  # fmt: skip
        tables.append(
            Table(
                f"{name}_{metric.replace('+', '_plus')}_{dataset}",
                f"{title} on {dataset}, {where} ({'higher' if higher else 'lower'} is better).",
                part,
                {column: text for column, text in shown.items() if column in part},
                formats,
                NOTES if "difference" in part else (),
            )
        )
    return tables


def verdict(row: Mapping, higher_is_better: bool) -> str:
    """What a row of `compare` says of its variant."""
    difference = row.get("difference")
    if difference is None or difference != difference:
        return ""
    agree = pd.isna(row["seeds_agree"]) or row["seeds_agree"]  # of one seed nothing is known
    if row["p_holm"] < ALPHA and agree:
        return "better" if (difference > 0) == higher_is_better else "worse"
    return "no difference shown"
