"""What is between latent and denoiser: see `oscar.bottlenecks.base` for the interface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import oscar.models  # noqa: F401, first: see there
from oscar.bottlenecks import vq  # they register themselves, the paper's first

# isort: split
from oscar.bottlenecks import hyperprior
from oscar.bottlenecks.base import (
    Bottleneck,
    Components,
    Draw,
    Output,
    Payload,
    Symbols,
    concatenate,
)
from oscar.operating_points import Point, Setting
from oscar.registry import BOTTLENECKS

__all__ = [
    "Bottleneck",
    "Components",
    "Draw",
    "Output",
    "Payload",
    "Point",
    "Setting",
    "Symbols",
    "concatenate",
    "from_config",
    "hyperprior",
    "vq",
]


def from_config(config: Mapping[str, Any], latent_channels: int) -> Bottleneck:
    """The bottleneck of a checkpoint's description, untrained.

    Raises:
        ValueError: for an unknown kind, or options that do not fit.
    """
    kind = config.get("kind", vq.VQBottleneck.kind)
    if kind not in BOTTLENECKS:
        raise ValueError(
            f"bottleneck.kind is {kind!r}; allowed: {', '.join(BOTTLENECKS)} (a kind of your own is known "
            "once OSCAR_PLUGINS names its module)"
        )
    bottleneck = BOTTLENECKS[kind]
    if bottleneck.config_fields == ("options",):  # which no schema has checked
        _check_options(kind, bottleneck, {name: value for name, value in config.items() if name != "kind"})
    return bottleneck.from_config(config, latent_channels)


def _check_options(kind: str, bottleneck: type[Bottleneck], options: Mapping[str, Any]) -> None:
    _, *parameters = inspect.signature(bottleneck).parameters.values()
    allowed = [parameter.name for parameter in parameters]
    for name in options:
        if name not in allowed:
            raise ValueError(f"bottleneck.options.{name} is unknown to kind {kind}; allowed: {', '.join(allowed)}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ValueError(f"bottleneck.options.{parameter.name} is unset; kind {kind} needs it")
