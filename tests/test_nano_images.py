"""The manifest of nano's images, and the lists that are made of it."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest


@pytest.fixture
def script(load_script, tmp_path: Path, monkeypatch):
    """The script with a manifest of three images, which are in `tmp_path / "images"`."""
    module = load_script("nano_images")
    folder, manifest = tmp_path / "images", tmp_path / "images.csv"
    rows = [("a/1.jpg", "train", "Flickr"), ("b/2.jpg", "train", "wallpapers"), ("b/3.jpg", "held_out", "wallpapers")]
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "source", "author", "licence", "sha256"])
        for name, split, source in rows:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
            writer.writerow([name, split, source, "", "CC0", hashlib.sha256(name.encode()).hexdigest()])
    monkeypatch.setattr(module, "MANIFEST", manifest)
    return module


def test_lists(script, tmp_path: Path, capsys) -> None:
    assert script.main([str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    train = (tmp_path / "out/train.txt").read_text().splitlines()
    images = tmp_path / "images"
    assert train == [str(images / "a/1.jpg")] + 6 * [str(images / "b/2.jpg")]
    assert (tmp_path / "out/held_out.txt").read_text() == f"{images / 'b/3.jpg'}\n"
    assert "2 images, 7 lines" in capsys.readouterr().out


def test_other_images_are_refused_and_nothing_is_written(script, tmp_path: Path, capsys) -> None:
    (tmp_path / "images/b/2.jpg").write_bytes(b"another")
    (tmp_path / "images/b/3.jpg").unlink()
    assert script.main([str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "2.jpg is another image (2 such in all)" in message
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_every_image_once_with_a_licence(load_script) -> None:
    module = load_script("nano_images")
    rows = list(csv.DictReader(module.MANIFEST.read_text(encoding="utf-8").splitlines()))
    assert len({row["file"] for row in rows}) == len({row["sha256"] for row in rows}) == len(rows) == 1252
    assert sum(row["split"] == "held_out" for row in rows) == 60
    assert {row["split"] for row in rows} == set(module.SPLITS)
    assert {row["source"] for row in rows} == set(module.REPEATS)
    assert all(row["licence"] for row in rows)
