"""Rates that were trained in separate runs, put together into one checkpoint; or added to a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oscar import checkpoint
from oscar.bitstream.context import ContextModel
from oscar.bottlenecks.vq import HyperEncoder, VQBottleneck, need_rates
from oscar.checkpoint import CheckpointError
from oscar.codec import OscarCodec
from oscar.rates import RatePoint
from oscar.timesteps import (
    LearnedMapping,
    TableMapping,
    TimestepMapping,
    interpolate,
    mapping_from_config,
    read_calibration,
)


def merge_rates(sources: Sequence[str | Path], out: str | Path) -> OscarCodec:
    """Write a checkpoint with the hyper-encoders, frequency tables and context models of all sources.

    It decodes as the sources do, since they have the same backbone, timesteps and denoiser. Where stage `bottleneck`
    made them the denoiser is untrained; then its adapters do nothing yet, and the prompt is the first source's.

    Args:
        sources: two or more checkpoints (names, folders or hub ids) on the same backbone; no rate in two of them. All
            are read whole, two at a time.
        out: folder of the result; it appears whole or not at all, and replaces an earlier checkpoint of that name.

    Returns:
        What was written, ready for training.

    Raises:
        CheckpointError: if a source cannot be read, or does not go with the first; nothing is written then.
    """
    if len(sources) < 2:
        raise CheckpointError(f"merge needs two or more checkpoints; got {len(sources)}")
    first = _load(sources[0])
    origin = {rate: sources[0] for rate in first.bottleneck.rates}
    parts = [_rates(first)]
    for source in sources[1:]:
        codec = _load(source)
        _check_same(first, codec, sources[0], source)
        for rate in codec.bottleneck.rates:
            if rate in origin:
                raise CheckpointError(
                    f"rate {rate.bpp:.4f} is in both {origin[rate]} and {source}; allowed: each rate in one checkpoint"
                )
            origin[rate] = source
        parts.append(_rates(codec))
        del codec  # and its backbone, before the next is read
    try:
        merged = OscarCodec(first.backbone, _joined(first.bottleneck, parts), first.denoiser, first.mapping)
    except ValueError as error:
        raise CheckpointError(f"merge: {error}") from None
    merged.save_pretrained(out)
    return merged


def add_rates(
    model: str | Path, rates: str | Path, out: str | Path, calibration: str | Path | None = None
) -> OscarCodec:
    """Write a trained model with rates that its denoiser never saw, from stage 1.

    The denoiser stays as it is, and so does what it makes of the model's own rates; files that the model wrote before
    are another model's, since the timesteps of all rates are part of a model.

    Args:
        model: name, folder or hub id of the trained model.
        rates: checkpoint of stage 1 on the same VAE, with none of the model's rates. Its UNet is not looked at.
        out: folder of the result; it appears whole or not at all, and replaces an earlier checkpoint of that name.
        calibration: calibration.json of `rates` (scripts/calibrate_timesteps.py), whose mapping `cosine` gives the
            timesteps of the added rates; None interpolates those of the model over log(bpp). A mapping that knows
            every rate (log, linear, constant, per_image) stays as it is then.

    Returns:
        What was written.

    Raises:
        CheckpointError: if a checkpoint cannot be read, or they do not go together; nothing is written then.
        ValueError: for a calibration that cannot be read, or lacks a rate.
    """
    own, other = _load(model), _load(rates, unet=False)
    differences = {
        "VAE encoders": not _equal(_encoder(own), _encoder(other))
        or own.backbone.vae.config.scaling_factor != other.backbone.vae.config.scaling_factor,
        "kinds of bottleneck": not isinstance(own.bottleneck, type(other.bottleneck)),
        "noise schedules": own.backbone.schedule.config != other.backbone.schedule.config,
        "hyper-encoders (width, features or codebook_dim)": _shape(own) != _shape(other),
    }
    for what, differ in differences.items():
        if differ:
            raise CheckpointError(f"{model} and {rates} have different {what}; allowed: the same")
    twice = set(own.bottleneck.rates) & set(other.bottleneck.rates)
    if twice:
        names = ", ".join(f"{rate.bpp:.4f}" for rate in sorted(twice, key=lambda rate: rate.bpp))
        raise CheckpointError(f"rate {names} is in both {model} and {rates}; allowed: rates that {model} lacks")
    mapping = _extended(own, other.bottleneck.rates, calibration)
    bottleneck = _joined(own.bottleneck, [_rates(own), _rates(other)])
    joined = OscarCodec(own.backbone, bottleneck, own.denoiser, mapping, provenance=own.provenance)
    joined.save_pretrained(out)
    return joined


def _extended(codec: OscarCodec, rates: Sequence[RatePoint], calibration: str | Path | None) -> TimestepMapping:
    """The mapping of a codec, for further rates too."""
    known = codec.bottleneck.rates
    if calibration is not None:
        if codec.mapping.per_image:
            raise ValueError("calibration is set, but the model measures each image's own timestep; allowed: null")
        measured = mapping_from_config(read_calibration({"kind": "cosine", "calibration": str(calibration)}))
        table = {rate.id: codec.mapping(rate) for rate in known} | {rate.id: measured(rate) for rate in rates}
        return (TableMapping if all(isinstance(value, int) for value in table.values()) else LearnedMapping)(table)
    if isinstance(codec.mapping, TableMapping):
        return interpolate(codec.mapping, known, rates)
    return codec.mapping


def _encoder(codec: OscarCodec) -> dict[str, Tensor]:
    """What latents come from."""
    state = codec.backbone.vae.state_dict()
    return {name: value for name, value in state.items() if name.startswith(("encoder.", "quant_conv."))}


def _joined(first: VQBottleneck, parts: Sequence[tuple]) -> VQBottleneck:
    """A bottleneck with all hyper-encoders, tables and context models, in the order of the rates' ids."""
    encoders, frequencies, contexts = ({}, {}, {})
    for own, tables, models in parts:
        encoders, frequencies, contexts = encoders | own, frequencies | tables, contexts | models
    rates = sorted(encoders, key=lambda rate: rate.id)
    bottleneck = type(first)(rates, first.latent_channels, **first.options)
    bottleneck.hyper_encoders.update({str(rate.id): encoders[rate] for rate in rates})
    bottleneck.frequencies, bottleneck.contexts = frequencies, contexts
    return bottleneck


def _load(source: str | Path, unet: bool = True) -> OscarCodec:
    codec = OscarCodec.from_pretrained(source, unet=unet)
    try:
        need_rates(codec.bottleneck, "merging")
    except ValueError as error:
        raise CheckpointError(f"model {str(source)!r}: {error}") from None
    return codec


def _rates(
    codec: OscarCodec,
) -> tuple[dict[RatePoint, HyperEncoder], dict[int, np.ndarray], dict[int, ContextModel]]:
    """The hyper-encoder of each rate, and by rate id the frequency tables and context models."""
    bottleneck = codec.bottleneck
    return {rate: bottleneck.at(rate) for rate in bottleneck.rates}, bottleneck.frequencies, bottleneck.contexts


def _check_same(one: OscarCodec, other: OscarCodec, name: str | Path, other_name: str | Path) -> None:
    """Refuse checkpoints that differ in more than their rates."""
    differences = {
        "backbones": not _equal(_backbone(one), _backbone(other))
        or one.backbone.schedule.config != other.backbone.schedule.config
        or one.backbone.vae.config.scaling_factor != other.backbone.vae.config.scaling_factor,
        "hyper-encoders (width, features or codebook_dim)": _shape(one) != _shape(other),
        "timesteps": one.mapping != other.mapping,
        "denoisers": one.denoiser.options != other.denoiser.options
        or (_is_trained(one) or _is_trained(other))
        and not _equal(_denoiser(one), _denoiser(other)),
    }
    for what, differ in differences.items():
        if differ:
            raise CheckpointError(f"{name} and {other_name} have different {what}; allowed: the same")


def _backbone(codec: OscarCodec) -> dict[str, Tensor]:
    """VAE and UNet without adapters; names are those of the plain UNet."""
    unet = {
        name.replace(".base_layer", ""): value
        for name, value in codec.backbone.unet.state_dict().items()
        if "lora_" not in name
    }
    return {f"vae.{name}": value for name, value in codec.backbone.vae.state_dict().items()} | unet


def _denoiser(codec: OscarCodec) -> dict[str, Tensor]:
    return {name: value for name, value in checkpoint.tensors(codec).items() if name.startswith("denoiser.")}


def _is_trained(codec: OscarCodec) -> bool:
    """Whether an adapter does anything; tuned in full, the UNet is part of what `_backbone` compares."""
    return any(value.any() for name, value in _denoiser(codec).items() if "lora_B" in name)


def _shape(codec: OscarCodec) -> dict:
    names = ("width", "features", "codebook_dim")
    options = {name: codec.bottleneck.options.get(name) for name in names}
    return {**options, "latent_channels": codec.bottleneck.latent_channels}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
