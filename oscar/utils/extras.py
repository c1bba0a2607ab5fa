"""Packages that not every installation has, and the extra that brings each."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

# Name of the import: the distribution, and the extras that install it.
PACKAGES = {
    "bjontegaard": ("bjontegaard", ("eval",)),
    "datasets": ("datasets", ("train",)),
    "gradio": ("gradio", ("app",)),
    "hydra": ("hydra-core", ("train", "eval")),
    "hydra_plugins.hydra_submitit_launcher": ("hydra-submitit-launcher", ("train",)),
    "lpips": ("lpips", ("eval",)),
    "onnx": ("onnx", ("export",)),
    "onnxruntime": ("onnxruntime", ("export",)),
    "onnxscript": ("onnxscript", ("export",)),
    "matplotlib": ("matplotlib", ("eval",)),
    "omegaconf": ("omegaconf", ("train", "eval")),
    "pandas": ("pandas", ("eval",)),
    "peft": ("peft", ("train",)),
    "pyarrow": ("pyarrow", ("eval",)),
    "pyiqa": ("pyiqa", ("eval",)),
    "skimage": ("scikit-image", ("eval",)),
    "tensorboard": ("tensorboard", ("train",)),
    "torchvision": ("torchvision", ("train", "eval")),
    "transformers": ("transformers", ("train",)),
    "wandb": ("wandb", ("train",)),
}


def how_to_install(module: str, extra: str | None = None) -> str:
    """The command that brings a package of `PACKAGES`.

    Args:
        module: name of its import.
        extra: the one to name, if it brings the package.
    """
    extras = PACKAGES[module][1]
    return f"pip install 'oscar-codec[{extra if extra in (*extras, 'all') else extras[0]}]'"


def explain_missing(error: BaseException, extra: str | None = None) -> str | None:
    """In one line, which package an import has missed and how to get it; None if no extra has it."""
    module = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if module not in PACKAGES:
        return None
    return f"{PACKAGES[module][0]} is not installed; allowed: {how_to_install(module, extra)}"


def need(module: str) -> None:
    """Say which extra is missing, where its package is about to be imported.

    Raises:
        ModuleNotFoundError: if the package is not installed, with the line of `explain_missing`.
    """
    if importlib.util.find_spec(module) is None:
        error = ModuleNotFoundError(name=module)
        raise ModuleNotFoundError(explain_missing(error), name=module)


@contextlib.contextmanager
def missing_as_line(name: str, extra: str) -> Iterator[None]:
    """Have a package that an extra would bring end the process with one line and exit code 2."""
    try:
        yield
    except ImportError as error:
        if (line := explain_missing(error, extra)) is None:
            raise
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(2)
