"""Models of commands: options of their networks, and loading. What is wrong is said before torch is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oscar.cli import lean
from oscar.cli.engine import OrTorch, check_engine, choose_engine
from oscar.cli.messages import CommandError, one_line
from oscar.cli.processes import own_device
from oscar.utils.extras import is_installed

if TYPE_CHECKING:
    from oscar.codec import OscarCodec
    from oscar.runtime import Codec

DTYPES = ("float32", "float16", "bfloat16")
_COMPILE = {"off": False, "on": True, "graphs": "graphs"}  # as the codec has them
SHIPPED = {"quality": "nano", "rate": "nano-vq"}  # models in the package, by the name of their operating points
Model = Annotated[str, typer.Option(help="nano, nano-vq, a model folder, or an id on the hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...; of ONNX Runtime cpu, cuda, coreml, directml.")]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"Of the networks: {', '.join(('auto', *DTYPES))}; auto is float32 for models below 100 M "
        "parameters, else what the device is fast in."
    ),
]
Compile = Annotated[
    str, typer.Option("--compile", help="torch.compile: off, on, graphs (CUDA graphs too). Pays in folders.")
]
Memory = Annotated[
    str, typer.Option(help="For large images, beyond the model: auto (by what is free), a size such as 4GB, none.")
]
Backbone = Annotated[
    str | None, typer.Option(help="Where the model's backbone is now, if it has moved.", show_default=False)
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on the CPU; by default the engine's choice.")]


def network_options(dtype: str, compile: str, memory: str, engine: str, device: str, **others: Any) -> dict[str, Any]:
    """Arguments of `load_codec` beside model, device and threads; checked without torch."""
    for name, value, allowed in (("dtype", dtype, ("auto", *DTYPES)), ("compile", compile, tuple(_COMPILE))):
        if value not in allowed:
            raise CommandError(f"--{name} {value!r} does not exist; allowed: {', '.join(allowed)}")
    options = {"dtype": dtype, "compile": _COMPILE[compile], "memory": None if memory == "none" else memory, **others}
    check_engine(engine, device, options)
    return {"engine": engine, **options}


def check_point(codec: OscarCodec | Codec, points: dict[str, float | None], effort: int) -> OscarCodec | Codec:
    """Refuse, for every file, an operating point or an effort that the model does not have."""
    bottleneck = codec.bottleneck
    own = bottleneck.point_name if bottleneck.point_name in points else "point"
    few = len(bottleneck.points) == len(bottleneck.all_points)  # else they are too many to list
    allowed = f"--{own} {', '.join(map(bottleneck.label, bottleneck.points))}" if few else f"--{own}"
    for name, value in points.items():
        if value is None:
            continue
        if name not in (own, "point"):
            other = f", or --model {SHIPPED[name]}" if name in SHIPPED else ""
            raise CommandError(
                f"--{name} is {value}, but this model has {bottleneck.point_words}; allowed: {allowed}{other}"
            )
        try:
            bottleneck.parse(value)
        except ValueError as error:
            raise CommandError(one_line(error)) from error
    if effort > bottleneck.max_effort:
        raise CommandError(f"--effort is {effort}, but this model has {bottleneck.point_words}; allowed: {allowed}")
    return codec


def load_codec(
    model: str, device: str, threads: int | None, dtype: str = "auto", engine: str = "torch", **options: Any
) -> OscarCodec | Codec | OrTorch:
    """Load the model on its device; all that fails here fails for every file, hence CommandError.

    Args:
        model: name, folder or hub id.
        device, threads: of the networks.
        dtype: of the networks, a name.
        engine: `oscar.cli.engine`.
        options: of `oscar.load`.
    """
    chosen = choose_engine(engine, model, device, {"dtype": dtype, **options})
    try:
        device = own_device(device)
        if chosen == "torch":
            return _load_torch(model, device, threads, dtype, options)
        from oscar.runtime import Codec

        codec = Codec(model, device=device, threads=threads or _environment_threads())
        if engine == "onnx" or not is_installed("torch"):
            return codec
        return OrTorch(codec, lambda: _load_torch(model, "cpu", threads, dtype, options))
    except (ValueError, OSError) as error:
        raise CommandError(one_line(error)) from error


def _environment_threads() -> int | None:
    """What the environment says of threads, which torch follows by itself, and ONNX Runtime does not."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else None


def _load_torch(model: str, device: str, threads: int | None, dtype: str, options: dict[str, Any]) -> OscarCodec:
    import torch

    with lean.imports(compiles=bool(options.get("compile"))):
        from oscar.inference.load import load

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(
            f"--device {device} is not available here; allowed: cpu, or cuda, mps, ... where torch finds one"
        ) from error
    return load(model, device, "auto" if dtype == "auto" else getattr(torch, dtype), **options)
