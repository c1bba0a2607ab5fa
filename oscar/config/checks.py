"""What the schemas share: the error of a configuration and the checks of single fields."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""


def choose(name: str, value: Any, allowed: tuple) -> None:
    if value is not None and value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(str(item) for item in allowed)}")


def fill(config: Any, values: Mapping[str, Any]) -> None:
    """Give fields that are unset a value, in place."""
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, copy.deepcopy(value))


def at_least(name: str, value: float | None, low: float, strict: bool = False) -> None:
    if value is not None and (value < low or (strict and value == low)):
        raise ConfigError(f"{name} is {value}; allowed: {'above' if strict else 'at least'} {low:g}")
