"""Losses of the training stages: cosine, image distances and adversarial (paper, stages 1 and 2).

Images are (B, 3, H, W), RGB in [-1, 1]; latents (B, C, h, w). Every loss is a mean over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.config import StageConfig
from oscar.metrics.networks import DistsDistance, LpipsDistance
from oscar.metrics.ssim import MS_SSIM_WEIGHTS, MS_SSIM_WINDOW, ssim_parts
from oscar.metrics.weights import Weights
from oscar.registry import LOSSES
from oscar.training.perceptual_losses import FeatureDistance

EDGES = "edges_"
CHROMA_BLOCK = 8  # pixels a side


def generator_loss(logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """softplus(-logits): the codec's adversarial loss for the critic's logits on its output (paper, stage 2).

    Args:
        logits: (B, 1, h, w).
        weight: of each image, (B,); None is 1 for all.
    """
    loss = F.softplus(-logits.float())
    return loss.mean() if weight is None else (weight * loss.flatten(1).mean(dim=1)).mean()


def critic_loss(real_logits: Tensor, fake_logits: Tensor, reduction: str = "sum") -> Tensor:
    """Binary cross-entropy of real against fake: the sum of the two means, 2 log 2 for a critic that knows nothing.

    With reduction "mean", the published code's, it is half of that.
    """
    total = F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()
    return total / 2 if reduction == "mean" else total


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return F.l1_loss(prediction, target)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference, of images in [-1, 1]: four times that of images in [0, 1]."""
    return F.mse_loss(prediction, target)


def chroma(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of the colours (Cb, Cr of BT.601) of blocks of 8x8 pixels, of images in [-1, 1].

    It weighs what goes first in small files and other terms hardly count: areas that turn grey.
    """
    return _chroma_by_image(prediction, target).mean()


def ms_ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - MS-SSIM (Wang et al. 2003), in [0, 1].

    Equal to `pytorch_msssim` from 176 pixels a side. Smaller crops, which that package refuses, use as many of the five
    scales as leave room for the 11-pixel window (4 from 88 pixels, 3 from 44, 2 from 22, 1 from 11), their weights
    scaled to the same sum. Negative contrast terms are clamped just above zero, since the gradient of a power at zero
    is infinite; `pytorch_msssim` gives NaN there.

    Raises:
        ValueError: if a side is under 11 pixels.
    """
    return 1 - _ms_ssim_scores(prediction, target).mean()


def _ms_ssim_scores(prediction: Tensor, target: Tensor) -> Tensor:
    """MS-SSIM of each image and channel, (B, 3)."""
    shape = tuple(prediction.shape)
    scales = max_scales(min(shape[-2:]))
    if scales == 0:
        raise ValueError(f"ms_ssim needs images of at least {MS_SSIM_WINDOW} pixels a side; got {shape}")
    weights = prediction.new_tensor(MS_SSIM_WEIGHTS[:scales])
    weights = weights * (sum(MS_SSIM_WEIGHTS) / weights.sum())
    x, y = (prediction + 1) / 2, (target + 1) / 2
    score = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            padding = [side % 2 for side in x.shape[-2:]]
            x, y = F.avg_pool2d(x, 2, padding=padding), F.avg_pool2d(y, 2, padding=padding)
        luminance, contrast = ssim_parts(x, y)
        similarity = luminance * contrast if scale == scales - 1 else contrast
        score = score * similarity.mean(dim=(2, 3)).clamp_min(1e-4) ** weight
    return score


def max_scales(side: int) -> int:
    """How many times the window fits while the side is halved."""
    return sum(side >= MS_SSIM_WINDOW * 2**scale for scale in range(len(MS_SSIM_WEIGHTS)))


def sobel_edges(image: Tensor, eps: float = 1e-6) -> Tensor:
    """Gradient magnitude per channel, same shape as the image: 0 where flat, 1 at an upright step from -1 to 1.

    The Sobel kernels are divided by 8, so that values are differences per pixel; borders repeat their last pixel. `eps`
    keeps the gradient finite (it is zero) where the image is flat.
    """
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    smooth_down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    smooth_across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    across = (smooth_down[..., 2:] - smooth_down[..., :-2]) / 8
    down = (smooth_across[..., 2:, :] - smooth_across[..., :-2, :]) / 8
    return (across.square() + down.square() + eps).sqrt() - eps**0.5


def grey_edges(image: Tensor, eps: float = 1e-6) -> Tensor:
    """Gradient magnitude of the grey image as the published code has it: (B, 3, H, W) in [-1, 1] -> (B, 3, H, W).

    The image is taken in [0, 1], the Sobel kernels are not normalised, borders are of zeros, and the one channel is
    repeated, as DISTS does by broadcasting. So values go from sqrt(eps), where flat, to more than 1: 4 at an upright
    step from black to white.
    """
    weights = image.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = ((image + 1) / 2 * weights).sum(dim=1, keepdim=True)
    sobel = image.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    across, down = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None], padding=1).split(1, dim=1)
    return (across.square() + down.square() + eps).sqrt().expand_as(image)


EDGE_MAPS = {"rgb": sobel_edges, "grey": grey_edges}
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """An image loss that is more than a function (prediction, target) -> mean over the batch.

    Attributes:
        build: weight files -> such a function, or a network that is one.
        by_image: the distance of each image (B,); None takes what is built, if it has such a method, or else images
            one by one.
        unit: factor from images in [-1, 1] to images in [0, 1].
    """

    build: Callable[[Weights], Distance]
    by_image: Distance | None = None
    unit: float = 1.0

    @classmethod
    def named(cls, name: str) -> Term:
        """The term of a name of `LOSSES`."""
        entry = LOSSES[name]
        return entry if isinstance(entry, cls) else cls(lambda weights: entry)


def _l1_by_image(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().mean(dim=(1, 2, 3))


def _mse_by_image(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean(dim=(1, 2, 3))


def _chroma_by_image(prediction: Tensor, target: Tensor) -> Tensor:
    red, green, blue = F.avg_pool2d(prediction - target, CHROMA_BLOCK, ceil_mode=True).unbind(dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], dim=1)
    return planes.square().mean(dim=(1, 2, 3))


def _ms_ssim_by_image(prediction: Tensor, target: Tensor) -> Tensor:
    return 1 - _ms_ssim_scores(prediction, target).mean(dim=1)


LOSSES.register("l1", Term(lambda weights: l1, _l1_by_image, unit=1 / 2))
LOSSES.register("mse", Term(lambda weights: mse, _mse_by_image, unit=1 / 4))
LOSSES.register("chroma", Term(lambda weights: chroma, _chroma_by_image, unit=1 / 4))
LOSSES.register("ms_ssim", Term(lambda weights: ms_ssim, _ms_ssim_by_image))
LOSSES.register("dists", Term(DistsDistance))
LOSSES.register("lpips_vgg", Term(lambda weights: LpipsDistance(weights, "vgg16")))
LOSSES.register("lpips_alex", Term(lambda weights: LpipsDistance(weights, "alexnet")))
LOSSES.register("features", Term(FeatureDistance.from_weights))


class ImageLoss(nn.Module):
    """Weighted sum of named image distances.

    A name is one of `oscar.registry.LOSSES` (`l1`, `mse`, `chroma`, `ms_ssim`, `dists`, `lpips_vgg`, `lpips_alex`,
    `features`, or one of your own), or one of these after `edges_`, which measures Sobel edge maps (mapped from [0, 1]
    to [-1, 1]) in place of images. Networks are frozen, stay in evaluation mode and are shared between a term and its
    edge variant. All is computed in float32.

    Args:
        weights: term to weight; a term of weight zero is not built.
        paths: weight files by name, see `oscar.metrics.weights.Weights`.
        download: whether missing weight files may be fetched.
        image_range, edges, clamp_output: conventions, see `oscar.config.StageConfig`.

    Raises:
        ValueError: for an unknown term or a negative weight.
        WeightsUnavailable: if a term's library or weights cannot be had.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        paths: Mapping[str, str | Path] | None = None,
        download: bool = False,
        image_range: str = "signed",
        edges: str = "rgb",
        clamp_output: bool = False,
    ) -> None:
        super().__init__()
        self.edges = EDGE_MAPS[edges]
        self.clamp_output = clamp_output
        for name, weight in weights.items():
            if name.removeprefix(EDGES) not in LOSSES:
                allowed = f"{', '.join(LOSSES)}, each also after {EDGES}"
                raise ValueError(f"image loss {name!r} does not exist; allowed: {allowed}")
            if not weight >= 0:
                raise ValueError(f"image loss weight {name} = {weight} is not allowed; it must be 0 or more")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        files = Weights(paths, download, key="stage.network_files", switch="stage.download")
        needed = [name for name in LOSSES if {name, EDGES + name} & self.weights.keys()]
        self.terms = {name: Term.named(name) for name in needed}
        self.factors = {name: term.unit if image_range == "unit" else 1 for name, term in self.terms.items()}
        self.distances = {name: term.build(files) for name, term in self.terms.items()}
        self.networks = nn.ModuleDict(
            {name: distance for name, distance in self.distances.items() if isinstance(distance, nn.Module)}
        )
        self.train(False)

    @classmethod
    def of(cls, stage: StageConfig) -> ImageLoss:
        """The image losses that a stage is configured to have."""
        return cls(
            stage.image_losses, stage.network_files, stage.download, stage.image_range, stage.edges, stage.clamp_output
        )

    def train(self, mode: bool = True) -> ImageLoss:
        """Stay in evaluation mode: LPIPS holds dropout, which must never run here."""
        return super().train(False)

    def forward(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and its terms, unweighted, of images (B, 3, H, W) in [-1, 1]."""
        return self._sum(self._distance, prediction, target)

    def by_image(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of each image, (B,), and means of its terms."""
        total, terms = self._sum(self._distances, prediction, target)
        return total, {name: value.detach().mean() for name, value in terms.items()}

    def _distance(self, name: str, prediction: Tensor, target: Tensor) -> Tensor:
        return self.distances[name](prediction, target)

    def _distances(self, name: str, prediction: Tensor, target: Tensor) -> Tensor:
        by_image = self.terms[name].by_image or getattr(self.distances[name], "by_image", None)
        if by_image is not None:
            return by_image(prediction, target)
        pairs = zip(prediction.split(1), target.split(1), strict=True)
        return torch.stack([self.distances[name](*pair) for pair in pairs])

    def _sum(self, distance: Callable, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = prediction.new_zeros((), dtype=torch.float32), {}
        with torch.autocast(prediction.device.type, enabled=False):  # variances cancel in half precision
            plain = prediction.float(), target.float()
            if self.clamp_output:
                plain = plain[0].clamp(-1, 1), plain[1]
            edges = None
            for name, weight in self.weights.items():
                if name.startswith(EDGES) and edges is None:
                    edges = tuple(2 * self.edges(image) - 1 for image in plain)
                pair, kind = (edges if name.startswith(EDGES) else plain), name.removeprefix(EDGES)
                terms[name] = self.factors[kind] * distance(kind, *pair)
                total = total + weight * terms[name]
        return total, terms
