"""Schemas of evaluation, of calibration and of the ablations over one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any  # noqa: UP035 (OmegaConf reads Optional from the annotations)

from oscar.config.checks import ConfigError, at_least, choose
from oscar.config.images import ImagesConfig, MetricsConfig, PackagedImagesConfig


@dataclass
class EvaluateConfig:
    """One evaluation: one codec on one folder of images."""

    output: str = "runs/evaluate"
    """folder of the results; a run that was interrupted goes on in it"""
    codec: str = "oscar"
    """oscar, or the name of a baseline (`oscar.baselines.registry.BASELINES`)"""
    model: str = "nano"
    """oscar: nano, a checkpoint folder or a hub id"""
    protocol: str = "bitstream"
    """oscar: bitstream (real files, any size), or paper (the published code's: resized images, no file)"""
    dtype: str = "float32"
    """oscar: precision of the networks"""
    options: dict[str, Any] = field(default_factory=dict)
    """baselines: arguments of their constructor"""
    points: list[float] | None = None
    """operating points: nominal bpp of oscar's rates, quality of a baseline; None takes the codec's own list"""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    save_images: bool = False
    """keep decoded images in output/images and files in output/files"""
    device: str | None = None
    """of the networks, also the metrics'; None leaves it to Accelerate: a GPU per process if there are any"""
    threads: int | None = None
    """CPU threads of each process; None leaves the library's choice"""

    def check(self) -> None:
        choose("protocol", self.protocol, ("bitstream", "paper"))
        choose("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        if self.codec != "oscar" and self.protocol == "paper":
            raise ConfigError(f"protocol is 'paper', but codec is {self.codec!r}; allowed there: bitstream")
        if self.codec == "oscar" and self.options:
            raise ConfigError(f"options is {self.options}, but codec oscar has none; allowed there: {{}}")
        if self.points is not None and not self.points:
            raise ConfigError("points is empty; allowed: one or more points, or null for the codec's own")
        at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()


@dataclass
class CalibrateTimestepsConfig:
    """One measurement of how noisy a checkpoint's quantised latents are."""

    output: str = "runs/calibrate_timesteps"
    """folder of the results"""
    model: str = "nano-vq"
    """nano-vq, a checkpoint folder or a hub id"""
    data: PackagedImagesConfig = field(default_factory=PackagedImagesConfig)
    save_to: str | None = None
    """folder for a copy of the checkpoint with the measured mapping"""
    save_mapping: str = "cosine"
    """which one that copy gets: cosine or snr"""
    device: str = "cpu"
    threads: int | None = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        choose("save_mapping", self.save_mapping, ("cosine", "snr"))
        at_least("threads", self.threads, 1)
        self.data.check()


@dataclass
class AblateTimestepsConfig:
    """Mappings and a sweep of timesteps over one checkpoint."""

    output: str = "runs/ablate_timesteps"
    """folder of the results; a run that was interrupted goes on in it"""
    model: str = "nano-vq"
    """nano-vq, a checkpoint folder or a hub id"""
    mappings: dict[str, Any] = field(default_factory=dict)
    """by any name (configs/timesteps); cosine and snr without a calibration file are measured on the images below"""
    sweep: list[int] = field(default_factory=list)
    """timesteps to decode every rate at, beside those of the mappings"""
    rates: list[float] | None = None
    """nominal bpp of the rates; None takes all of the model's"""
    data: PackagedImagesConfig = field(default_factory=PackagedImagesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    device: str = "cpu"
    threads: int | None = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        if not self.mappings:
            raise ConfigError("mappings is empty; allowed: one or more by name")
        for name, mapping in self.mappings.items():
            if name == "best" or not isinstance(mapping, dict):
                raise ConfigError(f"mappings.{name} is {mapping!r}; allowed: a mapping of any name but best")
        if self.rates is not None and not self.rates:
            raise ConfigError("rates is empty; allowed: one or more nominal bpp, or null for all")
        at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()


@dataclass
class AblateDenoiserConfig:
    """A checkpoint's files decoded with and without its UNet."""

    output: str = "runs/ablate_denoiser"
    """folder of the results; a run that was interrupted goes on in it"""
    model: str = "nano"
    """nano, a checkpoint folder or a hub id"""
    points: list[float] | None = None
    """operating points: nominal bpp or quality; None takes the model's own list"""
    timestep: int | None = None
    """the one for all points; None takes the mean of the points' own"""
    data: PackagedImagesConfig = field(default_factory=PackagedImagesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    device: str = "cpu"
    threads: int | None = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        if self.points is not None and not self.points:
            raise ConfigError("points is empty; allowed: one or more points, or null for the model's own")
        at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()
