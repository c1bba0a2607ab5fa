"""Schemas of a codec's parts: backbone, bottleneck and denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any  # noqa: UP035 (OmegaConf reads Optional from the annotations)

from oscar.config.checks import ConfigError, at_least, choose, fill
from oscar.rates import PAPER_RATES, RATES, RatePoint, find_rate
from oscar.registry import BOTTLENECKS


@dataclass
class BackboneConfig:
    """Where VAE, UNet and schedule come from: `source`, or the three configurations for random weights."""

    name: str | None = None
    source: str | None = None
    """diffusers folder or hub id with vae/, unet/ and scheduler/; None builds random weights from the fields below.
    With `init_from` where its backbone is now, if it has moved"""
    vae: dict[str, Any] | None = None
    unet: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None

    def check(self) -> None:
        if self.source is None and (self.vae is None or self.unet is None or self.scheduler is None):
            raise ConfigError(
                "backbone.source is unset; allowed: a folder or hub id, all of vae, unet, scheduler, "
                "or backbone=NAME of configs/backbone"
            )


@dataclass
class HyperpriorConfig:
    """Sizes of a hyperprior bottleneck (`oscar.bottlenecks.hyperprior`)."""

    groups: list[int] | None = None
    """latent channels that are coded together; each group is predicted from all before it"""
    hidden: int | None = None
    """width of the layers that predict"""
    features: int | None = None
    """channels of the decoded side information"""
    side_channels: int | None = None
    """channels of the side information itself"""
    side_features: int | None = None
    """channels within the network that decodes it"""

    def check(self) -> None:
        if self.groups is not None and (not self.groups or min(self.groups) < 1):
            raise ConfigError(f"bottleneck.hyperprior.groups is {list(self.groups)}; allowed: numbers above 0")
        for name in ("hidden", "features", "side_channels", "side_features"):
            at_least(f"bottleneck.hyperprior.{name}", getattr(self, name), 1)


@dataclass
class BottleneckConfig:
    """The vector-quantised bottleneck (paper section 3.2), a hyperprior for any rate, or one of your own.

    What is unset (None) is that of `init_from`, and without it as in `VQ` or `HYPERPRIOR`.
    """

    kind: str | None = None
    """vq, which has all fields but `hyperprior` and `options`; hyperprior, which has it alone; or one of your own
    (docs/extend.md), which has `options`"""
    options: dict[str, Any] = field(default_factory=dict)
    """of a kind of your own: arguments of its constructor"""
    hyperprior: HyperpriorConfig = field(default_factory=HyperpriorConfig)
    rates: list[float] | None = None
    """nominal bits per pixel of the rates to build; with `init_from` those of its rates that are kept"""
    width: int | None = None
    """N, channels of the backbone"""
    features: int | None = None
    """M, channels around the quantiser"""
    codebook_dim: int | None = None
    kmeans_init: bool | None = None
    """start the codebooks from k-means over the first pass's features; false is the paper's setting"""
    dead_code_threshold: float = 0.0
    """share of its uses, were all codes used alike, below which it is revived; 0, the paper's setting, never"""
    decay: float = 0.8
    """of the codebook's moving average; 0.8, the quantiser library's default, is the paper's"""
    rotation_trick: bool = True
    """gradient through the quantiser by rotation (the library's default, as in the paper), else straight through"""

    def complete(self) -> None:
        """Fill in what is unset, for a new bottleneck."""
        choose("bottleneck.kind", self.kind, tuple(BOTTLENECKS))
        self.kind = self.kind or "vq"
        self.family.complete(self)

    @property
    def family(self) -> Any:
        """The class of the bottleneck, which says what goes with it."""
        return BOTTLENECKS[self.kind or "vq"]

    def check(self) -> None:
        choose("bottleneck.kind", self.kind, tuple(BOTTLENECKS))
        self.hyperprior.check()
        blank, used = BottleneckConfig(), {"kind", *self.family.config_fields}
        known = self.kind is not None  # else it is that of `init_from`, see oscar.training.resolve
        for name in sorted({item.name for item in fields(self)} - used) if known else ():
            if getattr(self, name) != getattr(blank, name):
                raise ConfigError(
                    f"bottleneck.{name} is {getattr(self, name)}, but kind {self.kind} does not use it; "
                    "allowed: its default"
                )
        for name in ("width", "features", "codebook_dim"):
            at_least(f"bottleneck.{name}", getattr(self, name), 2)
        if self.rates is not None and not self.rates:
            raise ConfigError("bottleneck.rates is empty; allowed: one or more of the configured rates")
        self.rate_points()

    @property
    def is_known(self) -> bool:
        """Whether it is set of which kind it is and which rates it has."""
        return self.family.is_known(self)

    def rate_points(self) -> tuple[RatePoint, ...]:
        """The rates, by id; all that there are where they are not known yet, none of a kind without rates."""
        if "rates" not in self.family.config_fields:
            return ()
        try:
            points = {find_rate(bpp) for bpp in self.rates} if self.rates is not None else set(RATES)
        except ValueError as error:
            raise ConfigError(f"bottleneck.rates: {error}") from None
        return tuple(sorted(points, key=lambda rate: rate.id))

    def describe(self) -> dict[str, Any]:
        """What `oscar.bottlenecks.from_config` takes."""
        return self.family.describe(self)

    def training_options(self) -> dict[str, Any]:
        """What may change from one run to the next: arguments of `VQBottleneck.set_training`."""
        return {name: getattr(self, name) for name in ("dead_code_threshold", "decay", "rotation_trick")}


@dataclass
class DenoiserConfig:
    """How the UNet is adapted (paper section 3.3). What is unset (None) is that of `init_from`, else of `DENOISER`."""

    tuning: str | None = None
    """lora or full"""
    lora_rank: int | None = None
    lora_alpha: float | None = None
    prompt_tokens: int | None = None
    prompt_init: str | None = None
    """noise (the paper) or text: the backbone's text encoder on an empty prompt. With `init_from` either one takes the
    place of its prompt, which None keeps"""

    def complete(self) -> None:
        """Fill in what is unset, for a new denoiser."""
        fill(self, DENOISER)

    def check(self) -> None:
        choose("denoiser.tuning", self.tuning, ("lora", "full"))
        choose("denoiser.prompt_init", self.prompt_init, ("noise", "text"))
        at_least("denoiser.lora_rank", self.lora_rank, 1)
        at_least("denoiser.prompt_tokens", self.prompt_tokens, 1)

    def options(self) -> dict[str, Any]:
        names = ("tuning", "lora_rank", "lora_alpha", "prompt_tokens")
        return {name: getattr(self, name) for name in names}


# What a new bottleneck and denoiser have where nothing is set: the paper's values, and nano's sizes.
VQ = {
    "rates": [rate.bpp for rate in PAPER_RATES],
    "width": 192,
    "features": 320,
    "codebook_dim": 32,
    "kmeans_init": False,
}

HYPERPRIOR = {"groups": [8, 8, 16, 32], "hidden": 96, "features": 64, "side_channels": 32, "side_features": 48}

DENOISER = {"tuning": "lora", "lora_rank": 16, "lora_alpha": 8.0, "prompt_tokens": 77, "prompt_init": "noise"}
