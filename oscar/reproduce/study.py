"""A study: jobs, and what is made of their results.

    OUTPUT/index.html           the page: tables, figures, commands, commit, what failed
    OUTPUT/tables/, plots/      each table as CSV, Markdown and LaTeX; each figure as PDF, SVG and PNG
    OUTPUT/study.json           configuration, commands, failures, commit, hardware
    OUTPUT/jobs/, runs/         see `oscar.reproduce.jobs`

The same command goes on where it stopped. Started several times, or by `torchrun`, its processes share the jobs.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import pandas as pd

from oscar import checkpoint
from oscar.config import ConfigError, ReproduceConfig
from oscar.data.datasets import DATASETS
from oscar.data.folders import find_images
from oscar.metrics.image import MetricSet
from oscar.reproduce.actions import Actions
from oscar.reproduce.jobs import Job, check_records, lock, read_record, run_jobs
from oscar.utils.environment import describe_environment
from oscar.utils.strict_json import write_json
from oscar.utils.tables import Table

_MODULES = {
    "rd": "rd.RateDistortion",
    "unseen_rates": "unseen_rates.UnseenRates",
    "timesteps": "timesteps.Timesteps",
    "losses": "retrain.Losses",
    "lora_rank": "retrain.Retrain",
    "stages": "retrain.Stages",
    "design": "design.Design",
    "entropy": "entropy.Entropy",
    "complexity": "complexity.Complexity",
}


@dataclass
class Summary:
    """What a study has found.

    Attributes:
        lines: sentences for the head of the page.
        tables: in the order of the page.
        figures: names of files in plots/, without suffix, by caption.
    """

    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)


class Study(ABC):
    """A study of a configuration.

    Attributes:
        title: heading of the page.
        config: of the study.
        output: its folder.
    """

    title: str

    def __init__(self, config: ReproduceConfig):
        self.config = config
        self.output = Path(config.output)
        self.plots = self.output / "plots"
        self.check()

    def check(self) -> None:
        """Refuse a configuration that this study cannot run (ValueError, in one line)."""
        for name in self.config.data.datasets:
            self.images_of(name)
        metrics = self.config.metrics
        found = MetricSet(metrics.names, "cpu", metrics.files, metrics.download)
        if len(found.unavailable) == len(found.names):
            raise ConfigError(f"metrics.names has none that can be had: {'; '.join(found.unavailable.values())}")

    @abstractmethod
    def jobs(self) -> list[Job]:
        """Each behind those that it needs."""

    @abstractmethod
    def summarise(self, done: Sequence[str]) -> Summary:
        """Tables and figures of the jobs of these names, with their files written to `plots`."""

    # For subclasses.

    def images_of(self, dataset: str) -> Path:
        """The folder of a data set, which is there (ValueError if not)."""
        root = Path(self.config.data.root)
        if dataset in DATASETS:
            return DATASETS[dataset].check(root, partial=self.config.data.limit is not None)
        if not (root / dataset).is_dir():
            raise ConfigError(
                f"data.datasets has {dataset!r}, but {root / dataset} does not exist; allowed: {', '.join(DATASETS)}, "
                "or a folder of data.root"
            )
        find_images(root / dataset)
        return root / dataset

    def count_images(self, dataset: str) -> int:
        return len(find_images(self.images_of(dataset))[: self.config.data.limit])

    def rates_of(self, model: str) -> list[float]:
        """Nominal bpp of a model's rates (ValueError for one without)."""
        from oscar.rates import rate_by_id

        _, description = checkpoint.read_description(model)
        ids = description["bottleneck"].get("rates")
        if ids is None:
            raise ConfigError(
                f"model is {model!r}, which has no rates; allowed for study {self.config.study}: one with"
            )
        return sorted(rate_by_id(rate_id).bpp for rate_id in ids)

    def need_rates(self, which: str, rates: Iterable[float]) -> None:
        """Refuse (ConfigError) rates that the model does not have; `which` begins the message."""
        own = self.rates_of(self.config.model)
        for rate in rates:
            if not any(abs(rate - other) < 5e-5 for other in own):
                raise ConfigError(f"{which} {rate:.4f}; allowed: {', '.join(f'{bpp:.4f}' for bpp in own)}")

    def backbone_of(self, model: str) -> str:
        """Where VAE and UNet of a checkpoint are; what is none is taken for a backbone itself."""
        try:
            folder, description = checkpoint.read_description(model)
        except checkpoint.CheckpointError:
            return model
        return description["backbone"] or str(folder)

    def images_arguments(self, dataset: str) -> list[str]:
        limit = self.config.data.limit
        return [f"data.images={self.images_of(dataset)}", *([] if limit is None else [f"data.limit={limit}"])]

    def metric_arguments(self) -> list[str]:
        metrics = self.config.metrics
        files = [f"+metrics.files.{name}={path}" for name, path in metrics.files.items()]
        return [f"metrics.names=[{','.join(metrics.names)}]", *files, *(["metrics.download=true"] * metrics.download)]

    def train_arguments(self, stage: str, start: Sequence[str], overrides: Sequence[str]) -> tuple[str, ...]:
        """Of a run of a stage of the recipe, from where `start` says; overrides come last."""
        sources = self.config.data.train
        train = [f"data.train=[{','.join(sources)}]"] if sources else []
        return (*getattr(self.config.recipe, stage), *start, *train, *overrides)

    def evaluate_job(
        self,
        name: str,
        model: str,
        dataset: str,
        points: int,
        needs: tuple[str, ...] = (),
        extra: Sequence[str] = (),
    ) -> Job:
        """An evaluation of a model at some number of points."""
        arguments = [f"model={model}", *self.images_arguments(dataset), *self.metric_arguments(), *extra]
        work = ("evaluate", points * self.count_images(dataset))
        return Job(name, "evaluate", tuple(arguments), needs, (model,), work)

    def result_of(self, job: str) -> str:
        """The checkpoint that a training job writes."""
        return str(self.output / "runs" / job / "final")


def make_study(config: ReproduceConfig) -> Study:
    """The study that a configuration names.

    Raises:
        ValueError: in one line, for what it cannot run.
    """
    module, _, name = _MODULES[config.study].partition(".")
    return getattr(import_module(f"oscar.reproduce.{module}"), name)(config)


def run_study(config: ReproduceConfig, configs: Path, overrides: Sequence[str] = ()) -> int:
    """Run a study, or with `dry_run` say what it would do.

    Args:
        config: of the study.
        configs: folder of the configurations of scripts.
        overrides: of the command, for the record.

    Returns:
        The exit code: 0, or 1 if a job has failed.

    Raises:
        ValueError: in one line, before anything runs, for what cannot be run.
        KeyboardInterrupt: if a signal has ended a job.
    """
    study = make_study(config)
    jobs = study.jobs()
    actions = Actions(configs, config.device, config.threads)
    jobs = [actions.check(job) for job in jobs]
    check_records(jobs, study.output)
    if config.dry_run:
        print(describe(study, jobs))
        return 0
    failed = run_jobs(jobs, study.output, actions)
    with lock(study.output / "jobs/summary.lock", wait=True):
        write_summary(study, jobs, failed, overrides)
    for name, reason in failed.items():
        print(f"no result of {name}: {reason}")
    print(f"page: {study.output / 'index.html'}")
    return 1 if failed else 0


def describe(study: Study, jobs: Sequence[Job]) -> str:
    """The jobs, their number and how long they take."""
    recipe, hours, unknown = study.config.recipe, 0.0, 0
    lines = []
    for job in jobs:
        record = read_record(job, study.output)
        state = record["state"] if record else "to do"
        per_step = recipe.seconds.get(job.work[0]) if job.work else None
        if per_step is None:
            unknown += job.work is not None
            estimate = "? h" if job.work else "–"
        else:
            hours += per_step * job.work[1] / 3600 if state != "done" else 0
            estimate = f"{per_step * job.work[1] / 3600:.2f} h"
        lines.append(f"{state:>6}  {estimate:>9}  {job.text(study.output)}")
    some = f", without the {unknown} marked '?'" if unknown else ""
    where = f" (times measured on {recipe.measured_on})" if recipe.measured_on else ""
    return "\n".join([*lines, f"{len(jobs)} jobs; to do: about {hours:.2f} hours of one process{some}{where}"])


def write_summary(study: Study, jobs: Sequence[Job], failed: dict[str, str], overrides: Sequence[str] = ()) -> None:
    """Tables, figures, page and study.json from what there is."""
    from oscar.reproduce.page import write_page

    done = [job.name for job in jobs if job.name not in failed]
    summary = study.summarise(done)
    for table in summary.tables:
        table.write(study.output / "tables")
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "scripts/reproduce.py", *overrides]),
        "jobs": {job.name: job.text(study.output) for job in jobs},
        "failed": failed,
        "config": asdict(study.config),
        **describe_environment(),
    }
    write_json(study.output / "study.json", record)
    write_page(study.output / "index.html", study.title, summary, record, study.plots)


def read_rows(folder: Path, **columns: object) -> pd.DataFrame:
    """The rows of an evaluation, with more columns."""
    from oscar.evaluation.results import load_results

    frame, _ = load_results(folder)
    return frame.assign(**columns)
