"""The scripts of a clone as commands that need none: `oscar train` is `python scripts/train.py`.

Each has a line in `SCRIPTS`. Those of Hydra are configured by `KEY=VALUE`, from `oscar.config.config_folder`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from oscar.utils.errors import one_line, run_script
from oscar.utils.extras import missing_as_line

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Script:
    """A script that takes the words of its command line.

    Attributes:
        name: as the script's file.
        work: takes the words and returns the exit code.
        help: a line for `oscar --help`.
        extra: of the installation, which brings what the script imports.
    """

    name: str
    work: Callable[[list[str]], int]
    help: str
    extra: str

    def main(self, args: Sequence[str] | None = None) -> int:
        """Run it.

        Args:
            args: words of the command line without the program's name; None takes the process's.

        Returns:
            The exit code.
        """
        words = sys.argv[1:] if args is None else list(args)
        with mock.patch.object(sys, "argv", [self.name, *words]):  # where libraries look
            try:
                with missing_as_line(self.name, self.extra):
                    return self.work(words)
            except SystemExit as end:
                return end.code if isinstance(end.code, int) else int(end.code is not None)

    def run(self) -> None:
        """Run it on the process's words, and end the process if it fails."""
        if code := self.main():
            sys.exit(code)


@dataclass(frozen=True)
class Job:
    """What Hydra calls, once or for each job of a sweep; can be pickled, for launchers that run it elsewhere.

    Attributes:
        name: of the configuration and of its schema.
        work: takes the typed configuration and the overrides; may return an exit code.
    """

    name: str
    work: Callable[[Any, list[str]], int | None]

    def __call__(self, config: DictConfig) -> None:
        from oscar.config import SCHEMAS, parse_job

        with one_line(self.name):
            code = self.work(*parse_job(config, SCHEMAS[self.name]))
        if code:
            sys.exit(code)


def _hydra_script(name: str, work: Callable[[Any, list[str]], int | None], help: str, extra: str) -> Script:
    def run(args: list[str]) -> int:
        import hydra

        from oscar.config import config_folder, register

        register()
        job = Job(name, work)
        object.__setattr__(job, "__module__", f"{__name__}.{name}")  # whose last part Hydra takes for the job's name
        run_script(hydra.main(str(config_folder()), name, version_base="1.3")(job), name)
        return 0

    return Script(name, run, help, extra)


def _train(config: Any, overrides: list[str]) -> None:
    from oscar.training.build import build_stage
    from oscar.training.resolve import resolve
    from oscar.training.trainer import Trainer, make_accelerator

    if config.plan:
        from oscar.training.plan import run_plan

        run_plan(config)
        return
    if config.preflight:
        from oscar.training.preflight import run_preflight

        run_preflight(config)
        return
    config = resolve(config)
    accelerator = make_accelerator(config)  # before the stage, whose quantisers ask whether there are other processes
    Trainer(build_stage(config), config, accelerator, overrides).run()


def _cache_latents(config: Any, overrides: list[str]) -> None:
    from oscar.training.latent_cache import cache_latents

    index = cache_latents(config)
    print(f"{index.count} latents of {index.images} images, {index.crops} crops each, in {config.output}")


def _evaluate(config: Any, overrides: list[str]) -> None:
    from oscar.evaluation.evaluate import evaluate_config

    evaluate_config(config)


def _benchmark(config: Any, overrides: list[str]) -> None:
    from oscar.benchmark.runs import run_benchmark

    run_benchmark(config)


def _calibrate_timesteps(config: Any, overrides: list[str]) -> None:
    from oscar.evaluation.calibration import calibrate_config

    calibrate_config(config)


def _ablate_timesteps(config: Any, overrides: list[str]) -> None:
    from oscar.evaluation.ablation import ablate_config

    ablate_config(config)


def _ablate_denoiser(config: Any, overrides: list[str]) -> None:
    from oscar.evaluation.denoiser import ablate_denoiser_config

    ablate_denoiser_config(config)


def _reproduce(config: Any, overrides: list[str]) -> int | None:
    from oscar.reproduce.actions import leave_launcher

    leave_launcher()  # before CUDA is looked at
    from oscar.config import config_folder
    from oscar.reproduce.study import run_study

    return run_study(config, config_folder(), overrides)


def _prepare_data(args: list[str]) -> int:
    from oscar.cli.prepare_data import main

    return main(args)


def _demo(args: list[str]) -> int:
    from oscar.benchmark.demo import main

    return main(args)


SCRIPTS = {
    script.name: script
    for script in (
        _hydra_script("train", _train, "Train a stage of a model.", "train"),
        _hydra_script("cache_latents", _cache_latents, "Latents of training crops, for quick training.", "train"),
        _hydra_script("evaluate", _evaluate, "A codec on a folder of images: rates and metrics.", "eval"),
        _hydra_script("benchmark", _benchmark, "Codecs side by side: tables, BD-rate, plots, a page.", "eval"),
        _hydra_script("calibrate_timesteps", _calibrate_timesteps, "How noisy quantised latents are.", "eval"),
        _hydra_script("ablate_timesteps", _ablate_timesteps, "Timestep mappings over one checkpoint.", "eval"),
        _hydra_script("ablate_denoiser", _ablate_denoiser, "What the denoising step does: a table.", "eval"),
        _hydra_script("reproduce", _reproduce, "The paper's tables and figures, and ablations.", "all"),
        Script("prepare_data", _prepare_data, "Lay out a data set of the field, and check it.", "train"),
        Script("demo", _demo, "A model on photographs at every rate: files, a table, a page.", "eval"),
    )
}
