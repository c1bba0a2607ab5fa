"""Parts of networks, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from oscar.utils.provenance import WEIGHTS


class WeightsError(ValueError):
    """Tensors of a file that are damaged, missing, unknown or misshapen."""


def drop(network: nn.Module, parts: Iterable[str]) -> None:
    """Remove child modules that will not be used, where the network has them."""
    for name, _ in list(network.named_children()):
        if name in parts:
            delattr(network, name)


def check_names(names: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a checkpoint's tensors that are missing or unknown (WeightsError naming the first)."""
    names, expected = set(names), set(expected)
    for problem, found in (("lacks", expected - names), ("has unknown", names - expected)):
        if found:
            raise WeightsError(f"{WEIGHTS} {problem} {min(found)} ({len(found)} tensors in all)")


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint's tensors that are missing, unknown or of another shape (WeightsError naming the first)."""
    check_names(tensors, expected)
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise WeightsError(
                f"{WEIGHTS}: {name} has shape {tuple(value.shape)}; allowed: {tuple(expected[name].shape)}"
            )


def count(*modules: nn.Module) -> int:
    """Parameters of modules, trained or not."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
