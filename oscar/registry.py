"""What can be extended by name, and the modules of one's own that do so: docs/extend.md shows each.

A registry is a mapping from names, as configurations and checkpoints have them, to what they stand for. Its own entries
are made when its home module is imported, those of the user when the modules are that `OSCAR_PLUGINS` names; both
happen when something is first looked up.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, overload

PLUGINS = "OSCAR_PLUGINS"  # environment variable: names of modules, separated by commas
Entry = TypeVar("Entry")


class PluginError(ValueError):
    """A module of `OSCAR_PLUGINS` that cannot be imported; the message is one line."""


def load_plugins() -> None:
    """Import the modules of `OSCAR_PLUGINS`, each once; they may be in the current folder.

    Raises:
        PluginError: naming the first that cannot be imported, and why.
    """
    names = [name.strip() for name in os.environ.get(PLUGINS, "").split(",") if name.strip()]
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module of the user's raises
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            raise PluginError(
                f"{PLUGINS} names {name!r}, which cannot be imported ({reason}); allowed: modules on "
                "Python's path or in the current folder, separated by commas"
            ) from error


class Registry(Mapping[str, Any]):
    """Names and what they stand for, in the order of registration.

    Args:
        field: what a name is called in messages, such as "bottleneck.kind".
        home: the module whose import registers what is in the package.
        attribute: under which a class that is registered knows its name, unless it sets it itself.
    """

    def __init__(self, field: str, home: str, attribute: str | None = None):
        self.field, self.home, self.attribute = field, home, attribute
        self._entries: dict[str, Any] = {}
        self._variants: dict[str, Any] = {}  # entries that come with others, and behind all of them
        self._is_filling = False

    @overload
    def register(self, name: str) -> Callable[[Entry], Entry]: ...

    @overload
    def register(self, name: str, entry: Entry) -> Entry: ...

    def register(self, name, entry=None):
        """Give something a name: `register(name, entry)`, or the decorator `@register(name)` of a class or function.

        Raises:
            ValueError: if something else has this name.
        """
        if entry is None:
            return lambda entry: self.register(name, entry)
        if name in self._entries and not _is_same(self._entries[name], entry):
            raise ValueError(f"{self.field} {name!r} is registered already; allowed: a name that is free")
        if self.attribute is not None and isinstance(entry, type) and self.attribute not in vars(entry):
            setattr(entry, self.attribute, name)
        self._entries[name] = entry
        if hasattr(entry, "variants"):
            self._variants |= entry.variants(name)
        return entry

    def find(self, name: object) -> Any:
        """What a name stands for.

        Raises:
            ValueError: if there is none such, listing all that there are.
        """
        if name not in self:
            raise ValueError(f"{self.field} {name!r} does not exist; allowed: {', '.join(self)}")
        return self[name]

    def _all(self) -> dict[str, Any]:
        if not self._is_filling:  # else by the very modules that are imported here
            self._is_filling = True
            try:
                importlib.import_module(self.home)
                load_plugins()
            finally:
                self._is_filling = False
        return {**self._entries, **self._variants}

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def _is_same(one: Any, other: Any) -> bool:
    """Whether both are one thing, or one module's, which was imported anew."""
    names = [(getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)) for entry in (one, other)]
    return one is other or (names[0] == names[1] and None not in names[0])


BOTTLENECKS = Registry("bottleneck.kind", "oscar.bottlenecks", "kind")
"""classes of `oscar.bottlenecks.Bottleneck`"""
MAPPINGS = Registry("timesteps.kind", "oscar.timesteps", "kind")
"""classes of `oscar.timesteps.TimestepMapping`"""
AUTOENCODERS = Registry("vae class", "oscar.models.backbone")
"""classes of autoencoders in the manner of diffusers', by `_class_name` of their configuration"""
UNETS = Registry("unet class", "oscar.models.backbone")
"""classes of denoising networks, likewise"""
LOSSES = Registry("image loss", "oscar.training.losses")
"""functions (prediction, target) -> mean distance of images (B, 3, H, W) in [-1, 1]; or `oscar.training.losses.Term`"""
STAGES = Registry("stage.name", "oscar.training.stages")
"""classes of `oscar.training.stages.base.Stage`"""
METRICS = Registry("metric", "oscar.metrics.image")
"""an `oscar.metrics.image.Metric` each"""
BASELINES = Registry("codec", "oscar.baselines.registry", "name")
"""classes of `oscar.baselines.ImageCodec`, or functions that make one"""
