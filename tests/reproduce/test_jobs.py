"""Jobs: what is done is kept, a failure costs its row, processes share, another job in a folder is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from oscar.config import ConfigError
from oscar.reproduce.actions import leave_launcher
from oscar.reproduce.jobs import Job, check_records, lock, run_jobs

JOBS = [
    Job("a", "train", ("seed=0",)),
    Job("b", "train", ("seed=1",)),
    Job("c", "evaluate", ("model=a",), ("a",)),
    Job("d", "evaluate", ("model=b",), ("b",)),
]


class Perform:
    """Writes down which jobs it does, and fails at some."""

    def __init__(self, fails: tuple[str, ...] = (), error: type[BaseException] = ValueError):
        self.fails, self.error, self.done = fails, error, []

    def __call__(self, job: Job, folder: Path) -> None:
        if job.name in self.fails:
            raise self.error(f"{job.name} cannot be\nsecond line")
        self.done.append(job.name)
        folder.mkdir(parents=True)


def test_jobs_are_done_once(tmp_path: Path, capsys) -> None:
    perform = Perform()
    assert run_jobs(JOBS, tmp_path, perform) == {} and perform.done == ["a", "b", "c", "d"]
    assert f"job 3/4: python scripts/evaluate.py model=a output={tmp_path}/runs/c" in capsys.readouterr().out
    assert run_jobs(JOBS, tmp_path, perform) == {} and perform.done == ["a", "b", "c", "d"]
    record = json.loads((tmp_path / "jobs/a.json").read_text())
    assert record["state"] == "done" and record["arguments"] == ["seed=0"] and "commit" in record["environment"]


def test_a_failed_job_costs_its_row_and_is_tried_again(tmp_path: Path, capsys) -> None:
    perform = Perform(("a",))
    failed = run_jobs(JOBS, tmp_path, perform)
    assert failed == {"a": "a cannot be", "c": "a failed"} and perform.done == ["b", "d"]
    assert capsys.readouterr().err.splitlines() == ["failed: a: a cannot be", "not run: c: a failed"]
    again = Perform()
    assert run_jobs(JOBS, tmp_path, again) == {} and again.done == ["a", "c"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, AssertionError])
def test_what_is_no_failure_of_the_job_ends_the_study(tmp_path: Path, error) -> None:
    with pytest.raises(error):
        run_jobs(JOBS, tmp_path, Perform(("b",), error))
    again = Perform()
    assert run_jobs(JOBS, tmp_path, again) == {} and again.done == ["b", "c", "d"]


def test_another_job_of_the_name_is_refused(tmp_path: Path) -> None:
    run_jobs(JOBS, tmp_path, Perform())
    check_records([*JOBS, Job("e", "train", ())], tmp_path)  # more jobs are none
    with pytest.raises(ConfigError, match=r"another job a \(seed=0, seed=7\); allowed: the same, or another output"):
        check_records([Job("a", "train", ("seed=7",))], tmp_path)
    with pytest.raises(ConfigError, match="in another order"):
        run_jobs([Job("f", "train", ("x", "y"))], tmp_path, Perform())
        check_records([Job("f", "train", ("y", "x"))], tmp_path)


def test_a_job_that_has_read_another_checkpoint_is_refused(tmp_path: Path, make_codec) -> None:
    model, job = tmp_path / "model", Job("a", "train", (), (), (str(tmp_path / "model"),))
    make_codec(rates=[7]).save_pretrained(model)
    run_jobs([job], tmp_path, Perform())
    check_records([job], tmp_path)
    make_codec(seed=1, rates=[7]).save_pretrained(model)
    with pytest.raises(ConfigError, match=f"job a has read another {model}"):
        check_records([job], tmp_path)


def _share(output: Path, start) -> None:
    def perform(job: Job, folder: Path) -> None:
        folder.mkdir(parents=True)  # an error if two do it
        time.sleep(0.05)
        (folder / "process").write_text(str(os.getpid()))

    start.wait()
    run_jobs([Job(f"{n}", "train", (), (f"{n - 1}",) if n % 3 else ()) for n in range(9)], output, perform, poll=0.01)


def test_processes_share_jobs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    workers = [context.Process(target=_share, args=(tmp_path, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    done = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/process")}
    assert len(done) == 9 and len(set(done.values())) == 2


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    with lock(tmp_path / "it") as is_held:
        assert is_held
        with lock(tmp_path / "it") as is_held_too:
            assert not is_held_too
    with lock(tmp_path / "it") as is_held:
        assert is_held


def test_processes_of_a_launcher_become_workers_of_their_own() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "here", "HOME": "/"}
    leave_launcher(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "3", "HOME": "/"}
    environment = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}
    leave_launcher(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "6"}
    environment = {"CUDA_VISIBLE_DEVICES": "4,6"}
    leave_launcher(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "4,6"}


def test_commands_are_those_of_the_repository(tmp_path: Path) -> None:
    texts = [Job("x", command, ("it's",)).text(Path("out")) for command in ("train", "compare_codings", "add-rates")]
    assert texts == [
        """python scripts/train.py 'it'"'"'s' output=out/runs/x""",
        """python scripts/compare_codings.py 'it'"'"'s' --out out/runs/x""",
        """oscar add-rates 'it'"'"'s' --out out/runs/x""",
    ]
