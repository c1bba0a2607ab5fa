"""Numbers that leave a precision's range: computed anew in float32, or an error, but never an image or a file.

float16 ends at 65504, which activations of some networks exceed. What comes out then is
infinite or not a number.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class NotFiniteError(ValueError):
    """Results that are infinite or not numbers, in float32 too."""


def compute_finite(what: str, network: nn.Module, run: Callable[..., Tensor], value: Tensor, *others: Tensor) -> Tensor:
    """The result of a network for a batch, in which all numbers are finite.

    Members of the batch whose result is not are computed anew by a copy of the network in float32, which is made for
    this call and left to nobody: results do not depend on what was computed before. In training, of the network or
    through it, nothing is looked at.

    Args:
        what: the result in messages.
        network: that computes; its parameters share one precision.
        run: (network, value, *others) -> (B, ...).
        value: (B, ...); floats are converted to the network's precision.
        others: (B, ...) each, given as they are.

    Returns:
        The result in float32, in float64 of a network in that.

    Raises:
        NotFiniteError: naming `what`, if numbers are not finite in float32 either.
    """
    dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    result = widen(run(network, _as(value, dtype), *others))
    if network.training or result.requires_grad:
        return result
    failed = _not_finite(result)
    if failed.any() and dtype.itemsize < torch.float32.itemsize:
        wide = nn.Module.to(copy.deepcopy(network), torch.float32)  # diffusers' own has opinions on layers
        rows = failed.nonzero()[:, 0]
        result[rows] = run(wide, _as(value[rows], torch.float32), *(other[rows] for other in others))
        failed = _not_finite(result)
    if failed.any():
        raise NotFiniteError(f"{what} has numbers that are not finite, computed in {_tried(dtype)}")
    return result


def widen(value: Tensor) -> Tensor:
    """The same numbers in float32, in float64 if they are that."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Have convolutions on CUDA devices compute in all of float32; else they round to TensorFloat-32, with 10 bits."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        yield


def _not_finite(batch: Tensor) -> Tensor:
    """(B, ...) -> bool (B,)."""
    return ~batch.isfinite().flatten(1).all(dim=1)


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _tried(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if dtype.itemsize >= torch.float32.itemsize else f"{name} and float32"
