"""Folders, names and writing: nothing passed over in silence, nothing lost."""

from __future__ import annotations

import os
import stat
import threading
import unicodedata
from pathlib import Path

import pytest

from oscar.utils.files import atomic_write, list_folder, name_results


def names(*sources: str) -> dict[str, str]:
    results = name_results([Path(source) for source in sources], ".oscar")
    return {source.as_posix(): result.as_posix() for source, result in results.items()}


@pytest.mark.parametrize(
    ("sources", "results"),
    [
        (["a.jpg"], ["a.oscar"]),
        (["a.jpg", "b.png"], ["a.oscar", "b.oscar"]),
        (["a.jpg", "a.png"], ["a.jpg.oscar", "a.png.oscar"]),
        (["a.jpg", "a.png", "a.webp", "b.png"], ["a.jpg.oscar", "a.png.oscar", "a.webp.oscar", "b.oscar"]),
        (["x/a.jpg", "y/a.png"], ["x/a.oscar", "y/a.oscar"]),
        (["A.jpg", "a.PNG"], ["A.jpg.oscar", "a.PNG.oscar"]),  # alike where case is ignored
        (["Straße.jpg", "STRASSE.png"], ["Straße.jpg.oscar", "STRASSE.png.oscar"]),
        (["a.jpg", "a.jpg.webp", "a.png"], ["a.jpg.oscar", "a.jpg.webp.oscar", "a.png.oscar"]),  # a name that is taken
        (["c.v1.png", "c.v2.png"], ["c.v1.oscar", "c.v2.oscar"]),
        (["X/a.jpg", "x/a.png"], ["X/a.jpg.oscar", "x/a.png.oscar"]),
    ],
)
def test_results_are_kept_apart(sources, results):
    assert list(names(*sources).values()) == results
    assert list(names(*reversed(sources)).values()) == results[::-1]  # whatever the order


@pytest.mark.parametrize(
    "sources",
    [
        ["a.jpg", "A.jpg"],
        ["x/a.jpg", "X/a.jpg", "X/a.png"],
        [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")],
        [unicodedata.normalize(form, "É.jpg") for form in ("NFC", "NFD")] + ["é.jpg"],
    ],
)
def test_whole_names_that_differ_by_case_or_normalisation(sources):
    results = names(*sources)
    folded = {unicodedata.normalize("NFC", result.casefold()) for result in results.values()}
    assert len(folded) == len(sources)
    more = names(*sources, "b.png")
    assert {source: more[source] for source in sources} == results  # a hash of the name, not a number


def test_results_of_results_are_apart():
    """What was kept apart when compressing stays so when decompressing."""
    packed = names("a.jpg", "a.png", "a.jpg.webp", "A.jpg", "b.png").values()
    back = name_results([Path(name) for name in packed], ".png")
    assert [path.as_posix() for path in back.values()] == [name.removesuffix(".oscar") + ".png" for name in packed]


def make(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def listed(folder: Path, **options) -> tuple[list[str], dict[str, int]]:
    listing = list_folder(folder, frozenset({".png", ".gif"}), **options)
    assert not listing.errors
    return [path.relative_to(folder).as_posix() for path in listing.files], dict(listing.left_out)


def test_listing(tmp_path):
    make(tmp_path, "b.PNG", "a.gif", "deep/er/c.png", "x.txt", "deep/y.TXT", "z.mov", "README", "png")
    found, left_out = listed(tmp_path)
    assert found == ["a.gif", "b.PNG", "deep/er/c.png"]
    assert left_out == {".txt": 2, ".mov": 1, "no suffix": 2}
    assert listed(tmp_path, recursive=False) == (["a.gif", "b.PNG"], {".txt": 1, ".mov": 1, "no suffix": 2})


def test_dot_files_sidecars_and_empty_folders_are_passed_over(tmp_path):
    make(tmp_path, "a.png", "._a.png", ".DS_Store", ".hidden/b.png", "sub/._c.gif", ".png")
    (tmp_path / "empty/er").mkdir(parents=True)
    assert listed(tmp_path) == (["a.png"], {})
    assert listed(make(tmp_path / ".named", "a.png")) == (["a.png"], {})  # unless it is asked for by name


def test_links(tmp_path):
    root, other = make(tmp_path / "root", "a.png", "sub/b.png"), make(tmp_path / "other", "c.png", "d.txt")
    (root / "linked").symlink_to(other)
    (root / "file.gif").symlink_to(other / "c.png")
    (root / "gone.png").symlink_to(tmp_path / "nothing.png")
    (root / "self.png").symlink_to("self.png")
    (root / "sub/up").symlink_to(root)  # a loop
    (other / "back").symlink_to(root / "sub")  # another one, through two folders
    found, left_out = listed(root)
    assert found == ["a.png", "file.gif", "gone.png", "linked/back/b.png", "linked/c.png", "self.png", "sub/b.png"]
    assert left_out == {".txt": 1}


def test_pipes_are_left_out(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert listed(tmp_path) == ([], {".png": 1})


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    make(tmp_path, "a.png", "closed/b.png", "open/c.png")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_folder(tmp_path, frozenset({".png"}))
    assert [path.name for path in listing.files] == ["a.png", "c.png"]
    (error,) = listing.errors
    assert error.filename == str(tmp_path / "closed")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_replaced_file_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    for bits in (0o600, 0o640, 0o444, 0o755):
        path.touch()
        path.chmod(bits)
        atomic_write(path, b"new")
        assert path.read_bytes() == b"new" and mode(path) == bits
        path.unlink()


def test_a_new_file_follows_the_umask(tmp_path):
    for umask in (0o022, 0o077, 0o002):
        before = os.umask(umask)
        try:
            atomic_write(tmp_path / f"{umask}", b"new")
        finally:
            os.umask(before)
        assert mode(tmp_path / f"{umask}") == 0o666 & ~umask


def test_links_stay_and_their_files_are_written(tmp_path):
    (tmp_path / "far").mkdir()
    real, link, chain = tmp_path / "far/real", tmp_path / "link", tmp_path / "chain"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to("far/real")
    chain.symlink_to(link)
    for path in (link, chain):
        atomic_write(path, path.name.encode())
        assert path.is_symlink() and not real.is_symlink()
        assert real.read_bytes() == path.name.encode() and mode(real) == 0o640
    dangling = tmp_path / "dangling"
    dangling.symlink_to("far/later")
    atomic_write(dangling, b"made")
    assert dangling.is_symlink() and (tmp_path / "far/later").read_bytes() == b"made"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chain", "dangling", "far", "later", "link", "real"]


@pytest.mark.parametrize("target", ["loop", "nowhere/a", "folder", "file/a"])
def test_what_cannot_be_written_is_named(tmp_path, target):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / target, b"new")
    assert caught.value.filename == str(tmp_path / target)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_bytes() == b"old"


def test_pipes_are_written_as_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    atomic_write(tmp_path / "pipe", b"new")
    reader.join(timeout=10)
    assert got == [b"new"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
