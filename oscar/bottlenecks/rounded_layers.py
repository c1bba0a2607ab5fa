"""Networks that compute in floats what the integer model of `oscar.bitstream.hyperprior` computes, for training.

Weights and activations are rounded to the integer model's steps; gradients pass the rounding as if it were not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.bitstream.hyperprior_weights import ACTIVATION_STEPS, KNOTS, LARGEST_SYMBOL, SCALES, WEIGHT_STEPS
from oscar.bitstream.rans import PRECISION
from oscar.models.compressai import GaussianConditional

SCALE_MIN, SCALE_MAX = 0.11, 64.0
_ACTIVATION_LIMIT, _WEIGHT_LIMIT = 32767 / ACTIVATION_STEPS, 31.0
_SUM_STEPS, _BIAS_LIMIT = ACTIVATION_STEPS * WEIGHT_STEPS, 2**31 - 1
_LEAST_REACH = 8  # of a table, from -8 to 8
_DEVIATIONS = 9  # that a table of symbols reaches
LEVEL_STEP = math.log(SCALE_MAX / SCALE_MIN) / (SCALES - 1)
_LEVEL_WEIGHT = 8.0  # of the rows that give scale levels, which run to 63, so that they learn as fast as means


class RoundedLayer(nn.Module):
    """A convolution with rounded weights whose bias may be learned at knots of q, of several passes.

    Args:
        inputs, outputs: channels.
        size: of the kernel.
        biases: shape of the set of biases, its last dimension KNOTS; without it there is one.
    """

    def __init__(self, inputs: int, outputs: int, size: int, biases: tuple[int, ...] = ()):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size) * (2 / (inputs * size**2)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(*biases, outputs))

    def forward(self, value: Tensor, knots: Tensor | None = None) -> Tensor:
        result = F.conv2d(value, round_weight(self.weight), padding=self.weight.shape[-1] // 2)
        bias = round_bias(self.bias)
        return result + (bias[:, None, None] if knots is None else at_quality(bias, knots))


class Predictor(nn.Module):
    """Means and scale levels of a group of channels from those before it, its own anchors, and side information."""

    def __init__(self, before: int, own: int, features: int, hidden: int):
        super().__init__()
        self.before, self.own = before, own
        known = torch.randn(hidden, before + own, 5, 5) * (1 / (25 * (before + own))) ** 0.5
        self.known = nn.Parameter(known)
        self.side = nn.Parameter(torch.randn(hidden, features, 1, 1) * (1 / features) ** 0.5)
        self.first_bias = nn.Parameter(torch.zeros(2, KNOTS, hidden))
        self.middle = RoundedLayer(hidden, hidden, 1)
        self.last = nn.Parameter(torch.randn(2 * own, hidden, 1, 1) * 0.1 * hidden**-0.5)
        self.last_bias = nn.Parameter(torch.zeros(2 * own))
        with torch.no_grad():
            self.last_bias[own:] = -math.log(SCALE_MIN) / LEVEL_STEP / _LEVEL_WEIGHT  # scale 1

    def common(self, decoded: list[Tensor], features: Tensor) -> Tensor:
        """The part of the first layer that both passes share."""
        result = F.conv2d(features, round_weight(self.side))
        if decoded:
            known = round_activation(torch.cat(decoded, dim=1))
            result = result + F.conv2d(known, round_weight(self.known[:, : self.before]), padding=2)
        return result

    def outputs(self, common: Tensor, anchors: Tensor | None, turn: int, knots: Tensor) -> tuple[Tensor, Tensor]:
        """Means and levels, (B, own, h, w) each, of a pass: the first, or the second, which knows the anchors."""
        if anchors is not None:
            common = common + F.conv2d(round_activation(anchors), round_weight(self.known[:, self.before :]), padding=2)
        hidden = round_activation(common + at_quality(round_bias(self.first_bias[turn]), knots)).relu()
        hidden = round_activation(self.middle(hidden)).relu()
        weight, bias = self.scaled_last()
        outputs = round_activation(F.conv2d(hidden, round_weight(weight)) + round_bias(bias)[:, None, None])
        return outputs.split(self.own, dim=1)

    def integers(self) -> dict[str, np.ndarray]:
        """Weights and biases of the integer model."""
        weight, bias = self.scaled_last()
        return {
            "known": integer_weights(self.known),
            "side": integer_weights(self.side)[..., 0, 0],
            "first_bias": integer_biases(self.first_bias),
            "middle": integer_weights(self.middle.weight)[..., 0, 0],
            "middle_bias": integer_biases(self.middle.bias),
            "last": integer_weights(weight)[..., 0, 0],
            "last_bias": integer_biases(bias),
        }

    def scaled_last(self) -> tuple[Tensor, Tensor]:
        """Weights and biases of the last layer as they are used."""
        factor = self.last.new_ones(2 * self.own)
        factor[self.own :] = _LEVEL_WEIGHT
        return self.last * factor[:, None, None, None], self.last_bias * factor


def knot_weights(quality: Tensor) -> Tensor:
    """Weights (B, KNOTS) by which values at the knots are interpolated at qualities (B,)."""
    places = quality[:, None] * (KNOTS - 1)
    return (1 - (places - torch.arange(KNOTS, device=quality.device)).abs()).clamp_min(0)


def at_quality(values: Tensor, knots: Tensor) -> Tensor:
    """Values at the knots (KNOTS, n) -> at the qualities of a batch, (B, n, 1, 1)."""
    return (knots @ values)[:, :, None, None]


def bits_of(likelihood: Tensor) -> Tensor:
    """Bits of each image from likelihoods (B, ...)."""
    return -likelihood.flatten(1).log2().sum(dim=1)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach() if value.requires_grad else rounded


def round_activation(value: Tensor) -> Tensor:
    """Rounded and clipped as the integer model's activations."""
    clipped = value.clamp(-_ACTIVATION_LIMIT, _ACTIVATION_LIMIT)
    return straight_through(clipped, (clipped * ACTIVATION_STEPS + 0.5).floor() / ACTIVATION_STEPS)


def round_weight(value: Tensor) -> Tensor:
    """Rounded and clipped as the integer model's weights."""
    clipped = value.clamp(-_WEIGHT_LIMIT, _WEIGHT_LIMIT)
    return straight_through(clipped, (clipped * WEIGHT_STEPS).round() / WEIGHT_STEPS)


def round_bias(value: Tensor) -> Tensor:
    """Rounded as the integer model's biases."""
    return straight_through(value, (value * _SUM_STEPS).round() / _SUM_STEPS)


def integer_weights(value: Tensor) -> np.ndarray:
    return (round_weight(value) * WEIGHT_STEPS).cpu().numpy().astype(np.int16)


def integer_biases(value: Tensor) -> np.ndarray:
    return (value.double() * _SUM_STEPS).round().clamp(-_BIAS_LIMIT, _BIAS_LIMIT).cpu().numpy().astype(np.int32)


def scale_frequencies() -> np.ndarray:
    """Tables of symbols by scale level, int32 (64, 2 * M + 1)."""
    scales = SCALE_MIN * np.exp(LEVEL_STEP * np.arange(SCALES))
    whole = np.broadcast_to(np.arange(-LARGEST_SYMBOL, LARGEST_SYMBOL + 1.0), (SCALES, 2 * LARGEST_SYMBOL + 1))
    model = GaussianConditional(None, scale_bound=SCALE_MIN).double().eval()
    _, likelihood = model(torch.from_numpy(whole.copy()), torch.from_numpy(scales)[:, None])
    return frequency_tables(likelihood.numpy(), np.ceil(_DEVIATIONS * scales).astype(int))


def frequency_tables(likelihood: np.ndarray, reaches: Sequence[int]) -> np.ndarray:
    """Probabilities of whole numbers around 0, (n, 2 * L + 1) -> frequencies, int32 (n, 2 * R + 1), R <= L.

    Each row is of 65536 and reaches as far as is said, but from -8 to 8 at least; all that it holds is above 0.
    """
    centre = likelihood.shape[1] // 2
    reaches = [min(max(_LEAST_REACH, int(reach)), centre) for reach in reaches]
    widest = max(reaches)
    tables = np.zeros((len(likelihood), 2 * widest + 1), dtype=np.int32)
    for table, row, own in zip(tables, likelihood, reaches, strict=True):
        table[widest - own : widest + own + 1] = _frequencies(row[centre - own : centre + own + 1])
    return tables


def _frequencies(likelihood: np.ndarray) -> np.ndarray:
    """Integers above 0 in the ratio of probabilities, as nearly as may be, that sum to 65536."""
    total = 2**PRECISION
    counts = 1 + np.floor(likelihood / likelihood.sum() * (total - len(likelihood))).astype(np.int64)
    counts[np.argmax(likelihood)] += total - counts.sum()
    return counts
