"""The bottleneck: a latent into bytes and back at an operating point. This is the one interface to extend.

A bottleneck owns what is between the VAE's latent z0 and the denoiser's input z_hat: its networks, how its symbols are
coded, and how it is trained. The codec (`oscar.codec`) and the training stages `bottleneck` and `joint` know no kind of
it. A new one is a subclass of `Bottleneck` and a call of `BOTTLENECKS.register`; docs/extend.md shows one.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.bitstream import Payload
from oscar.config import IMAGE_FIELDS, take
from oscar.diffusion import NoiseSchedule
from oscar.models.backbone import Components
from oscar.models.modules import check_tensors, count
from oscar.operating_points import OperatingPoints, Point, no_preview
from oscar.timesteps import TimestepMapping
from oscar.utils.rng import StepRng, choose_points

if TYPE_CHECKING:
    from oscar.config import BottleneckConfig, StageConfig


class Symbols(NamedTuple):
    """Symbols that are one tensor, (B, ...); a bottleneck with more has a NamedTuple of its own."""

    values: Tensor


class Draw(NamedTuple):
    """What one training pass goes through the bottleneck at.

    Attributes:
        point: a `Point` for the whole batch, or the bottleneck's own form of one for each image.
        label: suffix of the pass's columns in logs, None if passes are not told apart.
    """

    point: Any
    label: str | None


class Output(NamedTuple):
    """What a training pass through a bottleneck gives.

    Attributes:
        z_hat: the denoiser's input, (B, C, h, w), with gradients.
        losses: by name, of the whole batch or of each image (B,). `cosine` and `commitment` count `stage.cosine` and
            `stage.commitment` times, all others as they are.
        statistics: further scalars for the logs.
        weight: of each image's distortion in stage `joint`, (B,); None is 1 for all.
    """

    z_hat: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]
    weight: Tensor | None = None


class Bottleneck(OperatingPoints, nn.Module, ABC):
    """Turns latents (B, C, h, w) into symbols, symbols into bytes, and both back.

    Symbols are a NamedTuple, `Symbols` or the bottleneck's own, whose tensors have the batch as their first dimension.

    One of your own sets `latent_channels`, `options` and `points`, and defines `forward`, `quantise`, `dequantise`,
    `write` and `read`; all else has a default. Its operating points are those of `OperatingPoints`.

    Attributes:
        kind: its name in configurations and checkpoints, set by `BOTTLENECKS.register`.
        config_fields: of `BottleneckConfig` that describe it, beside `kind`.
        stage_fields: of `StageConfig` that count with it, by stage.
        validation_field: of `ValidationConfig` that names operating points.
        latent_channels: C.
        options: arguments of the constructor beside `latent_channels`, JSON-able; configurations have them as
            `bottleneck.options`.
        factor: pixels per latent position that it is made for; None if any will do.
        is_published: whether protocol `paper` exists for it.
        per_image_timesteps: whether files can hold a timestep of the image's own (mapping `per_image`).
    """

    kind: ClassVar[str]
    config_fields: ClassVar[tuple[str, ...]] = ("options",)
    stage_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "bottleneck": ("cosine", "commitment", "sample_latents", "table_batches"),
        "joint": (
            *IMAGE_FIELDS,
            "cosine",
            "commitment",
            "sample_latents",
            "latent",
            "gan",
            "table_batches",
            "vae",
            "denoiser",
        ),
    }
    validation_field: ClassVar[str] = "points"
    latent_channels: int
    options: dict[str, Any]
    factor: int | None = None
    is_published: ClassVar[bool] = False
    per_image_timesteps: ClassVar[bool] = False

    # The two halves.

    @abstractmethod
    def quantise(self, latent: Tensor, point: Point, effort: int = 0) -> Any:
        """Encoder half: latent (B, C, h, w) -> symbols. A higher effort gives smaller files at a little loss."""

    @abstractmethod
    def dequantise(self, symbols: Any, point: Point) -> Tensor:
        """Decoder half: symbols -> z_hat (B, C, h, w), as the denoiser takes it."""

    @abstractmethod
    def write(self, symbols: Any, point: Point) -> list[Payload]:
        """Symbols -> the payload of each image."""

    @abstractmethod
    def read(self, payload: Payload, point: Point, shape: tuple[int, int]) -> Any:
        """The inverse of `write` for one image whose latent has this shape (h, w): symbols of batch 1.

        Raises:
            BitstreamError: for bytes that `write` cannot have written, whatever they are.
        """

    def read_prefix(self, payload: Payload, point: Point, shape: tuple[int, int]) -> tuple[Any, float]:
        """Symbols of a payload whose end may be missing, and the share of them that was read.

        Raises:
            PayloadError: if the coding has no preview.
        """
        raise no_preview(payload)

    def check_published(self, point: Point, height: int, width: int) -> None:
        """Refuse (ValueError) what the published evaluation (protocol `paper`) cannot do for an image of this size."""
        raise ValueError(
            f"protocol 'paper' is the published quantiser's, and this model has {self.point_words}; allowed: bitstream"
        )

    def stored(self, symbols: Any, point: Point) -> Any:
        """The symbols as a file holds them, where `quantise` gives more than that."""
        return symbols

    def estimated_bits(self, symbols: Any, point: Point) -> list[float]:
        """Expected length of each image's payload in bits, without header; by default that of `write`."""
        return [8.0 * len(payload.data) for payload in self.write(symbols, point)]

    def parameter_counts(self) -> list[tuple[str, float | None, int, str | None]]:
        """Parameters by part: its name, the operating point that it belongs to, how many, and a note."""
        return [("bottleneck", None, count(self), None)]

    @torch.no_grad()
    def judge(self, symbols: Any, point: Point, latent: Tensor) -> tuple[float, np.ndarray | None]:
        """What validation says of symbols: the cosine similarity with the latent (over channels, mean over positions),
        and how often each code of a codebook is used (K,), None without one."""
        return cosine_spatial(self.dequantise(symbols, point), latent).item(), None

    # Checkpoints.

    def to_config(self) -> dict:
        """Kind and options in JSON-able form."""
        return {"kind": self.kind, **self.options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], latent_channels: int) -> Bottleneck:
        """The inverse of `to_config`, untrained (ValueError for options that do not fit)."""
        return cls(latent_channels, **{name: value for name, value in config.items() if name != "kind"})

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by name: `bottleneck.*` for weights, other prefixes for tables."""
        return {f"bottleneck.{name}": value for name, value in self.state_dict().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave (ValueError for missing, unknown or misshapen ones)."""
        check_tensors(tensors, self.tensors())
        self.load_state_dict({name.removeprefix("bottleneck."): value for name, value in tensors.items()})

    def decoder_tensors(self) -> set[str]:
        """Names among `tensors` on which decoding depends, and so the fingerprint; by default all."""
        return set(self.tensors())

    def keep(self, components: Components, both_needed: bool = False) -> None:
        """Remove what neither coding nor these components use; the bottleneck cannot be trained then.

        Args:
            components: what stays.
            both_needed: whether the encoder decodes z_hat too.
        """

    # Configurations.

    @classmethod
    def complete(cls, config: BottleneckConfig) -> None:
        """Fill in what is unset, for a new bottleneck."""

    @classmethod
    def describe(cls, config: BottleneckConfig) -> dict[str, Any]:
        """What `from_config` takes, of a configuration that is complete."""
        return {"kind": cls.kind, **config.options}

    @classmethod
    def is_known(cls, config: BottleneckConfig) -> bool:
        """Whether all is set that says which operating points there are, where a checkpoint may say it else."""
        return True

    @classmethod
    def take_over(cls, config: BottleneckConfig, stored: Mapping[str, Any]) -> None:
        """Fill in what is unset by a checkpoint's `to_config` (ConfigError for what is set to something else)."""
        take(config.options, "bottleneck.options", {name: value for name, value in stored.items() if name != "kind"})

    @classmethod
    def check_stage(cls, config: BottleneckConfig, stage: StageConfig) -> None:
        """Refuse (ConfigError) options of a stage that do not go with the bottleneck."""

    @classmethod
    def default_mapping(cls, config: BottleneckConfig) -> TimestepMapping:
        """Pseudo-timesteps to start with, for the points of a configuration."""
        raise ValueError(
            f"timesteps is unset; allowed with bottleneck {cls.kind}: a mapping of its points, such as "
            "timesteps=constant"
        )

    # Training.

    def adapt(self, config: BottleneckConfig) -> None:
        """Take over what a run changes of a checkpoint's bottleneck (ValueError for what does not fit)."""

    def configure(self, config: BottleneckConfig, stage: StageConfig, factor: int) -> None:
        """Take over the options of a training run, before its first pass, on a backbone of `factor`."""

    @abstractmethod
    def forward(self, latent: Tensor, point: Any) -> Output:
        """The training pass at a `Draw.point`: latent (B, C, h, w) -> z_hat, losses, statistics."""

    def draw(self, rng: StepRng, latent: Tensor, every: bool) -> list[Draw]:
        """What the next pass trains, from a `StepRng` alone, so that it is the same after a resume.

        Args:
            rng: of this pass.
            latent: of it, (B, C, h, w).
            every: whether as many points as the run's options say, by default all, or one (stage `joint`).
        """
        points = choose_points(rng, self.points, [1.0] * len(self.points), None if every else 1)
        return [Draw(point, self.label(point)) for point in points]

    def columns(self) -> tuple[str, ...]:
        """Names in the logs beyond `loss`: of losses and statistics, plain or with `_` and a point's label."""
        return tuple(f"loss_{self.label(point)}" for point in self.points)

    def timesteps(self, mapping: TimestepMapping, point: Any, latent: Tensor) -> float | Tensor:
        """Pseudo-timesteps of a `Draw.point`, one or (B,)."""
        return mapping(point)

    def validation_points(self) -> Sequence[Point]:
        """Operating points that validation codes at, unless some are named."""
        return self.points

    def compiled_networks(self) -> list[nn.Module]:
        """What `trainer.compile` compiles: networks without random draws and side effects."""
        return []

    def independent_parts(self) -> list[list[nn.Parameter]] | None:
        """Parameters of each operating point that shares none with others; None if they share some."""
        return None

    def finish(self, latents: Iterable[Tensor], schedule: NoiseSchedule | None) -> TimestepMapping | None:
        """Make what coding needs (tables, integers) at the end of training.

        Args:
            latents: batches of them, (B, C, h, w).
            schedule: at the end of stage `bottleneck`, else None.

        Returns:
            Pseudo-timesteps measured with the schedule; None keeps those that there are.
        """

    @contextlib.contextmanager
    def ready_to_code(self) -> Iterator[None]:
        """Within it files can be written by the weights as they are in mid-training."""
        yield


def concatenate(symbols: Sequence[Any]) -> Any:
    """Symbols of single images -> of a batch."""
    first = symbols[0]
    parts = zip(*symbols, strict=True)
    return type(first)(*(torch.cat(part) if isinstance(part[0], Tensor) else sum(part, ()) for part in parts))


def channel_cosines(z_hat: Tensor, latent: Tensor, least: float = 1e-8) -> Tensor:
    """Cosines of the vectors over space, one per channel, of two latents (B, C, h, w): (B, C).

    Args:
        z_hat, latent: the latents.
        least: norm of a vector at least; its inverse bounds the gradient where all is zero.
    """
    return F.cosine_similarity(z_hat.float().flatten(2), latent.float().flatten(2), dim=2, eps=least)


def cosine_spatial(z_hat: Tensor, latent: Tensor) -> Tensor:
    """Mean cosine of the vectors over channels, one per position, of two latents (B, C, h, w)."""
    return F.cosine_similarity(z_hat.float(), latent.float(), dim=1).mean()
