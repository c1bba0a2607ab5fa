"""Which engine runs a model's networks: torch, or ONNX Runtime for models that have graphs, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from oscar.cli.messages import CommandError
from oscar.model_folder import RUNTIME, find_here
from oscar.utils.extras import how_to_install, is_installed

ENGINES = ("auto", "torch", "onnx")
DEVICES = ("cpu", "cuda", "coreml", "directml")  # of ONNX Runtime
# What options are where torch is not asked for anything that it alone does.
_COMMON = {
    "dtype": ("auto", "float32"),
    "compile": (False,),
    "memory": ("auto",),
    "backbone": (None,),
    "tiny_vae": (None,),
}
Engine = Annotated[
    str,
    typer.Option(
        help="torch; onnx: ONNX Runtime, which starts in a second, for models with graphs; auto: onnx where it does "
        "all that is asked for, but on a GPU torch."
    ),
]


def check_engine(engine: str, device: str, options: Mapping[str, Any]) -> None:
    """Refuse an engine that does not exist, and with onnx what only torch does, before anything is loaded."""
    if engine not in ENGINES:
        raise CommandError(f"--engine {engine!r} does not exist; allowed: {', '.join(ENGINES)}")
    if engine != "onnx":
        return
    for option in _torch_options(options):
        raise CommandError(f"--engine onnx and {option} exclude each other")
    if device not in DEVICES:
        raise CommandError(f"--device is {device}; allowed with --engine onnx: {', '.join(DEVICES)}")


def choose_engine(engine: str, model: str, device: str, options: Mapping[str, Any]) -> str:
    """The engine, torch or onnx, that `auto` stands for.

    Args:
        engine: one of `ENGINES`.
        model: name, folder or hub id.
        device: that was asked for.
        options: as `oscar.cli.loading.network_options` gives them.

    Raises:
        CommandError: if it takes torch, which is not installed.
    """
    if engine != "auto":
        return engine
    asked = [*_torch_options(options), *([f"--device {device}"] if device not in DEVICES else [])]
    folder, has_torch = find_here(model), is_installed("torch")
    has_graphs = folder is not None and (folder / RUNTIME).is_file() and is_installed("onnxruntime")
    if has_graphs and not asked and not (device == "cuda" and has_torch):
        return "onnx"
    if has_torch:
        return "torch"
    if asked or folder is not None:
        reason = asked[0] if asked else f"model {model}, which has no graphs ({RUNTIME}),"
        raise CommandError(f"{reason} needs torch, which is not installed; allowed: {how_to_install('torch')}")
    return "onnx"  # a model that is not here, which the runtime looks for, or says so


def _torch_options(options: Mapping[str, Any]) -> list[str]:
    """The options that ask for what only torch does."""
    return [
        f"--{name.replace('_', '-')}" for name, usual in _COMMON.items() if options.get(name, usual[0]) not in usual
    ]
