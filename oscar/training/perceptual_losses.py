"""A perceptual distance of a small local feature network; where its weights come from: see `oscar.metrics.weights`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oscar.metrics.squeezenet import SqueezeNetFeatures
from oscar.metrics.weights import Weights, WeightsUnavailable
from oscar.utils.errors import first_line


class FeatureDistance(nn.Module):
    """Squared distance of SqueezeNet features, each position's vector scaled to unit length, averaged over taps.

    As LPIPS without its calibrated layers: summed over channels, so 2 - 2 cos in [0, 2] at each position, then averaged
    over positions, taps and the batch.
    """

    def __init__(self, network: SqueezeNetFeatures) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_weights(cls, weights: Weights) -> FeatureDistance:
        path = weights.find("squeezenet")
        try:
            return cls(SqueezeNetFeatures.from_file(path))
        except Exception as error:
            raise WeightsUnavailable(f"squeezenet weights: {path}: {first_line(error)}") from error

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        pairs = zip(self.network(prediction), self.network(target), strict=True)
        distances = [(unit(a) - unit(b)).square().sum(dim=1).mean() for a, b in pairs]
        return torch.stack(distances).mean()


def unit(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Vectors over channels scaled to length one; eps keeps the gradient finite where ReLU left only zeros."""
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + eps)
