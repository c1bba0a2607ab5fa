"""The command that makes golden data anew says what changed, and overwrites nothing unless it is told to."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).parent


def test_nothing_is_overwritten_without_force(make_goldens, tmp_path: Path, capsys) -> None:
    images = tmp_path / "ours/images"
    shutil.copytree(HERE / "ours/images", images)
    assert make_goldens.main(["images"], tmp_path) == 0
    assert capsys.readouterr().out == "images: 7 of 7 files as they were\n"
    before = (images / "7x5.png").read_bytes()
    Image.new("RGB", (7, 5)).save(images / "7x5.png")
    black = (images / "7x5.png").read_bytes()
    (images / "1x1.png").unlink()
    (images / "2x2.png").touch()
    assert make_goldens.main(["images"], tmp_path) == 1
    found = capsys.readouterr().out
    assert "5 of 7 files as they were" in found and "images: nothing overwritten; --force does" in found
    assert "1x1.png: new" in found and "2x2.png: no longer made" in found
    assert re.search(r"7x5.png: \d+ levels", found)
    assert (images / "7x5.png").read_bytes() == black and (images / "2x2.png").exists()
    assert make_goldens.main(["images", "--force"], tmp_path) == 0
    assert (images / "7x5.png").read_bytes() == before
    assert (images / "1x1.png").exists() and not (images / "2x2.png").exists()


def test_a_part_that_does_not_exist(make_goldens, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        make_goldens.main(["files", "none"], tmp_path)
    assert caught.value.code == 2 and "part 'none' does not exist; allowed: images, models" in capsys.readouterr().err
