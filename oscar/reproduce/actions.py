"""What the commands of jobs do, in this process: the same as on a command line, from the same configuration."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch

from oscar.config import (
    AblateTimestepsConfig,
    BenchmarkConfig,
    CalibrateTimestepsConfig,
    EvaluateConfig,
    TrainConfig,
    parse,
)
from oscar.reproduce.jobs import Interrupted, Job
from oscar.utils.overrides import quote_overrides

SCHEMAS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "benchmark": BenchmarkConfig,
    "calibrate_timesteps": CalibrateTimestepsConfig,
    "ablate_timesteps": AblateTimestepsConfig,
}
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def leave_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make one of several processes of a launcher a worker of its own, with a GPU of its own if there are any.

    Each job then runs as it does alone, and gives the same result. Must come before CUDA is used.
    """
    local = environment.pop("LOCAL_RANK", None)
    for name in _LAUNCHER:
        environment.pop(name, None)
    if local is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else None
        environment["CUDA_VISIBLE_DEVICES"] = devices[int(local) % len(devices)] if devices else local


@dataclasses.dataclass(frozen=True)
class Actions:
    """Does jobs.

    Attributes:
        configs: folder of the configurations of scripts.
        device: of evaluations; None leaves it to them.
        threads: CPU threads; None leaves the library's choice.
    """

    configs: Path
    device: str | None = None
    threads: int | None = None

    def compose(self, command: str, arguments: Sequence[str], folder: Path | None = None) -> Any:
        """The typed configuration of a script with these arguments.

        Raises:
            ConfigError, HydraException: in one line, for what does not exist or does not go together.
        """
        from hydra import compose, initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        extra = [] if folder is None else [f"output={folder}"]
        overrides = quote_overrides([*arguments, *extra])
        running = GlobalHydra.instance()
        outer, running.hydra = running.hydra, None  # of the study itself
        try:
            with initialize_config_dir(str(self.configs.absolute()), version_base="1.3"):
                typed = parse(compose(command, overrides=overrides), SCHEMAS[command])
        finally:
            running.hydra = outer
        if self.threads is not None:
            (typed.trainer if command == "train" else typed).threads = self.threads
        if self.device is not None and command != "train":
            typed.device = self.device
        return typed

    def check(self, job: Job) -> Job:
        """A job that can run as far as can be said before others have, with the steps of its configuration.

        Raises:
            ConfigError, CheckpointError, BackboneError, WeightsUnavailable: in one line, if it cannot.
        """
        if job.command not in SCHEMAS:
            return job
        config = self.compose(job.command, job.arguments)
        if job.command != "train":
            return job
        from oscar.models.backbone import read_configs
        from oscar.training.losses import ImageLoss
        from oscar.training.resolve import check_shape, resolve

        if not job.needs:
            config = resolve(config)
        if config.backbone.source is not None and not job.needs:
            source = config.backbone.source
            check_shape(config.backbone, read_configs(source), f"backbone.source {source!r}")
        ImageLoss.of(config.stage)  # whose weights must be there
        return dataclasses.replace(job, work=job.work and (job.work[0], config.trainer.max_steps))

    def __call__(self, job: Job, folder: Path) -> None:
        """Do a job.

        Raises:
            Interrupted: if a signal has ended it.
            ValueError, RuntimeError, OSError: if it cannot be done.
        """
        # As training has it, for every job alike: results must not depend on what this process did before.
        torch.set_flush_denormal(True)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            if job.command in SCHEMAS:
                getattr(self, f"_{job.command}")(self.compose(job.command, job.arguments, folder), job.arguments)
            else:
                getattr(self, f"_{job.command.replace('-', '_')}")(job.arguments, folder)
        finally:
            _forget_accelerate()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _train(self, config: TrainConfig, arguments: Sequence[str]) -> None:
        from oscar.training.build import build_stage
        from oscar.training.resolve import resolve
        from oscar.training.trainer import Trainer, make_accelerator

        config = resolve(config)
        accelerator = make_accelerator(config)
        if not Trainer(build_stage(config), config, accelerator, arguments).run():
            raise Interrupted

    def _evaluate(self, config: EvaluateConfig, _: Sequence[str]) -> None:
        from oscar.evaluation.evaluate import evaluate_config

        evaluate_config(config)

    def _benchmark(self, config: BenchmarkConfig, _: Sequence[str]) -> None:
        from oscar.benchmark.runs import run_benchmark

        run_benchmark(config)

    def _calibrate_timesteps(self, config: CalibrateTimestepsConfig, _: Sequence[str]) -> None:
        from oscar.evaluation.calibration import calibrate_config

        calibrate_config(config)

    def _ablate_timesteps(self, config: AblateTimestepsConfig, _: Sequence[str]) -> None:
        from oscar.evaluation.ablation import ablate_config

        ablate_config(config)

    def _add_rates(self, arguments: Sequence[str], folder: Path) -> None:
        from oscar.convert.merge import add_rates

        model, rates, *calibration = arguments
        add_rates(model, rates, folder, calibration[1] if calibration else None)

    def _compare_codings(self, arguments: Sequence[str], folder: Path) -> None:
        from oscar.evaluation.codings import compare_folder, parse_arguments

        compare_folder(parse_arguments("", [*arguments, "--out", str(folder)]))


def _forget_accelerate() -> None:
    """Accelerate keeps its settings for the life of a process, and refuses others."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
