"""Integer frequency tables of the code indices, counted over training pictures."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from oscar.bitstream.entropy import normalise_counts
from oscar.codec import OscarCodec

TABLE_BATCHES = 128


@torch.no_grad()
def estimate_frequencies(codec: OscarCodec, batches, limit: int = TABLE_BATCHES) -> None:
    """Count every rate's indices over image batches (B, 3, H, W) and store the tables in the codec."""
    codec.eval()
    counts = {rate.id: np.zeros(codec.bottleneck.at(rate).codebook_size, dtype=np.int64) for rate in codec.rates}
    for batch in itertools.islice(batches, limit):
        latent = codec.backbone.encode(batch)
        for rate in codec.rates:
            indices = codec.bottleneck.encode(latent, rate).cpu().numpy().reshape(-1)
            counts[rate.id] += np.bincount(indices, minlength=len(counts[rate.id]))
    codec.frequencies = {rate_id: normalise_counts(count) for rate_id, count in counts.items()}
    codec.forget_fingerprint()
