"""A mean-scale hyperprior with a context of channel groups and checkerboards, at a continuous quality q in [0, 1].

The latent is scaled by a gain of q (Cui et al., Asymmetric Gained Deep Image Compression, CVPR 2021) and rounded; side
information z and what is already decoded say where each value is expected (Minnen et al. 2018; He et al., ELIC, CVPR
2022). What depends on q is interpolated between knots.

Training and estimates run float networks (`oscar.bottlenecks.rounded_layers`). Files are coded by the integer model
alone (`oscar.bitstream.hyperprior`), which `HyperpriorBottleneck.update` makes of the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.bitstream import Coding
from oscar.bitstream.hyperprior import Coded, HyperpriorCoder
from oscar.bitstream.hyperprior_weights import ACTIVATION_STEPS, KNOTS, LARGEST_SIDE, SCALES
from oscar.bitstream.rans import MEAN_STATE_BITS, PRECISION
from oscar.bottlenecks.base import Bottleneck, Components, Draw, Output, Payload, channel_cosines
from oscar.bottlenecks.rounded_layers import (
    LEVEL_STEP,
    SCALE_MIN,
    Predictor,
    RoundedLayer,
    at_quality,
    bits_of,
    frequency_tables,
    integer_biases,
    integer_weights,
    knot_weights,
    round_activation,
    scale_frequencies,
    straight_through,
)
from oscar.config import HYPERPRIOR, IMAGE_FIELDS, ConfigError, fill, take
from oscar.diffusion import NoiseSchedule
from oscar.models.compressai import EntropyBottleneck, GaussianConditional
from oscar.models.modules import check_tensors, count, drop
from oscar.models.precision import compute_finite
from oscar.operating_points import Qualities, Quality
from oscar.registry import BOTTLENECKS
from oscar.timesteps import CurveMapping, TimestepMapping
from oscar.utils.errors import first_line
from oscar.utils.rng import StepRng

if TYPE_CHECKING:
    from oscar.config import BottleneckConfig, StageConfig

VALIDATION_QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
# CompressAI's tables, for which checkpoints keep the integers themselves; and its constants, of which float16 makes
# a least likelihood of 0.
_NOT_STORED = (
    "_quantized_cdf",
    "_cdf_length",
    "_offset",
    "scale_table",
    ".bound",
    "scale_bound",
    "side_model.target",
    "side_model.quantiles",
)
_TWINS = ("up1", "up2", "predictors", "side_model", "value_model")  # modules that the integers stand for

_TAIL = 1e-8  # probability of side information that a table leaves out
_LEAST_NORM = 1.0  # of a channel in the cosine loss: at low rates whole channels are rounded to zero
_FIRST_GAIN, _LAST_GAIN = 0.35, 10.0  # to start with, for latents of unit variance


class HyperpriorSymbols(NamedTuple):
    """What a file of a quality holds.

    Attributes:
        values: the decoded latent in the coder's integers, int32 (B, C, h, w).
        coded: of each image, symbols and their tables in the order of coding.
    """

    values: Tensor
    coded: tuple[Coded, ...]


class Estimate(NamedTuple):
    """What the float networks say of a latent.

    Attributes:
        z_hat: decoded latent, (B, C, h, w).
        bits: estimated length of each image's payload in bits, (B,).
    """

    z_hat: Tensor
    bits: Tensor


@BOTTLENECKS.register("hyperprior")
class HyperpriorBottleneck(Qualities, Bottleneck):
    """Latents to bytes and back at any quality.

    Args:
        latent_channels: C.
        groups: channels of each group, which sum to C; a group is predicted from all before it.
        hidden: width of the layers that predict, and of the hyper-encoder.
        features: channels P of the decoded side information.
        side_channels: channels Z of the side information, at a quarter of the latent's resolution.
        side_features: channels S within the hyper-decoder.

    Attributes:
        coder: the integer model, None until `update` made it.
    """

    kind = "hyperprior"
    config_fields = ("hyperprior",)
    stage_fields = {
        "bottleneck": ("lambdas", "table_batches"),
        "joint": (*IMAGE_FIELDS, "cosine", "latent", "gan", "lambdas", "vae", "denoiser"),
    }
    validation_field = "qualities"

    def __init__(
        self,
        latent_channels: int,
        groups: Sequence[int],
        hidden: int = 96,
        features: int = 64,
        side_channels: int = 32,
        side_features: int = 48,
    ):
        super().__init__()
        self.latent_channels = latent_channels
        if sum(groups) != latent_channels or min(groups) < 1:
            raise ValueError(
                f"bottleneck.groups are {list(groups)}; allowed: numbers above 0 whose sum is the "
                f"backbone's {latent_channels} latent channels"
            )
        self.groups = tuple(groups)
        self.options = {
            "groups": list(groups),
            "hidden": hidden,
            "features": features,
            "side_channels": side_channels,
            "side_features": side_features,
        }
        gains = torch.linspace(math.log(_FIRST_GAIN), math.log(_LAST_GAIN), KNOTS)[:, None]
        self.log_gain = nn.Parameter(gains.repeat(1, latent_channels))
        self.log_inverse = nn.Parameter(-gains.repeat(1, latent_channels))
        self.log_side_gain = nn.Parameter(torch.linspace(-1, 1, KNOTS)[:, None].repeat(1, side_channels))
        self.hyper_encoder = nn.Sequential(
            nn.Conv2d(latent_channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(hidden, side_channels, 5, stride=2, padding=2),
        )
        self.up1 = RoundedLayer(side_channels, 4 * side_features, 3, (KNOTS,))
        self.up2 = RoundedLayer(side_features, 4 * features, 3)
        self.predictors = nn.ModuleList(
            Predictor(sum(groups[:number]), own, features, hidden) for number, own in enumerate(groups)
        )
        self.side_model = EntropyBottleneck(side_channels)
        self.side_model.quantiles.requires_grad_(False)  # medians stay 0, so that side information is whole numbers
        self.value_model = GaussianConditional(None, scale_bound=SCALE_MIN)
        self.coder = None

    # The two halves.

    @torch.no_grad()
    def quantise(self, latent: Tensor, point: Quality, effort: int = 0) -> HyperpriorSymbols:
        if effort:
            raise ValueError(f"effort is {effort}, but this model has a hyperprior; allowed: 0")
        quality = torch.full((len(latent),), point.value, device=latent.device)
        values, side = (part.float().cpu().numpy() for part in self.analyse(latent, quality))
        sides = np.rint(side).astype(np.int64)
        found = [self.coder.choose(own, side, point.code) for own, side in zip(values, sides, strict=True)]
        return self._symbols(found)

    def dequantise(self, symbols: HyperpriorSymbols, point: Quality) -> Tensor:
        knots = knot_weights(torch.tensor([point.value], device=symbols.values.device))
        inverse = at_quality(self.log_inverse.float(), knots).exp()
        return symbols.values.float() / ACTIVATION_STEPS * inverse

    def write(self, symbols: HyperpriorSymbols, point: Quality) -> list[Payload]:
        shape = tuple(symbols.values.shape[-2:])
        return [Payload(Coding.HYPERPRIOR, b"", self.coder.write(coded, shape)) for coded in symbols.coded]

    def read(self, payload: Payload, point: Quality, shape: tuple[int, int]) -> HyperpriorSymbols:
        return self._symbols([self.coder.read(payload.data, shape, point.code)])

    def read_prefix(self, payload: Payload, point: Quality, shape: tuple[int, int]) -> tuple[HyperpriorSymbols, float]:
        values, share = self.coder.decode_prefix(payload.data, shape, point.code)
        return self._symbols([([], values)]), share

    def estimated_bits(self, symbols: HyperpriorSymbols, point: Quality) -> list[float]:
        """The ideal code length and the mean of rANS's final state, which weighs several per cent in small files."""
        return [sum(self.coder.bits(coded)) + MEAN_STATE_BITS for coded in symbols.coded]

    def _symbols(self, found: Sequence[tuple[Coded, np.ndarray]]) -> HyperpriorSymbols:
        values = torch.from_numpy(np.stack([values for _, values in found])).to(self.log_inverse.device)
        return HyperpriorSymbols(values, tuple(coded for coded, _ in found))

    def parameter_counts(self) -> list[tuple[str, float | None, int, str | None]]:
        return [("bottleneck", None, count(self), "without the coder's integers")]

    # Checkpoints.

    def tensors(self) -> dict[str, Tensor]:
        """The networks, and the integers that files are coded by; those still in training have none."""
        found = {name: value for name, value in super().tensors().items() if not name.endswith(_NOT_STORED)}
        if self.coder is not None:
            found |= {f"coder.{name}": torch.from_numpy(value.copy()) for name, value in self.coder.arrays().items()}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        arrays, weights = {}, {}
        for name, value in tensors.items():
            prefix, _, rest = name.partition(".")
            (arrays if prefix == "coder" else weights)[rest if prefix == "coder" else name] = value
        check_tensors(weights, {name: value for name, value in self.tensors().items() if not name.startswith("coder.")})
        self.load_state_dict({name.removeprefix("bottleneck."): value for name, value in weights.items()}, strict=False)
        if arrays:
            try:
                coder = HyperpriorCoder.from_arrays({name: value.numpy() for name, value in arrays.items()})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"coder: {first_line(error)}") from None
            if coder.channels != self.latent_channels:
                raise ValueError(f"coder is for {coder.channels} latent channels; allowed: {self.latent_channels}")
            self.coder = coder

    def decoder_tensors(self) -> set[str]:
        return {name for name in self.tensors() if name.startswith("coder.") or ".log_inverse" in name}

    def keep(self, components: Components, both_needed: bool = False) -> None:
        drop(self, _TWINS if components != "decoder" else (*_TWINS, "hyper_encoder"))

    # Configurations.

    @classmethod
    def complete(cls, config: BottleneckConfig) -> None:
        fill(config.hyperprior, HYPERPRIOR)

    @classmethod
    def describe(cls, config: BottleneckConfig) -> dict[str, Any]:
        return {"kind": cls.kind, **asdict(config.hyperprior)}

    @classmethod
    def take_over(cls, config: BottleneckConfig, stored: Mapping[str, Any]) -> None:
        take(
            config.hyperprior,
            "bottleneck.hyperprior",
            {name: stored.get(name, HYPERPRIOR[name]) for name in HYPERPRIOR},
        )

    @classmethod
    def check_stage(cls, config: BottleneckConfig, stage: StageConfig) -> None:
        low_high = stage.lambdas
        if stage.name in cls.stage_fields and (len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]):
            raise ConfigError(f"stage.lambdas is {list(low_high)}; allowed: [low, high] with 0 < low <= high")

    @classmethod
    def default_mapping(cls, config: BottleneckConfig) -> TimestepMapping:
        return CurveMapping.straight()

    # Training.

    def configure(self, config: BottleneckConfig, stage: StageConfig, factor: int) -> None:
        self.lambdas, self.pixels_per_latent = tuple(stage.lambdas), factor**2
        self.is_alone, self.has_cosine = stage.name != "joint", stage.cosine > 0

    def draw(self, rng: StepRng, latent: Tensor, every: bool) -> list[Draw]:
        """Qualities (B,), drawn evenly for each image."""
        return [Draw(torch.rand(len(latent), device=latent.device, generator=rng.noise(latent.device)), None)]

    def columns(self) -> tuple[str, ...]:
        return ("bpp", "distortion", *(("cosine",) if self.has_cosine else ()))

    def forward(self, latent: Tensor, quality: Tensor) -> Output:
        """The training pass at qualities (B,).

        An image's loss is R + lambda D, bits per pixel and distortion, where the logarithm of lambda is a straight line
        over the quality. It is divided by the root of lambda, so that gradients are of one order at all qualities.
        """
        estimate = self.estimate(latent, quality)
        low, high = self.lambdas
        root = (0.5 * (math.log(low) + quality * math.log(high / low))).exp()
        bpp = estimate.bits / (latent.shape[-2] * latent.shape[-1] * self.pixels_per_latent)
        distortion = (estimate.z_hat - latent.float()).square().mean(dim=(1, 2, 3))
        losses = {"rate": bpp / root}
        statistics = {"bpp": bpp.detach().mean(), "distortion": distortion.detach().mean()}
        if self.is_alone:  # else images say how far off it is
            losses["weighted_distortion"] = root * distortion
        if self.has_cosine:
            cosine = -channel_cosines(estimate.z_hat, latent, _LEAST_NORM).mean(dim=1)
            losses["cosine"], statistics["cosine"] = root * cosine, cosine.detach().mean()
        return Output(estimate.z_hat, losses, statistics, weight=root)

    def timesteps(self, mapping: TimestepMapping, quality: Tensor, latent: Tensor) -> Tensor:
        # never in half precision, which rounds them
        return torch.tensor([mapping.at(value) for value in quality.tolist()], device=latent.device)

    def validation_points(self) -> Sequence[Quality]:
        return [Quality.of(value) for value in VALIDATION_QUALITIES]

    @torch.no_grad()
    def finish(self, latents: Iterable[Tensor], schedule: NoiseSchedule | None) -> CurveMapping | None:
        """Make the integer model; with a schedule, also find the timesteps whose sqrt(alpha_bar) are nearest the mean
        cosine similarity of z_hat and latent, by quality.

        Of whole latents, not of channels as for codebooks: most channels hold little and vanish at low rates, so that
        their mean would ask the denoiser to make anew what the few others say.
        """
        self.update()
        if schedule is None:
            return None
        found = []
        for latent in latents:
            qualities = torch.linspace(0, 1, KNOTS, device=latent.device)
            found.append(
                torch.stack(
                    [
                        latent_cosine(self.estimate(latent, quality.expand(len(latent))).z_hat, latent)
                        for quality in qualities
                    ]
                )
            )
        cosines = torch.stack(found).mean(dim=0)
        timesteps = schedule.timestep_of_signal(cosines)
        return CurveMapping(tuple(map(float, timesteps)), tuple(round(value, 6) for value in cosines.tolist()))

    @contextlib.contextmanager
    def ready_to_code(self) -> Iterator[None]:
        self.update()
        yield

    # The float networks.

    def estimate(self, latent: Tensor, quality: Tensor) -> Estimate:
        """What a latent (B, C, h, w) at qualities (B,) decodes to and costs: `quantise` and `write` in floats."""
        with torch.autocast(latent.device.type, enabled=False):  # what is rounded must be exact, as the integers are
            return self._estimate(latent.to(self.log_gain.dtype), quality)

    def _estimate(self, latent: Tensor, quality: Tensor) -> Estimate:
        knots = knot_weights(quality)
        values, side = self.analyse(latent, quality)
        side_hat = straight_through(side, side.round())
        _, likelihood = self.side_model(side)
        bits = bits_of(likelihood)
        known, value_bits = self._predict(values, self._features(side_hat, knots, values.shape[-2:]), knots)
        return Estimate(known * at_quality(self.log_inverse, knots).exp(), bits + value_bits)

    def analyse(self, latent: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder half: latent (B, C, h, w) -> scaled latent (B, C, h, w) and side information (B, Z, hz, wz), both
        before they are rounded."""
        knots = knot_weights(quality)
        side = compute_finite("the side information", self.hyper_encoder, nn.Module.__call__, latent)
        side = side * at_quality(self.log_side_gain.float(), knots).exp()
        return latent.float() * at_quality(self.log_gain.float(), knots).exp(), side

    @torch.no_grad()
    def update(self) -> None:
        """Make the integer model, without which nothing is coded, of the weights as they are."""
        arrays = {
            "groups": np.array(self.groups, dtype=np.int32),
            "side_frequencies": self._side_frequencies(),
            "scale_frequencies": scale_frequencies(),
            **{
                f"{name}{part}": value
                for name, layer in (("up1", self.up1), ("up2", self.up2))
                for part, value in (("", integer_weights(layer.weight)), ("_bias", integer_biases(layer.bias)))
            },
        }
        for number, predictor in enumerate(self.predictors):
            arrays |= {f"{name}.{number}": value for name, value in predictor.integers().items()}
        self.coder = HyperpriorCoder.from_arrays(arrays)

    def _side_frequencies(self) -> np.ndarray:
        """Tables of the side information, int32 (Z, 2 * R + 1)."""
        whole = torch.arange(-LARGEST_SIDE, LARGEST_SIDE + 1.0, device=self.log_gain.device)
        training = self.side_model.training
        _, likelihood = self.side_model.eval()(whole.expand(1, self.side_model.channels, -1).contiguous())
        self.side_model.train(training)
        likelihood = likelihood[0].double().cpu().numpy()
        return frequency_tables(
            likelihood, [np.abs(np.flatnonzero(row > _TAIL) - LARGEST_SIDE).max() for row in likelihood]
        )

    def _features(self, side: Tensor, knots: Tensor, shape: Sequence[int]) -> Tensor:
        """Decoded side information (B, P, h, w)."""
        hidden = round_activation(F.pixel_shuffle(self.up1(side, knots), 2)).relu()
        return round_activation(F.pixel_shuffle(self.up2(hidden), 2)).relu()[..., : shape[0], : shape[1]]

    def _predict(self, values: Tensor, features: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded values (B, C, h, w) and their bits (B,), group by group, the anchors of each first."""
        rows, columns = (torch.arange(side, device=values.device) for side in values.shape[-2:])
        anchors = (rows[:, None] + columns) % 2 == 0
        decoded: list[Tensor] = []
        bits = values.new_zeros(len(values))
        for own, predictor in zip(values.split(self.groups, dim=1), self.predictors, strict=True):
            common = predictor.common(decoded, features)
            first, first_levels = predictor.outputs(common, None, 0, knots)
            known = straight_through(own, (own - first).round() + first) * anchors
            second, second_levels = predictor.outputs(common, known, 1, knots)
            means = torch.where(anchors, first, second)
            levels = torch.where(anchors, first_levels, second_levels).clamp(0, SCALES - 1)
            if not self.training:
                levels = (levels + 0.5).floor()
            _, likelihood = self.value_model(own, SCALE_MIN * (levels * LEVEL_STEP).exp(), means)
            if not self.training:
                likelihood = likelihood.clamp_min(2.0**-PRECISION)  # as in the tables
            bits = bits + bits_of(likelihood)
            decoded.append(straight_through(own, (own - means).round() + means))
        return torch.cat(decoded, dim=1), bits


def latent_cosine(z_hat: Tensor, latent: Tensor) -> Tensor:
    """Cosine similarity of two latents (B, C, h, w), mean over the batch."""
    return F.cosine_similarity(z_hat.float().flatten(1), latent.float().flatten(1)).mean()
