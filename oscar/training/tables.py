"""How often codes are used: integer frequency tables for the entropy coder, and perplexity."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from oscar.bitstream.entropy import normalise_counts
from oscar.codec import OscarCodec


@torch.no_grad()
def estimate_frequencies(codec: OscarCodec, batches, limit: int | None = None, latents: bool = False) -> None:
    """Count every rate's indices over image batches (B, 3, H, W), the first `limit`, and store the tables in the codec,
    which loses its context models.

    With `latents` the batches are those of the VAE, (B, 4, h, w).
    """
    codec.eval()
    counts = {rate.id: np.zeros(codec.bottleneck.at(rate).codebook_size, dtype=np.int64) for rate in codec.bottleneck.rates}
    for batch in itertools.islice(batches, limit):
        latent = batch if latents else codec.backbone.encode(batch)
        for rate in codec.bottleneck.rates:
            indices = codec.bottleneck.encode(latent, rate).cpu().numpy().reshape(-1)
            counts[rate.id] += np.bincount(indices, minlength=len(counts[rate.id]))
    codec.bottleneck.frequencies = {rate_id: normalise_counts(count) for rate_id, count in counts.items()}
    codec.bottleneck.contexts = {}  # of the indices as they were
    codec.forget_fingerprint()


def running_frequencies(codec: OscarCodec) -> dict[int, np.ndarray]:
    """Tables by rate id from the quantisers' moving averages, for files written while training goes on."""
    averages = {rate.id: codec.bottleneck.at(rate).usage().double().cpu().numpy() for rate in codec.bottleneck.rates}
    return {rate_id: normalise_counts(np.rint(usage * 2**16).astype(np.int64)) for rate_id, usage in averages.items()}


def perplexity(usage: Tensor) -> Tensor:
    """exp of the entropy of uses (K,), counts or averages of any scale: K if all codes are used alike, 1 if one is."""
    share = usage / usage.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(share).sum().exp()
