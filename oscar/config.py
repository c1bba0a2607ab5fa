"""Typed schemas of the configuration; contradictions are refused here, naming field, value and what is allowed.

A script parses its Hydra config once with `parse` and passes the typed result on. Unset (None) differs from zero.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional  # noqa: UP035 (OmegaConf reads Optional from the annotations)

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oscar.rates import PAPER_RATES, RATES, RatePoint, find_rate
from oscar.registry import BOTTLENECKS, STAGES


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""


def _choose(name: str, value: Any, allowed: tuple) -> None:
    if value is not None and value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(str(item) for item in allowed)}")


def fill(config: Any, values: Mapping[str, Any]) -> None:
    """Give fields that are unset a value, in place."""
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, copy.deepcopy(value))


def take(config: Any, name: str, stored: Mapping[str, Any]) -> None:
    """Take fields, or entries of a dict, over from a checkpoint; refuse those that are set to other values.

    Raises:
        ConfigError: naming the first such.
    """
    values = config if isinstance(config, dict) else vars(config)
    for key, value in stored.items():
        own = values.get(key)
        if own is None:
            values[key] = copy.deepcopy(value)
        elif own != value:
            raise ConfigError(f"{name}.{key} is {own!r}, but init_from has {value!r}; allowed: the same, or null")


def _at_least(name: str, value: float | None, low: float, strict: bool = False) -> None:
    if value is not None and (value < low or (strict and value == low)):
        raise ConfigError(f"{name} is {value}; allowed: {'above' if strict else 'at least'} {low:g}")


@dataclass
class BackboneConfig:
    """Where VAE, UNet and schedule come from: `source`, or the three configurations for random weights."""

    name: Optional[str] = None
    source: Optional[str] = None
    """diffusers folder or hub id with vae/, unet/ and scheduler/; None builds random weights from the fields below.
    With `init_from` where its backbone is now, if it has moved"""
    vae: Optional[dict[str, Any]] = None
    unet: Optional[dict[str, Any]] = None
    scheduler: Optional[dict[str, Any]] = None

    def check(self) -> None:
        if self.source is None and (self.vae is None or self.unet is None or self.scheduler is None):
            raise ConfigError("backbone.source is unset; allowed: a folder or hub id, all of vae, unet, scheduler, "
                              "or backbone=NAME of configs/backbone")  # fmt: skip


@dataclass
class HyperpriorConfig:
    """Sizes of a hyperprior bottleneck (`oscar.bottlenecks.hyperprior`)."""

    groups: Optional[list[int]] = None
    """latent channels that are coded together; each group is predicted from all before it"""
    hidden: Optional[int] = None
    """width of the layers that predict"""
    features: Optional[int] = None
    """channels of the decoded side information"""
    side_channels: Optional[int] = None
    """channels of the side information itself"""
    side_features: Optional[int] = None
    """channels within the network that decodes it"""

    def check(self) -> None:
        if self.groups is not None and (not self.groups or min(self.groups) < 1):
            raise ConfigError(f"bottleneck.hyperprior.groups is {list(self.groups)}; allowed: numbers above 0")
        for name in ("hidden", "features", "side_channels", "side_features"):
            _at_least(f"bottleneck.hyperprior.{name}", getattr(self, name), 1)


@dataclass
class BottleneckConfig:
    """The vector-quantised bottleneck (paper section 3.2), a hyperprior for any rate, or one of your own.

    What is unset (None) is that of `init_from`, and without it as in `VQ` or `HYPERPRIOR`.
    """

    kind: Optional[str] = None
    """vq, which has all fields but `hyperprior` and `options`; hyperprior, which has it alone; or one of your own
    (docs/extend.md), which has `options`"""
    options: dict[str, Any] = field(default_factory=dict)
    """of a kind of your own: arguments of its constructor"""
    hyperprior: HyperpriorConfig = field(default_factory=HyperpriorConfig)
    rates: Optional[list[float]] = None
    """nominal bits per pixel of the rates to build; with `init_from` those of its rates that are kept"""
    width: Optional[int] = None
    """N, channels of the backbone"""
    features: Optional[int] = None
    """M, channels around the quantiser"""
    codebook_dim: Optional[int] = None
    kmeans_init: Optional[bool] = None
    """start the codebooks from k-means over the first pass's features; false is the paper's setting"""
    dead_code_threshold: float = 0.0
    """share of its uses, were all codes used alike, below which it is revived; 0, the paper's setting, never"""
    decay: float = 0.8
    """of the codebook's moving average; 0.8, the quantiser library's default, is the paper's"""
    rotation_trick: bool = True
    """gradient through the quantiser by rotation (the library's default, as in the paper), else straight through"""
    dither: dict[float, float] = field(default_factory=dict)
    """noise at the encoder's input by nominal bpp, as a share of each channel's root mean square; 0 (the paper) where a
    rate is not named. With `init_from` too, it replaces the checkpoint's if it is not empty"""
    stages: dict[float, int] = field(default_factory=dict)
    """codes that are summed to one vector by nominal bpp: 1 (the paper) where a rate is not named; 4, 16 or 64 take the
    indices of 2x2, 4x4 or 8x8 positions together, and are trained by gradient: decay, dead_code_threshold and
    rotation_trick do nothing there. With `init_from`, a rate that had another number gets a new hyper-encoder"""
    start_from: dict[float, float] = field(default_factory=dict)
    """nominal bpp of the rate, on the same grid of vectors, whose weights such a new hyper-encoder takes over, all but
    the codes; only with `init_from`"""

    def complete(self) -> None:
        """Fill in what is unset, for a new bottleneck."""
        _choose("bottleneck.kind", self.kind, tuple(BOTTLENECKS))
        self.kind = self.kind or "vq"
        self.family.complete(self)

    @property
    def family(self) -> Any:
        """The class of the bottleneck, which says what goes with it."""
        return BOTTLENECKS[self.kind or "vq"]

    def check(self) -> None:
        _choose("bottleneck.kind", self.kind, tuple(BOTTLENECKS))
        self.hyperprior.check()
        blank, used = BottleneckConfig(), {"kind", *self.family.config_fields}
        known = self.kind is not None  # else it is that of `init_from`, see oscar.training.resolve
        for name in sorted({item.name for item in fields(self)} - used) if known else ():
            if getattr(self, name) != getattr(blank, name):
                raise ConfigError(f"bottleneck.{name} is {getattr(self, name)}, but kind {self.kind} does not use it; "
                                  "allowed: its default")  # fmt: skip
        for name in ("width", "features", "codebook_dim"):
            _at_least(f"bottleneck.{name}", getattr(self, name), 2)
        if self.rates is not None and not self.rates:
            raise ConfigError("bottleneck.rates is empty; allowed: one or more of the configured rates")
        for bpp, share in self.dither.items():
            _at_least(f"bottleneck.dither.{bpp}", share, 0)
        for bpp, stages in self.stages.items():
            _choose(f"bottleneck.stages.{bpp}", stages, (1, 4, 16, 64))
        for bpp in self.start_from:
            if bpp not in self.stages:
                raise ConfigError(f"bottleneck.start_from.{bpp} is set, but that rate's stages are not; "
                                  f"allowed: {', '.join(map(str, self.stages)) or 'none'}")  # fmt: skip
        for name in ("dither", "stages", "start_from"):
            self.by_id(name)

    @property
    def is_known(self) -> bool:
        """Whether it is set of which kind it is and which rates it has."""
        return self.family.is_known(self)

    def rate_points(self) -> tuple[RatePoint, ...]:
        """The rates, by id; all that there are where they are not known yet, none of a kind without rates."""
        if "rates" not in self.family.config_fields:
            return ()
        try:
            points = {find_rate(bpp, RATES) for bpp in self.rates} if self.rates is not None else set(RATES)
        except ValueError as error:
            raise ConfigError(f"bottleneck.rates: {error}") from None
        return tuple(sorted(points, key=lambda rate: rate.id))

    def by_id(self, name: str) -> dict[int, Any]:
        """A field that goes by nominal bpp, such as dither, by rate id; of start_from the values are ids too."""
        points = self.rate_points()
        try:
            values = {find_rate(float(bpp), points).id: value for bpp, value in getattr(self, name).items()}
            if name == "start_from":
                values = {rate_id: find_rate(float(bpp), points).id for rate_id, bpp in values.items()}
        except ValueError as error:
            raise ConfigError(f"bottleneck.{name}: {error}") from None
        return values

    def describe(self) -> dict[str, Any]:
        """What `oscar.bottlenecks.from_config` takes."""
        return self.family.describe(self)

    def training_options(self) -> dict[str, Any]:
        """What may change from one run to the next: arguments of `VQBottleneck.set_training`."""
        return {name: getattr(self, name) for name in ("dead_code_threshold", "decay", "rotation_trick")}


@dataclass
class DenoiserConfig:
    """How the UNet is adapted (paper section 3.3). What is unset (None) is that of `init_from`, else of `DENOISER`."""

    tuning: Optional[str] = None
    """lora or full"""
    lora_rank: Optional[int] = None
    lora_alpha: Optional[float] = None
    prompt_tokens: Optional[int] = None
    prompt_init: Optional[str] = None
    """noise (the paper) or text: the backbone's text encoder on an empty prompt. With `init_from` either one takes the
    place of its prompt, which None keeps"""

    def complete(self) -> None:
        """Fill in what is unset, for a new denoiser."""
        fill(self, DENOISER)

    def check(self) -> None:
        _choose("denoiser.tuning", self.tuning, ("lora", "full"))
        _choose("denoiser.prompt_init", self.prompt_init, ("noise", "text"))
        _at_least("denoiser.lora_rank", self.lora_rank, 1)
        _at_least("denoiser.prompt_tokens", self.prompt_tokens, 1)

    def options(self) -> dict[str, Any]:
        names = ("tuning", "lora_rank", "lora_alpha", "prompt_tokens")
        return {name: getattr(self, name) for name in names}


# Options of image losses, in `StageConfig`.
IMAGE_FIELDS = ("image_losses", "network_files", "download", "image_range", "edges", "clamp_output")
# What a new bottleneck and denoiser have where nothing is set: the paper's values, and nano-hyperprior's sizes.
VQ = {"rates": [rate.bpp for rate in PAPER_RATES], "width": 192, "features": 320, "codebook_dim": 32,
      "kmeans_init": False}  # fmt: skip
HYPERPRIOR = {"groups": [8, 8, 16, 32], "hidden": 96, "features": 64, "side_channels": 32, "side_features": 48}
DENOISER = {"tuning": "lora", "lora_rank": 16, "lora_alpha": 8.0, "prompt_tokens": 77, "prompt_init": "noise"}


@dataclass
class DataConfig:
    """Training pictures."""

    train: list[str] = field(default_factory=list)
    """folders (searched recursively), text lists of pictures, WebDataset shards (.tar), patterns of these such as
    shards/{000..099}.tar, and hf:DATASET[#SPLIT] for a Hugging Face data set (`oscar.data.sources`)"""
    latents: Optional[str] = None
    """hyper, context: latents folder that scripts/cache_latents.py made of such pictures; `train` is not read then"""
    crop: int = 256
    """side of the square crops in pixels; a multiple of 64, so that every rate's grid fits"""
    batch_size: int = 8
    """crops per process and forward pass"""
    total_batch_size: Optional[int] = None
    """crops that an optimiser step must take over all processes and passes, or the run is refused; None takes any"""
    workers: int = 2
    augment: bool = True
    """flips and right-angle rotations"""
    crop_margin: int = 0
    """pixels by which a first crop is larger. After flips and rotations the crop is cut from it, half of the time at a
    random place and else at the top left. Published: 8. 0 cuts once, with all places alike"""
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """range of the random shrinking before the crop"""
    cache: bool = False
    """keep decoded pictures in memory"""

    def check(self) -> None:
        from oscar.data.sources import HUB, expand

        if self.latents is not None:
            if not Path(self.latents).is_dir():
                allowed = "a folder that scripts/cache_latents.py wrote"
                raise ConfigError(f"data.latents is {self.latents!r}, which does not exist; allowed: {allowed}")
        elif not self.train:
            raise ConfigError("data.train is empty; allowed: one or more folders or text lists of pictures")
        for root in () if self.latents is not None else self.train:
            if not root.startswith(HUB):
                try:
                    expand(root)
                except ValueError as error:
                    raise ConfigError(f"data.train names {root!r}: {error}") from None
        if self.crop < 64 or self.crop % 64:
            raise ConfigError(f"data.crop is {self.crop}; allowed: multiples of 64")
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.total_batch_size", self.total_batch_size, 1)
        _at_least("data.workers", self.workers, 0)
        _at_least("data.crop_margin", self.crop_margin, 0)
        if self.crop_margin and not self.augment:
            raise ConfigError(f"data.crop_margin is {self.crop_margin}, but data.augment is false; allowed: 0")
        if self.crop_margin and self.latents is not None:
            raise ConfigError(f"data.crop_margin is {self.crop_margin}, but data.latents are of crops without one; "
                              "allowed: 0")  # fmt: skip
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
    """after the warm-up: constant, or cosine, which falls to 0"""
    schedule_steps: Optional[int] = None
    """cosine: steps at which it is 0; None takes trainer.max_steps. A run that is stopped early keeps its own"""
    grad_clip: Optional[float] = 1.0
    """largest L2 norm of the gradients, all together or, with `stage.independent_rates`, of each hyper-encoder; None
    never clips"""
    set_to_none: bool = True
    """true forgets gradients after a step, so that AdamW leaves alone what the next one does not use. false (published)
    sets them to zero, so that hyper-encoders of rates that are not drawn, once they were, go on by their momentum and
    decay in every step"""

    def check(self, name: str) -> None:
        _at_least(f"{name}.lr", self.lr, 0, strict=True)
        _at_least(f"{name}.warmup_steps", self.warmup_steps, 0)
        _at_least(f"{name}.grad_clip", self.grad_clip, 0, strict=True)
        _choose(f"{name}.schedule", self.schedule, ("constant", "cosine"))
        _at_least(f"{name}.schedule_steps", self.schedule_steps, 1)
        if self.schedule_steps is not None and self.schedule == "constant":
            raise ConfigError(f"{name}.schedule_steps is {self.schedule_steps}, but {name}.schedule is 'constant'; "
                              "allowed there: null")  # fmt: skip
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{name}.betas is {list(self.betas)}; allowed: two numbers in [0, 1)")


@dataclass
class CriticConfig:
    """The adversarial critic of the joint stage (paper section 3.4)."""

    lora_rank: Optional[int] = 16
    """rank of the critic's LoRA; None trains all of its weights"""
    lora_alpha: Optional[float] = None
    """scale of the LoRA times its rank; None takes the rank, published is 8"""
    lora_init: str = "gaussian"
    """of LoRA's first factor: gaussian, or kaiming (published, PEFT's default)"""
    lora_layers: str = "denoiser"
    """denoiser: the layers of the paper's denoiser; published: these less conv_in, and time_emb_proj"""
    head: str = "light"
    """light: a 3x3 and a 1x1 convolution at 256 channels; published: two 4x4 convolutions at twice the features, which
    are 52.5 million parameters with Stable Diffusion 2.1"""
    prompt: str = "codec"
    """what the critic's cross-attention sees: codec, the denoiser's prompt; own (published), one that is drawn at the
    start"""
    feature_gradient: bool = True
    """whether gradients pass the critic's UNet. false (published) leaves codec, LoRA and own prompt without any, so
    that the head alone learns and `stage.gan` does nothing"""
    reduction: str = "sum"
    """of the losses of real and decoded latents: sum, or mean (published)"""
    timesteps: list[int] = field(default_factory=lambda: [20, 980])
    """range [low, high) of the timesteps at which its inputs are re-noised, for a schedule of 1000"""
    weight: float = 1e-2
    """of the critic's own loss"""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def check(self, name: str) -> None:
        _at_least(f"{name}.lora_rank", self.lora_rank, 1)
        _at_least(f"{name}.lora_alpha", self.lora_alpha, 0, strict=True)
        _at_least(f"{name}.weight", self.weight, 0)
        _choose(f"{name}.lora_init", self.lora_init, ("gaussian", "kaiming"))
        _choose(f"{name}.lora_layers", self.lora_layers, ("denoiser", "published"))
        _choose(f"{name}.head", self.head, ("light", "published"))
        _choose(f"{name}.prompt", self.prompt, ("codec", "own"))
        _choose(f"{name}.reduction", self.reduction, ("sum", "mean"))
        if self.lora_rank is None:
            blank = CriticConfig()
            for key in ("lora_alpha", "lora_init", "lora_layers"):
                if getattr(self, key) != getattr(blank, key):
                    raise ConfigError(f"{name}.{key} is {getattr(self, key)!r}, but {name}.lora_rank is unset; "
                                      f"allowed there: {getattr(blank, key)}")  # fmt: skip
        if len(self.timesteps) != 2 or not 0 <= self.timesteps[0] < self.timesteps[1] <= 1000:
            allowed = "[low, high] with 0 <= low < high <= 1000"
            raise ConfigError(f"{name}.timesteps is {list(self.timesteps)}; allowed: {allowed}")
        self.optimiser.check(f"{name}.optimiser")


@dataclass
class ContextConfig:
    """Size of a context model (`oscar.bitstream.context`)."""

    neighbours: int = 12
    """positions that each one looks at"""
    embedding: int = 8
    """dimensions of a code's vector; where a rate's codes are stages of one vector, as many as codes, up to 16"""
    hidden: int = 48
    """width of the first layer"""
    features: int = 32
    """width of the second layer, and of the vectors of the tree's nodes"""

    def check(self, name: str) -> None:
        for part, high in (("neighbours", 24), ("embedding", 64), ("hidden", 512), ("features", 512)):
            _at_least(f"{name}.{part}", getattr(self, part), 1)
            if getattr(self, part) > high:
                raise ConfigError(f"{name}.{part} is {getattr(self, part)}; allowed: at most {high}")


@dataclass
class StageConfig:
    """What a stage trains and by which loss; fields that a stage does not use are refused if they are set."""

    name: str = "joint"
    """vae, prior, hyper, joint, context, or one of your own"""
    image_losses: dict[str, float] = field(default_factory=dict)
    """weight by term: l1, mse, ms_ssim, features, dists, lpips_vgg, lpips_alex, or one of your own; with the prefix
    edges_ on Sobel maps"""
    network_files: dict[str, str] = field(default_factory=dict)
    """local weight files by network: squeezenet, vgg16, alexnet, dists"""
    download: bool = False
    """fetch the networks' weights that are not there, where that is possible"""
    image_range: str = "signed"
    """in which l1 and mse are measured: signed, [-1, 1], or unit, [0, 1] (published), with half and a quarter of it"""
    edges: str = "rgb"
    """Sobel maps: rgb, each channel's, from 0 to 1, with repeated borders; or grey (published), of the grey image in
    [0, 1], kernels not normalised, with borders of zeros"""
    clamp_output: bool = False
    """clamp the reconstruction to [-1, 1] before the image losses (published), so that what is outside gets no
    gradient; otherwise the losses pull it back"""
    kl: float = 0.0
    """vae: weight of the posterior's KL divergence"""
    cosine: float = 0.0
    """hyper, joint: weight of the cosine loss"""
    commitment: float = 0.0
    """hyper, joint: weight of the quantiser's commitment loss; 0 is the paper's"""
    lambdas: list[float] = field(default_factory=list)
    """hyper, joint with a hyperprior: weight of the distortion against bits per pixel at quality 0 and at quality 1,
    between which its logarithm is a straight line"""
    sample_latents: bool = False
    """hyper, joint: train on samples of the VAE's posterior, drawn in each pass (published), or on its mode, as files
    are coded"""
    latent: float = 0.0
    """joint: weight of the mean squared error of x0 against the latent; 0 is the paper's"""
    gan: float = 0.0
    """joint: weight of the generator's adversarial loss"""
    critic: CriticConfig = field(default_factory=CriticConfig)
    rates_per_step: Optional[int] = None
    """hyper: rates trained per step, all if None; joint: 1"""
    independent_rates: bool = False
    """hyper: train each rate as in a run of its own: their losses are added in place of averaged, and
    `optimiser.grad_clip` holds for each hyper-encoder by itself"""
    rate_order: str = "random"
    """joint, hyper: random draws rates by weight (the paper); balanced takes all rates of positive weight equally
    often, in an order shuffled anew each time round"""
    rate_weights: dict[float, float] = field(default_factory=dict)
    """joint, hyper: relative probability of drawing a rate, 1 if not named; 0 leaves it as it is, in stage context too,
    where all others are trained in every step"""
    table_batches: int = 128
    """hyper, joint: batches at the end over which the entropy coder's tables are counted; with a hyperprior, hyper:
    over which the timesteps are calibrated"""
    vae: str = "frozen"
    """joint: frozen (the paper); decoder trains the VAE's decoder too; all trains the whole VAE"""
    denoiser: str = "trained"
    """joint: trained (the paper); frozen trains the hyper-encoders alone, so that with a frozen VAE rates of weight 0
    stay as they are"""

    context: ContextConfig = field(default_factory=ContextConfig)
    """context: size of the models"""

    def check(self, bottleneck: BottleneckConfig) -> None:
        _choose("stage.name", self.name, tuple(STAGES))
        _choose("stage.vae", self.vae, ("frozen", "decoder", "all"))
        _choose("stage.denoiser", self.denoiser, ("trained", "frozen"))
        _choose("stage.rate_order", self.rate_order, ("random", "balanced"))
        _choose("stage.image_range", self.image_range, ("signed", "unit"))
        _choose("stage.edges", self.edges, ("rgb", "grey"))
        _at_least("stage.table_batches", self.table_batches, 1)
        for name in ("kl", "cosine", "commitment", "latent", "gan"):
            _at_least(f"stage.{name}", getattr(self, name), 0)
        for term, weight in self.image_losses.items():
            _at_least(f"stage.image_losses.{term}", weight, 0)
        stage, own = STAGES[self.name], bottleneck.family.stage_fields
        used = own.get(self.name, stage.fields)
        if used is None:
            allowed = ", ".join(name for name, other in STAGES.items() if name in own or other.fields is not None)
            raise ConfigError(f"stage.name is {self.name!r}, but a model with {bottleneck.family.point_words} has no "
                              f"such stage; allowed: {allowed}")  # fmt: skip
        blank = StageConfig()
        for name in (*IMAGE_FIELDS, "kl", "cosine", "commitment", "lambdas", "sample_latents", "latent", "gan",
                     "rates_per_step", "independent_rates", "rate_order", "rate_weights", "table_batches", "vae",
                     "denoiser", "context"):  # fmt: skip
            if name not in used and getattr(self, name) != getattr(blank, name):
                other = any(name in kind.stage_fields.get(self.name, ()) for kind in BOTTLENECKS.values())
                raise ConfigError(
                    f"stage.{name} is {getattr(self, name)!r}, but stage {self.name} does not use it"
                    f"{f' with {bottleneck.family.point_words}' if other else ''}; "
                    f"allowed there: {', '.join(used) or 'none'}"
                )
        if self.name == "vae" and not any(self.image_losses.values()):
            raise ConfigError("stage.image_losses is empty; allowed: at least one positive weight")
        if self.name == "joint" and not any(self.image_losses.values()) and not self.latent:
            raise ConfigError("stage.image_losses is empty; allowed: at least one positive weight, or stage.latent")
        bottleneck.family.check_stage(bottleneck, self)
        self.critic.check("stage.critic")
        self.context.check("stage.context")

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
    """no, bf16, or fp16 with a scaled loss, which takes a GPU: on a CPU the run says so and is in float32"""
    ema_decay: Optional[float] = None
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
    """a loss or gradient that is no number: stop names the pictures and stops; skip leaves the step out everywhere"""
    max_skipped: int = 10
    """skip: so many such steps in a row stop the run"""
    gradient_checkpointing: bool = False
    """vae, prior, joint: compute the activations of UNet, VAE and critic again in the backward pass; saves memory"""
    compile: bool = False
    """run VAE, UNet, hyper-encoders and critic through torch.compile"""
    channels_last: bool = False
    """memory layout of images and convolutions; often faster"""
    cudnn_deterministic: bool = False
    """GPUs: only convolutions that repeat to the bit (published, by pyiqa); slower"""
    threads: Optional[int] = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        for name in ("max_steps", "accumulation", "checkpoint_every", "keep_last", "log_every", "max_skipped"):
            _at_least(f"trainer.{name}", getattr(self, name), 1)
        _at_least("trainer.threads", self.threads, 1)
        _choose("trainer.final", self.final, ("last", "best"))
        _choose("trainer.non_finite", self.non_finite, ("stop", "skip"))
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
class MetricsConfig:
    """Which metrics are scored (`oscar.metrics.image.METRICS`), and where their weights come from."""

    names: list[str] = field(default_factory=lambda: ["psnr", "ms_ssim"])
    files: dict[str, str] = field(default_factory=dict)
    """local weight files by name, used in place of downloads"""
    download: bool = False
    """fetch weights that are not there; without it such a metric is reported as unavailable"""

    def check(self) -> None:
        if not self.names:
            raise ConfigError("metrics.names is empty; allowed: one or more metrics")
        for name, path in self.files.items():
            if not Path(path).exists():
                raise ConfigError(f"metrics.files.{name} is {path!r}, which does not exist; allowed: a weight file")


@dataclass
class ValidationConfig:
    """Validation during training, on a fixed set of pictures; off unless `images` is given."""

    images: Optional[str] = None
    """folder, searched recursively; the pictures are kept in memory"""
    limit: Optional[int] = 24
    """only so many, the first in the order of their paths; None takes all"""
    crop: Optional[int] = None
    """side of the centre crop that stands for each picture, a multiple of 64; None takes whole pictures"""
    every: int = 1000
    """optimiser steps between two validations; one more follows the last step"""
    rates: Optional[list[float]] = None
    """hyper, joint: nominal bpp of the rates to validate; None takes all"""
    qualities: Optional[list[float]] = None
    """hyper, joint with a hyperprior: qualities to validate, 0 to 1; None takes five"""
    points: Optional[list[float]] = None
    """hyper, joint with a bottleneck of your own: operating points to validate; None takes all"""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """of single pictures; those whose weights cannot be had are left out, with a warning"""
    best: Optional[str] = None
    """scalar that picks the best checkpoint: a metric, or in stages hyper and joint also bpp or cosine; None takes
    cosine in stage hyper, loss in stage prior, and otherwise the first metric that can be had"""
    grid: int = 4
    """pictures in the grid of originals and reconstructions; 0 makes none"""

    @property
    def enabled(self) -> bool:
        return self.images is not None

    def check(self, stage: str, bottleneck: BottleneckConfig) -> None:
        if self.images is not None and not Path(self.images).is_dir():
            raise ConfigError(f"validation.images is {self.images!r}; allowed: a folder of pictures that exists")
        for name in ("limit", "every"):
            _at_least(f"validation.{name}", getattr(self, name), 1)
        _at_least("validation.grid", self.grid, 0)
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
    seed: int = 0
    init_from: Optional[str] = None
    """hyper, joint, context: OSCAR checkpoint folder to start from. Backbone, bottleneck and denoiser are then its own:
    what is set there must be equal to it, but for `backbone.source` (where its backbone is now), fewer
    `bottleneck.rates`, `denoiser.prompt_init`, and what is said to be the run's own"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    timesteps: Optional[dict[str, Any]] = field(default_factory=dict)
    """hyper, joint: mapping from rate to pseudo-timestep (configs/timesteps, or a kind of your own); if empty, that
    of `init_from`, and the paper's table without it"""
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def check(self) -> None:
        self.timesteps = self.timesteps or None
        _choose("stage.name", self.stage.name, tuple(STAGES))
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
        self.data.check()
        if self.data.latents is not None and not stage.works_on_latents:
            name = self.stage.name
            raise ConfigError(f"data.latents is {self.data.latents!r}, but stage {name} needs pictures; allowed: null")
        if self.bottleneck.is_known:  # else that of init_from, see oscar.training.resolve
            self.stage.check(self.bottleneck)
        if self.data.latents is not None and self.stage.sample_latents:
            raise ConfigError(f"stage.sample_latents is true, but data.latents is {self.data.latents!r}, which holds "
                              "modes; allowed: false")  # fmt: skip
        self.optimiser.check("optimiser")
        self.trainer.check()
        for name, optimiser in (("optimiser", self.optimiser), ("stage.critic.optimiser", self.stage.critic.optimiser)):
            if optimiser.schedule_steps is not None:
                _at_least(f"{name}.schedule_steps", optimiser.schedule_steps, self.trainer.max_steps)
        if self.trainer.gradient_checkpointing and stage.works_on_latents:
            raise ConfigError(f"trainer.gradient_checkpointing is true, but stage {self.stage.name} has no gradient "
                              "through UNet or VAE; allowed: false")  # fmt: skip
        if self.trainer.final == "best" and not self.validation.enabled:
            raise ConfigError("trainer.final is 'best', but validation.images is unset; allowed: last")
        if self.bottleneck.is_known:
            self.validation.check(self.stage.name, self.bottleneck)


@dataclass
class PicturesConfig:
    """Pictures to evaluate on."""

    images: Optional[str] = None
    """folder, searched recursively"""
    limit: Optional[int] = None
    """only so many, the first in the order of their paths"""

    def check(self) -> None:
        if self.images is None:
            raise ConfigError("data.images is unset; allowed: a folder of pictures")
        _at_least("data.limit", self.limit, 1)


@dataclass
class EvaluateConfig:
    """One evaluation: one codec on one folder of pictures."""

    output: str = "runs/evaluate"
    """folder of the results; a run that was interrupted goes on in it"""
    codec: str = "oscar"
    """oscar, or the name of a baseline (`oscar.baselines.registry.BASELINES`)"""
    model: str = "nano"
    """oscar: nano, a checkpoint folder or a hub id"""
    protocol: str = "bitstream"
    """oscar: bitstream (real files, any size), or paper (the published code's: resized pictures, no file)"""
    dtype: str = "float32"
    """oscar: precision of the networks"""
    options: dict[str, Any] = field(default_factory=dict)
    """baselines: arguments of their constructor"""
    points: Optional[list[float]] = None
    """operating points: nominal bpp of oscar's rates, quality of a baseline; None takes the codec's own list"""
    data: PicturesConfig = field(default_factory=PicturesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    save_images: bool = False
    """keep decoded pictures in output/images and files in output/files"""
    device: Optional[str] = None
    """of the networks, also the metrics'; None leaves it to Accelerate: a GPU per process if there are any"""
    threads: Optional[int] = None
    """CPU threads of each process; None leaves the library's choice"""

    def check(self) -> None:
        _choose("protocol", self.protocol, ("bitstream", "paper"))
        _choose("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        if self.codec != "oscar" and self.protocol == "paper":
            raise ConfigError(f"protocol is 'paper', but codec is {self.codec!r}; allowed there: bitstream")
        if self.codec == "oscar" and self.options:
            raise ConfigError(f"options is {self.options}, but codec oscar has none; allowed there: {{}}")
        if self.points is not None and not self.points:
            raise ConfigError("points is empty; allowed: one or more points, or null for the codec's own")
        _at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()


@dataclass
class BenchmarkPicturesConfig(PicturesConfig):
    """Pictures of a benchmark; without a folder scikit-image's packaged photographs."""

    dataset: Optional[str] = None
    """whose published curves are drawn beside ours: kodak, div2k_val, clic2020; None goes by the folder's name"""

    def check(self) -> None:
        _choose("data.dataset", self.dataset, (None, "kodak", "div2k_val", "clic2020"))
        _at_least("data.limit", self.limit, 1)


@dataclass
class TimingConfig:
    """The timing part of a benchmark (`oscar.benchmark.speed.timing`), on the first picture."""

    points: dict[str, list[float]] = field(default_factory=dict)
    """operating points by codec name; a codec that is not named is timed at the middle one of its own"""
    repeats: int = 10
    warmup: int = 2
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4])
    """of the throughput"""
    memory: bool = True
    """measure peak memory, in processes of their own that load the model anew"""

    def check(self) -> None:
        _at_least("timing.repeats", self.repeats, 1)
        _at_least("timing.warmup", self.warmup, 0)
        _at_least("timing.batch_sizes", min(self.batch_sizes, default=1), 1)


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
    images: Optional[str] = None
    """folder of pictures to load; None makes JPEG files of DIV2K's size of scikit-image's packaged photographs"""
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
            _choose("training.measure", name, ("schedules", "loader", "joint"))
        if self.joint.name != "joint":
            raise ConfigError(f"training.joint.name is {self.joint.name!r}; allowed: joint")
        if self.crop < 64 or self.crop % 64:
            raise ConfigError(f"training.crop is {self.crop}; allowed: multiples of 64")
        for name in ("batch_size", "workers", "repeats", "loader_steps", "joint_steps"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        _at_least("training.warmup", self.warmup, 0)
        if self.images is not None and not Path(self.images).is_dir():
            raise ConfigError(f"training.images is {self.images!r}; allowed: a folder of pictures that exists")
        self.backbone.check()
        self.bottleneck.complete()
        self.bottleneck.check()
        self.joint.check(self.bottleneck)


@dataclass
class InferenceSpeedConfig:
    """The inference part of a benchmark (`oscar.benchmark.speed.inference`). At full size it needs minutes."""

    measure: list[str] = field(default_factory=lambda: ["latency", "memory"])
    """latency: encode and decode beside the plain way; memory: loading and running each half in a process of its own;
    large: memory of one large picture, likewise"""
    model: Optional[str] = None
    """checkpoint folder or hub id; None makes one of random weights from backbone and bottleneck, in the output"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    sizes: list[str] = field(default_factory=lambda: ["512x512"])
    """WIDTHxHEIGHT of the latency's pictures; the first is that of memory too"""
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
    """budget of the large picture: auto, or a size such as 4GB"""

    def check(self) -> None:
        for name in self.measure:
            _choose("inference.measure", name, ("latency", "memory", "large"))
        for name in self.dtypes:
            _choose("inference.dtypes", name, ("auto", "float32", "float16", "bfloat16"))
        for name in self.compile:
            _choose("inference.compile", name, ("off", "on", "graphs"))
        _choose("inference.large_dtype", self.large_dtype, ("float32", "float16", "bfloat16"))
        for name in ("sizes", "dtypes", "compile"):
            if not getattr(self, name):
                raise ConfigError(f"inference.{name} is empty; allowed: one or more")
        for size in (*self.sizes, self.large_size):
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
                raise ConfigError(f"inference: size {size!r} is not allowed; allowed: WIDTHxHEIGHT, such as 512x512")
        _at_least("inference.repeats", self.repeats, 1)
        _at_least("inference.warmup", self.warmup, 0)
        if self.model is None:
            self.backbone.check()
            self.bottleneck.complete()
            self.bottleneck.check()
        try:
            find_rate(self.rate, RATES)
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
    at full size, which takes minutes, and need none of these codecs and pictures"""
    models: dict[str, str] = field(default_factory=lambda: {"nano": "nano"})
    """OSCAR models by their name in the results: nano, a checkpoint folder or a hub id"""
    protocols: list[str] = field(default_factory=lambda: ["bitstream"])
    """of the OSCAR models: bitstream (real files, any size), paper (the published code's: resized pictures, no file)"""
    dtype: str = "float32"
    """precision of the OSCAR models' networks"""
    rates: Optional[list[float]] = None
    """nominal bpp of the OSCAR models' rates; None takes all"""
    baselines: dict[str, Any] = field(default_factory=dict)
    """by any name: `name` of a baseline, `points`, and its options (configs/baselines)"""
    data: BenchmarkPicturesConfig = field(default_factory=BenchmarkPicturesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    bd_method: str = "pchip"
    """interpolation of BD-rate: pchip, akima or cubic"""
    timing: TimingConfig = field(default_factory=TimingConfig)
    training: TrainingSpeedConfig = field(default_factory=TrainingSpeedConfig)
    inference: InferenceSpeedConfig = field(default_factory=InferenceSpeedConfig)
    report_pictures: int = 6
    """pictures in the report's browser, spread over the data set; each costs the page some megabytes"""
    device: Optional[str] = None
    """of the networks, also the metrics'; None takes a GPU if there is one"""
    threads: Optional[int] = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        for part in self.parts:
            _choose("parts", part, ("quality", "matched", "timing", "report", "training", "inference"))
        for protocol in self.protocols:
            _choose("protocols", protocol, ("bitstream", "paper"))
        _choose("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        _choose("bd_method", self.bd_method, ("pchip", "akima", "cubic"))
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
        _at_least("report_pictures", self.report_pictures, 0)
        _at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()
        self.timing.check()
        for part in ("training", "inference"):
            if part in self.parts:
                getattr(self, part).check()


@dataclass
class PackagedPicturesConfig(PicturesConfig):
    """Pictures to measure; without a folder scikit-image's packaged photographs."""

    def check(self) -> None:
        _at_least("data.limit", self.limit, 1)


@dataclass
class CalibrateTimestepsConfig:
    """One measurement of how noisy a checkpoint's quantised latents are."""

    output: str = "runs/calibrate_timesteps"
    """folder of the results"""
    model: str = "nano"
    """nano, a checkpoint folder or a hub id"""
    data: PackagedPicturesConfig = field(default_factory=PackagedPicturesConfig)
    save_to: Optional[str] = None
    """folder for a copy of the checkpoint with the measured mapping"""
    save_mapping: str = "cosine"
    """which one that copy gets: cosine or snr"""
    device: str = "cpu"
    threads: Optional[int] = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        _choose("save_mapping", self.save_mapping, ("cosine", "snr"))
        _at_least("threads", self.threads, 1)
        self.data.check()


@dataclass
class AblateTimestepsConfig:
    """Mappings and a sweep of timesteps over one checkpoint."""

    output: str = "runs/ablate_timesteps"
    """folder of the results; a run that was interrupted goes on in it"""
    model: str = "nano"
    """nano, a checkpoint folder or a hub id"""
    mappings: dict[str, Any] = field(default_factory=dict)
    """by any name (configs/timesteps); cosine and snr without a calibration file are measured on the pictures below"""
    sweep: list[int] = field(default_factory=list)
    """timesteps to decode every rate at, beside those of the mappings"""
    rates: Optional[list[float]] = None
    """nominal bpp of the rates; None takes all of the model's"""
    data: PackagedPicturesConfig = field(default_factory=PackagedPicturesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    device: str = "cpu"
    threads: Optional[int] = None
    """CPU threads; None leaves the library's choice"""

    def check(self) -> None:
        if not self.mappings:
            raise ConfigError("mappings is empty; allowed: one or more by name")
        for name, mapping in self.mappings.items():
            if name == "best" or not isinstance(mapping, dict):
                raise ConfigError(f"mappings.{name} is {mapping!r}; allowed: a mapping of any name but best")
        if self.rates is not None and not self.rates:
            raise ConfigError("rates is empty; allowed: one or more nominal bpp, or null for all")
        _at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()


@dataclass
class CacheLatentsConfig:
    """One latent cache (`oscar.data.latents`)."""

    output: str = "runs/latents"
    """folder of the latents; a run that was interrupted goes on in it"""
    seed: int = 0
    """of the crops; with the seed of the training run they are the crops that it would cut itself"""
    crops: int = 8
    """crops, and so latents, per picture"""
    dtype: str = "float16"
    """in which latents are stored; they are computed in float32"""
    shard_size: int = 1024
    """latents per file, about; what an interruption may cost"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    """pictures, crop and augmentation; batch_size is the number of crops that pass through the VAE at once, at most"""
    device: Optional[str] = None
    """cpu, or None: a GPU per process if there are any"""
    threads: Optional[int] = None
    """CPU threads of each process; None leaves the library's choice"""

    def check(self) -> None:
        _choose("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        _choose("device", self.device, (None, "cpu"))
        for name in ("crops", "shard_size", "threads"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        if self.data.latents is not None:
            raise ConfigError(f"data.latents is {self.data.latents!r}, but latents are made of pictures; allowed: null")
        for name in ("total_batch_size", "crop_margin"):
            if getattr(self.data, name):
                raise ConfigError(f"data.{name} is {getattr(self.data, name)}, but a latent cache does not use it; "
                                  f"allowed: {getattr(DataConfig(), name)}")  # fmt: skip
        if not self.data.augment and self.crops > 1:
            raise ConfigError(f"crops is {self.crops}, but data.augment is false, so all would be equal; allowed: 1")
        self.backbone.check()
        self.data.check()


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
        typed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error.msg if getattr(error, "msg", None) else error).splitlines()[0]
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"config: {key}{reason}") from None
    typed.check()
    return typed
