"""Folders: manifests, reading ahead, progress, and shares of several processes, with nano."""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from oscar.cli import compress as compress_module
from oscar.cli import jobs, processes
from oscar.cli.main import main
from oscar.utils.files import Job

ROOT = Path(__file__).parents[1]
NAMES = [f"{number}.oscar" for number in range(5)]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def alone(monkeypatch) -> None:
    """No launcher's variables, before and after."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    processes.group.cache_clear()
    yield
    processes.group.cache_clear()


def test_a_manifest_names_every_file_also_after_a_resume(photos, tmp_path, alone) -> None:
    out, table = tmp_path / "out", tmp_path / "files.csv"
    assert run("compress", photos, out, "--manifest", table) == 0
    before = rows(table)
    assert [row["file"] for row in before] == NAMES
    for row in before:
        size = (out / row["file"]).stat().st_size
        assert int(row["bytes"]) == size and float(row["seconds"]) > 0
        assert float(row["bpp"]) == pytest.approx(8 * size / (96 * 80), abs=1e-6)
    (out / "3.oscar").unlink()
    assert run("compress", photos, out, "--manifest", table, "--skip-existing", "--quality", "0") == 0
    after = rows(table)
    assert [row["file"] for row in after] == NAMES
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False, True]
    table.unlink()
    assert run("compress", photos, out, "--manifest", table, "--skip-existing") == 0
    assert rows(table) == [{**row, "seconds": ""} for row in after]  # which nobody knows any more


def test_a_manifest_of_one_file(photos, tmp_path, alone) -> None:
    assert run("compress", photos / "0.png", tmp_path / "a.oscar", "--manifest", tmp_path / "a.csv") == 0
    assert run("compress", photos / "1.png", tmp_path, "--manifest", tmp_path / "b.csv") == 0
    assert [rows(tmp_path / name)[0]["file"] for name in ("a.csv", "b.csv")] == ["a.oscar", "1.oscar"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--manifest", "table.txt"], ["--manifest is table.txt", ".csv"]),
        (["--manifest", "none/table.csv"], ["none/table.csv", "folder none does not exist"]),
        (["--manifest", "folder.csv"], ["folder.csv", "is a folder"]),
        (["--manifest", "other.csv"], ["other.csv", "exists already", "--skip-existing"]),
        (["--manifest", "other.csv", "--skip-existing"], ["other.csv", "file,bytes,bpp,seconds"]),
        (["--manifest", "binary.csv", "--skip-existing"], ["binary.csv", "file,bytes,bpp,seconds"]),
        (["--workers", "-1"], ["--workers", "0"]),
        (["--workers", "many"], ["--workers", "'many'"]),
        (["--workers", "65"], ["--workers", "64"]),
    ],
)
def test_bad_options_change_nothing(photos, tmp_path, alone, monkeypatch, capsys, words, parts) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(b'"\xff\x00\n\r\x01')
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    assert run("compress", photos, "out", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("oscar: error: ") and all(part in line for part in parts)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_standard_output_has_no_manifest(photos, alone, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert run("compress", photos / "0.png", "-", "--manifest", "a.csv") == 2
    assert "--manifest and standard output exclude each other" in capsys.readouterr().err


def test_reading_ahead_changes_no_file(photos, tmp_path, alone, capsys) -> None:
    images = tmp_path / "in"
    images.mkdir()
    for path in photos.iterdir():
        (images / path.name).symlink_to(path)
    (images / "2.png").unlink()
    (images / "2.png").write_bytes(b"no image")
    contents = []
    for workers in (0, 3):
        out = tmp_path / f"{workers}"
        assert run("compress", images, out, "--workers", workers, "--batch-size", "2") == 2
        captured = capsys.readouterr()
        assert captured.out == "compressed 4 of 5 files, 1 failed\n"
        assert captured.err.count("\n") == 1 and "2.png" in captured.err
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] and sorted(contents[0]) == ["0.oscar", "1.oscar", "3.oscar", "4.oscar"]


def test_workers_read_ahead_and_not_without_end() -> None:
    todo, read = [Job(Path(f"{number}"), Path("x")) for number in range(20)], []
    files = jobs._read(todo, lambda job: read.append(job) or job, workers=2, ahead=3)
    seen = []
    for job, content in files:
        assert content() is job
        time.sleep(0.01)
        assert len(read) <= len(seen) + 2 + 3 + 1
        seen.append(job)
    assert seen == todo and sorted(read, key=todo.index) == todo


def test_an_interrupted_run_leaves_a_manifest(photos, tmp_path, alone, monkeypatch, capsys) -> None:
    read, calls = compress_module.read_image, []

    def interrupted(path: Path, *options):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(path, *options)

    monkeypatch.setattr(compress_module, "read_image", interrupted)
    words = ("compress", photos, tmp_path / "out", "--manifest", tmp_path / "a.csv")
    assert run(*words, "--workers", "0") == 130
    assert "interrupted after 2 of 5 files; go on with --skip-existing" in capsys.readouterr().err
    assert [row["file"] for row in rows(tmp_path / "a.csv")] == NAMES[:2]
    kept = rows(tmp_path / "a.csv")
    assert run(*words, "--skip-existing") == 0
    assert rows(tmp_path / "a.csv")[:2] == kept and len(rows(tmp_path / "a.csv")) == 5


def test_progress_has_rate_and_rest(photos, tmp_path, alone, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("compress", photos, tmp_path / "out") == 0
    shown = capsys.readouterr().err
    assert re.search(r"compress: 100%\|.*\| 5/5 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(file/s|s/file)\]", shown), shown


# Several processes.


def test_each_process_takes_its_own_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes.own_device("cuda") == "cuda"
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert processes.own_device("cuda") == device
        assert processes.own_device("cpu") == "cpu" and processes.own_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two'", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["MASTER_ADDR", "torchrun"]),
    ],
)
def test_half_a_launcher_is_refused(photos, tmp_path, alone, monkeypatch, capsys, variables, parts) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.group.cache_clear()
    assert run("compress", photos, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("oscar: error: ") and all(part in line for part in parts), line


def torchrun(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "oscar", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_processes_share_a_folder(photos, tmp_path, alone) -> None:
    images = tmp_path / "in"
    images.mkdir()
    for path in photos.iterdir():
        (images / path.name).symlink_to(path)
    (images / "notes.txt").touch()
    done = torchrun("compress", images, "out", "--manifest", "a.csv", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "compressed 5 of 5 files\n"), done.stderr
    assert done.stderr.count("left out 1 file") == 1  # said once
    assert [row["file"] for row in rows(tmp_path / "a.csv")] == NAMES
    assert all(float(row["seconds"]) > 0 for row in rows(tmp_path / "a.csv"))
    assert run("compress", images, tmp_path / "alone") == 0
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()

    (images / "5.png").write_bytes(b"no image")
    done = torchrun("compress", images, "out", "--skip-existing", cwd=tmp_path)
    assert done.returncode != 0 and done.stdout == "compressed 0 of 6 files, 5 existed, 1 failed\n", done.stderr
    assert len(re.findall("^oscar: error: .*5.png", done.stderr, re.M)) == 1


def test_processes_do_not_share_a_file(photos, tmp_path, alone, monkeypatch, capsys) -> None:
    """One of them says so. Both run here, one after the other, with a store as a launcher gives it."""
    store = torch.distributed.HashStore()
    module = importlib.import_module("torch.distributed.rendezvous")  # whose name is also a function's
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(module, "rendezvous", lambda url, rank=rank: iter([(store, rank, 2)]))
        processes.group.cache_clear()
        assert run("compress", photos / "0.png", tmp_path / "one.oscar") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 - rank and not (tmp_path / "one.oscar").exists()
        assert all(line.startswith("oscar: error: 2 processes cannot share one file") for line in lines)
