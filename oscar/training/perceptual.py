"""Perceptual distances by name: networks from pyiqa and lpips, and a small local feature network.

Their weights are large files that this project does not ship. Each is looked for in `paths`, then in torch's hub cache
where torchvision and pyiqa keep theirs, then, only with `download=True`, fetched from where those libraries fetch it.
Whatever is wrong ends in `PerceptualUnavailable` with the reason, so that a run without network stops at its start.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from oscar.errors import first_line
from oscar.models.features import SqueezeNetFeatures

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
# weight files by the name used in `paths`, with their place in torch's hub cache (None: not to be had by download)
CACHE = {
    "vgg16": "checkpoints/vgg16-397923af.pth",
    "alexnet": "checkpoints/alexnet-owt-7be5be79.pth",
    "dists": "pyiqa/DISTS_weights-f5e65c96.pth",
    "squeezenet": None,
}


class PerceptualUnavailable(RuntimeError):
    """A perceptual term cannot be built: a library or its weights are missing or unusable."""


class Weights:
    """Where to find weight files.

    Args:
        paths: name of a weight file (`vgg16`, `alexnet`, `dists` or `squeezenet`) to its path; others are looked up in
            torch's hub cache.
        download: whether a missing file may be fetched from the network.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, paths: Mapping[str, str | Path] | None = None, download: bool = False) -> None:
        self.paths = {name: Path(path) for name, path in (paths or {}).items() if path is not None}
        self.download = download
        for name in self.paths:
            if name not in CACHE:
                raise ValueError(f"loss weight path {name!r} does not exist; allowed: {', '.join(CACHE)}")

    def find(self, name: str) -> Path:
        """The file of these weights; raises PerceptualUnavailable if it cannot be had."""
        if name in self.paths:
            if self.paths[name].is_file():
                return self.paths[name]
            raise PerceptualUnavailable(f"{name} weights: no file {self.paths[name]}")
        if CACHE[name] is None:
            raise PerceptualUnavailable(f"{name} weights: give their file under paths.{name}")
        cached = Path(torch.hub.get_dir()) / CACHE[name]
        if not cached.is_file():
            if not self.download:
                raise PerceptualUnavailable(
                    f"{name} weights are not in torch's cache ({cached}); give their file under paths.{name}"
                    " or allow the download"
                )
            fetch(name, cached)
        return cached

    def load(self, name: str) -> dict[str, Tensor]:
        """The state dict of these weights; raises PerceptualUnavailable if it cannot be had."""
        path = self.find(name)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged files
            raise PerceptualUnavailable(f"{name} weights: {path} cannot be read: {first_line(error)}") from error


class LpipsDistance(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018) of the `lpips` package, mean over the batch; `trunk` is `vgg16` or `alexnet`."""

    def __init__(self, weights: Weights, trunk: str) -> None:
        super().__init__()
        lpips = import_or_explain("lpips")
        trunk_weights = trunk_features(weights.load(trunk), trunk)
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
    """DISTS (Ding et al. 2020) of pyiqa, mean over the batch."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        dists_arch = import_or_explain("pyiqa.archs.dists_arch")
        from torchvision.models import vgg16

        mixing, trunk_weights = weights.load("dists"), trunk_features(weights.load("vgg16"), "vgg16")
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
        return self.network((prediction + 1) / 2, (target + 1) / 2).mean()


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
            raise PerceptualUnavailable(f"squeezenet weights: {path}: {first_line(error)}") from error

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        pairs = zip(self.network(prediction), self.network(target), strict=True)
        distances = [(unit(a) - unit(b)).square().sum(dim=1).mean() for a, b in pairs]
        return torch.stack(distances).mean()


NETWORKS = {
    "dists": DistsDistance,
    "lpips_vgg": lambda weights: LpipsDistance(weights, "vgg16"),
    "lpips_alex": lambda weights: LpipsDistance(weights, "alexnet"),
    "features": FeatureDistance.from_weights,
}


def unit(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Vectors over channels scaled to length one; eps keeps the gradient finite where ReLU left only zeros."""
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + eps)


def trunk_features(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The convolutions of a torchvision classifier: `features.5.weight` as `5.weight`."""
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    if not features:
        raise PerceptualUnavailable(f"{name} weights hold no features.*: not a torchvision {name} file")
    return features


def load_all(network: nn.Module, state: Mapping[str, Tensor | None], name: str, extra: list[str] | None = None) -> None:
    """Load a state dict in which None stands for a weight that the file lacked; `extra` keys keep their values."""
    lacking = [key for key, value in state.items() if value is None]
    if lacking:
        raise PerceptualUnavailable(f"{name} weights lack {lacking[0]}")
    kept = {key: value for key, value in network.state_dict().items() if key in (extra or [])}
    try:
        network.load_state_dict({**kept, **state})
    except RuntimeError as error:
        raise PerceptualUnavailable(f"{name} weights do not fit: {first_line(error)}") from error


def import_or_explain(module: str):
    """Import a library that only some perceptual terms need."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise PerceptualUnavailable(f"package {package} cannot be imported: {first_line(error)}") from error


def fetch(name: str, destination: Path) -> None:
    """Download a weight file into torch's cache, giving up when the network is silent."""
    import torchvision.models as models

    if name == "dists":
        url = import_or_explain("pyiqa.archs.dists_arch").default_model_urls["url"]
    else:
        url = {"vgg16": models.VGG16_Weights, "alexnet": models.AlexNet_Weights}[name].IMAGENET1K_V1.url
    destination.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, str(destination), progress=False)
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors
        raise PerceptualUnavailable(f"{name} weights cannot be downloaded: {first_line(error)}") from error
    finally:
        socket.setdefaulttimeout(before)
