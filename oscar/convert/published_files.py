"""Files of the published implementation: how they name things, and their content as tensors by those names.

Files are read as tensors, numbers and text only: no code in them is run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oscar.rates import LATENT_SIDE, RATES, RatePoint
from oscar.utils.errors import first_line

LORA_ALPHA = 8  # PEFT's default, which the published code leaves; not in its files


# Codes of a rate where the published code's table departs from ours.
CODEBOOK_SIZES = {10: 8196}


LAYER_LISTS = {  # published name -> adapter
    "unet_lora_encoder_modules": "default_encoder",
    "unet_lora_decoder_modules": "default_decoder",
    "unet_lora_others_modules": "default_others",
}


TOP = ("hyper_encoders", "embeddings", *LAYER_LISTS, "rank_unet", "state_dict_unet")


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message is one line."""


# Spellings that other versions and wrappers give the same tensors: pattern and what it stands for.
RESPELLINGS = (
    (r"(?:^|(?<=\.))(?:module|_orig_mod|base_model\.model)\.", ""),  # Accelerate, torch.compile, PEFT's model class
    (r"^conv_in\.(weight|bias)$", r"conv_in.base_layer.\1"),  # PEFT before 0.6 adapted the layer itself
)


class Published(NamedTuple):
    """What published files hold: tensors by published name, rates in the list's order, options of the networks."""

    tensors: dict[str, Tensor]
    rates: list[RatePoint]
    bottleneck: dict[str, Any]
    denoiser: dict[str, Any]
    layers: dict[str, list[str]]  # by adapter; empty for files of stage 1


def read_pickle(path: Path) -> Any:
    """The tensors, numbers and containers in a file that `torch.save` wrote; nothing else in it is run.

    Raises:
        ConvertError: in one line, if it is missing, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror or first_line(error)}") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ConvertError(
                f"{path}: refused, since it asks for {code[1].rstrip('.')}, which could run code; "
                "allowed: tensors, numbers and text"
            ) from None
        raise ConvertError(f"{path}: damaged, or not a checkpoint of PyTorch") from None
    except Exception as error:  # of the zip reader, of pickle's machine on nonsense, of tensors that do not fit
        raise ConvertError(f"{path}: damaged, or not a checkpoint of PyTorch ({type(error).__name__})") from None


def read_published(sources: Sequence[Path]) -> Published:
    if not sources:
        raise ConvertError("no source; allowed: a published checkpoint, or files of stage 1")
    contents = [read_pickle(path) for path in sources]
    if len(sources) == 1 and isinstance(contents[0], Mapping) and "hyper_encoders" in contents[0]:
        return _parse_joint(contents[0], sources[0])
    tensors = {}
    for place, (path, content) in enumerate(zip(sources, contents, strict=True)):
        for name, value in _respell(_hyper_encoder(content, path), path).items():
            tensors[f"hyper_encoders.{place}.{name}"] = value
    rates, bottleneck = _rates_and_sizes(tensors, ", ".join(map(str, sources)))
    return Published(tensors, rates, bottleneck, {"lora_alpha": LORA_ALPHA}, {})


def _parse_joint(content: Mapping, path: Path) -> Published:
    for name in TOP:
        if name not in content:
            raise ConvertError(f"{path}: lacks {name}; allowed: {', '.join(TOP)}")
    for name in content:
        if name not in TOP:
            raise ConvertError(f"{path}: {name!r} is unknown; allowed: {', '.join(TOP)}")
    layers = {}
    for name, adapter in LAYER_LISTS.items():
        if not isinstance(content[name], list) or not all(isinstance(layer, str) for layer in content[name]):
            raise ConvertError(f"{path}: {name} is no list of layers")
        layers[adapter] = content[name]
    rank, prompt = content["rank_unet"], content["embeddings"]
    if type(rank) is not int or rank < 1:
        raise ConvertError(f"{path}: rank_unet is {rank!r}; allowed: whole numbers from 1 up")
    if not isinstance(prompt, Tensor) or prompt.dim() != 2:
        raise ConvertError(f"{path}: embeddings is no tensor of tokens by channels")
    tensors = {"embeddings": prompt.detach()}
    adapters = {layer: adapter for adapter, names in layers.items() for layer in names}
    for part in ("hyper_encoders", "state_dict_unet"):
        for name, value in _respell(content[part], path, adapters).items():
            tensors[f"{part}.{name}"] = value
    for name, value in tensors.items():
        lora = re.search(r"\.lora_([AB])\.", name)
        if lora and (value.dim() < 2 or value.shape[lora[1] == "B"] != rank):
            raise ConvertError(f"{path}: {name} has shape {tuple(value.shape)}; allowed: of rank_unet, {rank}")
    rates, bottleneck = _rates_and_sizes(tensors, str(path))
    denoiser = {"lora_rank": rank, "lora_alpha": LORA_ALPHA, "prompt_tokens": len(prompt)}
    return Published(tensors, rates, bottleneck, denoiser, layers)


def _hyper_encoder(content: Any, path: Path) -> Mapping:
    """The state dict of one hyper-encoder, also where it is the only entry of another dict."""
    if isinstance(content, Mapping) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, Mapping) or not any(str(name).endswith("_codebook.embed") for name in content):
        raise ConvertError(
            f"{path}: neither a published checkpoint (it would hold {TOP[0]}) nor a hyper-encoder of stage 1"
        )
    return content


def _respell(state: Any, path: Path, adapters: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A state dict in today's spelling.

    Args:
        state: names to tensors.
        path: its file, for messages.
        adapters: adapter by layer, for names without one, as PEFT's own `get_peft_model_state_dict` writes them.
    """
    if not isinstance(state, Mapping):
        raise ConvertError(f"{path}: holds a {type(state).__name__} where tensors by name are allowed")
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConvertError(f"{path}: {name!r} is no tensor")
        for pattern, replacement in RESPELLINGS:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.+)(\.lora_[AB])\.weight", name):
            name = f"{match[1]}{match[2]}.{(adapters or {}).get(match[1], 'unknown')}.weight"
        if name in result:
            raise ConvertError(f"{path}: {name} is there twice")
        result[name] = _with_heads(name, value.detach())
    return result


def _with_heads(name: str, value: Tensor) -> Tensor:
    """Codebooks had no dimension of heads before vector-quantize-pytorch 0.10, and `initted` had one before 1.27."""
    field = name.rpartition("_codebook.")[2] if "_codebook." in name else ""
    dimensions = {"embed": 3, "embed_avg": 3, "cluster_size": 2}.get(field)
    if field == "initted":
        return value.reshape(()) if value.numel() == 1 else value
    return value[None] if dimensions == value.dim() + 1 else value


def _rates_and_sizes(tensors: Mapping[str, Tensor], where: str) -> tuple[list[RatePoint], dict[str, Any]]:
    """The rates of the hyper-encoders, told by their weights' shapes, and the sizes that they share."""
    rates: list[RatePoint] = []
    sizes: dict[str, Any] = {}
    codebook_sizes = {}
    places = {int(match[1]) for name in tensors if (match := re.match(r"hyper_encoders\.(\d+)\.", name))}
    if not places or places != set(range(len(places))):
        raise ConvertError(f"{where}: holds hyper-encoders {sorted(places)}; allowed: 0, 1 and so on")
    for place in sorted(places):
        prefix = f"hyper_encoders.{place}."
        try:
            shapes = [
                tuple(tensors[f"{prefix}{name}"].shape)
                for name in (
                    "backbone.0.weight",
                    "backbone.4.weight",
                    "backbone.9.weight",
                    "quantizer.project_in.weight",
                    "quantizer._codebook.embed",
                )
            ]
            grid = LATENT_SIDE >> sum(shape[2] > 1 for shape in shapes[:3])
            sizes = {"width": shapes[0][0], "features": shapes[3][1], "codebook_dim": shapes[3][0]}
            codes = shapes[4][1]
        except (KeyError, IndexError) as error:
            what = f"lacks {error.args[0]}" if isinstance(error, KeyError) else "has tensors of too few dimensions"
            raise ConvertError(f"{where}: hyper-encoder {place} {what}") from None
        found = [
            rate for rate in RATES if rate.grid == grid and codes in (rate.codebook_size, CODEBOOK_SIZES.get(rate.id))
        ]
        if not found or found[0] in rates:
            allowed = ", ".join(f"{rate.grid} with {rate.codebook_size}" for rate in RATES if rate not in rates)
            raise ConvertError(
                f"{where}: hyper-encoder {place} has grid {grid} and {codes} codes, of which there is "
                f"{'another' if found else 'no rate'}; allowed: {allowed}"
            )
        rates.append(found[0])
        if codes != found[0].codebook_size:
            codebook_sizes[found[0].id] = codes
    return rates, {**sizes, "codebook_sizes": codebook_sizes}
