"""Packages that not every installation has, and the extra that brings each."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

# Name of the import: the distribution, and the extras that install it.
_TORCH = ("torch", "train", "eval", "app")  # the others include it
PACKAGES = {
    "accelerate": ("accelerate", _TORCH),
    "bjontegaard": ("bjontegaard", ("eval",)),
    "compressai": ("compressai", _TORCH),
    "datasets": ("datasets", ("train",)),
    "diffusers": ("diffusers", _TORCH),
    "gradio": ("gradio", ("app",)),
    "hydra": ("hydra-core", ("train", "eval")),
    "huggingface_hub": ("huggingface-hub", _TORCH),
    "hydra_plugins.hydra_submitit_launcher": ("hydra-submitit-launcher", ("train",)),
    "lpips": ("lpips", ("eval",)),
    "matplotlib": ("matplotlib", ("eval",)),
    "omegaconf": ("omegaconf", ("train", "eval")),
    "onnx": ("onnx", _TORCH),
    "onnxscript": ("onnxscript", _TORCH),
    "pandas": ("pandas", ("eval",)),
    "peft": ("peft", ("train",)),
    "pyarrow": ("pyarrow", ("eval",)),
    "pyiqa": ("pyiqa", ("eval",)),
    "skimage": ("scikit-image", ("eval",)),
    "ssimulacra2": ("ssimulacra2", ("eval",)),
    "tensorboard": ("tensorboard", ("train",)),
    "torch": ("torch", _TORCH),
    "torchvision": ("torchvision", ("train", "eval")),
    "transformers": ("transformers", ("train",)),
    "vector_quantize_pytorch": ("vector-quantize-pytorch", _TORCH),
    "wandb": ("wandb", ("train",)),
}


def is_installed(module: str) -> bool:
    """Whether a package is there, without importing it; a folder of its name that has no `__init__.py` is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of the package that would hold it
        return False
    return spec is not None and spec.origin is not None


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
    if not is_installed(module):
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
