"""Jobs of a study: what is done is kept, what fails costs its row, and several processes share the rest.

    OUTPUT/jobs/<name>.json     what became of a job: its arguments, digests of what it read, state, seconds, commit
    OUTPUT/jobs/<name>.lock     held by the process that works on it; the system frees it when that process ends
    OUTPUT/runs/<name>/         what the job wrote

A job is a command of this repository. It resumes by itself in its folder, so that one which was interrupted is just run
again. Processes need not know of each other: each takes the next job that nobody holds and whose needs are done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oscar import checkpoint
from oscar.config import ConfigError
from oscar.utils.environment import describe_environment
from oscar.utils.errors import first_line
from oscar.utils.strict_json import as_read, write_json

DONE, FAILED = "done", "failed"
_POLL = 1.0  # seconds between looks at the jobs of other processes


class Interrupted(KeyboardInterrupt):
    """A signal has ended a job early; the same command goes on from there."""


@dataclass(frozen=True)
class Job:
    """A command with a folder of its own.

    Attributes:
        name: of the job, and of its folder.
        command: a script, such as train, or a command of `oscar`, such as add-rates (`oscar.reproduce.actions`).
        arguments: all but the folder.
        needs: names of the jobs whose results it reads.
        reads: checkpoints that its result follows from; those of `needs` included.
        work: what the estimate counts: a stage and optimiser steps, or `evaluate` and images times points.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    work: tuple[str, float] | None = None

    def folder(self, output: Path) -> Path:
        return output / "runs" / self.name

    def text(self, output: Path) -> str:
        """The command line that does the same."""
        folder = str(self.folder(output))
        if self.command == "add-rates":
            return shlex.join(["oscar", self.command, *self.arguments, "--out", folder])
        last = ["--out", folder] if self.command == "compare_codings" else [f"output={folder}"]
        return shlex.join(["python", f"scripts/{self.command}.py", *self.arguments, *last])


def read_record(job: Job, output: Path) -> dict | None:
    """What became of a job; None if nothing has yet."""
    try:
        return json.loads((output / "jobs" / f"{job.name}.json").read_text())
    except (OSError, ValueError):
        return None


def check_records(jobs: Sequence[Job], output: Path) -> None:
    """Refuse a folder whose jobs of these names are others, or have read something else.

    Raises:
        ConfigError: naming the first.
    """
    for job in jobs:
        record = read_record(job, output)
        if record is None or record["state"] != DONE:
            continue
        new = as_read(list(job.arguments))
        if record["arguments"] != new:
            changed = sorted(set(record["arguments"]) ^ set(new)) or ["in another order"]
            what = ", ".join(changed[:4]) + (" and more" if len(changed) > 4 else "")
            raise ConfigError(
                f"output is {output}, which holds another job {job.name} ({what}); allowed: the same, or another output"
            )
        for path, digest in record["inputs"].items():
            if _digest(path) != digest:
                raise ConfigError(
                    f"output is {output}, whose job {job.name} has read another {path}; allowed: the same, or another "
                    "output"
                )


def _digest(path: str) -> str | None:
    try:
        return checkpoint.content_hash(path)
    except checkpoint.CheckpointError:
        return None


def run_jobs(
    jobs: Sequence[Job], output: Path, perform: Callable[[Job, Path], None], poll: float = _POLL
) -> dict[str, str]:
    """Do what is not done, in order, and wait for what other processes do.

    Args:
        jobs: each behind those that it needs.
        output: of the study.
        perform: does a job, given its folder.
        poll: seconds between two looks at the jobs of others.

    Returns:
        By name of the jobs that have failed, or could not be run since another has: why.

    Raises:
        Interrupted: if a signal has ended a job.
    """
    (output / "jobs").mkdir(parents=True, exist_ok=True)
    started, waiting = time.time(), ""
    by_name = {job.name: job for job in jobs}
    open_jobs, failed = dict(by_name), {}
    while open_jobs:
        progressed = False
        for name, job in list(open_jobs.items()):
            broken = next((need for need in job.needs if need in failed), None)
            if broken is not None:
                failed[name] = f"{broken} failed"
                _say(f"not run: {name}: {failed[name]}", error=True)
                del open_jobs[name]
                progressed = True
            elif not any(need in open_jobs for need in job.needs):
                reason = _try(job, output, perform, started, f"{list(by_name).index(name) + 1}/{len(jobs)}")
                if reason is None:
                    continue
                del open_jobs[name]
                progressed = True
                if reason:
                    failed[name] = reason
        if open_jobs and not progressed:
            names = ", ".join(list(open_jobs)[:3])
            if names != waiting:
                waiting = names
                _say(f"waiting for other processes: {names}")
            time.sleep(poll)
    return failed


def _try(job: Job, output: Path, perform: Callable[[Job, Path], None], started: float, number: str) -> str | None:
    """Do a job unless it is done: "", or why it failed; None if another process works on it."""
    with lock(output / "jobs" / f"{job.name}.lock") as is_held:
        if not is_held:
            return None
        record = read_record(job, output)
        if record is not None and record["state"] == DONE:
            return ""
        if record is not None and record["ended"] >= started:  # by another process, in this session
            return record["reason"]
        _say(f"job {number}: {job.text(output)}")
        begun, reason = time.time(), ""
        inputs = {path: _digest(path) for path in job.reads}
        try:
            perform(job, job.folder(output))
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            reason = first_line(error)
            _say(f"failed: {job.name}: {reason}", error=True)
        record = {
            "state": FAILED if reason else DONE,
            "reason": reason,
            "command": job.text(output),
            "arguments": list(job.arguments),
            "inputs": inputs,
            "seconds": round(time.time() - begun, 1),
            "ended": time.time(),
            "environment": describe_environment(),
        }
        write_json(output / "jobs" / f"{job.name}.json", record)
        return reason


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds a file, for the time of the block."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _say(line: str, error: bool = False) -> None:
    print(line, file=sys.stderr if error else sys.stdout, flush=True)
