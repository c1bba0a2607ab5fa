"""Changes a loaded codec from outside, for inference: fast and small, and the same results but for rounding.

Everywhere: adapters merged, the constant prompt's keys and values computed once, large images only cut where the whole
does not fit. On a GPU the standard modules run, in channels-last order, compiled on request. On a CPU the kernels of
`oscar.inference.cpu` run, and where a narrow precision is only emulated, sums of products in float32.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

from oscar.codec import OscarCodec
from oscar.inference.kernels import make_lean, use_fewer_multiplications
from oscar.inference.memory import MemoryBudget
from oscar.inference.precision import emulates_dtype, upcast_to_fp32
from oscar.inference.prompt import cache_prompt
from oscar.inference.tiling import TiledBackbone
from oscar.inference.windows import WindowedDenoiser


@torch.no_grad()
def optimise(
    codec: OscarCodec,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool | Literal["graphs"] = False,
    memory: int | str | MemoryBudget | None = "auto",
    preview: nn.Module | None = None,
) -> OscarCodec:
    """Make a codec fast for inference, in place; it cannot be trained or saved any more.

    Args:
        codec: from `OscarCodec.from_pretrained`, say.
        device: where the networks run.
        dtype: their precision.
        compile: as `oscar.load` has it.
        memory: as `set_memory` has it.
        preview: a small autoencoder that decodes in the VAE's place.

    Raises:
        ValueError: for an option that is not allowed or cannot be had here.
    """
    device, budget = torch.device(device), MemoryBudget.parse(memory)
    if codec.denoiser is not None:
        codec.denoiser.merge()
        codec.denoiser.__class__ = WindowedDenoiser  # the same parameters under the same names
    codec.backbone.__class__ = TiledBackbone
    if preview is not None:
        codec.backbone.preview = preview
    codec.eval().requires_grad_(False).to(device, dtype)
    set_memory(codec, budget)
    for change in module_changes(device, dtype, bool(compile)):
        change(codec)
    if codec.denoiser is not None and codec.denoiser.prompt is not None:
        cache_prompt(codec.denoiser.unet, codec.denoiser.prompt)
    if compile:
        backbone = codec.backbone
        networks = [getattr(backbone.vae, half, None) for half in ("encoder", "decoder")]
        networks += [backbone.unet, getattr(backbone, "preview", None)]
        compile_networks([network for network in networks if network is not None], device, compile == "graphs")
    return codec


def module_changes(device: torch.device, dtype: torch.dtype, compiled: bool) -> list[Callable[[nn.Module], object]]:
    """What is done to the modules of networks, in place: on a GPU they stay the standard ones."""
    if device.type != "cpu":
        return [use_channels_last]
    if compiled:
        return [make_lean]
    if dtype == torch.float32:
        return [make_lean, use_fewer_multiplications]
    return [make_lean, upcast_to_fp32] if emulates_dtype(device, dtype) else [make_lean]


def use_channels_last(network: nn.Module) -> None:
    """Put the weights of convolutions in the order in memory that a GPU is fastest with."""
    network.to(memory_format=torch.channels_last)


def set_memory(codec: OscarCodec, memory: int | str | MemoryBudget | None) -> None:
    """Bound the memory of large images: beyond it they are cut (see `oscar.inference.tiling`).

    Args:
        codec: the codec, made fast by `optimise`.
        memory: bytes beyond the weights, a size such as "4GB", "auto" (by what is free), or None, no bound.

    Raises:
        ValueError: for anything else.
    """
    budget = MemoryBudget.parse(memory)
    codec.backbone.memory = budget
    if codec.denoiser is not None:
        codec.denoiser.memory = budget


def compile_networks(networks: Iterable[nn.Module], device: torch.device, graphs: bool) -> None:
    """Have torch.compile compile networks on their first call, and with `graphs` replay them as CUDA graphs.

    Raises:
        ValueError: without a CUDA device for the graphs, or a C++ compiler for the CPU.
    """
    if graphs and device.type != "cuda":
        raise ValueError(f"compile is 'graphs' on device {device}; allowed: a CUDA device, or True or False")
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ValueError("compile is True, but there is no C++ compiler; allowed: with g++ or clang++, or False")
    for network in networks:
        network.compile(mode="reduce-overhead" if graphs else None)
