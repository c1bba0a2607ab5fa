"""The files from which a run goes on: checkpoints, the last few and the best, and tables of what was logged.

    OUTPUT/checkpoints/step-0001000.pt   state after so many steps; written whole or not at all
    OUTPUT/checkpoints/step-0001000/     beside it with DeepSpeed: every process's share of the optimisers
    OUTPUT/checkpoints/best.pt           state at the best validation

The first process alone writes; only DeepSpeed's shares come from each.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from oscar.training.train_state import NonFiniteError, TrainState
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write
from oscar.utils.provenance import PROVENANCE

FOLDER, BEST = "checkpoints", "best"
_STEP = re.compile(r"step-(\d+)\.pt")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        output: folder of the run.
        accelerator: of the run.
        keep_last: how many of the newest are kept.
    """

    def __init__(self, output: Path, accelerator: Accelerator, keep_last: int):
        self.folder = output / FOLDER
        self.output, self.accelerator, self.keep_last = output, accelerator, keep_last

    def save(self, state: dict, name: str, train_states: Sequence[TrainState]) -> None:
        """Write a state; call on every process.

        Args:
            state: as `torch.load` reads it with `weights_only`.
            name: step-NNNNNNN or best.
            train_states: whose engines, if they have any, write their shares.

        Raises:
            NonFiniteError: on every process, if a tensor holds what is no number; then nothing is written.
        """
        main, target = self.accelerator.is_main_process, self.folder / f"{name}.pt"
        (bad,) = broadcast_object_list([find_non_finite(state)])
        if bad is not None:
            raise NonFiniteError(
                f"checkpoint {target} is not written: {bad} holds values that are not finite; "
                "earlier checkpoints are as they were"
            )
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
        engines = [one for one in train_states if one.has_engine]
        if engines:
            self.accelerator.wait_for_everyone()
            for number, engine in enumerate(engines):
                engine.save_engine(self.engine_folder(target, number))
            self.accelerator.wait_for_everyone()  # the file below says that all shares are there
        if not main:
            return
        beside = target.with_suffix(".tmp")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        for old in find_checkpoints(self.output)[: -self.keep_last]:
            old.unlink()
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest checkpoint that the first process sees, the same on every process.

        Raises:
            ValueError: if this process does not see it.
        """
        found = find_checkpoints(self.output) if self.accelerator.is_main_process else []
        (path,) = broadcast_object_list([found[-1] if found else None])
        if path is not None and not path.is_file():
            raise ValueError(f"checkpoint {path} is not on this machine; allowed: an output folder that all share")
        return path

    def load(self, path: Path) -> dict:
        """Read a state.

        Raises:
            ValueError: naming the file, if it is damaged.
        """
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged files
            raise ValueError(f"checkpoint {path} cannot be read: {first_line(error)}") from None

    def load_engines(self, path: Path, train_states: Sequence[TrainState]) -> None:
        """Give the engines of train states their shares.

        Raises:
            ValueError: if they are not there, or not of as many processes.
        """
        for number, engine in enumerate(one for one in train_states if one.has_engine):
            engine.restore_engine(self.engine_folder(path, number))

    @property
    def best(self) -> Path:
        return self.folder / f"{BEST}.pt"

    @staticmethod
    def engine_folder(path: Path, number: int) -> Path:
        """Where the share of the train state of this number is, for a checkpoint."""
        return path.with_suffix("") / str(number)


def find_non_finite(state: Any, name: str = "") -> str | None:
    """The name of a tensor in a nested state that holds values that are not finite, or None."""
    if isinstance(state, Tensor):
        finite = not state.is_floating_point() or torch.isfinite(state).all()
        return None if finite else name
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    found = (find_non_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next((bad for bad in found if bad is not None), None)


def find_checkpoints(output: Path) -> list[Path]:
    """The run's checkpoints of single steps, oldest first."""
    paths = [path for path in (output / FOLDER).glob("*.pt") if _STEP.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(_STEP.fullmatch(path.name)[1]))


def reset(output: Path) -> None:
    """Remove what an earlier run left in this folder, its result too."""
    for name in (FOLDER, "final"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("log.csv", "validation.csv", PROVENANCE):
        (output / name).unlink(missing_ok=True)


class CsvLog:
    """A table with a row per logged step; on resume, rows after the checkpoint are dropped.

    Args:
        path: of the table.
        step: the last whose row is kept.
        columns: of the table; None takes those of the first row.
    """

    def __init__(self, path: Path, step: int, columns: Sequence[str] | None = None):
        self.path, self.columns = path, columns
        rows = []
        if path.exists():
            text = path.read_text()
            reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # a run may have died within a row
            rows = [row for row in reader if int(row["step"]) <= step]
            self.columns = columns or reader.fieldnames
        if self.columns is not None:
            self._start(rows)

    def write(self, row: dict) -> None:
        if self.columns is None:
            self.columns = list(row)
            self._start([])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)

    def _start(self, rows: list[dict]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path, text.getvalue().encode())
