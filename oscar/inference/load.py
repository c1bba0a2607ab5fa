"""Loading a checkpoint for inference: only what is needed, adapters merged, networks made fast."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import nn

from oscar import checkpoint
from oscar.bottlenecks import Components, from_config
from oscar.checkpoint import WEIGHTS, CheckpointError
from oscar.codec import OscarCodec
from oscar.inference.cpu.reuse import give_back_memory
from oscar.inference.loading import WeightsError, read_tensors, tensor_names
from oscar.inference.optimise import (
    auto_dtype,
    cache_prompt,
    compile_networks,
    compute_wide,
    imitates,
    load_tiny_vae,
    make_lean,
    merge_lora,
    use_fewer_multiplications,
)
from oscar.inference.tiling import MemoryBudget
from oscar.models.backbone import VAE_DECODER, Backbone
from oscar.models.denoiser import Denoiser
from oscar.models.modules import drop
from oscar.timesteps import mapping_from_config


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] = "auto",
    components: Components = "both",
    compile: bool | Literal["graphs"] = False,
    tiny_vae: str | Path | None = None,
    memory: int | str | MemoryBudget | None = "auto",
) -> OscarCodec:
    """Load a checkpoint for inference: in evaluation mode, adapters merged, networks made fast.

    Args:
        source: "nano" (in the package), a checkpoint folder or a hub id.
        device: where the networks run.
        dtype: their precision; "auto" takes bfloat16 or float16 where the device computes in it, else float32.
        components: "encoder" or "decoder" reads only what compressing or decompressing needs.
        compile: whether to have torch.compile compile the networks on their first call for each size of image;
            "graphs" replays them as CUDA graphs too.
        tiny_vae: folder or hub id of a diffusers AutoencoderTiny that decodes in place of the VAE, for previews.
        memory: what large images may take beyond the weights, as `set_memory` has it.

    Raises:
        CheckpointError: if it cannot be found or read.
        ValueError: for an option that is not allowed or cannot be had here.
    """
    for name, value, allowed in (("components", components, ("both", "encoder", "decoder")),
                                 ("compile", compile, (False, True, "graphs"))):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    device = torch.device(device)
    dtype = auto_dtype(device) if dtype == "auto" else dtype
    budget = MemoryBudget.parse(memory)
    codec = read(source, components, dtype)
    if tiny_vae is not None and components != "encoder":
        codec.backbone.preview = load_tiny_vae(tiny_vae, codec.backbone.latent_channels, dtype)
        drop(codec.backbone.vae, VAE_DECODER)
    codec.eval().requires_grad_(False).to(device)
    optimise(codec, compile)
    set_memory(codec, budget)
    give_back_memory()
    return codec


@torch.no_grad()
def optimise(codec: OscarCodec, compile: bool | Literal["graphs"] = False) -> None:
    """Make the networks of a loaded codec fast for inference; see `oscar.inference.optimise`."""
    make_lean(codec)
    if codec.denoiser is not None and codec.denoiser.prompt is not None:
        cache_prompt(codec.denoiser.unet, codec.denoiser.prompt)
    if compile:
        backbone = codec.backbone
        networks: list[nn.Module | None] = [getattr(backbone.vae, half, None) for half in ("encoder", "decoder")]
        networks += [backbone.unet, backbone.preview]
        compile_networks([network for network in networks if network is not None], codec.device, compile == "graphs")
    elif codec.device.type == "cpu" and codec.dtype == torch.float32:
        use_fewer_multiplications(codec)
    elif imitates(codec.device, codec.dtype):
        compute_wide(codec)


def set_memory(codec: OscarCodec, memory: int | str | MemoryBudget | None) -> None:
    """Bound the memory of large images (see `oscar.inference.tiling`): files and images do not depend on it.

    Args:
        codec: the codec.
        memory: bytes beyond the weights, a size such as "4GB", "auto" (by what is free), or None, no bound.

    Raises:
        ValueError: for anything else.
    """
    codec.backbone.memory = MemoryBudget.parse(memory)


def read(
    source: str | Path, components: Components = "both", dtype: torch.dtype = torch.float32
) -> OscarCodec:
    """Read a checkpoint: the adapters in the UNet's weights, and of some components only what they use.

    What the others alone use is not read, nor are its files checked.

    Args:
        source: name of a shipped model ("nano"), a folder, or a hub id.
        components: "encoder" can only compress, "decoder" only decompress.
        dtype: of the networks.

    Raises:
        CheckpointError: if it cannot be found, is damaged, or does not fit its description.
    """
    with checkpoint.reading(source) as (folder, config):
        path, mapping = folder / WEIGHTS, mapping_from_config(config["timesteps"])
        checkpoint.check_hashes(folder, {name: digest for name, digest in config["sha256"].items()
                                         if components != "encoder" or not name.startswith("unet/")})  # fmt: skip
        try:
            stored = tensor_names(path)
            adapters = {}
            if components != "encoder":
                names = [name for name in stored if "lora_" in name]
                adapters = {name.removeprefix("denoiser."): value for name, value in read_tensors(path, names)}
            scale = config["denoiser"]["lora_alpha"] / config["denoiser"]["lora_rank"]
            origin = config["backbone"] or folder
            backbone = Backbone.from_pretrained(origin, components, dtype, merge_lora(adapters, scale))
            denoiser = None
            if components != "encoder":
                denoiser = Denoiser(backbone.unet, backbone.schedule, **config["denoiser"], merged=True)
            bottleneck = from_config(config["bottleneck"], backbone.latent_channels)
            wanted = [name for name in stored if not name.startswith("denoiser.")
                      or denoiser is not None and name == "denoiser.prompt"]  # fmt: skip
            state = {name: value.to(dtype) if value.is_floating_point() else value
                     for name, value in read_tensors(path, wanted)}  # fmt: skip
            checkpoint.fill(bottleneck.to(dtype), denoiser, state)
        except WeightsError as error:
            raise CheckpointError(str(error)) from None
        bottleneck.keep(components, mapping.per_picture)
        codec = OscarCodec(backbone, bottleneck, denoiser, mapping)
        codec.components = components
        codec._fingerprint = checkpoint.identity(config)
        if config["backbone"] is None:
            codec.backbone.source = None
        return codec
