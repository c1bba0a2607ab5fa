"""A run's configuration with nothing left open: what it takes from `init_from` and from files stands in it.

What is set beside `init_from` is equal to the checkpoint's, or changes it as `TrainConfig.init_from` says, or is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from oscar import checkpoint
from oscar.config import DENOISER, BackboneConfig, BottleneckConfig, ConfigError, TrainConfig, fill, take
from oscar.models.backbone import PARTS, read_configs
from oscar.registry import BOTTLENECKS, STAGES
from oscar.timesteps import mapping_from_config, read_calibration
from oscar.utils.strict_json import as_read

# Of a backbone's configuration, what training or reading it may change.
_FREE = ("scaling_factor", "_diffusers_version", "_name_or_path")


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with what is unset filled in; one that is resolved already comes back as it is.

    Raises:
        ConfigError: for a key that is set to something else than `init_from` has.
        CheckpointError, BackboneError: if a description of `init_from`, or of its backbone, cannot be read.
        ValueError: for timesteps that cannot be read.
    """
    config = copy.deepcopy(config)
    if config.init_from is not None:
        folder, description = checkpoint.read_description(config.init_from)
        _take_bottleneck(config.bottleneck, description["bottleneck"])
        if not starts_denoiser(config, description):
            _take_denoiser(config, description["denoiser"])
        _take_backbone(config.backbone, description["backbone"], str(folder))
        if not config.timesteps:
            config.timesteps = description["timesteps"]
    if STAGES[config.stage.name].trains_codec:
        if not config.timesteps:
            mapping = config.bottleneck.family.default_mapping(config.bottleneck)
        else:
            rates = config.bottleneck.rate_points() if config.bottleneck.rates else ()
            mapping = mapping_from_config(read_calibration(config.timesteps), rates)
        config.timesteps = mapping.to_config()
    config.check()
    return config


def _take_bottleneck(config: BottleneckConfig, stored: Mapping[str, Any]) -> None:
    kind = stored.get("kind", "vq")
    BOTTLENECKS.find(kind)
    take(config, "bottleneck", {"kind": kind})
    config.family.take_over(config, stored)


def starts_denoiser(config: TrainConfig, description: Mapping[str, Any]) -> bool:
    """Whether a run begins another denoiser than that of `init_from`, which stage 1 has left untrained.

    Args:
        config: of the run; what is unset of its denoiser is filled in if so.
        description: of the checkpoint.
    """
    own, stored = config.denoiser, {**DENOISER, **description["denoiser"]}
    names = [name for name in DENOISER if name != "prompt_init"]
    if all(getattr(own, name) in (None, stored[name]) for name in names):
        return False
    if not _is_untrained(description.get("provenance")):
        return False
    fill(own, {name: stored[name] for name in names})
    return True


def _is_untrained(provenance: Mapping[str, Any] | None) -> bool:
    """Whether no run behind a checkpoint has trained a denoiser; not, if that is not known."""
    if provenance is None:
        return False
    stage, origin = provenance["config"]["stage"]["name"], provenance["origin"] or {}
    if stage not in STAGES or STAGES[stage].computes_with_unet:
        return False
    return "init_from" not in origin or _is_untrained(origin["provenance"])


def _take_denoiser(config: TrainConfig, stored: Mapping[str, Any]) -> None:
    names = [item.name for item in fields(config.denoiser) if item.name != "prompt_init"]
    stored = {name: stored.get(name, DENOISER[name]) for name in names}
    if stored["tuning"] == "full":  # which has no adapters, whatever the checkpoint says of them
        stored |= {name: getattr(config.denoiser, name) or stored[name] for name in ("lora_rank", "lora_alpha")}
    take(config.denoiser, "denoiser", stored)


def _take_backbone(config: BackboneConfig, named: str | None, folder: str) -> None:
    if named is None and config.source is not None:
        raise ConfigError(
            f"backbone.source is {config.source!r}, but init_from holds its backbone itself; allowed: null"
        )
    config.source = config.source or named
    if named is None or any(getattr(config, part) is not None for part in PARTS):
        stored = read_configs(config.source or folder)
        check_shape(config, stored, "init_from")
        if named is None:
            config.vae, config.unet, config.scheduler = (stored[part] for part in PARTS)


def check_shape(config: BackboneConfig, stored: Mapping[str, Mapping], where: str) -> None:
    """Refuse shapes of a backbone that are set to other values than those of the weights.

    Args:
        config: the shapes that are set.
        stored: configurations of vae, unet and scheduler, as diffusers stores them.
        where: the weights in messages.
    """
    for part in PARTS:
        for key, value in (getattr(config, part) or {}).items():
            value = as_read(value)
            other = as_read(stored[part].get(key))
            if key not in _FREE and value != other:
                raise ConfigError(
                    f"backbone.{part}.{key} is {value!r}, but {where} has {other!r}; allowed: the same, or ~backbone"
                )
