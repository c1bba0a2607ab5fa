"""Typed schemas of the configuration; contradictions are refused here, naming field, value and what is allowed.

A script parses its Hydra config once with `parse` and passes the typed result on. Unset (None) differs from zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional  # noqa: UP035 (OmegaConf reads Optional from the annotations)

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oscar.rates import PAPER_RATES, RATES, RatePoint, find_rate


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""


def _choose(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(str(item) for item in allowed)}")


def _at_least(name: str, value: float | None, low: float, strict: bool = False) -> None:
    if value is not None and (value < low or (strict and value == low)):
        raise ConfigError(f"{name} is {value}; allowed: {'above' if strict else 'at least'} {low:g}")


@dataclass
class BackboneConfig:
    """Where VAE, UNet and schedule come from: `source`, or the three configurations for random weights."""

    name: str = "nano"
    source: Optional[str] = None
    """diffusers folder or hub id with vae/, unet/ and scheduler/; None builds random weights from the fields below."""
    vae: Optional[dict[str, Any]] = None
    unet: Optional[dict[str, Any]] = None
    scheduler: Optional[dict[str, Any]] = None

    def check(self) -> None:
        if self.source is None and (self.vae is None or self.unet is None or self.scheduler is None):
            raise ConfigError("backbone.source is unset; allowed: a folder or hub id, or all of vae, unet, scheduler")


@dataclass
class BottleneckConfig:
    """The vector-quantised bottleneck (paper section 3.2)."""

    kind: str = "vq"
    rates: list[float] = field(default_factory=lambda: [rate.bpp for rate in PAPER_RATES])
    """nominal bits per pixel of the rates to build"""
    width: int = 192
    """N, channels of the backbone"""
    features: int = 320
    """M, channels around the quantiser"""
    codebook_dim: int = 32
    kmeans_init: bool = False
    dead_code_threshold: float = 0.0
    """share of its uses, were all codes used alike, below which it is revived; 0 never (the paper)"""
    decay: float = 0.8
    """of the codebook's moving average"""
    rotation_trick: bool = True

    def check(self) -> None:
        _choose("bottleneck.kind", self.kind, ("vq",))
        for name in ("width", "features", "codebook_dim"):
            _at_least(f"bottleneck.{name}", getattr(self, name), 2)
        if not self.rates:
            raise ConfigError("bottleneck.rates is empty; allowed: one or more of the configured rates")
        self.rate_points()

    def rate_points(self) -> tuple[RatePoint, ...]:
        try:
            points = {find_rate(bpp, RATES) for bpp in self.rates}
        except ValueError as error:
            raise ConfigError(f"bottleneck.rates: {error}") from None
        return tuple(sorted(points, key=lambda rate: rate.id))

    def options(self) -> dict[str, Any]:
        """Arguments of `VQBottleneck` beside the rates."""
        names = ("width", "features", "codebook_dim", "kmeans_init", "dead_code_threshold", "decay", "rotation_trick")
        return {name: getattr(self, name) for name in names}


@dataclass
class DenoiserConfig:
    """How the UNet is adapted (paper section 3.3)."""

    tuning: str = "lora"
    lora_rank: int = 16
    lora_alpha: float = 8.0
    prompt_tokens: int = 77
    prompt_init: str = "noise"
    """noise (the paper) or text: the backbone's text encoder on an empty prompt"""

    def check(self) -> None:
        _choose("denoiser.tuning", self.tuning, ("lora", "full"))
        _choose("denoiser.prompt_init", self.prompt_init, ("noise", "text"))
        _at_least("denoiser.lora_rank", self.lora_rank, 1)
        _at_least("denoiser.prompt_tokens", self.prompt_tokens, 1)

    def options(self) -> dict[str, Any]:
        names = ("tuning", "lora_rank", "lora_alpha", "prompt_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass
class DataConfig:
    """Training pictures."""

    train: list[str] = field(default_factory=list)
    """folders (searched recursively) and text lists of pictures"""
    crop: int = 256
    """side of the square crops in pixels; a multiple of 64, so that every rate's grid fits"""
    batch_size: int = 8
    """crops per process and forward pass"""
    workers: int = 2
    augment: bool = True
    """flips and right-angle rotations"""
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """range of the random shrinking before the crop"""
    cache: bool = False
    """keep decoded pictures in memory"""

    def check(self) -> None:
        if not self.train:
            raise ConfigError("data.train is empty; allowed: one or more folders or text lists of pictures")
        for path in self.train:
            if not Path(path).exists():
                raise ConfigError(f"data.train names {path!r}, which does not exist; allowed: folders or text lists")
        if self.crop < 64 or self.crop % 64:
            raise ConfigError(f"data.crop is {self.crop}; allowed: multiples of 64")
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.workers", self.workers, 0)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"data.scale is {list(self.scale)}; allowed: [low, high] with 0 < low <= high <= 1")


@dataclass
class OptimiserConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 5e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-2
    warmup_steps: int = 10
    schedule: str = "constant"
    grad_clip: Optional[float] = 1.0

    def check(self, name: str) -> None:
        _at_least(f"{name}.lr", self.lr, 0, strict=True)
        _at_least(f"{name}.warmup_steps", self.warmup_steps, 0)
        _at_least(f"{name}.grad_clip", self.grad_clip, 0, strict=True)
        _choose(f"{name}.schedule", self.schedule, ("constant", "cosine"))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{name}.betas is {list(self.betas)}; allowed: two numbers in [0, 1)")


@dataclass
class CriticConfig:
    """The adversarial critic of the joint stage (paper section 3.4)."""

    lora_rank: Optional[int] = 16
    """rank of the critic's LoRA; None trains all of its weights"""
    timesteps: list[int] = field(default_factory=lambda: [20, 980])
    """range [low, high) of the timesteps at which its inputs are re-noised, for a schedule of 1000"""
    weight: float = 1e-2
    """of the critic's own loss"""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def check(self, name: str) -> None:
        _at_least(f"{name}.lora_rank", self.lora_rank, 1)
        _at_least(f"{name}.weight", self.weight, 0)
        if len(self.timesteps) != 2 or not 0 <= self.timesteps[0] < self.timesteps[1] <= 1000:
            allowed = "[low, high] with 0 <= low < high <= 1000"
            raise ConfigError(f"{name}.timesteps is {list(self.timesteps)}; allowed: {allowed}")
        self.optimiser.check(f"{name}.optimiser")


@dataclass
class StageConfig:
    """What a stage trains and by which loss; fields that a stage does not use are refused if they are set."""

    name: str = "joint"
    """vae, prior, hyper or joint"""
    image_losses: dict[str, float] = field(default_factory=dict)
    """weight by term: l1, mse, ms_ssim, features, dists, lpips_vgg, lpips_alex; with the prefix edges_ on Sobel maps"""
    network_files: dict[str, str] = field(default_factory=dict)
    """local weight files by network: squeezenet, vgg16, alexnet, dists"""
    kl: float = 0.0
    """vae: weight of the posterior's KL divergence"""
    cosine: float = 0.0
    """hyper, joint: weight of the cosine loss"""
    commitment: float = 0.0
    """hyper, joint: weight of the quantiser's commitment loss; 0 is the paper's"""
    latent: float = 0.0
    """joint: weight of the mean squared error of x0 against the latent; 0 is the paper's"""
    gan: float = 0.0
    """joint: weight of the generator's adversarial loss"""
    critic: CriticConfig = field(default_factory=CriticConfig)
    rates_per_step: Optional[int] = None
    """hyper: rates trained per step, all if None; joint: 1"""
    rate_weights: dict[float, float] = field(default_factory=dict)
    """joint, hyper: relative probability of drawing a rate, 1 if not named"""
    vae: str = "frozen"
    """joint: frozen (the paper); decoder trains the VAE's decoder too; all trains the whole VAE"""

    def check(self, rates: tuple[RatePoint, ...]) -> None:
        _choose("stage.name", self.name, ("vae", "prior", "hyper", "joint"))
        _choose("stage.vae", self.vae, ("frozen", "decoder", "all"))
        for name in ("kl", "cosine", "commitment", "latent", "gan"):
            _at_least(f"stage.{name}", getattr(self, name), 0)
        for term, weight in self.image_losses.items():
            _at_least(f"stage.image_losses.{term}", weight, 0)
        used = {
            "vae": ("image_losses", "network_files", "kl"),
            "prior": (),
            "hyper": ("cosine", "commitment", "rates_per_step", "rate_weights"),
            "joint": ("image_losses", "network_files", "cosine", "commitment", "latent", "gan", "rate_weights",
                      "vae"),
        }[self.name]  # fmt: skip
        blank = StageConfig()
        for name in ("image_losses", "network_files", "kl", "cosine", "commitment", "latent", "gan",
                     "rates_per_step", "rate_weights", "vae"):  # fmt: skip
            if name not in used and getattr(self, name) != getattr(blank, name):
                raise ConfigError(
                    f"stage.{name} is {getattr(self, name)!r}, but stage {self.name} does not use it; "
                    f"allowed there: {', '.join(used) or 'none'}"
                )
        if self.name == "vae" and not any(self.image_losses.values()):
            raise ConfigError("stage.image_losses is empty; allowed: at least one positive weight")
        if self.name == "joint" and not any(self.image_losses.values()) and not self.latent:
            raise ConfigError("stage.image_losses is empty; allowed: at least one positive weight, or stage.latent")
        if self.name == "hyper" and not self.cosine:
            raise ConfigError("stage.cosine is 0; allowed: above 0 in stage hyper")
        if self.rates_per_step is not None and not 1 <= self.rates_per_step <= len(rates):
            raise ConfigError(f"stage.rates_per_step is {self.rates_per_step}; allowed: 1 to {len(rates)}")
        self.draw_weights(rates)
        self.critic.check("stage.critic")

    def draw_weights(self, rates: tuple[RatePoint, ...]) -> list[float]:
        """Relative probability of each of `rates`."""
        weights = {rate.id: 1.0 for rate in rates}
        for bpp, weight in self.rate_weights.items():
            try:
                weights[find_rate(float(bpp), rates).id] = float(weight)
            except ValueError as error:
                raise ConfigError(f"stage.rate_weights: {error}") from None
            _at_least(f"stage.rate_weights.{bpp}", float(weight), 0)
        if not any(weights.values()):
            raise ConfigError("stage.rate_weights are all 0; allowed: at least one above 0")
        return [weights[rate.id] for rate in rates]


@dataclass
class TrainerConfig:
    """The training loop."""

    max_steps: int = 150_000
    """optimiser steps"""
    accumulation: int = 1
    """forward passes per optimiser step"""
    mixed_precision: str = "no"
    ema_decay: Optional[float] = None
    """of the averaged weights that are saved at the end; None keeps no average"""
    checkpoint_every: int = 1000
    keep_last: int = 2
    log_every: int = 10
    resume: bool = True
    """continue from the newest checkpoint in `output`, if there is one"""
    channels_last: bool = False
    """memory layout of images and convolutions; often faster"""
    threads: Optional[int] = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        for name in ("max_steps", "accumulation", "checkpoint_every", "keep_last", "log_every"):
            _at_least(f"trainer.{name}", getattr(self, name), 1)
        _at_least("trainer.threads", self.threads, 1)
        _choose("trainer.mixed_precision", self.mixed_precision, ("no", "fp16", "bf16"))
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"trainer.ema_decay is {self.ema_decay}; allowed: between 0 and 1, or null")


@dataclass
class LoggerConfig:
    """CSV is always written; it needs no account."""

    tensorboard: bool = True
    wandb: bool = False
    project: str = "oscar"


@dataclass
class TrainConfig:
    """One training run: one stage on one backbone."""

    output: str = "runs/train"
    """folder of logs, checkpoints and the final model"""
    seed: int = 0
    init_from: Optional[str] = None
    """hyper, joint: OSCAR checkpoint folder to start from, instead of backbone, bottleneck, denoiser and timesteps"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    timesteps: dict[str, Any] = field(default_factory=lambda: {"kind": "table", "timesteps": "paper"})
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def check(self) -> None:
        if self.init_from is None:
            self.backbone.check()
        elif self.stage.name in ("vae", "prior"):
            name = self.stage.name
            raise ConfigError(f"init_from is set, but stage {name} starts from backbone.source; allowed: null")
        self.bottleneck.check()
        self.denoiser.check()
        self.data.check()
        self.stage.check(self.bottleneck.rate_points())
        self.optimiser.check("optimiser")
        self.trainer.check()


def register() -> None:
    """Give Hydra the schemas, so that every documented field can be overridden on the command line."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def parse(config: DictConfig, schema: type = TrainConfig) -> Any:
    """The typed, checked form of a Hydra config.

    Raises:
        ConfigError: with one line naming the field, its value and what is allowed.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        typed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error.msg if getattr(error, "msg", None) else error).splitlines()[0]
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"config: {key}{reason}") from None
    typed.check()
    return typed
