"""Weight files of other projects' networks: found by name, read safely, fetched only where that is allowed.

These are large files that this project does not ship. Each is looked for in `paths`, then in torch's hub cache where
torchvision and pyiqa keep theirs, then, only with `download=True`, fetched from where those libraries fetch it.
On torch's meta device, where networks have shapes and no values, no file is looked for.
Whatever is wrong ends in `WeightsUnavailable` with the reason in one line, and a run without network waits for none.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from oscar.utils.errors import first_line

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
# weight files by the name used in `paths`, with their place in torch's hub cache (None: not to be had by download)
CACHE = {
    "vgg16": "checkpoints/vgg16-397923af.pth",
    "alexnet": "checkpoints/alexnet-owt-7be5be79.pth",
    "squeezenet": None,
    "dists": "pyiqa/DISTS_weights-f5e65c96.pth",
    "musiq": "pyiqa/musiq_koniq_ckpt-e95806b9.pth",
    "clip_rn50": "clip/RN50.pt",
    "clipiqa_prompts": "pyiqa/CLIP-IQA+_learned_prompts-603f3273.pth",
    "niqe": "pyiqa/niqe_modelparameters.mat",
    "inception": "pyiqa/pt_inception-2015-12-05-6726825d.pth",
}
DISTS_MIXING = (1, 1475, 1, 1)  # a weight for each channel of the image and of five layers of VGG16


class WeightsUnavailable(RuntimeError):
    """A network cannot be built: its library or its weights are missing or unusable."""


class Weights:
    """Where to find weight files.

    Args:
        paths: name of a weight file, one of `CACHE`, to its path; others are looked up in torch's hub cache.
        download: whether a missing file may be fetched from the network.
        key, switch: what the user calls `paths` and `download`, for messages.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(
        self,
        paths: Mapping[str, str | Path] | None = None,
        download: bool = False,
        key: str = "paths",
        switch: str = "download",
    ) -> None:
        self.paths = {name: Path(path) for name, path in (paths or {}).items() if path is not None}
        self.download = download
        self.key, self.switch = key, switch
        for name in self.paths:
            if name not in CACHE:
                raise ValueError(f"{key}: weight file {name!r} does not exist; allowed: {', '.join(CACHE)}")

    def require(self, *names: str) -> None:
        """Raise WeightsUnavailable if any of these files cannot be had, naming all that are missing, and the way out.

        A network that needs several files calls it first, so that its user need not find out about them one by one.
        """
        if on_meta():
            return
        absent = [name for name in names if name in self.paths and not self.paths[name].is_file()]
        if absent:
            raise WeightsUnavailable("; ".join(f"{name} weights: no file {self.paths[name]}" for name in absent))
        missing = [name for name in names if name not in self.paths and not self.is_cached(name)]
        if missing and not (self.download and all(CACHE[name] for name in missing)):
            here = ", ".join(str(self.cached(name)) for name in missing if CACHE[name])
            where = f" are not in torch's cache ({here})" if here else " are in no cache and cannot be downloaded"
            raise WeightsUnavailable(f"{' and '.join(missing)} weights{where}; allowed: {self.how_to_get(*missing)}")

    def how_to_get(self, *names: str) -> str:
        """The settings that would provide these files."""
        files = " ".join(f"+{self.key}.{name}=FILE" for name in names)
        return files + (f", or {self.switch}=true to download" if all(CACHE[name] for name in names) else "")

    def cached(self, name: str) -> Path:
        """Where a file lies in torch's hub cache, if it is there."""
        return Path(torch.hub.get_dir()) / CACHE[name]

    def is_cached(self, name: str) -> bool:
        return CACHE[name] is not None and self.cached(name).is_file()

    def find(self, name: str) -> Path:
        """The file of these weights; raises WeightsUnavailable if it cannot be had."""
        self.require(name)
        if name in self.paths:
            return self.paths[name]
        if not self.is_cached(name):
            try:
                fetch(name, self.cached(name))
            except WeightsUnavailable as error:
                raise WeightsUnavailable(f"{error}; allowed: +{self.key}.{name}=FILE") from error
        return self.cached(name)

    def read(self, name: str) -> Any:
        """The tensors of this file; raises WeightsUnavailable if they cannot be had."""
        if on_meta():
            return shapes_of(name)
        path = self.find(name)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged files
            raise WeightsUnavailable(f"{name} weights: {path} cannot be read: {first_line(error)}") from error

    def load(self, name: str) -> dict[str, Tensor]:
        """The state dict in this file, less DataParallel's prefix; raises WeightsUnavailable if it cannot be had."""
        state = self.read(name)
        if not isinstance(state, Mapping):
            raise WeightsUnavailable(f"{name} weights: {self.find(name)} holds no state dict")
        return {key.removeprefix("module."): value for key, value in state.items()}


def on_meta() -> bool:
    """Whether networks are built on torch's meta device."""
    return torch.get_default_device().type == "meta"


def shapes_of(name: str) -> dict[str, Tensor]:
    """The tensors of a weight file in their shapes.

    Raises:
        WeightsUnavailable: for a file whose shapes are not known without it.
    """
    if name == "dists":
        return {key: torch.empty(DISTS_MIXING) for key in ("alpha", "beta")}
    if name in ("vgg16", "alexnet"):
        return getattr(import_or_explain("torchvision.models"), name)(weights=None).state_dict()
    raise WeightsUnavailable(f"{name} weights: their shapes are not known without the file")


def load_all(network: nn.Module, state: Mapping[str, Tensor | None], name: str, extra: list[str] | None = None) -> None:
    """Load a state dict in which None stands for a weight that the file lacked; `extra` keys keep their values.

    Raises:
        WeightsUnavailable: naming one weight that is missing, unknown or of another shape.
    """
    lacking = [key for key, value in state.items() if value is None]
    if lacking:
        raise WeightsUnavailable(f"{name} weights lack {lacking[0]}")
    kept = {key: value for key, value in network.state_dict().items() if key in (extra or [])}
    try:
        network.load_state_dict({**kept, **state})
    except RuntimeError as error:  # its first line only names the class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise WeightsUnavailable(f"{name} weights do not fit: {lines[min(1, len(lines) - 1)][:200]}") from error


def import_or_explain(module: str) -> ModuleType:
    """Import a library that only some networks need; raises WeightsUnavailable if it cannot be had."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise WeightsUnavailable(
            f"package {package} cannot be imported: {first_line(error)}; allowed: pip install 'oscar-codec[eval]'"
        ) from error


def fetch(name: str, destination: Path) -> None:
    """Download a weight file into torch's cache, giving up when the network is silent."""
    url = url_of(name)
    destination.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, str(destination), progress=False)
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors
        raise WeightsUnavailable(f"{name} weights cannot be downloaded: {first_line(error)}") from error
    finally:
        socket.setdefaulttimeout(before)


def url_of(name: str) -> str:
    """Where torchvision, CLIP or pyiqa fetch this file."""
    if name in ("vgg16", "alexnet"):
        models = import_or_explain("torchvision.models")
        return {"vgg16": models.VGG16_Weights, "alexnet": models.AlexNet_Weights}[name].IMAGENET1K_V1.url
    if name == "clip_rn50":
        return import_or_explain("pyiqa.archs.clip_model")._MODELS["RN50"]
    return import_or_explain("pyiqa.archs.arch_util").get_url_from_name(Path(CACHE[name]).name)
