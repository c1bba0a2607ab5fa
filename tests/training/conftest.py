"""What the tests of training runs share: reading what a run left behind, and comparing runs to the bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from oscar.config import TrainConfig
from oscar.training.checkpoints import find_checkpoints

TIMES = ("seconds", "images_per_second")  # columns of the log


class Runs:
    """Reads and compares the results of runs."""

    @staticmethod
    def rows(config: TrainConfig) -> list[dict[str, str]]:
        """The table of logged steps."""
        with (Path(config.output) / "log.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @staticmethod
    def newest(config: TrainConfig) -> dict:
        """The newest checkpoint."""
        return torch.load(find_checkpoints(Path(config.output))[-1], weights_only=True)

    @classmethod
    def assert_equal(cls, one: Any, other: Any, where: str = "") -> None:
        """Equality to the bit of nested states."""
        if isinstance(one, dict):
            assert one.keys() == other.keys(), where
            for key in one:
                cls.assert_equal(one[key], other[key], f"{where}.{key}")
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other), where
            for index, (a, b) in enumerate(zip(one, other, strict=True)):
                cls.assert_equal(a, b, f"{where}[{index}]")
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other), where
        else:
            assert one == other, where

    @classmethod
    def assert_same(cls, one: TrainConfig, other: TrainConfig) -> None:
        """Equality to the bit of checkpoints, results and logs but for times."""
        states = [cls.newest(config) for config in (one, other)]
        for state in states:
            assert len(state.pop("clock")) == 2
        cls.assert_equal(*states)
        for a, b in zip(cls.rows(one), cls.rows(other), strict=True):
            assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
        files = [cls.result(config) for config in (one, other)]
        assert files[0] == files[1] and files[0]

    @staticmethod
    def result(config: TrainConfig) -> dict[Path, bytes | dict]:
        """The files of the result, but for how it was made, which has dates."""
        files: dict[Path, bytes | dict] = {}
        for path in Path(config.output, "final").rglob("*.*"):
            if path.name == "oscar.json":
                files[path.relative_to(config.output)] = {**json.loads(path.read_text()), "provenance": None}
            elif path.name != "provenance.json":
                files[path.relative_to(config.output)] = path.read_bytes()
        return files


@pytest.fixture(scope="session")
def runs() -> type[Runs]:
    return Runs
