"""The parts of CompressAI that networks here are made of, imported without what its package brings along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from oscar.utils.lean_imports import without_init

CODER = "ans"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """CompressAI's modules without their package, which is asked for its coders when an entropy model is made."""
    with without_init("compressai", "scipy.stats") as empty:  # scipy makes tables of CompressAI's own
        if "compressai" in empty:
            empty["compressai"].available_entropy_coders = lambda: [CODER]  # type: ignore[attr-defined]
        yield


with _alone():
    from compressai import entropy_models
    from compressai.layers import AttentionBlock


class EntropyBottleneck(entropy_models.EntropyBottleneck):
    def __init__(self, *args: Any, **options: Any):
        with _alone():
            super().__init__(*args, entropy_coder=CODER, **options)


class GaussianConditional(entropy_models.GaussianConditional):
    def __init__(self, *args: Any, **options: Any):
        with _alone():
            super().__init__(*args, entropy_coder=CODER, **options)


__all__ = ["AttentionBlock", "EntropyBottleneck", "GaussianConditional"]
