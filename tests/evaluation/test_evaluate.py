"""One row per image and point, whatever interrupts it and however many processes share the work."""

from __future__ import annotations

import csv
import io
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from oscar.baselines.base import CodecError, Encoded, ImageCodec
from oscar.data.images import list_images
from oscar.evaluation.codecs import OscarImageCodec
from oscar.evaluation.evaluate import evaluate
from oscar.evaluation.results import EvaluationError, load_results, saved_file, saved_image
from oscar.metrics.image import psnr
from oscar.utils.environment import LIBRARIES

SECONDS = ["encode_seconds", "decode_seconds"]


class Jpeg(ImageCodec):
    """JPEG that counts what it encodes, and can be told to fail or to be interrupted."""

    name, label, point_name = "jpeg-test", "JPEG", "quality"
    points, grid = (5.0, 50.0), tuple(map(float, range(1, 96)))

    def __init__(self, stop_after: int | None = None, fails_at: float | None = None, settings: str = "default"):
        self.stop_after, self.fails_at, self.settings = stop_after, fails_at, settings
        self.encoded: list[tuple[bytes, float]] = []

    def describe(self) -> dict:
        return {**super().describe(), "settings": self.settings}

    def encode(self, image: Image.Image, point: float) -> Encoded:
        if self.stop_after is not None and len(self.encoded) == self.stop_after:
            raise KeyboardInterrupt
        if point == self.fails_at:
            raise CodecError("out of order")
        self.encoded.append((image.tobytes(), point))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(point))
        head = 20
        return Encoded(file.getvalue(), {"head": head, "body": len(file.getvalue()) - head}, nominal_bpp=None)

    def decode(self, data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def each_once(self) -> bool:
        """Whether no image was encoded twice at a point, but for the one of the warm-up."""
        return len(self.encoded) <= len(set(self.encoded)) + 1


class Metrics:
    """PSNR, a metric that some images lack, one that cannot be had, and a set metric."""

    names = ("psnr", "sometimes", "absent", "colour")
    has_set_metrics = True

    def __init__(self, unavailable: dict[str, str] | None = None):
        self.unavailable = {"absent": "no weights"} if unavailable is None else unavailable

    def score(self, reference: Image.Image, decoded: Image.Image) -> dict[str, float | None]:
        return {"psnr": psnr(reference, decoded), "sometimes": None if reference.width > 90 else 0.1}

    def features(self, image: Image.Image) -> dict[str, np.ndarray]:
        return {"mean": np.asarray(image).mean((0, 1))}

    def set_scores(self, reference: list[dict], decoded: list[dict]) -> dict[str, float]:
        means = [np.mean([features["mean"] for features in side], 0) for side in (reference, decoded)]
        return {"colour": float(np.abs(means[0] - means[1]).sum())}


class Process:
    """One of several processes, as Accelerate shows it."""

    def __init__(self, index: int, barrier: threading.Barrier):
        self.process_index, self.num_processes, self.barrier = index, barrier.parties, barrier

    def wait_for_everyone(self) -> None:
        self.barrier.wait(timeout=30)


@pytest.fixture
def folder(make_image, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "a.png", "more/c.png", "d.png", "e.png")):
        make_image(100 if name == "d.png" else 80, 64, seed).save(folder / name)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path):
    def run(output: str = "out", codec: ImageCodec | None = None, metrics: Metrics | None = None, **options):
        images = list_images(folder)
        options = {"progress": False, "root": folder, **options}
        return evaluate(codec or Jpeg(), images, metrics or Metrics(), tmp_path / output, **options)

    return run


def on_processes(run, count: int, **options) -> list[Jpeg]:
    """Run with `count` processes, here threads; their codecs."""
    codecs, barrier, errors = [Jpeg() for _ in range(count)], threading.Barrier(count), []

    def work(index: int) -> None:
        try:
            run(codec=codecs[index], accelerator=Process(index, barrier), **options)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return codecs


def same(left: Path, right: Path) -> None:
    """Both folders hold the same results, but for seconds and what tells of the run itself."""
    frames, infos = zip(*(load_results(path) for path in (left, right)), strict=True)
    pd.testing.assert_frame_equal(*(frame.drop(columns=SECONDS) for frame in frames))
    for field in ("codec", "points", "failed", "set_metrics", "images", "unavailable"):
        assert infos[0][field] == infos[1][field]


def test_rows(run, folder: Path, tmp_path: Path) -> None:
    frame = run()
    assert list(frame.columns) == [
        "image",
        "width",
        "height",
        "codec",
        "point",
        "protocol",
        "nominal_bpp",
        "estimated_bpp",
        "actual_bpp",
        "file_bytes",
        "bytes_head",
        "bytes_body",
        "psnr",
        "sometimes",
        "encode_seconds",
        "decode_seconds",
        "scored_width",
        "scored_height",
    ]
    names = ["a.png", "b.png", "d.png", "e.png", "more/c.png"]
    assert list(zip(frame.image, frame.point, strict=True)) == [(name, point) for name in names for point in (5, 50)]
    image = Image.open(folder / "more/c.png")
    encoded = Jpeg().encode(image, 50)
    row = frame.iloc[-1]
    assert row.file_bytes == len(encoded.data) == row.bytes_head + row.bytes_body
    assert row.actual_bpp == 8 * len(encoded.data) / (80 * 64)
    assert row.psnr == psnr(image, Jpeg().decode(encoded.data))
    assert (row.width, row.height, row.scored_width, row.scored_height) == (80, 64, 80, 64)
    assert np.isnan(frame.nominal_bpp).all() and list(np.isnan(frame.sometimes)) == list(frame.width == 100)
    with (tmp_path / "out/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["psnr"]) for row in rows] == list(frame.psnr)
    pd.testing.assert_frame_equal(load_results(tmp_path / "out")[0], frame)


def test_parquet_holds_the_same_rows(run, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing or does not go with this NumPy", exc_type=ImportError)
    frame = run()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out/results.parquet"), frame)


def test_without_pyarrow_the_rows_are_kept(run, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.parquet").write_bytes(b"of an earlier run")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(run()) == 10 and not (tmp_path / "out/results.parquet").exists()
    assert capsys.readouterr().err.startswith("results.parquet is not written, results.csv is: ")


def test_where_results_come_from(run, tmp_path: Path) -> None:
    run(config={"codec": "jpeg"})
    _, info = load_results(tmp_path / "out")
    assert info["codec"]["name"] == "jpeg-test" and info["protocol"] == "bitstream"
    assert info["config"] == {"codec": "jpeg"} and info["unavailable"] == {"absent": "no weights"}
    assert info["points"] == [5, 50] and info["images"] == 5 and info["failed"] == []
    assert info["versions"].keys() == {"python", *LIBRARIES} and info["versions"]["torch"] == torch.__version__
    assert info["hardware"]["cores"] >= 1 and info["hardware"]["processor"] and info["hardware"]["memory_gib"] > 0
    assert {"commit", "dirty", "date", "processes"} <= info.keys() and len(info["sessions"]) == 1
    json.dumps(info, allow_nan=False)
    assert info["without_value"] == {"sometimes": {"images": ["d.png"], "needed": ""}}


def test_saved_files_have_the_sizes_of_the_rows(run, tmp_path: Path) -> None:
    frame = run(save_images=True)
    for row in frame.itertuples():
        file = saved_file(tmp_path / "out", row.image, row.point, row.codec)
        assert file.suffix == ".jpeg" and file.stat().st_size == row.file_bytes
        with Image.open(saved_image(tmp_path / "out", row.image, row.point)) as kept:
            assert (np.asarray(kept) == np.asarray(Jpeg().decode(file.read_bytes()))).all()
    assert saved_image(Path("out"), "more/c.png", 50.0) == Path("out/images/more/c.png_50.png")
    images, files = ([path for path in (tmp_path / "out" / name).rglob("*.*")] for name in ("images", "files"))
    assert len(images) == len(frame) == len(files)


@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_interrupted_and_resumed_equals_uninterrupted(run, tmp_path: Path, stop_after: int) -> None:
    run("whole")
    first = Jpeg(stop_after)
    with pytest.raises(KeyboardInterrupt):
        run("parts", first)
    assert not (tmp_path / "parts/results.csv").exists()
    shard = tmp_path / "parts/rows/0.jsonl"
    done = shard.read_bytes().count(b"\n")
    assert done == stop_after - 1  # one was the warm-up
    with shard.open("ab") as file:
        file.write(b'{"image": "d.png", "poi')  # what a kill in the middle of writing leaves
    second = Jpeg()
    run("parts", second)
    same(tmp_path / "whole", tmp_path / "parts")
    assert second.each_once() and len(second.encoded) == 10 - done + 1
    assert not set(first.encoded[1:]) & set(second.encoded[1:])
    assert len(load_results(tmp_path / "parts")[1]["sessions"]) == 2


def test_finished_results_cost_nothing(run, tmp_path: Path) -> None:
    before = run()
    idle = Jpeg()
    pd.testing.assert_frame_equal(run(codec=idle), before)
    assert idle.encoded == [] and len(load_results(tmp_path / "out")[1]["sessions"]) == 1


def test_points_may_be_added(run, tmp_path: Path) -> None:
    run("parts", points=[50])
    added = Jpeg()
    frame = run("parts", added, points=[5, 20])
    assert sorted(set(frame.point)) == [5, 20, 50] and {point for _, point in added.encoded} == {5, 20}
    run("whole", points=[50, 20, 5, 5])
    same(tmp_path / "whole", tmp_path / "parts")


def test_several_processes_equal_one(run, tmp_path: Path) -> None:
    run("one")
    codecs = on_processes(run, 2, output="two")
    same(tmp_path / "one", tmp_path / "two")
    assert [len(codec.encoded) for codec in codecs] == [3 * 2 + 1, 2 * 2 + 1]
    assert load_results(tmp_path / "two")[1]["processes"] == 2


def test_resumed_on_another_number_of_processes(run, tmp_path: Path) -> None:
    run("one")
    with pytest.raises(KeyboardInterrupt):
        run("three", Jpeg(4))
    codecs = on_processes(run, 3, output="three")
    same(tmp_path / "one", tmp_path / "three")
    assert sum(len(codec.encoded) for codec in codecs) == 7 + 3


def test_set_metrics_are_over_the_images_of_a_point(run, tmp_path: Path) -> None:
    run()
    scores = load_results(tmp_path / "out")[1]["set_metrics"]
    assert [(score["point"], score["images"]) for score in scores] == [(5, 5), (50, 5)]
    assert scores[0]["colour"] > scores[1]["colour"] > 0


def test_an_unreadable_image_costs_one_line(run, folder: Path, tmp_path: Path, capsys) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    frame = run()
    assert len(frame) == 10 and "broken.png" not in set(frame.image)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "broken" in line]
    assert line.startswith("left out: broken.png: ") and "not an image" in line
    (failed,) = load_results(tmp_path / "out")[1]["failed"]
    assert failed["image"] == "broken.png" and failed["point"] is None and "not an image" in failed["error"]


def test_a_codec_that_fails_is_tried_again(run, tmp_path: Path, capsys) -> None:
    frame = run("parts", Jpeg(fails_at=5))
    assert set(frame.point) == {50} and len(frame) == 5
    assert "left out: a.png at 5: out of order\n" in capsys.readouterr().err
    assert len(load_results(tmp_path / "parts")[1]["failed"]) == 5
    assert len(run("parts")) == 10
    run("whole")
    same(tmp_path / "whole", tmp_path / "parts")


def test_no_result_at_all(run, folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"^none of the 5 images could be scored: .*a\.png: not an image"):
        run()
    with pytest.raises(EvaluationError, match="^no images"):
        evaluate(Jpeg(), [], Metrics(), folder / "out")


def test_results_of_something_else_are_refused(run, folder: Path, make_image) -> None:
    run()
    for options, named in (
        ({"codec": Jpeg(settings="optimised")}, r"codec \(settings: default, now optimised\)"),
        ({"metrics": Metrics({})}, r"metrics \(unavailable: .*absent.*, now \[\]\)"),
        ({"save_images": True}, r"settings \(save_images: False, now True\)"),
    ):
        with pytest.raises(EvaluationError, match=rf"out: its results are of other {named}; allowed: the same, or a"):
            run(**options)
    make_image(80, 64, 9).save(folder / "e.png")
    with pytest.raises(EvaluationError, match=r"of other images \(e\.png\); allowed"):
        run()


def test_results_from_before_keys_were_renamed_go_on(run, tmp_path: Path) -> None:
    frame = run()
    for name in ("rows/run.json", "results.json"):
        path = tmp_path / "out" / name
        record = json.loads(path.read_text())
        path.write_text(json.dumps({{"images": "pictures"}.get(key, key): value for key, value in record.items()}))
    assert load_results(tmp_path / "out")[1]["images"] == 5
    pd.testing.assert_frame_equal(run(), frame)
    assert "pictures" not in json.loads((tmp_path / "out/results.json").read_text())


def test_points_that_do_not_exist(run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jpeg-test: quality 99 is not allowed; allowed: whole numbers from 1 to 95"):
        run(points=[5, 99])
    assert not (tmp_path / "out").exists()


def test_images_of_one_name_are_kept_apart(run, folder: Path, make_image, tmp_path: Path) -> None:
    for index, name in enumerate(("more_c.png", "a.webp")):  # beside more/c.png and a.png
        make_image(80, 64, 20 + index).save(folder / name, lossless=True)
    frame = run(save_images=True)
    rows = frame[frame.image.isin(["a.png", "a.webp", "more_c.png", "more/c.png"])]
    kept = {saved_image(tmp_path / "out", row.image, row.point).read_bytes() for row in rows.itertuples()}
    assert len(kept) == len(rows) == 8


def test_without_results(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no results of an evaluation"):
        load_results(tmp_path)


def test_protocol_paper_from_images_to_rows(tiny, make_image, tmp_path: Path) -> None:
    """FID's reference are the originals, not the resized images; what is too small costs one line, not one a rate."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a", (300, 200)), ("b", (290, 400)), ("c", (500, 127))):
        make_image(*size, ord(name)).save(folder / f"{name}.png")
    paths = sorted(folder.iterdir())
    seen: list[tuple[int, int]] = []

    class Sizes(Metrics):
        names, unavailable = ("psnr", "colour"), {}

        def score(self, reference: Image.Image, decoded: Image.Image) -> dict[str, float | None]:
            assert reference.size == decoded.size and reference.size in ((256, 128), (256, 384))
            return {"psnr": psnr(reference, decoded)}

        def features(self, image: Image.Image) -> dict[str, np.ndarray]:
            seen.append(image.size)
            return super().features(image)

    codec = OscarImageCodec(tiny, "tiny", "paper")
    frame = evaluate(codec, paths, Sizes({}), tmp_path / "out", [0.0019, 0.125], progress=False)
    assert list(frame["image"]) == ["a.png", "a.png", "b.png", "b.png"] and set(frame["protocol"]) == {"paper"}
    assert set(zip(frame["scored_width"], frame["scored_height"], strict=True)) == {(256, 128), (256, 384)}
    assert seen == [(300, 200), (256, 128), (256, 128), (290, 400), (256, 384), (256, 384)]
    (failed,) = load_results(tmp_path / "out")[1]["failed"]
    assert failed["image"] == "c.png" and failed["point"] is None and "500x127" in failed["error"]
    again = evaluate(codec, paths, Sizes({}), tmp_path / "again", [0.125], progress=False)
    assert list(again["psnr"]) == list(frame["psnr"][frame["point"] == 0.125]), "seeded by the image"
