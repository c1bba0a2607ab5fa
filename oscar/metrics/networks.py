"""LPIPS and DISTS, from the lpips and pyiqa packages, with weights from files that the user names or has in a cache.

Both take images (B, 3, H, W) in [-1, 1] and give the mean distance over the batch, 0 for equal images.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from unittest import mock

from torch import Tensor, nn

from oscar.metrics.weights import Weights, WeightsUnavailable, import_or_explain, load_all


class LpipsDistance(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018) of the `lpips` package, mean over the batch; `trunk` is `vgg16` or `alexnet`."""

    def __init__(self, weights: Weights, trunk: str) -> None:
        super().__init__()
        trunk_weights = trunk_features(weights.load(trunk), trunk)
        lpips = import_or_explain("lpips")
        # pnet_rand: the package would fetch the trunk's weights itself; its own linear layers are in the package
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it calls torchvision in an outdated way
            self.network = lpips.LPIPS(net={"vgg16": "vgg", "alexnet": "alex"}[trunk], pnet_rand=True, verbose=False)
        # lpips cuts the trunk into slices and keeps the layers' numbers: slice2.5.weight is features.5.weight
        renamed = {key: trunk_weights.pop(key.split(".", 1)[1], None) for key in self.network.net.state_dict()}
        load_all(self.network.net, renamed, trunk)
        self.network.requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.network(prediction, target).mean()


class DistsDistance(nn.Module):
    """DISTS (Ding et al. 2020) of pyiqa, mean over the batch, or of each image."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        weights.require("dists", "vgg16")
        mixing, trunk_weights = weights.load("dists"), trunk_features(weights.load("vgg16"), "vgg16")
        dists_arch = import_or_explain("pyiqa.archs.dists_arch")
        from torchvision.models import vgg16

        # pyiqa asks torchvision for trained weights without a way to say where they are
        with mock.patch.object(dists_arch.models, "vgg16", lambda weights: vgg16(weights=None)):
            self.network = dists_arch.DISTS(pretrained=False)
        renamed = {  # pyiqa keeps the numbers of torchvision's layers: stage2.5.weight is features.5.weight
            key: mixing.get(key) if key in ("alpha", "beta") else trunk_weights.get(key.split(".", 1)[1])
            for key, _ in self.network.named_parameters()
        }
        load_all(self.network, renamed, "dists and vgg16", extra=[key for key, _ in self.network.named_buffers()])
        self.network.requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.by_image(prediction, target).mean()

    def by_image(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The distance of each image, (B,)."""
        return self.network((prediction + 1) / 2, (target + 1) / 2).reshape(len(prediction))


def trunk_features(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The convolutions of a torchvision classifier: `features.5.weight` as `5.weight`."""
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    if not features:
        raise WeightsUnavailable(f"{name} weights hold no features.*: not a torchvision {name} file")
    return features
