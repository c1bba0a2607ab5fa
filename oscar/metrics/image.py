"""Metrics between images, on 8-bit RGB, as the field reports them.

PSNR, MS-SSIM and SSIMULACRA2 need no weights (`oscar.metrics.pixels`). The rest are networks of pyiqa and lpips, whose
weights the user has or names (`oscar.metrics.weights`); a metric whose package or weights cannot be had is listed as
unavailable, with the reason, and the others go on. Any metric with the suffix `_p256` is taken on patches of 256x256
pixels: those of the grid that starts at (0, 0) and those of the grid shifted by half a patch to (128, 128), whole ones
only (HiFiC, Mentzer et al. 2020, for FID and KID). Metrics of single images are averaged over an image's patches; FID
and KID take all patches of all images as their set.

torch is imported lazily.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from oscar.metrics.pixels import (
    MS_SSIM_MIN_SIDE,
    SSIMULACRA2_MIN_SIDE,
    ImageLike,
    equal_arrays,
    ms_ssim,
    ms_ssim_y,
    psnr,
    ssimulacra2,
    unit_tensor,
)
from oscar.registry import METRICS

if TYPE_CHECKING:
    import torch
    from PIL import Image

    ImageLike = Image.Image | np.ndarray | torch.Tensor
else:
    ImageLike = Any

PATCH = 256  # pixels, with half a patch of shift
ON_PATCHES = f"_p{PATCH}"


@dataclass(frozen=True)
class Metric:
    """What a metric is called and how to read it.

    Attributes:
        label: its name in tables and plots.
        unit: of its values, empty for a plain number.
        higher_is_better: the direction of quality.
        kind: `full_reference` compares a decoded image with its original, `no_reference` looks at the decoded image
            alone, `set` compares all decoded images with all originals.
        needs: what images must have, where not all have a value.
        function: how it is computed, where no network does: of the original and the decoded image, uint8 arrays
            (H, W, 3), of the latter alone with `no_reference`; None or NaN where there is no value. With `set` it is a
            distance of Inception's features of the originals and of the decoded images, float32 (N, 2048).
        package: what the function imports, without which the metric is unavailable; empty if nothing.
    """

    label: str
    unit: str
    higher_is_better: bool
    kind: Literal["full_reference", "no_reference", "set"]
    needs: str = ""
    function: Callable[..., float | None] | None = None
    package: str = ""

    def variants(self, name: str) -> dict[str, Metric]:
        """What is registered along with it: the metric on patches."""
        label, needs = f"{self.label}, {PATCH}-pixel patches", f"a patch of {PATCH}x{PATCH} pixels"
        return {name + ON_PATCHES: replace(self, label=label, needs=needs)}


_PAPERS = {"ms_ssim": "ms_ssim_y"}  # conventions of protocol paper, under names of their own


def metrics_of(protocol: str, names: Iterable[str]) -> list[str]:
    """The metrics that a protocol reports for some names: under `paper` MS-SSIM is `ms_ssim_y`, the luma's."""
    if protocol != "paper":
        return list(names)
    plain = {name: name.removesuffix(ON_PATCHES) for name in names}
    return [_PAPERS.get(short, short) + name[len(short) :] for name, short in plain.items()]


def _fid(a: np.ndarray, b: np.ndarray) -> float:
    from oscar.metrics.distribution import frechet_distance

    return frechet_distance(a, b)


def _kid(a: np.ndarray, b: np.ndarray) -> float:
    from oscar.metrics.distribution import kernel_distance

    return kernel_distance(a, b)


_SIDES = f"{MS_SSIM_MIN_SIDE} pixels a side"
for _name, _metric in {
    "psnr": Metric("PSNR", "dB", True, "full_reference", function=psnr),
    "ms_ssim": Metric("MS-SSIM", "", True, "full_reference", _SIDES, ms_ssim),
    "ms_ssim_y": Metric("MS-SSIM (luma)", "", True, "full_reference", _SIDES, ms_ssim_y),
    "ssimulacra2": Metric(
        "SSIMULACRA2", "", True, "full_reference", f"{SSIMULACRA2_MIN_SIDE} pixels a side", ssimulacra2, "ssimulacra2"
    ),
    "lpips_alex": Metric("LPIPS (AlexNet)", "", False, "full_reference", "31 pixels a side"),
    "lpips_vgg": Metric("LPIPS (VGG)", "", False, "full_reference", "16 pixels a side"),
    "dists": Metric("DISTS", "", False, "full_reference"),
    "musiq": Metric("MUSIQ", "", True, "no_reference", "sides that differ less than 448 times"),
    "clipiqa+": Metric("CLIP-IQA+", "", True, "no_reference", "32 pixels a side"),
    "niqe": Metric("NIQE", "", False, "no_reference", "two blocks of 96x96 pixels with contrast"),
    "fid": Metric("FID", "", False, "set", "to be two or more", _fid),
    "kid": Metric("KID", "", False, "set", "to be two or more", _kid),
}.items():
    METRICS.register(_name, _metric)


class MetricSet:
    """Metrics by name, with their networks built once.

    Args:
        names: of `oscar.registry.METRICS`.
        device: of the networks; PSNR and MS-SSIM are computed on the CPU.
        files: weight files by name, see `oscar.metrics.weights.CACHE`; others are looked up in torch's hub cache.
        download: whether missing weight files may be fetched.
        key: where the user configures the two, for messages.

    Attributes:
        names: all names asked for, in order, each once.
        unavailable: those of them that cannot be had, with the reason in one line.
        files: SHA-256 of the weight files that were given, by name.

    Raises:
        ValueError: for an unknown metric or weight file.
    """

    def __init__(
        self,
        names: Iterable[str],
        device: str | torch.device = "cpu",
        files: Mapping[str, str] | None = None,
        download: bool = False,
        key: str = "metrics",
    ) -> None:
        from oscar.metrics.weights import Weights, WeightsUnavailable

        self.names = tuple(dict.fromkeys(names))
        for name in self.names:
            if name not in METRICS:
                allowed = ", ".join(name for name in METRICS if not name.endswith(ON_PATCHES))
                raise ValueError(f"metric {name!r} does not exist; allowed: {allowed}, each also with {ON_PATCHES}")
        self.unavailable: dict[str, str] = {}
        self._device = device
        self._networks: dict[str, Any] = {}
        weights = Weights(files, download, key=f"{key}.files", switch=f"{key}.download")
        self.files = {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in weights.paths.items()
            if path.is_file()
        }
        reasons: dict[str, str] = {}
        for name in self.names:
            network = _network_name(name)
            if network not in self._networks and network not in reasons:
                try:
                    self._networks[network] = _build(network, weights, device)
                except WeightsUnavailable as error:
                    reasons[network] = str(error)
            if network in reasons:
                self.unavailable[name] = reasons[network]

    def only(self, names: Iterable[str]) -> MetricSet:
        """A part of the set, with the same networks."""
        part = copy.copy(self)
        part.names = tuple(name for name in self.names if name in set(names))
        part.unavailable = {name: reason for name, reason in self.unavailable.items() if name in part.names}
        return part

    @property
    def has_set_metrics(self) -> bool:
        """Whether an available metric compares sets of images."""
        return bool(self._available("set"))

    def score(self, reference: ImageLike, decoded: ImageLike) -> dict[str, float | None]:
        """All available metrics of one image.

        Args:
            reference: the original, as for `psnr`.
            decoded: the decoded image, of the same size.

        Returns:
            Values by name; None where the metric does not exist for this image: too small, or NIQE of a flat one.
            Patches for which it does not exist do not count.

        Raises:
            ValueError: if the sizes differ.
            ImageError: if one of them is not such an image.
        """
        a, b = equal_arrays(reference, decoded)
        scores: dict[str, float | None] = {}
        for name in self._available("full_reference", "no_reference"):
            pairs = zip(patches(a), patches(b), strict=True) if name.endswith(ON_PATCHES) else [(a, b)]
            values = [self._score_one(name.removesuffix(ON_PATCHES), *pair) for pair in pairs]
            values = [value for value in values if value is not None and not math.isnan(value)]
            scores[name] = fmean(values) if values else None
        return scores

    def features(self, image: ImageLike) -> dict[str, np.ndarray]:
        """What the available set metrics need of one image.

        Returns:
            By network and, for `_p256`, patches: float32 arrays (N, features), N = 1 for the whole image.
        """
        (pixels,) = equal_arrays(image)
        features = {}
        for name in self._available("set"):
            network = _network_name(name)
            key = _features_key(name)
            if key not in features:
                with _exact_inference():
                    features[key] = self._networks[network](patches(pixels) if key != network else [pixels])
        return features

    def set_scores(
        self, reference: Sequence[Mapping[str, np.ndarray]], decoded: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, float | None]:
        """The available set metrics, from the `features` of all originals and of all decoded images.

        Returns:
            Values by name; None where a set has fewer than two images or patches.
        """
        scores: dict[str, float | None] = {}
        for name in self._available("set"):
            key = _features_key(name)
            sets = [[row for image in images for row in image[key]] for images in (reference, decoded)]
            distance = METRICS[name].function
            scores[name] = distance(*map(np.array, sets)) if min(map(len, sets)) >= 2 else None
        return scores

    def _available(self, *kinds: str) -> list[str]:
        return [name for name in self.names if name not in self.unavailable and METRICS[name].kind in kinds]

    def _score_one(self, name: str, reference: np.ndarray, decoded: np.ndarray) -> float | None:
        """A value of an image or patch; None or NaN where there is none."""
        network, alone = self._networks[name], METRICS[name].kind == "no_reference"
        if METRICS[name].function is not None:
            return network(decoded) if alone else network(reference, decoded)
        inputs = [decoded] if alone else [decoded, reference]
        with _exact_inference():
            return network(*(unit_tensor(pixels).to(self._device) for pixels in inputs))


def _network_name(metric: str) -> str:
    """Metrics of the same network share one."""
    return "inception" if METRICS[metric].kind == "set" else metric.removesuffix(ON_PATCHES)


def _features_key(metric: str) -> str:
    return _network_name(metric) + (ON_PATCHES if metric.endswith(ON_PATCHES) else "")


def _build(network: str, weights: Any, device: str | torch.device) -> Any:
    if network in METRICS and METRICS[network].function is not None:
        if METRICS[network].package:
            from oscar.metrics.weights import import_or_explain

            import_or_explain(METRICS[network].package)
        return METRICS[network].function
    if network == "inception":
        from oscar.metrics.distribution import Inception

        return Inception(weights).eval().to(device)
    from oscar.metrics.perceptual import NETWORKS

    return NETWORKS[network](weights).eval().to(device)


@contextmanager
def _exact_inference() -> Iterator[None]:
    """No gradients, and on a GPU the same value for the same image, in full float32 precision."""
    import torch

    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield


def patches(pixels: np.ndarray) -> list[np.ndarray]:
    """The 256x256 patches of an image (H, W, 3), of the grid at (0, 0) and then of that at (128, 128)."""
    height, width = pixels.shape[:2]
    return [
        pixels[y : y + PATCH, x : x + PATCH]
        for start in (0, PATCH // 2)
        for y in range(start, height - PATCH + 1, PATCH)
        for x in range(start, width - PATCH + 1, PATCH)
    ]
