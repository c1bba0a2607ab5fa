"""scripts/prepare_data.py: folders and archives of a small stand-in become what training and evaluation read."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from oscar.data import prepare
from oscar.data.datasets import DATASETS, Dataset
from oscar.data.sources import find_images

COUNT = 5


@pytest.fixture
def run(load_script, monkeypatch) -> Callable[..., int]:
    """The script, with data sets of five images in place of hundreds."""
    for name, dataset in list(DATASETS.items()):
        monkeypatch.setitem(DATASETS, name, replace(dataset, count=COUNT))
    monkeypatch.setattr(Dataset, "digests", lambda self: {})
    main = load_script("prepare_data").main
    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture
def div2k(make_image, tmp_path: Path) -> Path:
    """What DIV2K's pages give: the images, smaller ones, and what systems leave beside them."""
    folder = tmp_path / "got/DIV2K_train_HR"
    folder.mkdir(parents=True)
    for number in range(1, COUNT + 1):
        make_image(20 + number, 16, number).save(folder / f"{number:04d}.png")
        make_image(10, 8, number).save(folder / f"{number:04d}x2.png")
    make_image(9, 9).save(folder / "0801.png")  # of the validation set
    (folder / "._0001.png").write_bytes(b"sidecar")
    return folder


def test_a_folder(run, div2k: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "data"
    assert run("div2k", root, "--source", div2k.parent) == 0
    out = capsys.readouterr().out
    assert "academic research" in out and "5 new in" in out and f"train: 'data.train=[\"{root / 'div2k'}\"]'" in out
    names = [f"{number:04d}.png" for number in range(1, COUNT + 1)]
    assert sorted(path.name for path in (root / "div2k").iterdir()) == names
    assert (root / "div2k/0001.png").samefile(div2k / "0001.png"), "linked, not copied"
    assert run("div2k", root, "--source", div2k) == 0 and "0 new in" in capsys.readouterr().out


def test_where_nothing_can_be_linked_it_is_copied(run, div2k: Path, monkeypatch, tmp_path: Path) -> None:
    def refuse(*args: object) -> None:
        raise OSError("other device")

    monkeypatch.setattr("os.link", refuse)
    assert run("div2k", tmp_path / "data", "--source", div2k) == 0
    copied = tmp_path / "data/div2k/0003.png"
    assert not copied.samefile(div2k / "0003.png") and copied.read_bytes() == (div2k / "0003.png").read_bytes()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive(run, div2k: Path, tmp_path: Path, kind: str) -> None:
    archive = tmp_path / f"DIV2K.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in div2k.iterdir():
                file.write(path, f"DIV2K_train_HR/{path.name}")
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(div2k, "DIV2K_train_HR")
    assert run("div2k", tmp_path / "data", "--source", archive) == 0
    for number in range(1, COUNT + 1):
        name = f"{number:04d}.png"
        assert (tmp_path / "data/div2k" / name).read_bytes() == (div2k / name).read_bytes()


def test_an_interruption_leaves_no_part_of_a_file(run, div2k: Path, monkeypatch, tmp_path: Path) -> None:
    archive, copied = tmp_path / "DIV2K.zip", []
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(div2k.iterdir()):
            file.write(path, path.name)

    def interrupt(source, target) -> None:
        target.write(source.read(7))
        copied.append(target)
        if len(copied) == 3:
            raise KeyboardInterrupt
        target.write(source.read())

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", interrupt)
        assert run("div2k", tmp_path / "data", "--source", archive) == 130
    assert sorted(path.name for path in (tmp_path / "data/div2k").iterdir()) == ["0001.png", "0002.png"]
    assert run("div2k", tmp_path / "data", "--source", archive) == 0


def test_shards(run, div2k: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "data"
    assert run("div2k", root, "--source", div2k, "--shards", 2) == 0
    pattern = f"{root / 'div2k_shards'}/{{00000..00002}}.tar"
    assert f"train: 'data.train=[\"{pattern}\"]'" in capsys.readouterr().out
    images = find_images(pattern)
    assert [image.name for image in images] == [f"{number:04d}.png" for number in range(1, COUNT + 1)]
    assert images[2].open().read() == (div2k / "0003.png").read_bytes()
    shard, digests = root / "div2k_shards/00001.tar", []
    for _ in range(2):  # a damaged shard is made anew, others are left alone
        digests.append(hashlib.sha256(shard.read_bytes()).hexdigest())
        with tarfile.open(shard, "w"):
            pass
        before = (root / "div2k_shards/00000.tar").stat().st_mtime_ns
        assert run("div2k", root, "--shards", 2) == 0
        assert (root / "div2k_shards/00000.tar").stat().st_mtime_ns == before
    assert digests[0] == digests[1] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert run("div2k", root, "--shards", 3) == 2
    assert "00002.tar is there, but 2 shards are to be made" in capsys.readouterr().err


def test_a_download(run, div2k: Path, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setitem(DATASETS, "div2k", replace(DATASETS["div2k"], files=("https://none/DIV2K.zip",)))

    def fetch(url: str, path: str, progress: bool) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for image in div2k.iterdir():
                file.write(image, image.name)

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    assert run("div2k", tmp_path / "data", "--download") == 0
    assert len(list((tmp_path / "data/div2k").iterdir())) == COUNT
    monkeypatch.setattr("torch.hub.download_url_to_file", None)  # what is there is not fetched again
    assert run("div2k", tmp_path / "data", "--download") == 0

    def fail(*args: object, **named: object) -> None:
        raise OSError("<urlopen error no such host>")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    capsys.readouterr()
    assert run("div2k", tmp_path / "other", "--download") == 2
    assert "https://none/DIV2K.zip: <urlopen error no such host>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet", "DATA"], "data set 'imagenet' does not exist; allowed: kodak, div2k_valid"),
        (
            ["kodak", "DATA"],
            "data set kodak: DATA/kodak does not exist; to lay it out: oscar prepare-data kodak",
        ),
        (["div2k", "DATA", "--source", "DATA/none"], "DATA/none is no folder, zip or tar"),
        (["kodak", "DATA", "--source", "GOT"], "GOT holds no image of data set kodak"),
        (["div2k_valid", "DATA", "--source", "GOT"], "DATA/div2k_valid holds 1 images; allowed: 5"),
        (["lsdir", "DATA", "--download"], "data set lsdir has no address that we know"),
        (["div2k", "DATA", "--shards", "0"], "--shards is 0; allowed: at least 1"),
    ],
)
def test_what_is_refused(run, div2k: Path, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    places = {"DATA": str(tmp_path / "data"), "GOT": str(div2k.parent)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
        message = message.replace(name, place)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_two_versions_are_not_mixed(run, div2k: Path, make_image, tmp_path: Path, capsys) -> None:
    assert run("div2k", tmp_path / "data", "--source", div2k) == 0
    other = tmp_path / "other"
    other.mkdir()
    make_image(99, 16).save(other / "0002.png")
    assert run("div2k", tmp_path / "data", "--source", other) == 2
    assert "is another image than" in capsys.readouterr().err


def test_listed_digests_are_compared(make_image, tmp_path: Path) -> None:
    kodak = DATASETS["kodak"]
    assert len(kodak.digests()) == kodak.count == 24 and not DATASETS["div2k"].digests()
    (tmp_path / "kodak").mkdir()
    for name in kodak.digests():
        make_image(8, 8).save(tmp_path / "kodak" / name)
    assert kodak.check(tmp_path) == tmp_path / "kodak"
    with pytest.raises(ValueError, match=r"kodim01\.png is not the published image, by its SHA-256 \(24 of 24\)"):
        kodak.check_digests(tmp_path)


@pytest.mark.parametrize(
    ("name", "taken", "left"),
    [
        ("div2k", ["a/0001.png", "0800.png"], ["0000.png", "0801.png", "0001x2.png", "10001.png"]),
        ("div2k_valid", ["0801.png", "0900.png"], ["0800.png", "0901.png"]),
        ("flickr2k", ["Flickr2K_HR/000001.png", "002650.png"], ["000001x2.png", "0001.png"]),
        ("lsdir", ["HR/0001000/0000001.png"], ["val1/HR/val/0000001.png", "X4/0001000/0000001x4.png"]),
        ("kodak", ["kodim01.png", "kodim24.png"], ["kodim00.png", "kodim25.png"]),
        ("clic2020_test", ["professional/a.png"], ["._a.png", "a.txt"]),
        ("tecnick", ["RGB/RGB_OR_1200x1200/RGB_OR_1200x1200_001.png"], ["RGB_OR_0600x0600_001.png"]),
    ],
)
def test_which_files_are_images_of_a_data_set(name: str, taken: list[str], left: list[str]) -> None:
    dataset = DATASETS[name]
    assert dataset.role in ("training", "evaluation") and dataset.source.startswith("https://") and dataset.terms
    assert all(dataset.target(path) is not None for path in taken)
    assert not any(dataset.target(path) for path in left)
    assert prepare.lay_out(dataset, "unused", []) == 0
