"""From Hydra's configuration of a job to a typed and checked one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oscar.config.benchmark import BenchmarkConfig
from oscar.config.checks import ConfigError
from oscar.config.data import CacheLatentsConfig
from oscar.config.evaluation import (
    AblateDenoiserConfig,
    AblateTimestepsConfig,
    CalibrateTimestepsConfig,
    EvaluateConfig,
)
from oscar.config.reproduce import ReproduceConfig
from oscar.config.training import TrainConfig
from oscar.utils.former import explain_former

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCHEMAS = {  # by the name of a job's configuration
    "train": TrainConfig,
    "cache_latents": CacheLatentsConfig,
    "evaluate": EvaluateConfig,
    "benchmark": BenchmarkConfig,
    "calibrate_timesteps": CalibrateTimestepsConfig,
    "ablate_denoiser": AblateDenoiserConfig,
    "ablate_timesteps": AblateTimestepsConfig,
    "reproduce": ReproduceConfig,
}


def config_folder() -> Path:
    """Where Hydra's groups are: beside the package in a clone, and in it where that was installed from a wheel."""
    package = Path(__file__).parents[1]
    beside = package.parent / "configs"
    return beside if (beside / "train.yaml").is_file() else package / "configs"


def register() -> None:
    """Give Hydra the schemas, so that every documented field can be overridden on the command line."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    train = OmegaConf.structured(TrainConfig)
    for options in (train.bottleneck.options, train.timesteps, train.stage.image_losses):  # with keys of the user's
        OmegaConf.set_struct(options, False)
    reproduce = OmegaConf.structured(ReproduceConfig)
    for options in (reproduce.variants, reproduce.grid, reproduce.tolerance, reproduce.recipe.losses):
        OmegaConf.set_struct(options, False)
    for name, schema in {**SCHEMAS, "train": train, "reproduce": reproduce}.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(config)  # else keys that the schema lacks, added by +key=value, pass unseen
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        typed: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error.msg if getattr(error, "msg", None) else error).splitlines()[0]
        name = getattr(error, "full_key", None)
        if explained := explain_former(f"'{name}'"):
            raise ConfigError(explained) from None
        key = f"{name}: " if name else ""
        raise ConfigError(f"config: {key}{reason}") from None
    typed.check()
    return typed
