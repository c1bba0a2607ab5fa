"""Networks behind the perceptual metrics, from pyiqa and lpips, each with its weights from a file.

Every network takes decoded images (1, 3, H, W) in [0, 1], those of full reference also the reference, and gives one
number, NaN where the metric does not exist for such an image. All are built as pyiqa's defaults have them (`lpips`,
`lpips-vgg`, `dists`, `musiq` trained on KonIQ-10k, `clipiqa+` on CLIP's RN50, `niqe` with the original parameters).
"""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from oscar.metrics.networks import DistsDistance, LpipsDistance
from oscar.metrics.weights import Weights, WeightsUnavailable, import_or_explain, load_all
from oscar.utils.errors import first_line


class FullReference(nn.Module):
    """A distance between images in [-1, 1], for images in [0, 1] of at least `min_side` pixels a side."""

    def __init__(self, distance: nn.Module, min_side: int) -> None:
        super().__init__()
        self.distance = distance
        self.min_side = min_side

    def forward(self, decoded: Tensor, reference: Tensor) -> float:
        if min(decoded.shape[-2:]) < self.min_side:
            return math.nan
        return self.distance(2 * decoded - 1, 2 * reference - 1).item()


class Musiq(nn.Module):
    """MUSIQ (Ke et al. 2021), multi-scale transformer trained on KonIQ-10k: about 0 to 100."""

    LONGEST_SIDE = 224  # of the smallest of the image's three scales

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        state = weights.load("musiq")
        self.network = import_or_explain("pyiqa.archs.musiq_arch").MUSIQ(pretrained=False)
        load_all(self.network, state, "musiq")

    def forward(self, decoded: Tensor) -> float:
        shorter, longer = sorted(decoded.shape[-2:])
        if round(shorter * (self.LONGEST_SIDE / longer)) < 1:  # nothing is left of a strip so thin
            return math.nan
        return self.network(decoded).item()


class ClipIqaPlus(nn.Module):
    """CLIP-IQA+ (Wang et al. 2023): CLIP's RN50 with learned prompts for good and bad photos, 0 to 1."""

    MIN_SIDE = 32  # RN50 halves five times

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        weights.require("clip_rn50", "clipiqa_prompts")
        backbone, prompts = weights.find("clip_rn50"), weights.read("clipiqa_prompts")
        import_clip()
        arch = import_or_explain("pyiqa.archs.clipiqa_arch")
        try:  # OpenAI's file is a TorchScript archive, from which the sizes of all layers are read
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch would rather have another kind of file
                self.network = arch.CLIPIQA(model_type="clipiqa+", backbone=str(backbone), pretrained=False)
        except Exception as error:
            raise WeightsUnavailable(f"clip_rn50 weights: {backbone} cannot be read: {first_line(error)}") from error
        learned = self.network.prompt_learner.ctx
        shape = getattr(prompts, "shape", ())
        if shape not in (learned.shape, learned.shape[1:]):  # one prompt for each class, or one for both
            raise WeightsUnavailable(f"clipiqa_prompts weights do not fit: {tuple(shape)}, not {tuple(learned.shape)}")
        learned.data = prompts.data

    def forward(self, decoded: Tensor) -> float:
        if min(decoded.shape[-2:]) < self.MIN_SIDE:
            return math.nan
        return self.network(decoded).item()


class Niqe(nn.Module):
    """NIQE (Mittal et al. 2013): distance of an image's statistics from those of pristine ones, lower is better.

    The statistics are a covariance over blocks of 96x96 pixels that are not flat, of which there must be two.
    """

    BLOCK, FEATURES = 96, 36

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        path = weights.find("niqe")
        arch = import_or_explain("pyiqa.archs.niqe_arch")
        try:
            self.network = arch.NIQE(pretrained_model_path=str(path))
        except Exception as error:  # scipy raises many kinds for damaged files
            raise WeightsUnavailable(f"niqe weights: {path} cannot be read: {first_line(error)}") from error
        shapes = tuple(self.network.mu_pris_param.shape), tuple(self.network.cov_pris_param.shape)
        if shapes != ((self.FEATURES,), (self.FEATURES, self.FEATURES)):
            raise WeightsUnavailable(f"niqe weights do not fit: shapes {shapes[0]} and {shapes[1]}")

    def forward(self, decoded: Tensor) -> float:
        height, width = decoded.shape[-2:]
        if (height // self.BLOCK) * (width // self.BLOCK) < 2:
            return math.nan
        try:
            return self.network(decoded).item()
        except torch.linalg.LinAlgError:  # too few blocks with any contrast
            return math.nan


NETWORKS: dict[str, Callable[[Weights], nn.Module]] = {
    "lpips_alex": lambda weights: FullReference(LpipsDistance(weights, "alexnet"), min_side=31),
    "lpips_vgg": lambda weights: FullReference(LpipsDistance(weights, "vgg16"), min_side=16),
    "dists": lambda weights: FullReference(DistsDistance(weights), min_side=1),
    "musiq": Musiq,
    "clipiqa+": ClipIqaPlus,
    "niqe": Niqe,
}


def import_clip() -> None:
    """Import the clip package, which pyiqa's CLIP-IQA needs, also beside setuptools 82 and later.

    All that clip 1.0.1 takes from `pkg_resources`, which setuptools has dropped, is its copy of `packaging`.
    """
    if find_spec("pkg_resources") is not None:
        import_or_explain("clip")
        return
    import packaging.version

    sys.modules["pkg_resources"] = stand_in = types.ModuleType("pkg_resources")
    stand_in.packaging = packaging
    try:
        import_or_explain("clip")
    finally:
        del sys.modules["pkg_resources"]
