"""`oscar export`: a model for coding without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from oscar.cli.jobs import Overwrite
from oscar.cli.messages import CommandError

FORMATS, DTYPES = ("onnx",), ("float32", "float16")


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Trained model: name, folder or hub id.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder.")],
    file_format: Annotated[str, typer.Option("--format", help=f"Of the networks: {', '.join(FORMATS)}.")] = FORMATS[0],
    dtype: Annotated[
        str, typer.Option(help=f"Of weights that MODEL's own files do not hold: {', '.join(DTYPES)}.")
    ] = DTYPES[0],
    overwrite: Overwrite = False,
) -> None:
    """Write a copy of a model that codes without torch too: its networks as graphs for ONNX Runtime beside the weights.

    Checked on five images before it is there: the same symbols as with torch, pixels within one level."""
    for name, value, allowed in (("format", file_format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise CommandError(f"--{name} {value!r} does not exist; allowed: {', '.join(allowed)}")
    if os.path.lexists(target) and not overwrite:
        raise CommandError(f"{target}: exists already; allow it with --overwrite")
    import torch

    from oscar.convert.graphs import export as write

    files, checks = write(model, target, getattr(torch, dtype))
    typer.echo(f"{target}: {len(files)} files beside the model's, {sum(files.values()) / 1e6:.1f} MB")
    typer.echo("checked against torch:  size  point  bytes  symbols that differ  levels that pixels differ by")
    for row in checks:
        size = f"{row.width}x{row.height}"
        typer.echo(f"{size:>28}  {row.point:.4f}  {row.bytes:5}  {row.symbols:19}  {row.levels:28}")
