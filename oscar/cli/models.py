"""`oscar convert`, `merge` and `add-rates`: checkpoints from elsewhere, and rates that were trained apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oscar.cli.jobs import Overwrite
from oscar.cli.loading import DTYPES
from oscar.cli.messages import CommandError

if TYPE_CHECKING:
    from oscar.codec import OscarCodec


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="IN...", help="A published .pkl, or stage 1's, one per rate; with --back a model."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder; with --back a .pkl file.")],
    backbone: Annotated[
        str | None, typer.Option(help="Diffusers folder or hub id of the backbone that IN was trained on.")
    ] = None,
    bundle: Annotated[bool, typer.Option("--bundle", help="Store the backbone in OUT too.")] = False,
    dtype: Annotated[str, typer.Option(help=f"Of OUT's files: {', '.join(DTYPES)}.")] = DTYPES[0],
    timesteps: Annotated[
        str, typer.Option(help="Mapping of rates to pseudo-timesteps: table (the paper's), log, linear.")
    ] = "table",
    back: Annotated[bool, typer.Option("--back", help="Write a model of ours in the published layout.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of the published implementation (oscar.pkl) to a model folder, or with --back one of ours to
    a .pkl."""
    if os.path.lexists(target) and not overwrite:
        raise CommandError(f"{target}: exists already; allow it with --overwrite")
    if back:
        if len(sources) > 1 or backbone is not None or bundle:
            raise CommandError("--back takes one model, and neither --backbone nor --bundle")
        if not target.parent.is_dir():
            raise CommandError(f"{target}: folder {target.parent} does not exist")
        _export(sources[0], target)
        return
    if backbone is None:
        raise CommandError("--backbone is missing; allowed: a diffusers folder or hub id")
    if dtype not in DTYPES:
        raise CommandError(f"--dtype {dtype!r} does not exist; allowed: {', '.join(DTYPES)}")
    for source in sources:
        if not Path(source).is_file():
            raise CommandError(f"{source}: no such file")
    _import(sources, target, backbone, timesteps, bundle, dtype)


def merge(
    sources: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders or hub ids.")],
    target: Annotated[Path, typer.Option("--out", metavar="OUT", help="Model folder.")],
    overwrite: Overwrite = False,
) -> None:
    """Put rates that were trained apart, on one backbone, into one model folder."""
    if os.path.lexists(target) and not overwrite:
        raise CommandError(f"{target}: exists already; allow it with --overwrite")
    from oscar.convert.merge import merge_rates

    codec = merge_rates(sources, target)
    typer.echo(f"{target}: rates {_rate_list(codec)}")


def add_rates(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Trained model: name, folder or hub id.")],
    rates: Annotated[str, typer.Argument(metavar="RATES", help="Checkpoint of stage 1 with rates that MODEL lacks.")],
    target: Annotated[Path, typer.Option("--out", metavar="OUT", help="Model folder.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="calibration.json of RATES, for the timesteps; without it they lie between MODEL's own."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Add rates that the denoiser never saw to a trained model."""
    if os.path.lexists(target) and not overwrite:
        raise CommandError(f"{target}: exists already; allow it with --overwrite")
    from oscar.convert.merge import add_rates as join

    codec = join(model, rates, target, calibration)
    typer.echo(f"{target}: rates {_rate_list(codec)}")


def _import(sources: list[str], target: Path, backbone: str, timesteps: str, bundle: bool, dtype: str) -> None:
    """Convert published files, and say what became of their tensors."""
    import torch

    from oscar.convert import published

    mapping = {"kind": timesteps}
    result = published.convert(sources, target, backbone, mapping, bundle, getattr(torch, dtype))
    lines = [f"{target}: rates {_rate_list(result.codec)}", f"{result.used:>6} tensors taken over"]
    lines += [f"{count:>6} not needed: {reason}" for reason, count in result.unused.items()]
    typer.echo("\n".join(lines))


def _export(source: str, target: Path) -> None:
    from oscar.convert.published import export

    codec = export(source, target)
    typer.echo(f"{target}: rates {_rate_list(codec)}; frequency tables and context models have no place in it")


def _rate_list(codec: OscarCodec) -> str:
    return ", ".join(map(codec.bottleneck.label, codec.bottleneck.points))
