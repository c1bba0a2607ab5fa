"""The table of a run's files: a line for each with its bytes, bits per pixel and seconds."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from oscar.cli.messages import CommandError
from oscar.utils.files import STDIO, Plan, atomic_write

COLUMNS = ("file", "bytes", "bpp", "seconds")


def read_seconds(path: Path, overwrite: bool, skip: bool) -> dict[str, str]:
    """Seconds by file of the manifest that a run goes on with, if there is one.

    Raises:
        CommandError: if no manifest can be written to `path`, or something else is there.
    """
    if path.suffix.lower() != ".csv":
        raise CommandError(f"--manifest is {path}; allowed: a name that ends in .csv")
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"folder {path.parent} does not exist"
        raise CommandError(f"--manifest {path}: {reason}; allowed: a file in a folder that exists")
    if overwrite or not path.exists():
        return {}
    if not skip:
        raise CommandError(f"--manifest {path}: exists already; allow it with --overwrite or --skip-existing")
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            rows = csv.DictReader(file, strict=True)
            if tuple(rows.fieldnames or ()) == COLUMNS:
                return {row["file"]: row["seconds"] or "" for row in rows}
        except csv.Error:
            pass
    raise CommandError(f"--manifest {path}: is none of ours; allowed: one with {','.join(COLUMNS)}, or a new name")


def write(path: Path, plan: Plan, root: Path, seconds: dict[str, str]) -> None:
    """Write the manifest of all files of a plan that are there, in its order.

    Args:
        path: of the manifest.
        plan: whose targets are .oscar files.
        root: folder that the files are named from.
        seconds: by file; nothing for those that another run has made.
    """
    from oscar.bitstream import BitstreamError, Container

    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for target in (job.target for job in plan.jobs if job.target != STDIO):
        try:
            data = target.read_bytes()
            container = Container.unpack(data)
        except (OSError, BitstreamError):  # not written, or what was left as it is
            continue
        file = target.relative_to(root).as_posix()
        bpp = 8 * len(data) / (container.width * container.height)
        table.writerow((file, len(data), f"{bpp:.6f}", seconds.get(file, "")))
    atomic_write(path, text.getvalue().encode(errors="surrogateescape"))
