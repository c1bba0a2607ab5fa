"""Native checkpoints: a folder of safetensors and JSON.

    oscar.json          format, architecture, pseudo-timesteps, backbone, fingerprint, hashes of the weight files, and
                        how it was trained (`oscar.utils.provenance`)
    oscar.safetensors   bottleneck.*, denoiser.* (adapters and prompt), frequencies.* (integer tables by rate id) and,
                        where there are any, context.* (integer context models by rate id); with a hyperprior coder.*
                        (its integers) in place of tables
    README.md           the model's card, if somebody wrote one; no part of the model
    vae/ unet/ scheduler/   the backbone as diffusers writes it, where it is bundled (trained here); else named by id

Loading accounts for every tensor: a missing or an unknown one is an error.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oscar import model_folder
from oscar.bottlenecks import Bottleneck, from_config
from oscar.model_folder import CONFIG, FORMAT, CheckpointError, check_hashes, identity, new_folder, sha256
from oscar.models.backbone import Backbone, BackboneError
from oscar.models.denoiser import Denoiser
from oscar.registry import load_plugins
from oscar.timesteps import TimestepMapping, mapping_from_config
from oscar.utils.errors import first_line
from oscar.utils.provenance import WEIGHTS

CARD = "README.md"


class Parts(NamedTuple):
    """What a codec consists of; an `OscarCodec` has the same attributes, and does for one."""

    backbone: Backbone
    bottleneck: Bottleneck
    denoiser: Denoiser | None
    mapping: TimestepMapping


def build(config: Mapping, backbone: Backbone) -> Parts:
    """The parts of an architecture (keys bottleneck, denoiser, timesteps) on a backbone, untrained.

    Without a UNet there is no denoiser.

    Raises:
        ValueError: if they do not fit each other.
    """
    return Parts(
        backbone,
        from_config(config["bottleneck"], backbone.latent_channels),
        None if backbone.unet is None else Denoiser(backbone.unet, backbone.schedule, **config["denoiser"]),
        mapping_from_config(config["timesteps"]),
    )


def describe(parts: Parts) -> dict:
    """The architecture in JSON-able form, the inverse of `build`."""
    return {
        "bottleneck": parts.bottleneck.to_config(),
        "denoiser": parts.denoiser.options,
        "timesteps": parts.mapping.to_config(),
    }


def tensors(parts: Parts) -> dict[str, Tensor]:
    """The tensors of the weights file, without the bundled backbone's.

    Raises:
        CheckpointError: if the adapters are merged.
    """
    if parts.denoiser.tuning == "lora" and parts.denoiser.merged:
        raise CheckpointError("the adapters are merged into the UNet; save the checkpoint before merging")
    found = {**parts.bottleneck.tensors(), **parts.denoiser.tensors()}
    return {name: value.detach().cpu().contiguous() for name, value in found.items()}


def bundles_backbone(parts: Parts) -> bool:
    """Whether the backbone's weights go into the checkpoint: if trained here or of no source."""
    return parts.denoiser.tuning == "full" or parts.backbone.source is None


def fingerprint(parts: Parts, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of all that decoding depends on but for context models, in hexadecimal.

    Covers, with names, types and shapes: the architecture, the decoder half of the bottleneck, adapters and prompt, the
    frequency tables, and the UNet and VAE decoder where they are bundled; of a backbone that is only named, an evenly
    spaced sample of each tensor.

    Args:
        parts: the codec, or what it consists of.
        dtype: floating-point type in which the weights are saved, None for their own.
    """
    digest = hashlib.sha256(json.dumps(describe(parts), allow_nan=False, sort_keys=True).encode())
    digest.update(json.dumps(parts.backbone.schedule.config, allow_nan=False, sort_keys=True).encode())
    digest.update(repr(parts.backbone.vae.config.scaling_factor).encode())
    stored, wanted = tensors(parts), parts.bottleneck.decoder_tensors() | parts.denoiser.tensors().keys()
    own = {name: value for name, value in stored.items() if name in wanted}
    bundled = bundles_backbone(parts)
    state = {f"unet.{name}": value for name, value in parts.backbone.unet.state_dict().items() if "lora_" not in name}
    state.update(
        {
            f"vae.{name}": value
            for name, value in parts.backbone.vae.state_dict().items()
            if name.startswith(("decoder.", "post_quant_conv."))
        }
    )
    for name, value in sorted({**own, **state}.items()):
        value = _cast(value.detach().cpu(), dtype)
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        if name in state and not bundled:
            value = value.flatten()[:: max(1, value.numel() // 64)]
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(parts: Parts, folder: str | Path, dtype: torch.dtype | None = None, provenance: dict | None = None) -> None:
    """Write a checkpoint folder; it appears whole or not at all, and replaces an earlier checkpoint of that name.

    A card that is there stays.

    Args:
        parts: the codec, or what it consists of, its adapters not merged.
        folder: where to; its parents are made.
        dtype: floating-point type of the file, None for the weights' own.
        provenance: how it was trained, in JSON-able form.

    Raises:
        CheckpointError: if the folder exists and is not a checkpoint.
    """
    with new_folder(Path(folder)) as temporary:
        save_file({name: _cast(value, dtype) for name, value in tensors(parts).items()}, temporary / WEIGHTS)
        bundled = bundles_backbone(parts)
        if bundled:
            part = copy.copy(parts.backbone)
            part._modules = dict(parts.backbone._modules)
            if dtype is not None:
                part.vae, part.unet = (torch.nn.Module.to(copy.deepcopy(m), dtype) for m in (part.vae, part.unet))
            part.save_pretrained(temporary)
        config = {
            "format": FORMAT,
            **describe(parts),
            "backbone": None if bundled else parts.backbone.source,
            **({} if bundled or not parts.backbone.digests else {"backbone_sha256": parts.backbone.digests}),
            **({} if provenance is None else {"provenance": provenance}),
            "fingerprint": fingerprint(parts, dtype),
            "sha256": {
                path.relative_to(temporary).as_posix(): sha256(path) for path in temporary.rglob("*.safetensors")
            },
        }
        (temporary / CONFIG).write_text(json.dumps(config, allow_nan=False, indent=2, sort_keys=True) + "\n")
        if (Path(folder) / CARD).is_file():
            shutil.copy(Path(folder) / CARD, temporary)


class Loaded(NamedTuple):
    """What a checkpoint holds: the parts of a codec, its fingerprint, and how it was trained."""

    parts: Parts
    fingerprint: str
    provenance: dict | None


def load(source: str | Path, backbone: str | Path | None = None, unet: bool = True) -> Loaded:
    """Read a checkpoint, ready for training (adapters not merged), in float32 on the CPU.

    Args:
        source: name of a shipped model ("nano"), a folder, or a hub id.
        backbone: where the backbone is now that the checkpoint names, if it has moved. It must be the same one.
        unet: whether to read UNet and denoiser too, without which nothing is decoded.

    Raises:
        CheckpointError: if it cannot be found, is damaged, or does not fit its description.
    """
    with reading(source) as (folder, config):
        check_hashes(folder, config["sha256"])
        whole = unet or backbone is not None and "backbone_sha256" not in config  # which only all of it tells
        read = partial(Backbone.from_pretrained, unet=whole)
        parts = build(config, read_backbone(folder, config, backbone, read))
        state = {
            name: value.float() if value.is_floating_point() else value
            for name, value in load_file(folder / WEIGHTS).items()
        }
        fill(parts.bottleneck, parts.denoiser, state)
        if backbone is not None and "backbone_sha256" not in config and fingerprint(parts) != config["fingerprint"]:
            raise CheckpointError(f"backbone {str(backbone)!r} is not the one that this checkpoint was made with")
        return Loaded(parts, identity(config), config.get("provenance"))


def read_description(source: str | Path) -> tuple[Path, dict]:
    """The folder of a checkpoint and what its JSON says, without its weights.

    Raises:
        CheckpointError: if it cannot be found or read.
    """
    with reading(source) as (folder, config):
        return folder, config


def content_hash(source: str | Path) -> str:
    """What tells a checkpoint's contents from another's, wherever they lie: 16 hexadecimal digits.

    Raises:
        CheckpointError: if it cannot be found or read.
    """
    _, config = read_description(source)
    content = {name: value for name, value in config.items() if name not in ("backbone", "provenance")}
    return hashlib.sha256(json.dumps(content, allow_nan=False, sort_keys=True).encode()).hexdigest()[:16]


def read_backbone(
    folder: Path,
    config: Mapping,
    moved: str | Path | None,
    read: Callable[[str | Path], Backbone] = Backbone.from_pretrained,
) -> Backbone:
    """The backbone of a checkpoint from where it is.

    Args:
        folder, config: of the checkpoint.
        moved: where the backbone is now that the checkpoint names, if it has moved.
        read: reads a diffusers folder or hub id.

    Raises:
        CheckpointError: if it is not there, or not the one that the checkpoint was made with.
    """
    named = config["backbone"]
    if named is None:
        if moved is not None:
            raise CheckpointError(f"backbone is {str(moved)!r}, but the checkpoint holds its own; allowed: none")
        backbone = read(folder)
        backbone.source = None
        return backbone
    try:
        backbone = read(moved or named)
    except BackboneError as error:
        raise CheckpointError(
            f"{error}; if it is elsewhere now: backbone=FOLDER in Python, --backbone FOLDER "
            "of oscar, backbone.source=FOLDER in training"
        ) from None
    stored = config.get("backbone_sha256", {})
    for part, digest in backbone.digests.items():
        if stored.get(part, digest) != digest:
            place = str(moved or named)
            raise CheckpointError(
                f"backbone {place!r} is not the one that this checkpoint was made with: its {part} has other weights"
            )
    return backbone


def fill(bottleneck: Bottleneck, denoiser: Denoiser | None, state: Mapping[str, Tensor]) -> None:
    """Give bottleneck and denoiser their tensors (CheckpointError for missing, unknown or misshapen ones)."""
    own = {name: value for name, value in state.items() if name.startswith("denoiser.")}
    try:
        if denoiser is not None:
            denoiser.load_tensors(own)
        bottleneck.load_tensors({name: value for name, value in state.items() if name not in own})
    except ValueError as error:
        raise CheckpointError(first_line(error)) from None


@contextlib.contextmanager
def reading(source: str | Path) -> Iterator[tuple[Path, dict]]:
    """`oscar.model_folder.reading`, once the user's own kinds of parts are known."""
    load_plugins()  # what fails there is not the checkpoint's fault
    with model_folder.reading(source, BackboneError) as found:
        yield found


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
