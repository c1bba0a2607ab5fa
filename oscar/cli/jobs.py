"""Files and folders through a command, with progress; one that fails costs a line, and the rest is done."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from oscar.cli import manifest
from oscar.cli.messages import (
    INTERRUPTED,
    WRONG_INPUT,
    CommandError,
    error_line,
    one_line,
    print_error,
    print_note,
)
from oscar.cli.processes import Group, group
from oscar.utils.errors import is_out_of_memory
from oscar.utils.files import STDIO, Job, Listing, Plan, atomic_write, drop_existing, list_folder

OSCAR_SUFFIX = ".oscar"
BatchSize = Annotated[int, typer.Option(min=1, help="Of a folder, files that go through the networks together.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave out what is done already (resume).")]
_WATCH = 0.5  # seconds between looks at what other processes have done
_Input = tuple[Job, Any]  # and what its file holds


@dataclass(frozen=True)
class Work:
    """What a command does to its files.

    Attributes:
        verb: its name.
        read: what a file holds.
        convert: files to write, each with a remark on it, from jobs and what their files hold.
        prepare: what is done once before, unless there is nothing to do.
        close: what is done at the end.
    """

    verb: str
    read: Callable[[Job], Any]
    convert: Callable[[list[Job], list[Any]], list[tuple[bytes, str]]]
    prepare: Callable[[], object] = lambda: None
    close: Callable[[], None] = lambda: None


@dataclass
class _Done:
    """What became of this process's jobs: how many were done, failed among them; seconds of the others by target."""

    count: int = 0
    failed: int = 0
    seconds: dict[Path, float] = field(default_factory=dict)
    interrupted: bool = False


def run(
    plan: Plan,
    work: Work,
    overwrite: bool,
    skip: bool,
    batch_size: int = 1,
    workers: int = 0,
    table: tuple[Path, Path] | None = None,
) -> None:
    """Do the jobs; in a folder, a file that fails costs one line and the rest is done.

    Args:
        plan: the jobs. Those of a folder are shared among the processes of the run.
        work: what is done to each.
        overwrite, skip: as `drop_existing` has them.
        batch_size: of a folder, files that are converted together.
        workers: threads that read files ahead.
        table: a manifest to write, and the folder that its files are named from.
    """
    seconds = manifest.read_seconds(table[0], overwrite, skip) if table else {}
    todo = drop_existing(plan, overwrite, skip)
    processes = group()
    if not plan.is_folder:
        if processes.count > 1:
            raise CommandError(f"{processes.count} processes cannot share one file; allowed: a folder, or one process")
        done = _run_file(todo, work)
    else:
        for note in plan.notes:
            print_note(note)
        for error in plan.errors:
            print_error(one_line(error))
        processes.gather(None)  # before the first output is there, which another would take for done
        done = _run_folder(todo, work, batch_size, workers, processes)
    work.close()
    named = {target.relative_to(table[1]).as_posix(): f"{s:.3f}" for target, s in done.seconds.items()} if table else {}
    if done.interrupted:
        results = [(done.failed, named)]  # the others may be gone
    else:
        results = processes.gather((done.failed, named))
    if table and processes.rank == 0:
        for _, part in results:
            seconds.update(part)
        manifest.write(table[0], plan, table[1], seconds)
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    if plan.is_folder:
        failed, total = sum(failed for failed, _ in results), len(plan.jobs)
        if processes.rank == 0:
            typer.echo(
                f"{work.verb}ed {len(todo) - failed} of {total} files"
                + (f", {total - len(todo)} existed" if len(todo) < total else "")
                + (f", {failed} failed" if failed else "")
            )
        if failed or plan.errors:
            raise typer.Exit(WRONG_INPUT)


def _run_file(todo: list[Job], work: Work) -> _Done:
    done = _Done()
    for job in todo:
        with contextlib.redirect_stdout(sys.stderr), _about(job):  # standard output is for results
            inputs = [work.read(job)]
            work.prepare()
            begin = time.perf_counter()
            ((data, remark),) = work.convert([job], inputs)
        _write(job.target, data)
        if job.target == STDIO:
            print_note(f"standard output: {remark}")
        else:
            done.seconds[job.target] = time.perf_counter() - begin
            typer.echo(f"{job.target}: {remark}")
    return done


def _run_folder(todo: list[Job], work: Work, batch_size: int, workers: int, processes: Group) -> _Done:
    """Do this process's share of the jobs; the first process shows on a terminal how far all are."""
    from tqdm import tqdm

    done, share = _Done(), todo[processes.rank :: processes.count]
    visible = processes.rank == 0 and sys.stderr.isatty()
    with (
        tqdm(total=len(todo), desc=work.verb, unit="file", disable=not visible, dynamic_ncols=True) as bar,
        contextlib.redirect_stdout(sys.stderr),
        contextlib.closing(_read(share, work.read, workers, batch_size)) as files,
    ):

        def advance(number: int) -> int:
            done.count += number
            total = processes.add(number) if processes.count > 1 else done.count
            bar.update(total - bar.n)
            return total

        def fail(job: Job, error: Exception) -> None:
            if not _costs_a_line(error):
                raise error
            done.failed += 1
            bar.write(error_line(one_line(error, job.source)), file=sys.stderr)
            advance(1)

        prepare = functools.cache(work.prepare)
        try:
            while batch := list(islice(files, batch_size)):
                inputs = []
                for job, read in batch:
                    try:
                        job.target.parent.mkdir(parents=True, exist_ok=True)
                        inputs.append((job, read()))
                    except Exception as error:
                        fail(job, error)
                if inputs:
                    prepare()
                    for seconds in _convert(inputs, work, fail):
                        done.seconds.update(seconds)
                        advance(len(seconds))
            while visible and advance(0) < len(todo):  # by other processes
                time.sleep(_WATCH)
        except KeyboardInterrupt:
            bar.close()
            done.interrupted = True
            if processes.rank == 0:
                print_error(f"interrupted after {advance(0)} of {len(todo)} files; go on with --skip-existing")
    return done


def _convert(inputs: list[_Input], work: Work, fail: Callable[[Job, Exception], None]) -> Iterator[dict[Path, float]]:
    """Convert and write files that were read; gives the seconds of each that has been written."""
    jobs = [job for job, _ in inputs]
    begin = time.perf_counter()
    try:
        results = work.convert(jobs, [content for _, content in inputs])
        for job, (data, _) in zip(jobs, results, strict=True):
            _write(job.target, data)
    except Exception as error:
        if len(inputs) == 1 or not _costs_a_line(error):
            fail(jobs[0], error)
            return
        for one in inputs:  # only what fails is lost
            yield from _convert([one], work, fail)
        return
    yield dict.fromkeys((job.target for job in jobs), (time.perf_counter() - begin) / len(jobs))


def _read(
    jobs: list[Job], read: Callable[[Job], Any], workers: int, ahead: int
) -> Iterator[tuple[Job, Callable[[], Any]]]:
    """Jobs in their order, each with what gives or raises what reading its file has; workers read some ahead."""
    if workers == 0:
        yield from ((job, functools.partial(read, job)) for job in jobs)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Job, Callable[[], Any]]] = deque()
        for job in jobs:
            waiting.append((job, pool.submit(read, job).result))
            if len(waiting) > workers + ahead:
                yield waiting.popleft()
        yield from waiting


def _costs_a_line(error: Exception) -> bool:
    """Whether an error is one of a file, and not of the program."""
    return isinstance(error, (ValueError, OSError)) or is_out_of_memory(error)


@contextlib.contextmanager
def _about(job: Job) -> Iterator[None]:
    """Have errors name the file that they are about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(one_line(error, job.source)) from error


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
