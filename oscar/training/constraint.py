"""Codes in stages that cost fewer bits: fitted anew to photographs, on a codec that else stays as it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from oscar.bitstream.entropy import normalise_counts
from oscar.codec import OscarCodec
from oscar.data.images import read_image
from oscar.data.tensors import to_tensor
from oscar.models.padding import pad_to_multiple
from oscar.rates import RatePoint

PIXELS = 2**19  # to which larger photographs are reduced
FEATURES = 60_000  # that codes are fitted to


def constrain_codes(codec: OscarCodec, images: Sequence[Path], strengths: Mapping[float, float], seed: int = 0) -> None:
    """Have rates' codes cost fewer bits (`ResidualQuantizer.constrain`), with new frequency tables for these rates.

    Their context models are dropped, as those of other indices.

    Args:
        codec: changed in place.
        images: photographs to fit the codes to.
        strengths: worth of a bit by nominal rate, in shares of the mean squared distance of features and codes.
        seed: of the choice of features.

    Raises:
        ValueError: for a rate that the codec lacks or whose codes have no stages, or a strength that is not above 0.
    """
    rates = [codec.bottleneck.parse(rate) for rate in strengths]
    for rate, strength in zip(rates, strengths.values(), strict=True):
        if codec.bottleneck.at(rate).cell == 1:
            points = codec.bottleneck.rates
            staged = ", ".join(f"{point.bpp:.4f}" for point in points if codec.bottleneck.at(point).cell > 1)
            raise ValueError(
                f"strength is for rate {rate.bpp:.4f}, whose codes have no stages; "
                f"allowed: {staged or 'none, in this model'}"
            )
        if not strength > 0:
            raise ValueError(f"strength of rate {rate.bpp:.4f} is {strength}; allowed: above 0")
    latents = _latents(codec, images)
    generator = torch.Generator().manual_seed(seed)
    for rate, strength in zip(rates, strengths.values(), strict=True):
        encoder = codec.bottleneck.at(rate)
        features = torch.cat([found.flatten(0, 2) for found in _features(codec, latents, rate)])
        chosen = torch.randperm(len(features), generator=generator)[:FEATURES].to(features.device)
        encoder.quantizer.constrain(features[chosen], strength)
        uses = np.bincount(encoder.quantizer.search(features).flatten().cpu().numpy(), minlength=encoder.codebook_size)
        codec.bottleneck.frequencies[rate.id] = normalise_counts(uses)
        codec.bottleneck.contexts.pop(rate.id, None)
    codec.forget_fingerprint()


@torch.inference_mode()
def _latents(codec: OscarCodec, images: Sequence[Path]) -> list[Tensor]:
    latents = []
    for path in tqdm(images, desc="images", disable=not sys.stderr.isatty()):
        image = read_image(path)
        if image.width * image.height > PIXELS:
            scale = (PIXELS / (image.width * image.height)) ** 0.5
            sides = (max(1, round(side * scale)) for side in image.size)
            image = image.resize(tuple(sides), Image.Resampling.LANCZOS)
        latents.append(codec.backbone.encode(pad_to_multiple(to_tensor(image).to(codec.device), codec.backbone.factor)))
    return latents


@torch.no_grad()
def _features(codec: OscarCodec, latents: Sequence[Tensor], rate: RatePoint) -> list[Tensor]:
    encoder = codec.bottleneck.at(rate)
    multiple = rate.downsample * encoder.cell
    return [encoder.codebook_features(pad_to_multiple(latent.clone(), multiple)) for latent in latents]
