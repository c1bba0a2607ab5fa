"""Reading networks tensor by tensor: in a narrow precision in half the memory of diffusers' and PEFT's own ways.

Stable Diffusion 2.1's shape with the paper's adapters, beside `torch_dtype` and `fuse_lora`: peaks of 0.53 (whole) and
0.42 (decoder) in bfloat16, of 0.65 to 0.82 for an encoder, but of 1.1 in float32; times of 0.8 to 1.2. Adapters are
folded in float32 here, also where the weights are narrower.

A network is built without memory (its parameters on torch's meta device), loses the parts that are not wanted, and is
filled from safetensors files, so that reading takes little more than the network itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from oscar.diffusion import NoiseSchedule
from oscar.models.backbone import (
    VAE_DECODER,
    VAE_ENCODER,
    Backbone,
    Components,
    WeightSampler,
    find_class,
    read_config,
    reading,
)
from oscar.models.modules import WeightsError, drop
from oscar.registry import AUTOENCODERS, UNETS
from oscar.utils.errors import first_line

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# Layers of the attention in autoencoders, as diffusers named them before 0.17; Stable Diffusion's files have these.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(?<=attentions\.\d\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")
_UNUSED = {"both": (), "encoder": VAE_DECODER, "decoder": VAE_ENCODER}
_GROUP = 2**27  # bytes that are read from a file before it is opened anew, or given to a network at once

Change = Callable[[str, Tensor], Tensor]
Places = Mapping[str, tuple[Path, str]]  # of tensors by their name in a network: the file and the name there


def as_is(name: str, value: Tensor) -> Tensor:
    """The change that changes nothing."""
    return value


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"{path}: {first_line(error)}") from None


def tensor_names(path: str | Path) -> list[str]:
    """Names of the tensors of a safetensors file."""
    with _opened(path) as file:
        return list(file.keys())


def count_numbers(path: str | Path) -> int:
    """How many numbers the tensors of a safetensors file have; only its header is read."""
    with _opened(path) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def read_tensors(path: str | Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and values of some tensors of a safetensors file.

    The library maps the file, and what was read of it stays in memory until it is closed; hence now and then.
    """
    waiting = list(names)[::-1]
    while waiting:
        size = 0
        with _opened(path) as file:
            while waiting and size < _GROUP:
                name = waiting.pop()
                value = file.get_tensor(name).clone()
                size += value.nbytes
                yield name, value


def part_files(source: str, part: str) -> Places:
    """Where the tensors of a part of a diffusers folder or hub id are; empty if they are not in safetensors files."""
    index = _part_file(source, f"{part}/{WEIGHTS_NAME}.index.json")
    if index is None:
        path = _part_file(source, f"{part}/{WEIGHTS_NAME}")
        places = {} if path is None else {name: (path, name) for name in tensor_names(path)}
    else:
        names = json.loads(index.read_text())["weight_map"]
        paths = {file: _part_file(source, f"{part}/{file}") for file in set(names.values())}
        places = {name: (paths[file], name) for name, file in names.items() if paths[file]}
    return {_OLD_NAME.sub(lambda match: _OLD_ATTENTION[match[0]], name): place for name, place in places.items()}


def _part_file(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None


def fill(
    network: nn.Module,
    places: Places,
    what: str,
    dtype: torch.dtype,
    change: Change = as_is,
    names: Iterable[str] | None = None,
) -> None:
    """Give a network on the meta device its weights; what `places` has beyond them is not read.

    Args:
        network: the network, changed in place.
        places: where its tensors are.
        what: the network in messages.
        dtype: of the floating-point tensors.
        change: what becomes of each tensor, by its name in the network, in float32.
        names: the tensors to fill, by default all of the network's state.

    Raises:
        WeightsError: if a tensor is missing or has another shape.
    """
    state = network.state_dict()
    names = list(state if names is None else names)
    missing = sorted(set(names) - places.keys())
    if missing:
        raise WeightsError(f"the weights of {what} lack {missing[0]} ({len(missing)} tensors in all)")
    by_file: dict[Path, dict[str, str]] = {}
    for name in names:
        path, stored = places[name]
        by_file.setdefault(path, {})[stored] = name
    pending: dict[str, Tensor] = {}
    for path, wanted in by_file.items():
        for stored, value in read_tensors(path, wanted):
            name = wanted[stored]
            if value.shape != state[name].shape:
                allowed = tuple(state[name].shape)
                raise WeightsError(f"{what}: {stored} has shape {tuple(value.shape)}; allowed: {allowed}")
            pending[name] = change(name, value.float()).to(dtype) if value.is_floating_point() else value
            if sum(tensor.nbytes for tensor in pending.values()) > _GROUP:
                network.load_state_dict(pending, strict=False, assign=True)
                pending = {}
    network.load_state_dict(pending, strict=False, assign=True)


def read_backbone(source: str | Path, components: Components, dtype: torch.dtype, adapt: Change = as_is) -> Backbone:
    """`Backbone.from_pretrained`, of which some is left out.

    Args:
        source: diffusers folder or hub id.
        components: "encoder" leaves out UNet and VAE decoder, "decoder" the VAE encoder; they are not read at all.
        dtype: of the weights in memory.
        adapt: what becomes of each tensor of the UNet, by its name there, in float32.

    Raises:
        BackboneError: if a part is missing or unreadable, or its weights lack a tensor.
    """
    source, sampler, unet = str(source), WeightSampler(), None
    with reading(source):
        parts = ("vae",) if components == "encoder" else ("vae", "unet")
        places = {part: part_files(source, part) for part in parts}
        if not all(places.values()):  # whatever else there is, such as .bin
            return _read_whole(source, components, dtype, adapt)
        config = read_config(source, "vae")
        with init_empty_weights():
            vae = find_class(AUTOENCODERS, config).from_config(config)
        drop(vae, _UNUSED[components])
        fill(vae, places["vae"], "vae", dtype, sampler.of_vae)
        if components != "encoder":
            with init_empty_weights():
                config = read_config(source, "unet")
                unet = find_class(UNETS, config).from_config(config)
            fill(unet, places["unet"], "unet", dtype, lambda name, value: adapt(name, sampler.of_unet(name, value)))
            unet.eval()
        backbone = Backbone(vae.eval(), unet, NoiseSchedule(read_config(source, "scheduler")), source)
    backbone.digests = sampler.digests()
    return backbone


def _read_whole(source: str, components: Components, dtype: torch.dtype, adapt: Change) -> Backbone:
    backbone = Backbone.from_pretrained(source)
    drop(backbone.vae, _UNUSED[components])
    if components == "encoder":
        backbone.unet = None
    else:
        for name, value in backbone.unet.state_dict().items():
            value.copy_(adapt(name, value))
    return backbone.to(dtype)


def merge_lora(adapters: Mapping[str, Tensor], scale: float) -> Change:
    """The change that folds adapters into a network's weights, W + scale * B A, as PEFT does; each is freed then.

    Args:
        adapters: tensors by name, `<layer>.lora_A.<adapter>.weight` (rank, in, ...) and lora_B (out, rank, 1, ...).
        scale: alpha / rank.
    """
    pairs: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, value in adapters.items():
        layer, _, rest = name.removesuffix(".weight").partition(".lora_")
        side, _, adapter = rest.partition(".")
        pairs.setdefault(f"{layer}.weight", {}).setdefault(adapter, {})[side] = value.float()

    def merge(name: str, weight: Tensor) -> Tensor:
        for pair in pairs.pop(name, {}).values():
            down, up = pair["A"], pair["B"]
            if (len(up), down.shape[1:], up.shape[1]) != (len(weight), weight.shape[1:], len(down)):
                raise WeightsError(
                    f"the adapter of {name} has shapes {tuple(down.shape)} and {tuple(up.shape)}, "
                    f"which do not fit {tuple(weight.shape)}"
                )
            weight = weight + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        return weight

    return merge
