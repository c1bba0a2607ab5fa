"""Schema of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any  # noqa: UP035 (OmegaConf reads Optional from the annotations)

from oscar.config.checks import ConfigError, at_least, choose
from oscar.config.data import DataConfig
from oscar.config.images import MetricsConfig
from oscar.config.model import BackboneConfig, BottleneckConfig, DenoiserConfig
from oscar.config.stage import OptimiserConfig, StageConfig
from oscar.rates import RatePoint, find_rate
from oscar.registry import STAGES
from oscar.utils import former


@dataclass
class TrainerConfig:
    """The training loop."""

    max_steps: int = 150_000
    """optimiser steps"""
    accumulation: int = 1
    """forward passes per optimiser step"""
    mixed_precision: str = "no"
    """no, bf16, or fp16 with a scaled loss, which takes a GPU: on a CPU the run says so and is in float32"""
    ema_decay: float | None = None
    """of the averaged weights that are saved at the end; None keeps no average"""
    checkpoint_every: int = 1000
    keep_last: int = 2
    """checkpoints that are kept, beside that of the best validation"""
    log_every: int = 10
    """steps of which each row of log.csv holds the means"""
    resume: bool = True
    """continue from the newest checkpoint in `output`, if there is one"""
    final: str = "last"
    """weights of the result: last, or best by validation"""
    non_finite: str = "stop"
    """a loss or gradient that is no number: stop names the images and stops; skip leaves the step out everywhere"""
    max_skipped: int = 10
    """skip: so many such steps in a row stop the run"""
    gradient_checkpointing: bool = False
    """vae, diffusion_pretrain, joint: compute the activations of UNet, VAE and critic again in the backward pass; saves
    memory"""
    compile: bool = False
    """run VAE, UNet, hyper-encoders and critic through torch.compile"""
    channels_last: bool = False
    """memory layout of images and convolutions; often faster"""
    tf32: bool = False
    """GPUs from Ampere on: matrix products of float32 in TensorFloat-32 too, as convolutions are by torch's default"""
    cudnn_deterministic: bool = False
    """GPUs: only convolutions that repeat to the bit (published, by pyiqa); slower"""
    threads: int | None = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        for name in ("max_steps", "accumulation", "checkpoint_every", "keep_last", "log_every", "max_skipped"):
            at_least(f"trainer.{name}", getattr(self, name), 1)
        at_least("trainer.threads", self.threads, 1)
        choose("trainer.final", self.final, ("last", "best"))
        choose("trainer.non_finite", self.non_finite, ("stop", "skip"))
        choose("trainer.mixed_precision", self.mixed_precision, ("no", "fp16", "bf16"))
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"trainer.ema_decay is {self.ema_decay}; allowed: between 0 and 1, or null")


@dataclass
class LoggerConfig:
    """CSV is always written; it needs no account."""

    tensorboard: bool = True
    wandb: bool = False
    project: str = "oscar"


@dataclass
class ValidationConfig:
    """Validation during training, on a fixed set of images; off unless `images` is given."""

    images: str | None = None
    """folder, searched recursively; the images are kept in memory"""
    limit: int | None = 24
    """only so many, the first in the order of their paths; None takes all"""
    crop: int | None = None
    """side of the centre crop that stands for each image, a multiple of 64; None takes whole images"""
    every: int = 1000
    """optimiser steps between two validations; one more follows the last step"""
    rates: list[float] | None = None
    """bottleneck, joint: nominal bpp of the rates to validate; None takes all"""
    qualities: list[float] | None = None
    """bottleneck, joint with a hyperprior: qualities to validate, 0 to 1; None takes five"""
    points: list[float] | None = None
    """bottleneck, joint with a bottleneck of your own: operating points to validate; None takes all"""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """of single images; those whose weights cannot be had are left out, with a warning"""
    best: str | None = None
    """scalar that picks the best checkpoint: a metric, or in stages bottleneck and joint also bpp or cosine; None takes
    cosine in stage bottleneck, loss in stage diffusion_pretrain, and otherwise the first metric that can be had"""
    grid: int = 4
    """images in the grid of originals and reconstructions; 0 makes none"""

    @property
    def enabled(self) -> bool:
        return self.images is not None

    def check(self, stage: str, bottleneck: BottleneckConfig) -> None:
        if self.images is not None and not Path(self.images).is_dir():
            raise ConfigError(f"validation.images is {self.images!r}; allowed: a folder of images that exists")
        for name in ("limit", "every"):
            at_least(f"validation.{name}", getattr(self, name), 1)
        at_least("validation.grid", self.grid, 0)
        if self.crop is not None and (self.crop < 64 or self.crop % 64):
            raise ConfigError(f"validation.crop is {self.crop}; allowed: multiples of 64, or null")
        for name in ("rates", "qualities", "points"):
            own = bottleneck.family.validation_field == name
            if getattr(self, name) is not None and not (own and STAGES[stage].trains_codec):
                what = f"a model with {bottleneck.family.point_words}" if not own else f"stage {stage}"
                raise ConfigError(f"validation.{name} is set, but {what} has no {name}; allowed: null")
        if self.rates is not None:
            self.rate_points(bottleneck.rate_points())
        if self.qualities is not None and not (self.qualities and all(0 <= value <= 1 for value in self.qualities)):
            raise ConfigError(f"validation.qualities is {list(self.qualities)}; allowed: one or more from 0 to 1")
        if self.points is not None and not self.points:
            raise ConfigError("validation.points is empty; allowed: one or more of the bottleneck's points, or null")
        self.metrics.check()

    def rate_points(self, rates: tuple[RatePoint, ...]) -> tuple[RatePoint, ...]:
        """Those of `rates` that are validated."""
        if self.rates is None:
            return rates
        try:
            points = {find_rate(bpp, rates) for bpp in self.rates}
        except ValueError as error:
            raise ConfigError(f"validation.rates: {error}") from None
        if not points:
            raise ConfigError("validation.rates is empty; allowed: one or more of the configured rates, or null")
        return tuple(sorted(points, key=lambda rate: rate.id))


@dataclass
class TrainConfig:
    """One training run: one stage on one backbone."""

    output: str = "runs/train"
    """folder of logs, checkpoints and the final model"""
    preflight: bool = False
    """train nothing: look at weights, data, memory, disk and speed, and say what would stop the run or slow it down"""
    plan: bool = False
    """train nothing, and need no weights, images or GPU: compute memory and hours from the shapes (docs/gpu.md)"""
    seed: int = 0
    init_from: str | None = None
    """bottleneck, joint, context: OSCAR checkpoint folder to start from. Backbone, bottleneck and denoiser are then its
    own: what is set there must be equal to it, but for `backbone.source` (where its backbone is now), fewer
    `bottleneck.rates`, `denoiser.prompt_init`, all of denoiser after stage 1, which trains none, and what is said to be
    the run's own"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    timesteps: dict[str, Any] | None = field(default_factory=dict)
    """bottleneck, joint: mapping from rate to pseudo-timestep (configs/timesteps, or a kind of your own); if empty,
    that of `init_from`, and the paper's table without it"""
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def check(self) -> None:
        self.timesteps = self.timesteps or None
        if self.stage.name in former.STAGES.keys() - STAGES.keys():
            new = former.STAGES[self.stage.name]
            raise ConfigError(f"stage.name is {self.stage.name!r}, which is called {new!r} now; allowed: {new}")
        choose("stage.name", self.stage.name, tuple(STAGES))
        if self.plan and self.preflight:
            raise ConfigError("plan and preflight are both true; allowed: one of them")
        stage = STAGES[self.stage.name]
        if self.timesteps is not None and not stage.trains_codec:
            raise ConfigError(f"timesteps is set, but stage {self.stage.name} has no rates; allowed: null")
        if self.init_from is None:
            self.bottleneck.complete()
            self.denoiser.complete()
            self.backbone.check()
        elif not stage.trains_codec:
            name = self.stage.name
            raise ConfigError(f"init_from is set, but stage {name} starts from backbone.source; allowed: null")
        self.bottleneck.check()
        self.denoiser.check()
        self.data.check(needs_images=not self.plan)
        if self.data.latents is not None and not stage.works_on_latents:
            name = self.stage.name
            raise ConfigError(f"data.latents is {self.data.latents!r}, but stage {name} needs images; allowed: null")
        if self.bottleneck.is_known:  # else that of init_from, see oscar.training.resolve
            self.stage.check(self.bottleneck)
        if self.data.latents is not None and self.stage.sample_latents:
            raise ConfigError(
                f"stage.sample_latents is true, but data.latents is {self.data.latents!r}, which holds "
                "modes; allowed: false"
            )
        self.optimiser.check("optimiser")
        self.trainer.check()
        for name, optimiser in (("optimiser", self.optimiser), ("stage.critic.optimiser", self.stage.critic.optimiser)):
            if optimiser.schedule_steps is not None:
                at_least(f"{name}.schedule_steps", optimiser.schedule_steps, self.trainer.max_steps)
        if self.trainer.gradient_checkpointing and stage.works_on_latents:
            raise ConfigError(
                f"trainer.gradient_checkpointing is true, but stage {self.stage.name} has no gradient "
                "through UNet or VAE; allowed: false"
            )
        if self.trainer.final == "best" and not self.validation.enabled:
            raise ConfigError("trainer.final is 'best', but validation.images is unset; allowed: last")
        if self.bottleneck.is_known:
            self.validation.check(self.stage.name, self.bottleneck)
