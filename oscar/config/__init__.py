"""Typed schemas of the configuration; contradictions are refused here, naming field, value and what is allowed.

A script parses its Hydra config once with `parse` and passes the typed result on. Unset (None) differs from zero.
"""

from oscar.config.benchmark import BenchmarkConfig, InferenceSpeedConfig, TimingConfig, TrainingSpeedConfig
from oscar.config.checks import ConfigError, fill, take
from oscar.config.data import CacheLatentsConfig, DataConfig
from oscar.config.evaluation import (
    AblateDenoiserConfig,
    AblateTimestepsConfig,
    CalibrateTimestepsConfig,
    EvaluateConfig,
)
from oscar.config.images import BenchmarkImagesConfig, ImagesConfig, MetricsConfig, PackagedImagesConfig
from oscar.config.model import (
    DENOISER,
    HYPERPRIOR,
    VQ,
    BackboneConfig,
    BottleneckConfig,
    DenoiserConfig,
    HyperpriorConfig,
)
from oscar.config.parse import SCHEMAS, config_folder, job_name, parse, parse_job, register
from oscar.config.reproduce import STUDIES, RecipeConfig, ReproduceConfig, StudyImagesConfig
from oscar.config.stage import IMAGE_FIELDS, ContextConfig, CriticConfig, OptimiserConfig, StageConfig
from oscar.config.training import LoggerConfig, TrainConfig, TrainerConfig, ValidationConfig

__all__ = [
    "AblateDenoiserConfig",
    "AblateTimestepsConfig",
    "BackboneConfig",
    "BenchmarkConfig",
    "BenchmarkImagesConfig",
    "BottleneckConfig",
    "CacheLatentsConfig",
    "CalibrateTimestepsConfig",
    "ConfigError",
    "ContextConfig",
    "CriticConfig",
    "DENOISER",
    "DataConfig",
    "DenoiserConfig",
    "EvaluateConfig",
    "HYPERPRIOR",
    "HyperpriorConfig",
    "IMAGE_FIELDS",
    "InferenceSpeedConfig",
    "LoggerConfig",
    "MetricsConfig",
    "OptimiserConfig",
    "PackagedImagesConfig",
    "ImagesConfig",
    "RecipeConfig",
    "ReproduceConfig",
    "STUDIES",
    "SCHEMAS",
    "StageConfig",
    "StudyImagesConfig",
    "TimingConfig",
    "TrainConfig",
    "TrainerConfig",
    "TrainingSpeedConfig",
    "VQ",
    "ValidationConfig",
    "config_folder",
    "fill",
    "job_name",
    "parse",
    "parse_job",
    "register",
    "take",
]
