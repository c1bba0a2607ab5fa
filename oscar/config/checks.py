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


def take(config: Any, name: str, stored: Mapping[str, Any]) -> None:
    """Take fields, or entries of a dict, over from a checkpoint; refuse those that are set to other values.

    Raises:
        ConfigError: naming the first such.
    """
    values = config if isinstance(config, dict) else vars(config)
    for key, value in stored.items():
        own = values.get(key)
        if own is None:
            values[key] = copy.deepcopy(value)
        elif own != value:
            raise ConfigError(f"{name}.{key} is {own!r}, but init_from has {value!r}; allowed: the same, or null")


def at_least(name: str, value: float | None, low: float, strict: bool = False) -> None:
    if value is not None and (value < low or (strict and value == low)):
        raise ConfigError(f"{name} is {value}; allowed: {'above' if strict else 'at least'} {low:g}")
