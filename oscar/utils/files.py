"""Which file becomes which: planning runs over files and folders, and writing results whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

STDIO = Path("-")  # standard input as a source, standard output as a target
_KINDS_SHOWN = 8  # of files that are left out


class JobError(ValueError):
    """Inputs and outputs of a run that do not go together; nothing has been read or written yet."""


@dataclass(frozen=True)
class Job:
    """One file to read and the one to write from it."""

    source: Path
    target: Path


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        files: those that were looked for, sorted by path.
        left_out: how many others there are, by suffix in lower case.
        errors: of folders that cannot be read.
    """

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    errors: list[OSError] = field(default_factory=list)


@dataclass(frozen=True)
class Direction:
    """How a run finds and names its files.

    Attributes:
        list_sources: what of a folder a run takes.
        what: these files in words, for messages.
        suffix: of the files that a folder run writes.
        allowed: suffixes that the user may choose for a single file.
    """

    list_sources: Callable[[Path], Listing]
    what: str
    suffix: str
    allowed: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """The jobs of a run.

    Attributes:
        jobs: in the order of their sources.
        notes: lines that say what of a folder is left out, and which results have longer names.
        errors: of folders that cannot be read.
        is_folder: whether the run is over a folder.
    """

    jobs: list[Job]
    notes: list[str] = field(default_factory=list)
    errors: list[OSError] = field(default_factory=list)
    is_folder: bool = False


def list_folder(folder: Path, suffixes: frozenset[str], recursive: bool = True) -> Listing:
    """The files of a folder that have one of the suffixes, in any case.

    Files and folders whose names begin with a dot are passed over, as are the sidecars (`._photo.jpg`) that some
    systems write. Links are followed, but not to a folder around them. A link that leads nowhere is listed, so that
    reading it fails; what is neither file nor folder is left out.
    """
    listing = Listing()
    for entry in _walk(folder, recursive, frozenset(), listing.errors):
        path = Path(entry.path)
        suffix = path.suffix.lower()
        if suffix in suffixes and (_is(entry.is_file) or (entry.is_symlink() and not path.exists())):
            listing.files.append(path)
        else:
            listing.left_out[suffix or "no suffix"] += 1
    listing.files.sort()
    return listing


def _walk(
    folder: Path, recursive: bool, around: frozenset[tuple[int, int]], errors: list[OSError]
) -> Iterator[os.DirEntry[str]]:
    """All below a folder but its folders; `around` identifies the folders that it is in."""
    try:
        status = os.stat(folder)
        entries = [] if (status.st_dev, status.st_ino) in around else list(os.scandir(folder))
    except OSError as error:
        errors.append(error)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not _is(entry.is_dir):
            yield entry
        elif recursive:
            yield from _walk(Path(entry.path), recursive, around | {(status.st_dev, status.st_ino)}, errors)


def _is(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself
        return False


def plan_jobs(source: Path, target: Path, direction: Direction) -> Plan:
    """The jobs of a run: one for a file; for a folder one per file below it, at the same place below `target`.

    A single file may also come from standard input and go to standard output, or into an existing folder, under its
    own name with the direction's suffix.

    Raises:
        JobError: if the source does not exist, or a name is not allowed.
    """
    if source != STDIO and source.is_dir():
        return _plan_folder(source, target, direction)
    check_stdin(source)
    if source != STDIO and not source.exists():
        raise JobError(f"{source}: no such file or folder")
    if target == STDIO:
        if sys.stdout is None or sys.stdout.isatty():
            raise JobError("standard output is a terminal; allowed: a file or a pipe")
        return Plan([Job(source, target)])
    if target.is_dir():
        if source == STDIO:
            raise JobError(f"{target}: is a folder; allowed: a name for the result of standard input")
        target = target / source.with_suffix(direction.suffix).name
    if target.suffix.lower() not in direction.allowed:
        raise JobError(
            f"{target}: suffix {target.suffix or '(none)'} is not allowed; "
            f"allowed: {', '.join(sorted(direction.allowed))}, or - for standard output"
        )
    if not target.parent.is_dir():
        raise JobError(f"{target}: folder {target.parent} does not exist")
    return Plan([Job(source, target)])


def check_stdin(source: Path) -> None:
    """Refuse a terminal in the place of a file.

    Raises:
        JobError: if standard input is one, and is the source.
    """
    if source == STDIO and (sys.stdin is None or sys.stdin.isatty()):
        raise JobError("standard input is a terminal; allowed: a file or a pipe")


def _plan_folder(source: Path, target: Path, direction: Direction) -> Plan:
    if target == STDIO:
        raise JobError(f"{source}: is a folder, which cannot go to standard output; allowed: a folder")
    if target.exists() and not target.is_dir():
        raise JobError(f"{target}: is a file; allowed: a folder, since {source} is one")
    listing = direction.list_sources(source)
    names = [path.relative_to(source) for path in listing.files]
    results = name_results(names, direction.suffix)
    notes = []
    if not names:
        notes.append(f"{source}: no {direction.what} in this folder")
    if listing.left_out:
        notes.append(f"left out {_count(listing.left_out, direction.what)}")
    longer = [(name, result) for name, result in results.items() if result != name.with_suffix(direction.suffix)]
    if longer:
        name, result = longer[0]
        notes.append(f"kept apart by longer names: {len(longer)} files, such as {target / result} of {source / name}")
    jobs = [Job(source / name, target / result) for name, result in results.items()]
    return Plan(jobs, notes, listing.errors, is_folder=True)


def _count(left_out: Counter[str], what: str) -> str:
    total = left_out.total()
    kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = [f"{suffix} {count}" for suffix, count in kinds[:_KINDS_SHOWN]]
    if len(kinds) > _KINDS_SHOWN:
        shown.append(f"others {sum(count for _, count in kinds[_KINDS_SHOWN:])}")
    return f"{total} file{'s' * (total != 1)} other than {what} ({', '.join(shown)})"


def name_results(names: list[Path], suffix: str) -> dict[Path, Path]:
    """The result's path for each source's, both relative to the folder of a run.

    A result has the source's name with `suffix` in place of its own: `a.jpg` becomes `a.oscar`. Sources that would
    become the same keep their whole names: `a.jpg.oscar` beside `a.png.oscar`. The same is what some file systems take
    for it: names that differ by case or Unicode normalisation. Where these are all the difference between whole names,
    a hash of the path is added.
    """
    whole: set[Path] = set()
    while True:
        results = {
            name: name.with_name(name.name + suffix) if name in whole else name.with_suffix(suffix) for name in names
        }
        times = Counter(map(_folded, results.values()))
        same = {name for name, result in results.items() if times[_folded(result)] > 1}
        if same <= whole:
            break
        whole |= same
    for name in same:
        code = hashlib.sha256(os.fsencode(name.as_posix())).hexdigest()[:8]
        results[name] = name.with_name(f"{name.name}.{code}{suffix}")
    return results


def _folded(path: Path) -> str:
    """Equal for paths that a file system without regard to case or normalisation takes for the same."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path.as_posix()).casefold())


def drop_existing(plan: Plan, overwrite: bool, skip_existing: bool) -> list[Job]:
    """The jobs that are to run, given those outputs that exist. A link that leads nowhere is no output.

    Raises:
        JobError: if outputs exist and neither flag says what to do with them, or both do.
    """
    if overwrite and skip_existing:
        raise JobError("--overwrite and --skip-existing exclude each other")
    for job in () if plan.is_folder else plan.jobs:
        if job.target != STDIO and job.target.is_dir():
            raise JobError(f"{job.target}: is a folder; allowed: a name for a file")
    existing = {job for job in plan.jobs if job.target != STDIO and job.target.exists() and not job.target.is_dir()}
    if skip_existing:
        return [job for job in plan.jobs if job not in existing]
    if existing and not overwrite:
        first = next(job for job in plan.jobs if job in existing)
        others = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise JobError(f"{first.target}: exists already{others}; allow it with --overwrite or --skip-existing")
    return plan.jobs


def read_source(path: Path) -> bytes:
    """The bytes of a source, which may be standard input.

    Raises:
        OSError: if it cannot be read.
    """
    return sys.stdin.buffer.read() if path == STDIO else path.read_bytes()


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that at no time a part of it stands under its name: beside it first, then renamed.

    A symbolic link stays, and the file that it names is written, which need not exist. A file that is replaced hands
    its permissions on and, where the system allows it, its owner; a new one has what the process gives to new files.
    Pipes and devices are written as they are.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    beside = target.parent / f".oscar-{uuid.uuid4().hex[:12]}.tmp"
    try:
        status = _status(target)
        if status is not None and not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            target.write_bytes(data)
            return
        mode = 0o666 if status is None else 0o600  # less what the process takes away from new files
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        if status is not None:
            with contextlib.suppress(OSError, AttributeError):  # file systems without owners; Windows has no chown
                os.chown(beside, status.st_uid, status.st_gid)
            with contextlib.suppress(OSError):
                os.chmod(beside, stat.S_IMODE(status.st_mode))
        os.replace(beside, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
