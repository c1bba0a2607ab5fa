"""How much memory a network takes for an image, and so how many images of a batch it works on together."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SLACK = 1.25  # what it takes beyond the maps between its layers, such as a convolution's workspace

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple, int]] = weakref.WeakKeyDictionary()


def images_at_once(device: str, count: int, size: int, small: int, needed: float, limit: float) -> int:
    """How many images of a batch a network works on together, whole; 0 if it must cut even one.

    Args:
        device: its type. On a CPU large images go one by one, which is as fast there.
        count: images in the batch.
        size: of one: pixels, or positions of a latent.
        small: size up to which no image is cut, so that its result does not depend on the memory.
        needed: bytes that one takes.
        limit: bytes that there are.
    """
    fitting = min(count, int(min(limit / needed, count)))
    if device == "cpu":
        fitting = count if size <= small else min(fitting, 1)
    return max(fitting, 1) if size <= small else fitting


def device_type(tensor: Tensor) -> str:
    """Of the device that the decision is for."""
    return tensor.device.type


def peak_bytes(network: nn.Module, run: Callable[[nn.Module, Tensor], object], *shape: int, dtype: torch.dtype) -> int:
    """Bytes that a run of a network takes at most beyond its weights and inputs; nothing is computed.

    Attention counts as a kernel that keeps no scores, as torch's are.

    Args:
        network: stays as it is.
        run: runs a copy of it on an input on torch's meta device. Methods of one name take the same.
        shape: of the input.
        dtype: of the input.
    """
    known, key = _KNOWN.setdefault(network, {}), (run.__name__, shape, dtype)
    if key not in known:
        copied, example, alive = on_meta(network), torch.empty(shape, dtype=dtype, device="meta"), TensorMemory()
        with torch.no_grad(), _Attention(), alive:
            run(copied, example)
        known[key] = alive.peak
    return known[key]


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of a network without the memory of its tensors, and without its hooks."""
    tensors = {
        id(leaf): leaf
        for module in network.modules()
        for leaf in tree_leaves(dict(vars(module)))
        if isinstance(leaf, Tensor)
    }
    memo = {}
    for key, value in tensors.items():
        empty = torch.empty_like(value, device="meta")
        memo[key] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    copied = copy.deepcopy(network, memo)
    for module in copied.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return copied


class TensorMemory(TorchDispatchMode):
    """Adds up the memory of what operations give, for as long as something holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:  # a view takes nothing
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size).atexit = False

    def _remove(self, size: int) -> None:
        self.now -= size


class _Attention(TorchFunctionMode):
    """Attention without its computation, which on the meta device would keep all scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
