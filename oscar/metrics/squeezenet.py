"""SqueezeNet v1.0 features, a small local network to measure perceptual distance with.

Architecture: Iandola et al. 2016, arXiv 1602.07360. The weights are an ImageNet classifier's in the layout of a Caffe
export: `conv1.*`, `fireN/conv1x1_1.*` (squeeze), `fireN/conv1x1_2.*` and `fireN/conv3x3_2.*` (expand), N = 2..9, and a
classifier that is not used here. They are not calibrated to human judgements, as LPIPS is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# squeeze and expand channels of fire2..fire9; the output has twice the expand channels
FIRES = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192), 7: (48, 192), 8: (64, 256), 9: (64, 256)}
POOL_AFTER = ("conv1", "fire4", "fire8")
LAYERS = ("conv1", *(f"fire{n}" for n in FIRES))
CAFFE_NAMES = {"conv1x1_1": "squeeze", "conv1x1_2": "expand1", "conv3x3_2": "expand3"}
CLASSIFIERS = ("conv_final.", "conv10.")
BGR_MEAN = (104.0, 117.0, 123.0)  # of the 0..255 images that the network was trained on
SMALLEST_SIDE = 21  # pixels; below it the last pooling has nothing to look at


class Fire(nn.Module):
    """Squeeze to few channels by 1x1, expand by 1x1 and 3x3 side by side, ReLU after each convolution."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1(x), self.expand3(x)], dim=1))


class SqueezeNetFeatures(nn.Module):
    """Activations of SqueezeNet v1.0 at named layers; parameters are frozen, gradients reach the image.

    Args:
        taps: layers whose activations are returned, among `conv1` and `fire2` to `fire9`.

    Raises:
        ValueError: for a layer that does not exist.
    """

    def __init__(self, taps: Sequence[str] = ("fire2", "fire4", "fire5", "fire7", "fire9")) -> None:
        super().__init__()
        for tap in taps:
            if tap not in LAYERS:
                raise ValueError(f"features tap {tap!r} does not exist; allowed: {', '.join(LAYERS)}")
        self.taps = tuple(taps)
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        channels = 96
        for number, (squeeze, expand) in FIRES.items():
            self.add_module(f"fire{number}", Fire(channels, squeeze, expand))
            channels = 2 * expand
        self.register_buffer("bgr_mean", torch.tensor(BGR_MEAN).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path, **kwargs) -> SqueezeNetFeatures:
        """The network with weights from a torch file in the Caffe layout; see `load_caffe_weights`."""
        network = cls(**kwargs)
        network.load_caffe_weights(torch.load(path, map_location="cpu", weights_only=True))
        return network

    def load_caffe_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights named as in the module's docstring; every key must be known and every layer be given.

        Raises:
            ValueError: naming the first key that is missing, unknown or of another shape.
        """
        renamed = {rename(key): value for key, value in weights.items() if not key.startswith(CLASSIFIERS)}
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
        if missing or unknown:
            kind, key = ("lack", missing[0]) if missing else ("hold unknown", unknown[0])
            raise ValueError(f"SqueezeNet v1.0 weights {kind} {key!r}; expected fireN/conv1x1_1 and the like, N = 2..9")
        for key, value in renamed.items():
            if value.shape != own[key].shape:
                expected, found = tuple(own[key].shape), tuple(value.shape)
                raise ValueError(f"SqueezeNet v1.0 weight {key!r} has shape {found}; expected {expected}")
        self.load_state_dict(renamed)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Activations (B, C, H', W') at the taps, in the network's order, of images (B, 3, H, W), RGB in [-1, 1].

        Raises:
            ValueError: if a side is under 21 pixels.
        """
        if min(image.shape[-2:]) < SMALLEST_SIDE:
            shape = tuple(image.shape)
            raise ValueError(f"features need images of at least {SMALLEST_SIDE} pixels a side; got {shape}")
        x = (image.flip(1) + 1) * 127.5 - self.bgr_mean
        activations = []
        for name in LAYERS:
            layer = getattr(self, name)
            x = F.relu(layer(x)) if name == "conv1" else layer(x)
            if name in self.taps:
                activations.append(x)
                if len(activations) == len(self.taps):
                    break
            if name in POOL_AFTER:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        return activations


def rename(key: str) -> str:
    """This module's name of a Caffe key: `fire2/conv1x1_1.weight` becomes `fire2.squeeze.weight`."""
    layer, slash, rest = key.partition("/")
    part, dot, leaf = rest.partition(".")
    return f"{layer}.{CAFFE_NAMES.get(part, part)}.{leaf}" if slash and dot else key
