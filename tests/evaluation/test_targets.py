"""Targets in bytes: the table and the script, with the tiny random model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from oscar.evaluation.rate_control import draw_pairs, meet, targets_table


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("evaluate_targets")


def test_pairs_are_drawn_from_the_seed() -> None:
    pairs = draw_pairs(5, 100, seed=3)
    assert pairs == draw_pairs(5, 100, seed=3) != draw_pairs(5, 100, seed=4)
    assert {number for number, _ in pairs} == set(range(5))
    assert all(0 <= share < 1 for _, share in pairs)


def test_targets_are_kept(tiny, photos: Path) -> None:
    rows = [meet(tiny, sorted(photos.glob("*.png"))[0], share) for share in (0, 0.5, 1)]
    assert [row["image"] for row in rows] == ["0.png"] * 3
    assert all(row["file_bytes"] <= row["target"] for row in rows)
    assert rows[0]["target"] < rows[1]["target"] < rows[2]["target"]
    assert rows[2]["use"] == 1  # the longest file there is


def test_the_table_counts() -> None:
    rows = pd.DataFrame({"target": [100, 100, 200], "file_bytes": [90, 101, 200]})
    rows["use"] = rows["file_bytes"] / rows["target"]
    (row,) = targets_table(rows).frame.to_dict("records")
    assert (row["pairs"], row["exceeded"]) == (3, 1)
    assert row["mean"] == pytest.approx(97) and row["median"] == pytest.approx(100)
    assert row["smallest"] == pytest.approx(90)


def test_the_script(script, tiny_folder: Path, photos: Path, tmp_path: Path, capsys) -> None:
    assert script.main([str(photos), "--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--pairs", "3"]) == 0
    assert "| 3 | 0 |" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "out/rows.csv")) == 3
    assert (tmp_path / "out/targets.md").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--pairs", "0"], "--pairs is 0; allowed: at least 1"), (["--model", "nowhere"], "model 'nowhere'")],
)
def test_mistakes(script, photos: Path, tmp_path: Path, capsys, options, message) -> None:
    assert script.main([str(photos), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
