"""The one place that knows whether `oscar.inference.cpu` is there; without it the standard modules compute."""

from __future__ import annotations

import contextlib

from torch import nn

try:
    from oscar.inference.cpu import (
        every_multiplication,
        exact_norms,
        make_lean,
        nothing_kept,
        use_fewer_multiplications,
    )
except ModuleNotFoundError as error:
    if error.name != "oscar.inference.cpu":
        raise
    from oscar.inference.memory import nothing_kept

    def make_lean(network: nn.Module) -> None:
        """Nothing: blocks stay as diffusers has them."""

    def use_fewer_multiplications(network: nn.Module) -> None:
        """Nothing: convolutions stay as torch has them."""

    def every_multiplication(network: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Nothing: no multiplication is saved."""
        return contextlib.nullcontext()

    exact_norms = every_multiplication

__all__ = ["every_multiplication", "exact_norms", "make_lean", "nothing_kept", "use_fewer_multiplications"]
