"""Files and folders through a command, with progress; one that fails costs a line, and the rest is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from oscar.cli.messages import INTERRUPTED, WRONG_INPUT, error_line, one_line, print_error, print_note
from oscar.utils.errors import is_out_of_memory
from oscar.utils.files import STDIO, Job, Listing, Plan, atomic_write, drop_existing, list_folder

OSCAR_SUFFIX = ".oscar"
BatchSize = Annotated[int, typer.Option(min=1, help="Of a folder, files that go through the networks together.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave out what is done already (resume).")]
_Convert = Callable[[list[Job]], list[tuple[bytes, str]]]  # files to write, each with a remark on it


def run(
    plan: Plan,
    convert: _Convert,
    verb: str,
    overwrite: bool,
    skip: bool,
    batch_size: int,
    close: Callable[[], None] = lambda: None,
) -> None:
    """Do the jobs, then `close`; in a folder, a file that fails costs one line and the rest is done."""
    todo = drop_existing(plan, overwrite, skip)
    if not plan.is_folder:
        for job in todo:
            remark = _do([job], convert)[0]
            if job.target == STDIO:
                print_note(f"standard output: {remark}")
            else:
                typer.echo(f"{job.target}: {remark}")
        close()
        return
    for note in plan.notes:
        print_note(note)
    for error in plan.errors:
        print_error(one_line(error))
    failed = _run_folder(todo, convert, verb, batch_size)
    close()
    total = len(plan.jobs)
    typer.echo(
        f"{verb}ed {len(todo) - failed} of {total} files"
        + (f", {total - len(todo)} existed" if len(todo) < total else "")
        + (f", {failed} failed" if failed else "")
    )
    if failed or plan.errors:
        raise typer.Exit(WRONG_INPUT)


def _run_folder(jobs: list[Job], convert: _Convert, verb: str, batch_size: int) -> int:
    """Do the jobs under a progress bar (on a terminal only); returns how many failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = failed = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=len(jobs))
        waiting = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        while waiting:
            batch = waiting.pop(0)
            try:
                for job in batch:
                    job.target.parent.mkdir(parents=True, exist_ok=True)
                _do(batch, convert)
            except KeyboardInterrupt:
                progress.stop()
                print_error(f"interrupted after {done} of {len(jobs)} files; go on with --skip-existing")
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                if not isinstance(error, (ValueError, OSError)) and not is_out_of_memory(error):
                    raise
                if len(batch) > 1:  # one by one, only what fails is lost
                    waiting[:0] = [[job] for job in batch]
                    continue
                failed += 1
                console.print(error_line(one_line(error, batch[0].source)), markup=False, highlight=False)
            done += len(batch)
            progress.advance(task, len(batch))
    return failed


def _do(batch: list[Job], convert: _Convert) -> list[str]:
    """Read, convert and write files; returns a remark on each result."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # which is for results
            results = convert(batch)
    except (ValueError, OSError) as error:
        raise ValueError(one_line(error, batch[0].source)) from error
    for job, (data, _) in zip(batch, results, strict=True):
        _write(job.target, data)
    return [remark for _, remark in results]


def _write(path: Path, data: bytes) -> None:
    if path == STDIO:
        rest = memoryview(data)
        while rest:  # with PYTHONUNBUFFERED a call may write a part
            rest = rest[sys.stdout.buffer.write(rest) :]
        sys.stdout.buffer.flush()
    else:
        atomic_write(path, data)


def list_oscar(folder: Path) -> Listing:
    return list_folder(folder, frozenset({OSCAR_SUFFIX}))
