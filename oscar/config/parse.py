"""From Hydra's configuration of a job to a typed and checked one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oscar.config.benchmark import BenchmarkConfig
from oscar.config.checks import ConfigError
from oscar.config.data import CacheLatentsConfig
from oscar.config.evaluation import AblateTimestepsConfig, CalibrateTimestepsConfig, EvaluateConfig
from oscar.config.reproduce import ReproduceConfig
from oscar.config.training import TrainConfig


def register() -> None:
    """Give Hydra the schemas, so that every documented field can be overridden on the command line."""
    from hydra.core.config_store import ConfigStore

    train = OmegaConf.structured(TrainConfig)
    for options in (train.bottleneck.options, train.timesteps, train.stage.image_losses):  # with keys of the user's
        OmegaConf.set_struct(options, False)
    ConfigStore.instance().store(name="train_schema", node=train)
    ConfigStore.instance().store(name="cache_latents_schema", node=CacheLatentsConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
    ConfigStore.instance().store(name="calibrate_timesteps_schema", node=CalibrateTimestepsConfig)
    ConfigStore.instance().store(name="ablate_timesteps_schema", node=AblateTimestepsConfig)
    reproduce = OmegaConf.structured(ReproduceConfig)
    for options in (reproduce.variants, reproduce.grid, reproduce.tolerance, reproduce.recipe.losses):
        OmegaConf.set_struct(options, False)
    ConfigStore.instance().store(name="reproduce_schema", node=reproduce)


def parse_job(config: DictConfig, schema: type = TrainConfig) -> tuple[Any, list[str]]:
    """`parse` within `hydra.main`: the typed configuration of a job, and the overrides of its command.

    In a sweep (`--multirun`) every job has an output of its own, named after its overrides below the usual one, unless
    `output` is overridden too.

    Raises:
        ConfigError: as `parse`.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    job = HydraConfig.get()
    overrides = list(job.overrides.task)
    typed = parse(config, schema)
    if job.mode == RunMode.MULTIRUN and not any(re.match(r"\+{0,2}output=", override) for override in overrides):
        typed.output = str(Path(typed.output) / job_name(overrides))
    return typed, overrides


def job_name(overrides: Sequence[str]) -> str:
    """A folder's name for the job of a sweep that has these overrides, the same each time; at most 120 characters."""
    plain = re.sub(r"[^\w.,=+-]+", "_", ",".join(sorted(overrides)))
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    return plain if len(plain) <= 120 else f"{plain[:111]}-{digest}"


def parse(config: DictConfig, schema: type = TrainConfig) -> Any:
    """The typed, checked form of a Hydra config.

    Raises:
        ConfigError: with one line naming the field, its value and what is allowed.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        typed: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error.msg if getattr(error, "msg", None) else error).splitlines()[0]
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"config: {key}{reason}") from None
    typed.check()
    return typed
