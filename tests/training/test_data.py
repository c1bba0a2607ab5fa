import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oscar.data.crops import PhotoDataset, ResumableSampler, build_loader

COUNT = 5


def ramp(width: int, height: int) -> np.ndarray:
    """An image in which red is the column and green the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five PNGs of 60x50 whose blue tells them apart."""
    (tmp_path / "sub").mkdir()
    for index in range(COUNT):
        pixels = ramp(60, 50)
        pixels[..., 2] = 10 * index
        Image.fromarray(pixels).save(tmp_path / ("sub" if index == 4 else "") / f"{index}.png")
    return tmp_path


def to_bytes(image: torch.Tensor) -> np.ndarray:
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def first_batches(loader, count: int = 4) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(loader, count))


def assert_equal_batches(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["index"], b["index"]) and torch.equal(a["image"], b["image"])


def test_a_crop_is_a_piece_of_the_image_in_one_of_eight_orientations(folder: Path) -> None:
    dataset = PhotoDataset(folder, 16)
    assert len(dataset) == COUNT
    orientations, corners = set(), set()
    for number in range(200):
        sample = dataset[2, number]
        assert sample["index"] == 2 and sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32
        pixels = to_bytes(sample["image"]).astype(int)
        columns, rows = pixels[..., 0], pixels[..., 1]
        assert set(pixels[..., 2].flat) == {20} and np.ptp(columns) == np.ptp(rows) == 15
        orientations.add(tuple(axis[corner] - axis[0, 0] for axis in (columns, rows) for corner in ((0, 1), (1, 0))))
        corners.add((columns.min(), rows.min()))
    assert len(orientations) == 8
    assert {0, 44} <= {column for column, _ in corners} and {0, 34} <= {row for _, row in corners}


def test_without_augmentation_the_centre_is_cut(folder: Path) -> None:
    dataset = PhotoDataset(folder, 16, augment=False)
    expected = ramp(60, 50)[17:33, 22:38, :2]
    for number in (0, 7):
        assert np.array_equal(to_bytes(dataset[0, number]["image"])[..., :2], expected)
    image = dataset[0]["image"]
    assert image.min() == -1 and torch.equal(image[0, 0], torch.arange(22, 38) / 127.5 - 1)


def test_small_images_are_mirrored_not_enlarged(tmp_path: Path) -> None:
    Image.fromarray(ramp(7, 40)).save(tmp_path / "narrow.png")
    pixels = to_bytes(PhotoDataset(tmp_path, 16, augment=False)[0]["image"])
    assert pixels[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1, 0, 0, 1]
    assert pixels[:, 0, 1].tolist() == list(range(12, 28))
    Image.fromarray(ramp(1, 1)).save(tmp_path / "a.png")
    assert PhotoDataset(tmp_path, 16, scale=(0.5, 1.0))[0, 3]["image"].shape == (3, 16, 16)


def test_scale_shrinks_but_never_below_the_crop(tmp_path: Path) -> None:
    Image.fromarray(ramp(100, 80)).save(tmp_path / "a.png")
    spans = []
    for number in range(60):
        pixels = to_bytes(PhotoDataset(tmp_path, 16, scale=(0.1, 1.0))[0, number]["image"]).astype(int)
        spans.append(max(np.ptp(pixels[..., 0]), np.ptp(pixels[..., 1])))
    assert min(spans) <= 20 and 70 <= max(spans) <= 80
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    shrunk = to_bytes(PhotoDataset(tmp_path, 16, scale=(0.25, 0.25))[0, 0]["image"])
    assert shrunk.std() < 0.5 * noise.std(), "antialiased"


@pytest.mark.parametrize("cache", [False, True])
def test_a_sample_depends_on_seed_and_number_alone(folder: Path, cache: bool) -> None:
    dataset, other_seed = PhotoDataset(folder, 16, seed=3), PhotoDataset(folder, 16, seed=4)
    again = PhotoDataset(folder, 16, seed=3, cache=cache)
    list(map(again.__getitem__, range(3)))
    np.random.seed(1)
    torch.manual_seed(1)
    samples = [dataset[1, number]["image"] for number in range(8)]
    for number in reversed(range(8)):
        assert torch.equal(again[1, number]["image"], samples[number])
    assert not all(torch.equal(other_seed[1, number]["image"], samples[number]) for number in range(8))
    assert len({image.numpy().tobytes() for image in samples}) > 4


def test_roots_may_be_folders_lists_and_images(folder: Path) -> None:
    images = folder / "train.txt"
    images.write_text("# the best\n1.png\n\n  sub/4.png\n")
    dataset = PhotoDataset([folder / "sub", images, folder / "0.png"], 8)
    assert [path.name for path in dataset.paths] == ["4.png", "1.png", "4.png", "0.png"]
    images.write_text("1.png\nabsent.png\n")
    with pytest.raises(ValueError, match="train.txt line 2: no image absent.png"):
        PhotoDataset(images, 8)


@pytest.mark.parametrize("cache", [False, True])
def test_unreadable_images_are_reported_once_and_replaced(
    folder: Path, cache: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("3.png", "sub/4.png"):
        (folder / name).write_bytes(b"no image")
    Image.fromarray(np.zeros((9, 9, 4), dtype=np.uint8)).save(folder / "1.png")  # transparent
    with caplog.at_level(logging.WARNING):
        dataset = PhotoDataset(folder, 8, cache=cache)
        indices = [dataset[index, number]["index"] for number in range(2) for index in range(COUNT)]
    assert indices == [0, 2, 2, 0, 0] * 2
    for name in ("3.png", "4.png", "1.png"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    assert len(caplog.records) == 3 and not any("\n" in record.getMessage() for record in caplog.records)


def test_roots_without_images_are_refused(folder: Path, tmp_path: Path) -> None:
    empty, corrupt = tmp_path / "empty", tmp_path / "corrupt"
    empty.mkdir()
    corrupt.mkdir()
    for name in "ab":
        (corrupt / f"{name}.jpg").write_bytes(b"no image")
    for root, message in ((empty, "holds no image"), (corrupt, "no readable image"), (tmp_path / "x", "not exist")):
        with pytest.raises(ValueError, match=message) as caught:
            PhotoDataset([folder / "sub", root], 8)
        assert str(root) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="roots is empty"):
        PhotoDataset([], 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size = 0"),
        ({"scale": (0.0, 1.0)}, "scale = "),
        ({"scale": (0.5, 1.5)}, "scale = "),
        ({"scale": (0.9, 0.5)}, "scale = "),
        ({"scale": (0.5, 1.0), "augment": False}, "needs augment"),
    ],
)
def test_bad_dataset_arguments(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhotoDataset(folder, **{"crop_size": 8, **arguments})


def take(count: int, **arguments) -> list[tuple[int, int]]:
    return list(
        itertools.islice(ResumableSampler(**{"dataset_len": 7, "batch_size": 2, "seed": 5, **arguments}), count)
    )


def test_sampler_visits_every_image_once_an_epoch() -> None:
    keys = take(21)
    assert [number for _, number in keys] == list(range(21))
    epochs = [[index for index, _ in keys[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(21, seed=6) != keys


@pytest.mark.parametrize("start_step", [0, 1, 3, 4, 100])
def test_sampler_resumes_anywhere(start_step: int) -> None:
    assert take(10, start_step=start_step) == take(2 * start_step + 10)[2 * start_step :]


@pytest.mark.parametrize("start_step", [0, 9])
def test_processes_share_what_one_would_draw(start_step: int) -> None:
    whole = take(40, batch_size=4, start_step=start_step)
    halves = [take(20, num_processes=2, rank=rank, start_step=start_step) for rank in range(2)]
    for step in range(10):
        part = slice(2 * step, 2 * step + 2)
        assert halves[0][part] + halves[1][part] == whole[4 * step : 4 * step + 4]


def test_batches_larger_than_the_set() -> None:
    keys = take(16, dataset_len=3, batch_size=8)
    assert all(sorted(index for index, _ in keys[start : start + 3]) == [0, 1, 2] for start in range(0, 15, 3))


@pytest.mark.parametrize(
    "arguments", [{"dataset_len": 0}, {"batch_size": 0}, {"rank": 1}, {"rank": -1}, {"start_step": -1}, {"seed": -1}]
)
def test_bad_sampler_arguments(arguments: dict) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        take(1, **arguments)


def test_loader_batches_do_not_depend_on_workers_processes_or_resume(folder: Path) -> None:
    arguments = {"crop_size": 16, "seed": 2, "scale": (0.5, 1.0)}
    expected = first_batches(build_loader(folder, batch_size=4, **arguments))
    assert expected[0]["image"].shape == (4, 3, 16, 16) and expected[0]["index"].dtype == torch.int64
    assert_equal_batches(first_batches(build_loader(folder, batch_size=4, workers=2, **arguments)), expected)
    assert_equal_batches(first_batches(build_loader(folder, batch_size=4, cache=True, **arguments)), expected)
    resumed = build_loader(folder, batch_size=4, start_step=2, **arguments)
    assert_equal_batches(first_batches(resumed, 2), expected[2:])
    halves = [first_batches(build_loader(folder, batch_size=2, rank=rank, world=2, **arguments)) for rank in range(2)]
    joined = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    assert_equal_batches(joined, expected)


def test_loader_leaves_the_global_random_stream_alone(folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first_batches(build_loader(folder, crop_size=8, batch_size=2), 2)
    assert torch.equal(torch.rand(1), expected)
