"""The parts of CompressAI that networks here are made of, imported without what its package brings along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn import ParameterList

from oscar.utils.lean_imports import without_init

CODER = "ans"
_FORMER_NAMES = {"_matrix": "matrices", "_bias": "biases", "_factor": "factors"}


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
    """CompressAI's, its parameters by their names since 1.2.7; 1.2.6 is the one that goes with NumPy 2."""

    def __init__(self, *args: Any, **options: Any):
        with _alone():
            super().__init__(*args, entropy_coder=CODER, **options)
        for former, name in _FORMER_NAMES.items():
            if not hasattr(self, name):
                count = sum(key.startswith(former) for key in self._parameters)
                setattr(self, name, ParameterList(self._parameters.pop(f"{former}{i}") for i in range(count)))

    def __getattr__(self, name: str) -> Any:
        former = name.rstrip("0123456789")
        if former in _FORMER_NAMES and former != name:
            return getattr(self, _FORMER_NAMES[former])[int(name[len(former) :])]
        return super().__getattr__(name)


class GaussianConditional(entropy_models.GaussianConditional):
    def __init__(self, *args: Any, **options: Any):
        with _alone():
            super().__init__(*args, entropy_coder=CODER, **options)


__all__ = ["AttentionBlock", "EntropyBottleneck", "GaussianConditional"]
