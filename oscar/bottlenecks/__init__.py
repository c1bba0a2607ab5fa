"""What is between latent and denoiser: see `oscar.bottlenecks.base` for the interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oscar.models  # noqa: F401, first: see there
from oscar.bottlenecks import hyperprior, vq  # they register themselves
from oscar.bottlenecks.base import (
    REGISTRY,
    Bottleneck,
    Components,
    Draw,
    Output,
    Payload,
    Point,
    concatenate,
    register,
)

__all__ = ["REGISTRY", "Bottleneck", "Components", "Draw", "Output", "Payload", "Point", "concatenate", "from_config",
           "hyperprior", "register", "vq"]  # fmt: skip


def from_config(config: Mapping[str, Any], latent_channels: int) -> Bottleneck:
    """The bottleneck of a checkpoint's description, untrained.

    Raises:
        ValueError: for an unknown kind, or options that do not fit.
    """
    kind = config.get("kind", vq.VQBottleneck.kind)
    if kind not in REGISTRY:
        raise ValueError(f"bottleneck.kind is {kind!r}; allowed: {', '.join(REGISTRY)} (a kind of your own is known "
                         "once its module has been imported)")  # fmt: skip
    return REGISTRY[kind].from_config(config, latent_channels)
