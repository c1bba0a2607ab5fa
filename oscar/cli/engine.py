"""Which engine runs a model's networks: torch, or ONNX Runtime for models that have graphs, without torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oscar.cli.messages import CommandError
from oscar.model_folder import RUNTIME, find_here
from oscar.utils.extras import how_to_install, is_installed

if TYPE_CHECKING:
    from oscar.codec import OscarCodec
    from oscar.runtime import Codec

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
        help="torch; onnx: ONNX Runtime, which starts sooner, for models with graphs; auto: onnx where it does "
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
    if _kind(device) not in DEVICES:
        raise CommandError(f"--device is {device}; allowed with --engine onnx: {', '.join(DEVICES)}")
    if not is_installed("onnxruntime"):
        raise CommandError("--engine onnx needs onnxruntime, which is not installed; allowed: pip install onnxruntime")


def choose_engine(engine: str, model: str, device: str, options: Mapping[str, Any]) -> str:
    """The engine, torch or onnx, that `auto` stands for.

    Args:
        engine: one of `ENGINES`.
        model: name, folder or hub id.
        device: that was asked for.
        options: as `oscar.cli.loading.network_options` gives them.

    Raises:
        CommandError: if it takes a package that is not installed.
    """
    if engine != "auto":
        return engine
    asked = [*_torch_options(options), *([f"--device {device}"] if _kind(device) not in DEVICES else [])]
    folder, has_torch = find_here(model), is_installed("torch")
    has_graphs = folder is not None and (folder / RUNTIME).is_file()
    if has_torch and (asked or not has_graphs or _kind(device) == "cuda" or not is_installed("onnxruntime")):
        return "torch"
    if asked or folder is not None and not has_graphs:
        reason = asked[0] if asked else f"model {model}, which has no graphs ({RUNTIME}),"
        raise CommandError(f"{reason} needs torch, which is not installed; allowed: {how_to_install('torch')}")
    check_engine("onnx", device, options)
    return "onnx"  # also for a model that is not here, which the runtime looks for, or says so


class OrTorch:
    """The runtime's codec; an image that is too large for it goes through torch, which takes it in parts.

    Args:
        codec: of the runtime.
        load: gives torch's, for the first such image.
    """

    def __init__(self, codec: Codec, load: Callable[[], OscarCodec]):
        self._codec, self._load = codec, functools.cache(load)

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._codec, name)
        return functools.partial(self._call, name) if callable(own) else own

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        from oscar.runtime.codec import TooLargeError

        try:
            return getattr(self._codec, name)(*args, **options)
        except TooLargeError:
            return getattr(self._load(), name)(*args, **options)


def _kind(device: str) -> str:
    """A device without the number of a GPU."""
    return re.sub(r"^cuda:\d+$", "cuda", device)


def _torch_options(options: Mapping[str, Any]) -> list[str]:
    """The options that ask for what only torch does."""
    return [
        f"--{name.replace('_', '-')}" for name, usual in _COMMON.items() if options.get(name, usual[0]) not in usual
    ]
