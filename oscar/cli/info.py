"""`oscar info`: what a file holds, or how a model was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oscar.cli.jobs import list_oscar
from oscar.cli.messages import WRONG_INPUT, CommandError, one_line, print_error, print_note
from oscar.utils.files import STDIO, Listing, check_stdin, read_source
from oscar.utils.former import explain_former_model
from oscar.utils.strict_json import dumps

if TYPE_CHECKING:
    from oscar.bitstream import Container


def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help=".oscar file, folder of them, - for stdin, or model folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON; a list for a folder of files.")] = False,
) -> None:
    """Show what an .oscar file holds: size, rate, model tag, bits per pixel, bytes by part; or of a model folder (or
    the name of a model in the package) what it is and how it was trained."""
    from oscar.bitstream import Container
    from oscar.utils.provenance import as_text, read_model

    if not file.exists() and (explained := explain_former_model(str(file))) is not None:
        raise CommandError(f"{file} is not there; {explained}")
    model = None if file == STDIO else read_model(file)
    if model is not None:
        typer.echo(dumps(model, indent=2) if as_json else as_text(model))
        return
    check_stdin(file)
    is_folder = file != STDIO and file.is_dir()
    listing = list_oscar(file) if is_folder else Listing([file])
    if not listing.files:
        print_note(f"{file}: no .oscar files in this folder")
    facts, failed = [], bool(listing.errors)
    for error in listing.errors:
        print_error(one_line(error))
    for path in listing.files:
        try:
            facts.append(_facts(path, Container.unpack(read_source(path))))
        except (ValueError, OSError) as error:
            failed = True
            print_error(one_line(error, path))
    if as_json and (facts or is_folder):
        typer.echo(dumps(facts if is_folder else facts[0], indent=2))
    elif facts:
        typer.echo("\n\n".join(_describe(entry) for entry in facts))
    if failed:
        raise typer.Exit(WRONG_INPUT)


def _facts(path: Path, container: Container) -> dict[str, Any]:
    pixels = container.width * container.height
    parts = {name: len(part) for name, part in container.parts().items()}
    size = sum(parts.values())
    return {
        "file": str(path),
        "format_version": container.version,
        "width": container.width,
        "height": container.height,
        **container.point_facts(),
        "model_tag": f"{container.model_tag:04x}",
        "coding": container.coding.name.lower(),
        "actual_bpp": 8 * size / pixels,
        "bytes": size,
        "parts": parts,
    }


def _describe(facts: dict[str, Any]) -> str:
    if "quality" in facts:
        point = ("quality", f"{facts['quality']:.4f}")
    elif "rate" in facts:
        point = ("rate", f"{facts['rate']:.4f} (id {facts['rate_id']})")
    else:
        point = ("operating point", f"{facts['point_code']} (of a bottleneck of the model's own)")
    lines = [
        ("image", f"{facts['width']} x {facts['height']} pixels"),
        point,
        ("model tag", facts["model_tag"]),
        ("coding", facts["coding"]),
        ("actual bpp", f"{facts['actual_bpp']:.4f} (the whole file)"),
        *(
            [("nominal bpp", f"{facts['nominal_bpp']:.4f} (indices at fixed length, no header)")]
            if "nominal_bpp" in facts
            else []
        ),
        ("bytes", f"{facts['bytes']}"),
        *((f"  {name}", f"{size}") for name, size in facts["parts"].items()),
    ]
    return "\n".join([facts["file"], *(f"  {name:<16} {value}" for name, value in lines)])
