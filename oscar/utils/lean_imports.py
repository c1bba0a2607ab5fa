"""Importing what is used of a large package: not what its other parts would bring along, nor what they have to say.

CompressAI's package imports torch_geometric, pandas and pyarrow for data sets of point clouds, and diffusers takes in
every package for quantised or adapted weights that it finds: seconds before a command of the command line begins.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def without_init(*packages: str) -> Iterator[dict[str, ModuleType]]:
    """Let packages, and modules in them, be imported without running the packages' own `__init__`.

    As long as this lasts, those that are not imported yet are the empty modules that are given. The first import of one
    afterwards runs its `__init__`, which finds the modules that were imported here.

    Raises:
        ImportError: if there is no such package.
    """
    empty = {}
    for name in packages:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"{name} is not installed", name=name)
        empty[name] = sys.modules[name] = importlib.util.module_from_spec(spec)  # is not executed
    try:
        yield empty
    finally:
        for name, module in empty.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Let packages that are not imported yet seem absent to what is imported as long as this lasts."""
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: "not to be found"
    try:
        yield
    finally:
        for name in absent:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep off stderr what libraries say of themselves as they are imported, and nothing else.

    That is that bitsandbytes, which diffusers and peft import where it is installed, lacks a kernel of 4-bit weights,
    which nothing here has; and that a library of CompressAI's calls what torch is about to drop. Both appear anew where
    a program of one's own causes them.
    """

    def is_worth_saying(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(is_worth_saying)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated\.", FutureWarning)
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated\.", DeprecationWarning)
            yield
    finally:
        logger.removeFilter(is_worth_saying)
