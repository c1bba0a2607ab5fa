"""Tables of codings and efforts: every length is a file's, and sums are right."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from oscar.evaluation.codings import codings_table, efforts_table


@pytest.fixture
def script(load_script):
    return load_script("compare_codings")


def test_the_script(script, tiny_folder: Path, photos: Path, tmp_path: Path, capsys) -> None:
    args = [
        photos,
        "--out",
        tmp_path / "out",
        "--model",
        tiny_folder,
        "--rates",
        "0.0313",
        "0.125",
        "--efforts",
        "9",
        "--limit",
        "2",
        "--metrics",
    ]
    assert script.main(list(map(str, args))) == 0
    assert "| 0.1250 | 9 |" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "out/rows.csv")
    assert len(rows) == 2 * 2 * 2 and set(rows["effort"]) == {0, 9}
    assert (rows["packed_payload"] == rows["nominal_bytes"]).all()  # 8 bits an index
    assert (rows["table_bytes"] <= rows["packed_bytes"]).all() and (rows["context_bytes"] == rows["table_bytes"]).all()
    assert rows[["psnr"]].notna().all(axis=None)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"codings.md", "efforts.csv", "codings.tex"}


def test_what_is_wrong_is_one_line(script, tmp_path: Path, capsys) -> None:
    assert script.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_tables() -> None:
    row = {"image": "a", "rate": 0.125, "nominal_bytes": 100.0, "packed_payload": 100, "psnr": 30.0}
    rows = pd.DataFrame(
        [
            {**row, "effort": 0, "table_payload": 90, "table_bytes": 110, "context_payload": 60, "context_bytes": 80},
            {
                **row,
                "effort": 9,
                "table_payload": 80,
                "table_bytes": 100,
                "context_payload": 50,
                "context_bytes": 60,
                "psnr": 29.5,
            },
        ]
    )
    table = codings_table(rows)
    assert table.frame["context_saving"].tolist() == pytest.approx([40, 40])
    assert table.frame["worst"].tolist() == [-30, -30]
    assert "| 0.1250 | 100.0 | 100.0 | 90.0 | 60.0 | 10.0 | 40.0 | -30 |" in table.to_markdown()
    efforts = efforts_table(rows).frame
    assert efforts["saved"].tolist() == [0, 25] and efforts["psnr_change"].tolist() == [0, -0.5]
