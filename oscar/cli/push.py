"""`oscar push`: a model to the Hugging Face hub, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the hub; made if it is new.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder of oscar evaluate for the card; may be repeated.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Hub id of the backbone, where the model names a folder.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Its identifier on the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files; send nothing.")] = False,
) -> None:
    """Publish a model: safetensors, JSON and a card of its provenance, with the paths in it, and its evaluation."""
    from oscar.evaluation.publish import prepare, send

    publication = prepare(model, repository, results or (), backbone, licence)
    if dry_run:
        names = sorted([*publication.texts, *publication.files])
        typer.echo(f"{publication.texts['README.md']}\nwould send to {repository}: {', '.join(names)}")
        return
    typer.echo(send(publication, repository, private))
