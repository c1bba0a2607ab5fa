"""Schema of a benchmark and its parts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any  # noqa: UP035 (OmegaConf reads Optional from the annotations)

from oscar.config.checks import ConfigError, at_least, choose
from oscar.config.images import BenchmarkImagesConfig, MetricsConfig
from oscar.config.model import BackboneConfig, BottleneckConfig
from oscar.config.stage import StageConfig
from oscar.rates import find_rate


@dataclass
class TimingConfig:
    """The timing part of a benchmark (`oscar.benchmark.speed.timing`), on the first image."""

    points: dict[str, list[float]] = field(default_factory=dict)
    """operating points by codec name; a codec that is not named is timed at the middle one of its own"""
    repeats: int = 10
    warmup: int = 2
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4])
    """of the throughput"""
    memory: bool = True
    """measure peak memory, in processes of their own that load the model anew"""

    def check(self) -> None:
        at_least("timing.repeats", self.repeats, 1)
        at_least("timing.warmup", self.warmup, 0)
        at_least("timing.batch_sizes", min(self.batch_sizes, default=1), 1)


@dataclass
class TrainingSpeedConfig:
    """The training part of a benchmark (`oscar.benchmark.speed.training`). It needs minutes."""

    measure: list[str] = field(default_factory=lambda: ["schedules", "loader", "joint"])
    """schedules: hyper-encoder steps per second; loader: how long steps wait for batches; joint: its steps"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """random weights will do; the UNet is built for joint alone"""
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    joint: StageConfig = field(default_factory=StageConfig)
    """losses of stage joint; those whose weights cannot be had are left out"""
    images: str | None = None
    """folder of images to load; None makes JPEG files of DIV2K's size of scikit-image's packaged photographs"""
    crop: int = 256
    batch_size: int = 4
    """of schedules and loader; joint takes one crop"""
    workers: int = 2
    """loading processes of the loader's measurement; the schedules' batches lie in memory"""
    repeats: int = 3
    """rounds of the schedules; in each, every schedule trains every rate by one step"""
    warmup: int = 1
    loader_steps: int = 10
    """steps that are watched, after those whose batches were loaded ahead"""
    joint_steps: int = 3

    def check(self) -> None:
        for name in self.measure:
            choose("training.measure", name, ("schedules", "loader", "joint"))
        if self.joint.name != "joint":
            raise ConfigError(f"training.joint.name is {self.joint.name!r}; allowed: joint")
        if self.crop < 64 or self.crop % 64:
            raise ConfigError(f"training.crop is {self.crop}; allowed: multiples of 64")
        for name in ("batch_size", "workers", "repeats", "loader_steps", "joint_steps"):
            at_least(f"training.{name}", getattr(self, name), 1)
        at_least("training.warmup", self.warmup, 0)
        if self.images is not None and not Path(self.images).is_dir():
            raise ConfigError(f"training.images is {self.images!r}; allowed: a folder of images that exists")
        self.backbone.check()
        self.bottleneck.complete()
        self.bottleneck.check()
        self.joint.check(self.bottleneck)


@dataclass
class InferenceSpeedConfig:
    """The inference part of a benchmark (`oscar.benchmark.speed.inference`). At full size it needs minutes."""

    measure: list[str] = field(default_factory=lambda: ["latency", "memory"])
    """latency: encode and decode beside the plain way; memory: loading and running each half in a process of its own;
    large: memory of one large image, likewise"""
    model: str | None = None
    """checkpoint folder or hub id; None makes one of random weights from backbone and bottleneck, in the output"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    sizes: list[str] = field(default_factory=lambda: ["512x512"])
    """WIDTHxHEIGHT of the latency's images; the first is that of memory too"""
    rate: float = 0.0625
    """nominal bpp"""
    dtypes: list[str] = field(default_factory=lambda: ["auto", "float32"])
    """precisions of ours; auto is the default setting"""
    compile: list[str] = field(default_factory=lambda: ["off"])
    """off, on (torch.compile), graphs (CUDA graphs too): each for every dtype"""
    repeats: int = 5
    """rounds, in each of which every way is measured once"""
    warmup: int = 1
    large_size: str = "3840x2160"
    large_dtype: str = "bfloat16"
    large_memory: str = "auto"
    """budget of the large image: auto, or a size such as 4GB"""

    def check(self) -> None:
        for name in self.measure:
            choose("inference.measure", name, ("latency", "memory", "large"))
        for name in self.dtypes:
            choose("inference.dtypes", name, ("auto", "float32", "float16", "bfloat16"))
        for name in self.compile:
            choose("inference.compile", name, ("off", "on", "graphs"))
        choose("inference.large_dtype", self.large_dtype, ("float32", "float16", "bfloat16"))
        for name in ("sizes", "dtypes", "compile"):
            if not getattr(self, name):
                raise ConfigError(f"inference.{name} is empty; allowed: one or more")
        for size in (*self.sizes, self.large_size):
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
                raise ConfigError(f"inference: size {size!r} is not allowed; allowed: WIDTHxHEIGHT, such as 512x512")
        at_least("inference.repeats", self.repeats, 1)
        at_least("inference.warmup", self.warmup, 0)
        if self.model is None:
            self.backbone.check()
            self.bottleneck.complete()
            self.bottleneck.check()
        try:
            find_rate(self.rate)
        except ValueError as error:
            raise ConfigError(f"inference.rate: {error}") from None


@dataclass
class BenchmarkConfig:
    """One benchmark: several codecs on one data set."""

    output: str = "benchmark"
    """folder of the results; a run that was interrupted goes on in it"""
    parts: list[str] = field(default_factory=lambda: ["quality", "matched", "timing", "report"])
    """quality: every codec at its points; matched: baselines at the sizes of OSCAR's files; timing; report: the page.
    Parts that are left out stand in tables and page as an earlier run left them. training and inference measure speed
    at full size, which takes minutes, and need none of these codecs and images"""
    models: dict[str, str] = field(default_factory=dict)
    """OSCAR models by their name in the results: nano, a checkpoint folder or a hub id"""
    protocols: list[str] = field(default_factory=lambda: ["bitstream"])
    """of the OSCAR models: bitstream (real files, any size), paper (the published code's: resized images, no file)"""
    dtype: str = "float32"
    """precision of the OSCAR models' networks"""
    rates: list[float] | None = None
    """nominal bpp of the OSCAR models' rates; None takes all"""
    baselines: dict[str, Any] = field(default_factory=dict)
    """by any name: `name` of a baseline, `points`, and its options (configs/baselines)"""
    data: BenchmarkImagesConfig = field(default_factory=BenchmarkImagesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    bd_method: str = "pchip"
    """interpolation of BD-rate: pchip, akima or cubic"""
    timing: TimingConfig = field(default_factory=TimingConfig)
    training: TrainingSpeedConfig = field(default_factory=TrainingSpeedConfig)
    inference: InferenceSpeedConfig = field(default_factory=InferenceSpeedConfig)
    report_images: int = 6
    """images in the report's browser, spread over the data set; each costs the page some megabytes"""
    device: str | None = None
    """of the networks, also the metrics'; None takes a GPU if there is one"""
    threads: int | None = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        for part in self.parts:
            choose("parts", part, ("quality", "matched", "timing", "report", "training", "inference"))
        for protocol in self.protocols:
            choose("protocols", protocol, ("bitstream", "paper"))
        choose("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        choose("bd_method", self.bd_method, ("pchip", "akima", "cubic"))
        if not (self.models and self.protocols) and not self.baselines:
            raise ConfigError("models and baselines are empty; allowed: at least one codec")
        for name in self.models:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ConfigError(f"models.{name} is no name; allowed: letters, digits and . _ + -")
        for key, options in self.baselines.items():
            if not isinstance(options, dict) or not isinstance(options.get("name"), str):
                raise ConfigError(f"baselines.{key} is {options!r}; allowed: name: BASELINE, and its options")
        if self.rates is not None and not self.rates:
            raise ConfigError("rates is empty; allowed: one or more nominal bpp, or null for all")
        at_least("report_images", self.report_images, 0)
        at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()
        self.timing.check()
        for part in ("training", "inference"):
            if part in self.parts:
                getattr(self, part).check()
