"""FID and KID: distances between the Inception features of two sets of images.

The network is that of the original FID (Heusel et al. 2017), by pyiqa; images are resized as in Clean-FID (Parmar et
al. 2022), pyiqa's default.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from oscar.metrics.weights import Weights, import_or_explain, load_all

FEATURES = 2048
SIDE = 299  # pixels, the network's input
BATCH = 16
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # pyiqa's and torch-fidelity's


class Inception(nn.Module):
    """Features of images: (N, 2048) float32 from a list of N uint8 arrays (H, W, 3) of any sizes."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        state = weights.load("inception")
        arch = import_or_explain("pyiqa.archs.inception")
        with mock.patch.object(arch, "load_pretrained_network", lambda net, _: load_all(net, state, "inception")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it calls torchvision in an outdated way
                self.network = arch.InceptionV3()

    def forward(self, images: Sequence[np.ndarray]) -> np.ndarray:
        device = self.network.fc.weight.device
        features = [np.zeros((0, FEATURES), np.float32)]
        for start in range(0, len(images), BATCH):
            batch = np.stack([resize(image) for image in images[start : start + BATCH]])
            pixels = (torch.from_numpy(batch).to(device) - 128) / 128
            features.append(self.network(pixels)[0].flatten(1).cpu().numpy())
        return np.concatenate(features)


def resize(image: np.ndarray) -> np.ndarray:
    """A uint8 array (H, W, 3) as float32 (3, 299, 299) in 0..255, bicubic with antialiasing and without rounding."""
    channels = (Image.fromarray(image[..., c].astype(np.float32)) for c in range(3))
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized).clip(0, 255)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FID: squared Wasserstein-2 distance of the Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2) with covariances A = X^T X, B = Y^T Y of the centred and scaled
    features X, Y. The eigenvalues of A B are the squared singular values of X Y^T, so the last trace is their sum. That
    avoids the root of a matrix, slow and inaccurate where images are fewer than features (A and B singular), and what
    pyiqa calls for it, `scipy.linalg.sqrtm(..., disp=False)`, which SciPy 1.18 no longer has.

    Args:
        a: (N, D) features, N at least 2.
        b: (M, D), M at least 2.
    """
    (mean_a, root_a, trace_a), (mean_b, root_b, trace_b) = _gaussian(a), _gaussian(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + trace_a + trace_b - 2 * cross)


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean (D,), a root R (min(N, D), D) of the covariance R^T R, and the covariance's trace."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    root = np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")
    return mean, root, np.square(root).sum()


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (x.y / D + 1)^3, by pyiqa.

    Exact for sets of up to 1000; beyond, the mean over 100 pairs of subsets of 1000, always the same ones.

    Args:
        a: (N, D) features, N at least 2.
        b: (M, D), M at least 2.
    """
    arch = import_or_explain("pyiqa.archs.fid_arch")
    whole = len(a) == len(b) <= KID_SUBSET_SIZE
    state = np.random.get_state()  # pyiqa draws from numpy's global generator
    np.random.seed(0)
    try:
        return arch.mmd_polynomial_kernel(
            a.astype(np.float64), b.astype(np.float64), 1 if whole else KID_SUBSETS, KID_SUBSET_SIZE
        )
    finally:
        np.random.set_state(state)
