"""Parts of networks, by name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def drop(network: nn.Module, parts: Iterable[str]) -> None:
    """Remove child modules that will not be used, where the network has them."""
    for name, _ in list(network.named_children()):
        if name in parts:
            delattr(network, name)


def check_names(names: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse tensors that are missing or unknown (ValueError naming the first)."""
    names, expected = set(names), set(expected)
    for problem, found in (("lacks", expected - names), ("has unknown", names - expected)):
        if found:
            raise ValueError(f"{problem} {min(found)} ({len(found)} tensors in all)")


def count(*modules: nn.Module) -> int:
    """Parameters of modules, trained or not."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
