"""Taking networks apart."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def drop(network: nn.Module, parts: Iterable[str]) -> None:
    """Remove child modules that will not be used, where the network has them."""
    for name, _ in list(network.named_children()):
        if name in parts:
            delattr(network, name)
