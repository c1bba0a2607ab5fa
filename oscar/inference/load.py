"""Loading a checkpoint for inference: only what is needed, adapters merged, networks made fast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from oscar import checkpoint
from oscar.bottlenecks import Components, from_config
from oscar.checkpoint import WEIGHTS, CheckpointError
from oscar.codec import OscarCodec
from oscar.inference.loading import (
    Change,
    as_is,
    count_numbers,
    merge_lora,
    part_files,
    read_backbone,
    read_tensors,
    tensor_names,
)
from oscar.inference.memory import MemoryBudget, release_host_memory
from oscar.inference.optimise import optimise
from oscar.inference.precision import auto_dtype
from oscar.inference.preview import load_tiny_vae
from oscar.model_folder import check_hashes
from oscar.models.backbone import VAE_DECODER
from oscar.models.denoiser import Denoiser, adapter_names
from oscar.models.modules import WeightsError, check_names, drop
from oscar.timesteps import mapping_from_config

LARGE_MODEL = 100_000_000  # parameters from which a narrow precision pays


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] = "auto",
    components: Components = "both",
    compile: bool | Literal["graphs"] = False,
    tiny_vae: str | Path | None = None,
    memory: int | str | MemoryBudget | None = "auto",
    backbone: str | Path | None = None,
) -> OscarCodec:
    """Load a checkpoint for inference: in evaluation mode, adapters merged, networks made fast.

    Args:
        source: "nano" (in the package), a checkpoint folder or a hub id.
        device: where the networks run.
        dtype: their precision; "auto" takes float32 for models of fewer than 100 million parameters, so that their
            files are the same on every device; for larger ones bfloat16 or float16 where the device computes in it,
            else float32.
        components: "encoder" or "decoder" reads only what compressing or decompressing needs.
        compile: whether to have torch.compile compile the networks on their first call for each size of image;
            "graphs" replays them as CUDA graphs too.
        tiny_vae: folder or hub id of a diffusers AutoencoderTiny that decodes in place of the VAE, for previews.
        memory: what large images may take beyond the weights, as `oscar.inference.optimise.set_memory` has it.
        backbone: where the backbone is now that the checkpoint names, if it has moved. It must be the same one.

    Raises:
        CheckpointError: if it cannot be found or read.
        ValueError: for an option that is not allowed or cannot be had here.
    """
    for name, value, allowed in (
        ("components", components, ("both", "encoder", "decoder")),
        ("compile", compile, (False, True, "graphs")),
        ("dtype", dtype, ("auto", torch.float32, torch.bfloat16, torch.float16)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    device = torch.device(device)
    small, large = (torch.float32, auto_dtype(device)) if dtype == "auto" else (dtype, dtype)
    budget = MemoryBudget.parse(memory)
    codec = read(source, components, small, backbone, large)
    preview: Any = None
    if tiny_vae is not None and components != "encoder":
        preview = load_tiny_vae(tiny_vae, codec.backbone.latent_channels, codec.dtype)
        drop(cast(nn.Module, codec.backbone.vae), VAE_DECODER)
    optimise(codec, device, codec.dtype, compile, budget, preview)
    release_host_memory()
    return codec


def read(
    source: str | Path,
    components: Components = "both",
    dtype: torch.dtype = torch.float32,
    backbone: str | Path | None = None,
    large_dtype: torch.dtype | None = None,
) -> OscarCodec:
    """Read a checkpoint: the adapters in the UNet's weights, and of some components only what they use.

    What the others alone use is not read, nor are its files checked.

    Args:
        source: name of a shipped model ("nano"), a folder, or a hub id.
        components: "encoder" can only compress, "decoder" only decompress.
        dtype: of the networks.
        backbone: where the backbone is now, if it has moved.
        large_dtype: in the place of `dtype` for models of `LARGE_MODEL` parameters and more, if given.

    Raises:
        CheckpointError: if it cannot be found, is damaged, or does not fit its description.
    """
    with checkpoint.reading(source) as (folder, config):
        path, mapping = folder / WEIGHTS, mapping_from_config(config["timesteps"])
        check_hashes(
            folder,
            {
                name: digest
                for name, digest in config["sha256"].items()
                if components != "encoder" or not name.startswith("unet/")
            },
        )
        if large_dtype not in (None, dtype) and count_parameters(folder, config, backbone) >= LARGE_MODEL:
            dtype = large_dtype
        if backbone is not None and "backbone_sha256" not in config:
            checkpoint.load(source, backbone)  # of checkpoints from before, only all of it together tells
        try:
            stored = tensor_names(path)
            change = _merged_adapters(path, stored, config) if components != "encoder" else as_is
            network = checkpoint.read_backbone(
                folder, config, backbone, lambda source: read_backbone(source, components, dtype, change)
            )
            denoiser = None
            if network.unet is not None:
                denoiser = Denoiser(network.unet, network.schedule, **config["denoiser"], merged=True).to(dtype)
                check_names((name for name in stored if "lora_" in name), adapter_names(denoiser))
            bottleneck = from_config(config["bottleneck"], network.latent_channels).to(dtype)
            check_names(
                *(
                    [name for name in names if name.startswith("bottleneck.")]
                    for names in (stored, bottleneck.tensors())
                )
            )
            bottleneck.keep(components, mapping.per_image)
            own = {*bottleneck.tensors(), *(denoiser.tensors() if denoiser is not None else ())}
            wanted = [name for name in stored if name in own or not name.startswith(("bottleneck.", "denoiser."))]
            networks = ("bottleneck.", "denoiser.")  # the rest is integers
            state = {
                name: value.to(dtype) if name.startswith(networks) and value.is_floating_point() else value
                for name, value in read_tensors(path, wanted)
            }
            checkpoint.fill(bottleneck, denoiser, state)
        except WeightsError as error:
            raise CheckpointError(str(error)) from None
        codec = OscarCodec(
            network, bottleneck, denoiser, mapping, checkpoint.identity(config), config.get("provenance")
        )
        codec.components = components
        return codec


def count_parameters(folder: Path, config: dict, moved: str | Path | None = None) -> float:
    """Numbers in the files of a checkpoint and its backbone; infinity if the backbone's are on the hub, or in no
    safetensors files. All components of a model have the same count."""
    own = sum(count_numbers(folder / name) for name in config["sha256"])
    if config["backbone"] is None:
        return own
    source = str(moved or config["backbone"])
    places = [part_files(source, part) if Path(source).is_dir() else {} for part in ("vae", "unet")]
    if not all(places):
        return math.inf
    return own + sum(count_numbers(path) for part in places for path in {path for path, _ in part.values()})


def _merged_adapters(path: Path, stored: list[str], config: dict) -> Change:
    """The change that folds a checkpoint's adapters into the UNet's weights."""
    names = [name for name in stored if "lora_" in name]
    adapters = {name.removeprefix("denoiser."): value for name, value in read_tensors(path, names)}
    return merge_lora(adapters, config["denoiser"]["lora_alpha"] / config["denoiser"]["lora_rank"])
