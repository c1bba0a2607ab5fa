"""Which file becomes which: planning runs over files and folders, and writing results whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class JobError(ValueError):
    """Inputs and outputs of a run that do not go together; nothing has been read or written yet."""


@dataclass(frozen=True)
class Job:
    """One file to read and the one to write from it."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Direction:
    """How a run finds and names its files.

    Attributes:
        list_sources: the files of a folder that a run takes.
        what: these files in words, for messages.
        suffix: of the files that a folder run writes.
        allowed: suffixes that the user may choose for a single file.
    """

    list_sources: Callable[[Path], list[Path]]
    what: str
    suffix: str
    allowed: frozenset[str]


def plan_jobs(source: Path, target: Path, direction: Direction) -> list[Job]:
    """The jobs of a run: one for a file; for a folder one per file below it, at the same place below `target`.

    A single file may also go into an existing folder, under its own name with the direction's suffix.

    Raises:
        JobError: if there is nothing to do, a name is not allowed, or two files would become the same.
    """
    if source.is_dir():
        return _plan_folder(source, target, direction)
    if not source.is_file():
        raise JobError(f"{source}: no such file or folder")
    if target.is_dir():
        target = target / source.with_suffix(direction.suffix).name
    if target.suffix.lower() not in direction.allowed:
        raise JobError(f"{target}: suffix {target.suffix or '(none)'} is not allowed; "
                       f"allowed: {', '.join(sorted(direction.allowed))}")  # fmt: skip
    if not target.parent.is_dir():
        raise JobError(f"{target}: folder {target.parent} does not exist")
    return [Job(source, target)]


def _plan_folder(source: Path, target: Path, direction: Direction) -> list[Job]:
    if target.exists() and not target.is_dir():
        raise JobError(f"{target}: is a file; allowed: a folder, since {source} is one")
    planned: dict[Path, Path] = {}
    for path in direction.list_sources(source):
        result = target / path.relative_to(source).with_suffix(direction.suffix)
        if result in planned:
            raise JobError(f"{planned[result]} and {path} would both become {result}; rename one of them")
        planned[result] = path
    if not planned:
        raise JobError(f"{source}: no {direction.what} in this folder")
    return [Job(path, result) for result, path in planned.items()]


def drop_existing(jobs: list[Job], overwrite: bool, skip_existing: bool) -> list[Job]:
    """The jobs that are to run, given those outputs that exist.

    Raises:
        JobError: if outputs exist and neither flag says what to do with them, or both do.
    """
    if overwrite and skip_existing:
        raise JobError("--overwrite and --skip-existing exclude each other")
    existing = [job for job in jobs if os.path.lexists(job.target)]
    folder = next((job.target for job in existing if job.target.is_dir()), None)
    if folder is not None:
        raise JobError(f"{folder}: is a folder; allowed: a name for a file")
    if skip_existing:
        return [job for job in jobs if job not in existing]
    if existing and not overwrite:
        others = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise JobError(f"{existing[0].target}: exists already{others}; allow it with --overwrite or --skip-existing")
    return jobs


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that at no time a part of it stands under its name: beside it first, then renamed.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    beside = path.parent / f".oscar-{uuid.uuid4().hex[:12]}.tmp"
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
