"""Every kind of source gives the same images, in its stated order, and names what it cannot read."""

from __future__ import annotations

import io
import itertools
import logging
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from oscar.data.crops import PhotoDataset, build_loader
from oscar.data.images import ImageError, read_image
from oscar.data.sources import expand, find_images, open_source


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    """A folder with two shards of the five photographs, in another order than by name, each with its caption."""
    data = [path.read_bytes() for path in sorted(photos.iterdir())]
    for shard, numbers in (("000", (2, 0, 1)), ("001", (4, 3))):
        members = {}
        for number in numbers:
            members |= {f"{number}.txt": b"a caption", f"{number}.png": data[number]}
        write_shard(tmp_path / f"{shard}.tar", members)
    return tmp_path


@pytest.fixture
def hub(monkeypatch, tmp_path: Path):
    """Hugging Face's library with its cache in this test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def pixels(paths) -> list[np.ndarray]:
    return [np.asarray(open_source(path)) for path in paths]


def assert_photos(found, photos: Path, order) -> None:
    expected = [np.asarray(read_image(photos / f"{number}.png")) for number in order]
    assert len(found) == len(expected)
    assert all(np.array_equal(one, other) for one, other in zip(pixels(found), expected, strict=True))


@pytest.mark.parametrize("pattern", ["{000..001}.tar", "{000,001}.tar", "*.tar", "00[01].tar", "{000..000}{,1}.tar"])
def test_shards_are_read_in_the_order_of_pattern_and_tar(shards: Path, photos: Path, pattern: str) -> None:
    if pattern == "{000..000}{,1}.tar":
        (shards / "001.tar").rename(shards / "0001.tar")
    found = find_images(str(shards / pattern))
    assert_photos(found, photos, (2, 0, 1, 4, 3))
    assert str(found[3]).endswith("1.tar: 4.png")


def test_braces_keep_their_order_and_width(tmp_path: Path) -> None:
    for name in ("b9", "b10", "a9", "a10"):
        (tmp_path / name).touch()
    assert [path.name for path in expand(tmp_path / "{b,a}{9..10}")] == ["b9", "b10", "a9", "a10"]
    (tmp_path / "{b,a}").touch()
    assert expand(tmp_path / "{b,a}") == [tmp_path / "{b,a}"], "a file of that name comes first"
    with pytest.raises(ValueError, match=r"b11 does not exist; allowed: folders or text lists"):
        expand(tmp_path / "b{9..11}")


def test_a_dataset_of_shards_crops_like_one_of_files(shards: Path, photos: Path) -> None:
    from_shards = PhotoDataset([shards / "000.tar", shards / "001.tar"], 32, seed=1)
    from_files = PhotoDataset([photos / f"{number}.png" for number in (2, 0, 1, 4, 3)], 32, seed=1)
    for number in range(10):
        one, other = from_shards[number % 5, number], from_files[number % 5, number]
        assert one["index"] == other["index"] and torch.equal(one["image"], other["image"])


def test_damaged_members_are_named_and_skipped(photos: Path, tmp_path: Path, caplog) -> None:
    whole = (photos / "0.png").read_bytes()
    write_shard(tmp_path / "a.tar", {"no.png": b"no image", "half.png": whole[: len(whole) // 2], "0.png": whole})
    dataset = PhotoDataset(tmp_path / "a.tar", 32)
    assert [dataset[index, index]["index"] for index in (0, 1, 2)] == [2, 2, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all(str(tmp_path / "a.tar") in message for message in messages)
    assert "no.png: not an image" in messages[0] and "half.png: cannot be read" in messages[1]


def test_a_torn_shard_gives_what_comes_before_the_tear(shards: Path, photos: Path, caplog) -> None:
    path = shards / "000.tar"
    path.write_bytes(path.read_bytes()[: tarfile.open(path).getmember("0.png").offset_data + 100])
    with caplog.at_level(logging.WARNING):
        dataset = PhotoDataset(str(shards / "{000..001}.tar"), 32)
    assert [dataset[index, 0]["index"] for index in range(4)] == [0, 2, 2, 3]
    messages = [record.getMessage() for record in caplog.records]
    assert any("000.tar: not a whole" in message for message in messages)
    assert any("000.tar: 0.png" in message for message in messages)


def test_what_is_no_shard_is_refused(photos: Path, tmp_path: Path, caplog) -> None:
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.add(photos / "0.png", "0.png")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    write_shard(tmp_path / "captions.tar", {"0.txt": b"no image"})
    for name in ("zipped.tar", "bad.tar", "captions.tar"):
        with pytest.raises(ValueError, match=f"{name} holds no image"):
            find_images(tmp_path / name)
    assert "bad.tar: not a whole uncompressed tar" in caplog.text


def test_a_hub_folder_of_images(hub, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number, path in enumerate(sorted(photos.iterdir())):
        target = folder / ("validation" if number == 4 else "train") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "train" / "9.png").write_bytes(b"no image")
    found = find_images(f"hf:{folder}")
    assert_photos(found[:4], photos, range(4))
    with pytest.raises(ImageError, match=r"row 4 \(.*train/9.png\): not an image"):
        open_source(found[4])
    assert_photos(find_images(f"hf:{folder}#validation"), photos, [4])
    one, other = (
        list(itertools.islice(build_loader(f"hf:{folder}", crop_size=32, batch_size=4, workers=workers), 2))
        for workers in (0, 2)
    )
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match=r"#test cannot be read .*test"):
        find_images(f"hf:{folder}#test")


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_files(hub, photos: Path, tmp_path: Path, plain: bool) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for shard, numbers in enumerate(((1, 0), (2,))):
        cells = [(photos / f"{number}.png").read_bytes() for number in numbers]
        if not plain:
            cells = [{"bytes": cell, "path": f"{number}.png"} for cell, number in zip(cells, numbers, strict=True)]
        (tmp_path / "set").mkdir(exist_ok=True)
        table = pyarrow.table({"caption": ["text"] * len(cells), "image": cells})
        parquet.write_table(table, tmp_path / f"set/train-{shard}.parquet")
    found = find_images(f"hf:{tmp_path / 'set'}")
    assert_photos(found, photos, (1, 0, 2))
    assert str(found[1]).endswith("row 1" if plain else "row 1 (0.png)")


def test_hub_sets_that_cannot_be_had(hub, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.txt").write_text("no images")
    for root, reason in (("nobody/none", "nobody/none"), (tmp_path / "words", "no column of images among text")):
        with pytest.raises(ValueError, match=f"hf:{root} cannot be read .*{reason}") as caught:
            find_images(f"hf:{root}")
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets"):
        find_images("hf:nobody/none")
