"""The command line: in process with a stand-in codec, and in its own process for what start-up costs."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import oscar
from oscar.bitstream import Coding, Container, WrongModelError
from oscar.cli import engine, lean, loading
from oscar.cli import main as cli
from oscar.cli.image_files import IMAGE_FORMATS
from oscar.cli.messages import CommandError
from oscar.data.images import image_suffixes
from oscar.model_folder import CONFIG, RUNTIME, CheckpointError, locate
from oscar.rate_control import TargetError
from oscar.rates import PAPER_RATES, RatePoint, find_rate
from oscar.utils import files as jobs

ROOT = Path(__file__).parents[1]
TAG = 0x0ABC


class FakeRates:
    """Stands for the bottleneck of a model with the paper's rates."""

    point_name, point_words, max_effort = "rate", "rates", 9
    points = all_points = tuple(sorted(PAPER_RATES, key=lambda rate: rate.bpp))

    def label(self, point: RatePoint) -> str:
        return f"{point.bpp:.4f}"

    def parse(self, value: float) -> RatePoint:
        return find_rate(value, self.points)


class FakeCodec:
    """Writes real containers with empty content and decodes to a grey image of the right size."""

    bottleneck = FakeRates()
    default_point: ClassVar[float] = 0.0625
    efforts: ClassVar[list[int]] = []

    def compress(self, image: Image.Image, rate: float | None = None, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None:
            fitting = [point.bpp for point in self.bottleneck.points if self.length(image, point.bpp) <= max_bytes]
            if not fitting:
                raise TargetError(f"max_bytes is {max_bytes}, which no rate meets")
            rate = max(fitting)
        point = self.bottleneck.parse(rate)
        blank = _container(image.width, image.height, point.id)
        return blank.pack()

    def decompress(self, data: bytes) -> Image.Image:
        container = Container.unpack(data)
        if container.model_tag != TAG:
            raise WrongModelError("file was written by another model")
        return Image.new("RGB", (container.width, container.height), (90, 90, 90))

    def length(self, image: Image.Image, rate: float) -> int:
        return len(self.compress(image, rate))

    def compress_batch(self, images: list[Image.Image], point: float | None, effort: int = 0) -> list[bytes]:
        self.efforts.append(effort)
        point = self.default_point if point is None else point
        return [self.compress(image, point) for image in images]

    def decompress_prefix(self, data: bytes) -> tuple[Image.Image, float]:
        container = Container.unpack(data, whole=False)
        return Image.new("RGB", (container.width, container.height), (90, 90, 90)), 0.75

    def decompress_batch(self, files: list[bytes]) -> list[Image.Image]:
        return [self.decompress(data) for data in files]


def _container(width: int, height: int, rate_id: int, model_tag: int = TAG) -> Container:
    from oscar.bitstream import packed_length
    from oscar.rates import rate_by_id

    rate = rate_by_id(rate_id)
    rows, columns = rate.grid_shape(height, width)
    payload = bytes(packed_length(rows * columns, rate.codebook_size))
    return Container(Coding.PACKED, rate_id, model_tag, width, height, bytes(4), payload)


@pytest.fixture
def loads(monkeypatch) -> list[tuple]:
    """Replaces the model by the stand-in; lists the arguments of each load, the keywords as a last one."""
    calls = []

    def load(*args, **options):
        calls.append((*args, options))
        return FakeCodec()

    monkeypatch.setattr(loading, "load_codec", load)
    return calls


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def oscar_file(tmp_path) -> Path:
    path = tmp_path / "file.oscar"
    path.write_bytes(_container(100, 50, 7).pack())
    return path


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def refuse(capsys, *args: object) -> str:
    """Runs a command that must fail, with code 2 and one line; returns the line."""
    assert run(*args) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("oscar: error: "), captured.err
    return lines[0]


def no_leftovers(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("suffix", sorted(IMAGE_FORMATS))
def test_one_file_there_and_back(tmp_path, photo, loads, suffix):
    packed, result = tmp_path / "a.oscar", tmp_path / f"b{suffix}"
    assert run("compress", photo, packed, "--rate", "0.125") == 0
    assert Container.unpack(packed.read_bytes()).rate.bpp == 0.125
    assert run("decompress", packed, result, "--threads", "1") == 0
    with Image.open(result) as image:
        assert image.size == (70, 40)
        assert image.getpixel((3, 3)) == (90, 90, 90)
    assert [call[:-1] for call in loads] == [("nano", "cpu", None), ("nano-vq", "cpu", 1)]
    assert no_leftovers(tmp_path)


class FakeQualities:
    """Stands for the bottleneck of a model with a hyperprior."""

    point_name, point_words, max_effort = "quality", "a hyperprior", 0
    points, all_points = (0.0, 1.0), range(4096)

    def parse(self, value: float) -> float:
        return value


class QualityFake(FakeCodec):
    """Stands for a model with a hyperprior."""

    bottleneck = FakeQualities()
    default_point = 0.5

    def compress(self, image: Image.Image, quality: float) -> bytes:
        code = round(quality * 4095)
        return Container(Coding.HYPERPRIOR, code, TAG, image.width, image.height, b"", b"x").pack()


def test_quality(tmp_path, photo, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_codec", lambda *args, **options: QualityFake())
    for options, code in (((), 2048), (("--quality", 0.4), 1638), (("--quality", 0), 0), (("--quality", 1), 4095)):
        assert run("compress", photo, tmp_path / "a.oscar", *options, "--overwrite") == 0
        container = Container.unpack((tmp_path / "a.oscar").read_bytes())
        assert container.point_code == code and container.quality == code / 4095 and container.rate is None
    capsys.readouterr()
    assert run("info", tmp_path / "a.oscar") == 0
    shown = capsys.readouterr().out
    assert "quality          1.0000" in shown and "hyperprior" in shown and "nominal" not in shown
    assert run("info", tmp_path / "a.oscar", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["quality"], facts["quality_code"]) == (1, 4095) and "rate" not in facts
    for options in (("--rate", "0.125"), ("--effort", "3")):
        assert "allowed: --quality" in refuse(capsys, "compress", photo, tmp_path / "b.oscar", *options)


def test_files_find_the_shipped_model_that_writes_their_kind(tmp_path, loads, capsys):
    (tmp_path / "in").mkdir()
    for index, width in enumerate((10, 20, 30, 40)):
        blank = _container(width, 8, 4)
        if index % 2:
            blank = Container(Coding.HYPERPRIOR, 9, TAG, width, 8, b"", b"x")
        (tmp_path / f"in/{index}.oscar").write_bytes(blank.pack())
    assert run("decompress", tmp_path / "in", tmp_path / "out", "--batch-size", "3") == 0
    assert sorted(call[0] for call in loads) == ["nano", "nano-vq"]
    for index, width in enumerate((10, 20, 30, 40)):
        with Image.open(tmp_path / f"out/{index}.png") as image:
            assert image.size == (width, 8)
    assert run("decompress", tmp_path / "in/1.oscar", tmp_path / "a.png", "--model", "mine") == 0
    assert loads[-1][0] == "mine"


def test_qualities_that_are_not_allowed(tmp_path, photo, loads, capsys):
    for value in ("1.5", "-0.1", "nan"):
        assert "allowed: 0 to 1" in refuse(capsys, "compress", photo, tmp_path / "b.oscar", "--quality", value)
    words = refuse(capsys, "compress", photo, tmp_path / "b.oscar", "--quality", "0.5")
    assert "this model has rates; allowed: --rate 0.0019, " in words
    for option, value in (("--rate", "0.125"), ("--bpp", "0.1"), ("--max-bytes", "60")):
        words = refuse(capsys, "compress", photo, tmp_path / "b.oscar", "--quality", "0.5", option, value)
        assert "exclude each other" in words
    assert not (tmp_path / "b.oscar").exists()


def test_a_part_of_a_file(tmp_path, loads, capsys):
    whole = Container(Coding.HYPERPRIOR, 9, TAG, 70, 40, b"", bytes(40)).pack()
    (tmp_path / "part.oscar").write_bytes(whole[:-5])
    refuse(capsys, "decompress", tmp_path / "part.oscar", tmp_path / "b.png")
    assert run("decompress", tmp_path / "part.oscar", tmp_path / "b.png", "--partial") == 0
    assert "70x40 pixels from 75% of the symbols" in capsys.readouterr().out
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (70, 40)


def test_targets(tmp_path, photo, loads, capsys):
    for option, value in (("--max-bytes", 60), ("--bpp", 60 * 8 / (40 * 70))):
        assert run("compress", photo, tmp_path / "a.oscar", option, value, "--overwrite") == 0
        assert Container.unpack((tmp_path / "a.oscar").read_bytes()).rate.bpp == 0.125
    assert run("compress", photo, tmp_path / "a.oscar", "--max-bytes", 45, "--overwrite") == 0
    assert Container.unpack((tmp_path / "a.oscar").read_bytes()).rate.bpp < 0.125
    capsys.readouterr()
    words = refuse(capsys, "compress", photo, tmp_path / "b.oscar", "--max-bytes", "5")
    assert "max_bytes is 5" in words and not (tmp_path / "b.oscar").exists()


def test_effort_is_passed_on(tmp_path, photo, loads):
    assert run("compress", photo, tmp_path / "a.oscar", "--effort", "4") == 0
    assert FakeCodec.efforts[-1] == 4


def test_file_into_folder(tmp_path, photo, loads):
    (tmp_path / "out").mkdir()
    assert run("compress", photo, tmp_path / "out") == 0
    assert run("decompress", tmp_path / "out" / "photo.oscar", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["photo.oscar", "photo.png"]


def test_existing_output_is_kept_and_nothing_loaded(tmp_path, photo, oscar_file, loads, capsys):
    for command, source, target in [("compress", photo, "a.oscar"), ("decompress", oscar_file, "a.png")]:
        target = tmp_path / target
        target.write_bytes(b"precious")
        assert f"{target}: exists already" in refuse(capsys, command, source, target)
        assert target.read_bytes() == b"precious" and not loads
        assert run(command, source, target, "--overwrite") == 0
        assert target.read_bytes() != b"precious"
        loads.clear()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compress", "{photo}", "{dir}/a.oscar", "--rate", "0.05"], "rate 0.05 does not exist; allowed: 0.0019"),
        (["compress", "{photo}", "{dir}/a.oscar", "--rate", "nan"], "rate nan does not exist"),
        (["compress", "{photo}", "{dir}/a.oscar", "--rate", "high"], "--rate"),
        (["compress", "{photo}", "{dir}/a.oscar", "--background", "white"], "allowed: #rrggbb"),
        (["compress", "{photo}", "{dir}/a.oscar", "--threads", "0"], "--threads"),
        (["compress", "{photo}", "{dir}/a.oscar", "--overwrite", "--skip-existing"], "exclude each other"),
        (["compress", "{photo}", "{dir}/a.oscar", "--effort", "10"], "--effort"),
        (["compress", "{photo}", "{dir}/a.oscar", "--rate", "0.125", "--bpp", "0.1"], "--rate and --bpp exclude each"),
        (["compress", "{photo}", "{dir}/a.oscar", "--max-bytes", "9", "--bpp", "0.1"], "--bpp and --max-bytes exclude"),
        (["compress", "{photo}", "{dir}/a.oscar", "--bpp", "0.1", "--effort", "2"], "--effort and --bpp exclude"),
        (["compress", "{photo}", "{dir}/a.oscar", "--bpp", "nan"], "--bpp is nan; allowed: above 0"),
        (["compress", "{photo}", "{dir}/a.oscar", "--max-bytes", "0"], "--max-bytes is 0; allowed: above 0"),
        (["compress", "{photo}", "{dir}/a.jpg"], "suffix .jpg is not allowed; allowed: .oscar"),
        (["compress", "{photo}", "{dir}/missing/a.oscar"], "missing does not exist"),
        (["compress", "{photo}"], "'OUT'"),
        (["compress", "{photo}", "{dir}/a.oscar", "--colour", "1"], "--colour"),
        (["compress", "{dir}/none.png", "{dir}/a.oscar"], "none.png: no such file or folder"),
        (["compress", "{packed}", "{dir}/a.oscar"], "file.oscar: not an image of a known format"),
        (["decompress", "{packed}", "{dir}/a.jpg"], "suffix .jpg is not allowed; allowed: .bmp, .png"),
        (["decompress", "{photo}", "{dir}/a.png"], "photo.png: not an .oscar file"),
        (["info", "{photo}"], "photo.png: not an .oscar file"),
        (["info", "{dir}/none.oscar"], "none.oscar: No such file or directory"),
        (["shrink", "{photo}"], "'shrink'"),
        (["convert", "{photo}"], "'IN...'"),
        (["convert", "{photo}", "{dir}/new"], "--backbone is missing; allowed: a diffusers folder or hub id"),
        (["convert", "{photo}", "{photo}", "--backbone", "sd"], "photo.png: exists already; allow it with --overwrite"),
        (["convert", "{dir}/none.pkl", "{dir}/new", "--backbone", "sd"], "none.pkl: no such file"),
        (["convert", "{photo}", "{dir}/new", "--backbone", "sd", "--dtype", "int8"], "--dtype 'int8' does not exist"),
        (["convert", "--back", "a", "b", "{dir}/new.pkl"], "--back takes one model"),
        (["info", "nano-hyperprior"], "nano-hyperprior is not there; it is called nano now"),
        (["convert", "--back", "nano", "{dir}/missing/new.pkl"], "missing does not exist"),
        (["merge", "a", "b"], "--out"),
        (["merge", "a", "b", "--out", "{photo}"], "photo.png: exists already; allow it with --overwrite"),
    ],
)
def test_refusals_load_nothing(tmp_path, photo, oscar_file, loads, capsys, args, words):
    before = sorted(tmp_path.iterdir())
    line = refuse(capsys, *(arg.format(photo=photo, dir=tmp_path, packed=oscar_file) for arg in args))
    assert words in line
    assert not loads and sorted(tmp_path.iterdir()) == before


def test_codec_errors_are_one_line(tmp_path, loads, capsys):
    foreign = tmp_path / "foreign.oscar"
    foreign.write_bytes(_container(9, 9, 0, model_tag=1).pack())
    line = refuse(capsys, "decompress", foreign, tmp_path / "a.png")
    assert line == f"oscar: error: {foreign}: file was written by another model"
    assert not (tmp_path / "a.png").exists() and no_leftovers(tmp_path)


def test_failed_write_names_the_output(tmp_path, photo, loads, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs.os, "replace", full)
    line = refuse(capsys, "compress", photo, tmp_path / "a.oscar")
    assert line.endswith("a.oscar: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_transparency_needs_a_background(tmp_path, loads, capsys):
    Image.new("RGBA", (8, 8), (255, 0, 0, 100)).save(tmp_path / "clear.png")
    assert "transparent" in refuse(capsys, "compress", tmp_path / "clear.png", tmp_path / "a.oscar")
    assert run("compress", tmp_path / "clear.png", tmp_path / "a.oscar", "--background", "#ffffff") == 0


def make_folder(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (1, 2, 3)).save(folder / name)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_folders_keep_their_structure(tmp_path, loads, capsys):
    images = make_folder(tmp_path / "in", ["a.png", "deep/er/b.JPG", "deep/c.v2.webp"])
    (images / "notes.txt").write_text("not an image")
    assert run("compress", images, tmp_path / "packed") == 0
    assert files(tmp_path / "packed") == ["a.oscar", "deep/c.v2.oscar", "deep/er/b.oscar"]
    assert run("decompress", tmp_path / "packed", tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["a.png", "deep/c.v2.png", "deep/er/b.png"]
    assert len(loads) == 2
    assert capsys.readouterr() == (
        "compressed 3 of 3 files\ndecompressed 3 of 3 files\n",
        "oscar: left out 1 file other than images (.txt 1)\n",
    )


def test_bad_image_costs_one_line(tmp_path, loads, capsys):
    images = make_folder(tmp_path / "in", ["a.png", "c.png"])
    (images / "b.png").write_bytes(b"no image")
    assert str(images / "b.png") in refuse(capsys, "compress", images, tmp_path / "out")
    assert files(tmp_path / "out") == ["a.oscar", "c.oscar"]


def test_sources_of_one_name_are_kept_apart(tmp_path, loads, capsys):
    images = make_folder(tmp_path / "in", ["a.png", "a.jpg", "b.png", "A.bmp"])
    assert run("compress", images, tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["A.bmp.oscar", "a.jpg.oscar", "a.png.oscar", "b.oscar"]
    out, err = capsys.readouterr()
    assert out == "compressed 4 of 4 files\n"
    assert err == (
        f"oscar: kept apart by longer names: 3 files, such as {tmp_path / 'out/A.bmp.oscar'} "
        f"of {tmp_path / 'in/A.bmp'}\n"
    )
    assert run("decompress", tmp_path / "out", tmp_path / "back") == 0
    assert files(tmp_path / "back") == ["A.bmp.png", "a.jpg.png", "a.png.png", "b.png"]
    assert capsys.readouterr().err == ""


def test_a_source_of_the_same_name_that_is_added_later_is_not_taken_for_done(tmp_path, loads, capsys):
    images = make_folder(tmp_path / "in", ["a.png", "b.png"])
    assert run("compress", images, tmp_path / "out") == 0
    Image.new("RGB", (10, 9)).save(images / "a.jpg")
    assert run("compress", images, tmp_path / "out", "--skip-existing") == 0
    assert capsys.readouterr().out.endswith("compressed 2 of 3 files, 1 existed\n")
    assert files(tmp_path / "out") == ["a.jpg.oscar", "a.oscar", "a.png.oscar", "b.oscar"]
    assert Container.unpack((tmp_path / "out/a.jpg.oscar").read_bytes()).width == 10
    assert run("compress", images, tmp_path / "out", "--skip-existing") == 0
    assert capsys.readouterr().out == "compressed 0 of 3 files, 3 existed\n"


def test_a_folder_in_the_place_of_a_result_costs_one_line(tmp_path, loads, capsys):
    images = make_folder(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "out/a.oscar").mkdir(parents=True)
    assert f"{tmp_path / 'out/a.oscar'}: Is a directory" in refuse(capsys, "compress", images, tmp_path / "out")
    assert files(tmp_path / "out") == ["b.oscar"]


# Suffixes of what Pillow writes.
WRITTEN = (
    "apng avif bmp dds dib gif icns ico im j2k jfif jp2 jpe jpg mpo pcx pgm png pnm ppm qoi sgi tga tif tiff webp"
).split()


def test_folders_take_all_that_pillow_reads(tmp_path, loads, capsys):
    names = [f"{suffix}.{suffix}" for suffix in WRITTEN if f".{suffix}" in image_suffixes()]
    for name in names:
        side = 128 if name == "icns.icns" else 16
        image = Image.new("RGBA" if side == 128 else "RGB", (side, side), (90, 80, 70))
        (tmp_path / "in").mkdir(exist_ok=True)
        kind = {"apng.apng": "PNG", "dib.dib": "DIB"}.get(name)
        image.save(tmp_path / "in" / name, **({"format": kind} if kind else {}))
    others = ("notes.txt", "more.TXT", "clip.mov", "doc.pdf", "plot.eps", "film.mpg", "cube.h5")
    for name in (*others, "._png.png", ".x.png"):
        (tmp_path / "in" / name).write_bytes(b"no image")
    assert run("compress", tmp_path / "in", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out == f"compressed {len(names)} of {len(names)} files\n"
    assert err == "oscar: left out 7 files other than images (.txt 2, .eps 1, .h5 1, .mov 1, .mpg 1, .pdf 1)\n"
    assert len(files(tmp_path / "out")) == len(names)


def test_what_is_left_out_is_summed_up_from_the_ninth_kind_on(tmp_path, loads, capsys):
    images = make_folder(tmp_path / "in", ["a.png"])
    for index in range(12):
        (images / f"x.k{index:02}").write_bytes(b"")
    assert run("compress", images, tmp_path / "out") == 0
    assert capsys.readouterr().err.endswith(".k05 1, .k06 1, .k07 1, others 4)\n")


def test_interrupted_run_is_resumed(tmp_path, loads, capsys, monkeypatch):
    images = make_folder(tmp_path / "in", ["a.png", "b.png", "c.png"])
    compress, seen = FakeCodec.compress, []

    def interrupted(self, image, rate):
        seen.append(image)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return compress(self, image, rate)

    monkeypatch.setattr(FakeCodec, "compress", interrupted)
    assert run("compress", images, tmp_path / "out") == 130
    assert "interrupted after 1 of 3 files; go on with --skip-existing" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["a.oscar"]
    assert "a.oscar: exists already" in refuse(capsys, "compress", images, tmp_path / "out")
    assert run("compress", images, tmp_path / "out", "--skip-existing") == 0
    assert capsys.readouterr().out == "compressed 2 of 3 files, 1 existed\n"
    assert len(seen) == 4 and files(tmp_path / "out") == ["a.oscar", "b.oscar", "c.oscar"]


def test_batches_of_a_folder(tmp_path, loads, capsys, monkeypatch):
    """A batch that fails is done again one by one, so that only what is at fault fails."""
    images = make_folder(tmp_path / "in", ["a.png", "b.png", "c.png", "d.png", "e.png"])
    (images / "b.png").write_bytes(b"no image")
    batches, compress = [], FakeCodec.compress_batch

    def count(self, images, rate, effort):
        batches.append(len(images))
        return compress(self, images, rate, effort)

    monkeypatch.setattr(FakeCodec, "compress_batch", count)
    assert run("compress", images, tmp_path / "out", "--batch-size", "2") == 2
    captured = capsys.readouterr()
    assert captured.out == "compressed 4 of 5 files, 1 failed\n"
    assert captured.err.count("\n") == 1 and "b.png" in captured.err
    assert batches == [1, 2, 1] and files(tmp_path / "out") == ["a.oscar", "c.oscar", "d.oscar", "e.oscar"]
    assert run("decompress", tmp_path / "out", tmp_path / "back", "--batch-size", "3") == 0
    assert capsys.readouterr().out == "decompressed 4 of 4 files\n"
    assert files(tmp_path / "back") == ["a.png", "c.png", "d.png", "e.png"]


def test_options_of_the_networks(tmp_path, photo, oscar_file, loads, capsys):
    assert run("compress", photo, tmp_path / "a.oscar", "--dtype", "bfloat16", "--compile", "graphs") == 0
    assert run("decompress", oscar_file, tmp_path / "a.png", "--memory", "none", "--tiny-vae", "taesd") == 0
    plain = {"engine": "auto", "dtype": "auto", "compile": False, "memory": "auto", "backbone": None}
    assert loads[0][-1] == plain | {"components": "encoder", "dtype": "bfloat16", "compile": "graphs"}
    assert loads[1][-1] == plain | {"components": "decoder", "memory": None, "tiny_vae": "taesd"}
    for name, value, allowed in (("dtype", "int8", "auto, float32"), ("compile", "max", "off, on, graphs")):
        line = refuse(capsys, "compress", photo, tmp_path / "b.oscar", f"--{name}", value)
        assert f"--{name} '{value}' does not exist; allowed: {allowed}" in line
    assert len(loads) == 2


# Engines


@pytest.fixture
def with_graphs(tmp_path) -> str:
    """A folder that looks like a model with graphs."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (CONFIG, RUNTIME):
        (folder / name).write_text("{}")
    return str(folder)


def lacks(monkeypatch, *modules: str) -> None:
    monkeypatch.setattr(engine, "is_installed", lambda module: module not in modules)


def test_the_engine_that_auto_takes(with_graphs, tmp_path, monkeypatch) -> None:
    plain = {"dtype": "auto", "compile": False, "memory": "auto", "backbone": None, "components": "encoder"}
    others = ({"dtype": "bfloat16"}, {"compile": True}, {"memory": None}, {"backbone": "sd"}, {"tiny_vae": "taesd"})

    def choose(model=with_graphs, device="cpu", engine_name="auto", **options) -> str:
        return engine.choose_engine(engine_name, model, device, plain | options)

    assert choose() == choose(dtype="float32") == choose(device="coreml") == choose(device="directml") == "onnx"
    assert choose(engine_name="torch") == choose(model=str(tmp_path)) == choose(model="user/name") == "torch"
    assert choose(device="cuda") == choose(device="cuda:1") == choose(device="mps") == "torch"
    for options in others:
        assert choose(**options) == "torch"
    lacks(monkeypatch, "onnxruntime")
    assert choose() == "torch"
    lacks(monkeypatch, "onnxruntime", "torch")
    with pytest.raises(CommandError, match="--engine onnx needs onnxruntime, which is not installed; allowed: pip"):
        choose()
    lacks(monkeypatch, "torch")
    assert choose() == choose(device="cuda") == "onnx"
    get = "torch, which is not installed; allowed: pip install 'oscar-codec[torch]'"
    for options in others:
        name = "--" + next(iter(options)).replace("_", "-")
        with pytest.raises(CommandError, match=re.escape(f"{name} needs {get}")):
            choose(**options)
    with pytest.raises(CommandError, match=re.escape(f"--device mps needs {get}")):
        choose(device="mps")
    assert choose(model="no-such") == "onnx"  # which says what there is
    (Path(with_graphs) / RUNTIME).unlink()
    line = f"model {with_graphs}, which has no graphs (runtime.json), needs {get}"
    with pytest.raises(CommandError, match=re.escape(line)):
        choose()


def test_an_image_too_large_for_onnx_goes_through_torch(tmp_path, photo, monkeypatch, capsys) -> None:
    """With auto, and torch there: as large images were taken before there was another engine."""
    from oscar.runtime import codec

    monkeypatch.setattr(codec, "available_memory", lambda: 100_000)
    file, back = tmp_path / "own.oscar", tmp_path / "own.png"
    for command in (("compress", photo, file), ("decompress", file, back)):
        assert run(*command) == 0
        line = refuse(capsys, *command, "--engine", "onnx", "--overwrite")
        assert "are free; allowed: fewer pixels, or --engine torch" in line
    assert Image.open(back).size == Image.open(photo).size


def test_what_onnx_cannot_do_is_refused_at_once(tmp_path, photo, oscar_file, loads, capsys) -> None:
    compress = ("compress", photo, tmp_path / "a.oscar", "--engine", "onnx")
    decompress = ("decompress", oscar_file, tmp_path / "a.png", "--engine", "onnx")
    both = [
        ("--dtype", "float16"),
        ("--compile", "on"),
        ("--memory", "4GB"),
        ("--memory", "none"),
        ("--backbone", "sd"),
    ]
    for words in both:
        for command in (compress, decompress):
            assert f"--engine onnx and {words[0]} exclude each other" in refuse(capsys, *command, *words)
    assert "--engine onnx and --tiny-vae exclude" in refuse(capsys, *decompress, "--tiny-vae", "taesd")
    line = refuse(capsys, *compress, "--device", "mps")
    assert "--device is mps; allowed with --engine onnx: cpu, cuda, coreml, directml" in line
    line = refuse(capsys, "compress", photo, tmp_path / "a.oscar", "--engine", "tf")
    assert "--engine 'tf' does not exist; allowed: auto, torch, onnx" in line
    assert loads == []


def test_an_empty_folder_is_no_failure(tmp_path, loads, capsys):
    (tmp_path / "in/deeper").mkdir(parents=True)
    (tmp_path / "in/._a.png").write_bytes(b"sidecar")
    for command, what in (("compress", "images"), ("decompress", ".oscar files")):
        assert run(command, tmp_path / "in", tmp_path / "out") == 0
        assert capsys.readouterr() == (
            f"{command}ed 0 of 0 files\n",
            f"oscar: {tmp_path / 'in'}: no {what} in this folder\n",
        )
    assert run("info", tmp_path / "in", "--json") == 0
    assert capsys.readouterr() == ("[]\n", f"oscar: {tmp_path / 'in'}: no .oscar files in this folder\n")
    assert not loads and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_costs_one_line(tmp_path, loads, capsys, monkeypatch):
    images = make_folder(tmp_path / "in", ["a.png", "closed/b.png"])
    scan = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    line = refuse(capsys, "compress", images, tmp_path / "out")
    assert line == f"oscar: error: {images / 'closed'}: Permission denied"
    assert files(tmp_path / "out") == ["a.oscar"]


def test_a_broken_profile_is_a_warning(tmp_path, loads, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name, icc_profile=b"no profile")
    for source, target, name in (("in/a.png", "a.oscar", "a.png"), ("in", "out", "b.png")):  # each file is said once
        assert run("compress", tmp_path / source, tmp_path / target) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"oscar: warning: {tmp_path / 'in' / name}: colour profile is damaged and not applied: ")


def animation(path: Path, widths: list[int] | None = None, **options) -> Path:
    """Frames of grey 10, 20, 30."""
    frames = [Image.new("RGB", (24, 24), (10 * index,) * 3) for index in (1, 2, 3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    return path


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int, int]]:
    """The first pixel of each image that is compressed."""
    pixels, compress = [], FakeCodec.compress

    def look(self, image, *args, **options):
        pixels.append(image.getpixel((0, 0)))
        return compress(self, image, *args, **options)

    monkeypatch.setattr(FakeCodec, "compress", look)
    return pixels


ANIMATIONS = {"a.gif": {}, "a.png": {}, "a.webp": {"lossless": True}, "a.tif": {}, "a.mpo": {"quality": 100}}


@pytest.mark.parametrize("name", ANIMATIONS)
def test_of_several_frames_the_first_or_the_chosen_one_is_taken(tmp_path, loads, seen, capsys, name):
    path = animation(tmp_path / name, **ANIMATIONS[name])
    assert run("compress", path, tmp_path / "a.oscar") == 0
    out, err = capsys.readouterr()
    assert err == f"oscar: {path}: has 3 frames, and the first is taken; --frame N takes another\n"
    for frame in (1, 2, 3):
        assert run("compress", path, tmp_path / "a.oscar", "--overwrite", "--frame", frame) == 0
        assert capsys.readouterr().err == ""
    assert seen == [(10, 10, 10), (10, 10, 10), (20, 20, 20), (30, 30, 30)]
    line = refuse(capsys, "compress", path, tmp_path / "b.oscar", "--frame", "4")
    assert line == f"oscar: error: {path}: frame 4 does not exist; allowed: 1 to 3"
    assert "--frame" in refuse(capsys, "compress", path, tmp_path / "b.oscar", "--frame", "0")
    assert not (tmp_path / "b.oscar").exists()


def test_frames_in_folders(tmp_path, loads, seen, capsys):
    images = make_folder(tmp_path / "in", ["one.png"])
    animation(images / "a.gif")
    assert run("compress", images, tmp_path / "out") == 0
    assert capsys.readouterr().err == (
        f"oscar: {images / 'a.gif'}: has 3 frames, and the first is taken; --frame N takes another\n"
    )
    animation(images / "b.webp")
    assert run("compress", images, tmp_path / "out", "--overwrite", "--batch-size", "2") == 0
    assert capsys.readouterr().err == (
        "oscar: 2 files have several frames, and the first is taken; --frame N takes another\n"
    )
    line = refuse(capsys, "compress", images, tmp_path / "out", "--overwrite", "--frame", "3")
    assert line == f"oscar: error: {images / 'one.png'}: frame 3 does not exist; allowed: 1"


def test_overwrite_keeps_mode_and_link(tmp_path, photo, oscar_file, loads):
    for command, source, name in (("compress", photo, "real.oscar"), ("decompress", oscar_file, "real.png")):
        real, link = tmp_path / name, tmp_path / f"link-{name}"
        real.write_bytes(b"old")
        real.chmod(0o640)
        link.symlink_to(name)
        assert run(command, source, link, "--overwrite") == 0
        assert link.is_symlink() and real.read_bytes() != b"old"
        assert real.stat().st_mode & 0o777 == 0o640
        link.unlink()
        real.unlink()
        link.symlink_to(name)  # which leads nowhere now: nothing is there to be lost, or to be skipped
        assert run(command, source, link, "--skip-existing") == 0
        assert link.is_symlink() and real.is_file() and no_leftovers(tmp_path)


@pytest.mark.parametrize(
    ("size", "suffix", "words"),
    [
        ((16384, 9), ".webp", "16384x9 pixels do not fit into .webp; allowed: up to 16383 a side, or .png"),
        ((9, 16384), ".webp", "9x16384 pixels do not fit into .webp"),
        ((40000, 40000), ".bmp", "40000x40000 pixels do not fit into .bmp; allowed: up to 4294967241 bytes of pixels"),
        ((40000, 40000), ".tif", "40000x40000 pixels do not fit into .tif"),
        ((65536, 65536), ".tiff", "65536x65536 pixels do not fit into .tiff"),
        ((16383, 16383), ".webp", None),
        ((37837, 37837), ".bmp", None),  # rows of 113,512 bytes, the largest square
        ((37838, 37838), ".bmp", "do not fit"),
        ((37700, 37700), ".tif", None),
        ((65536, 65536), ".png", None),
        ((65536, 65536), ".ppm", None),
    ],
)
def test_limits_of_formats_are_refused_from_the_header(tmp_path, loads, monkeypatch, capsys, size, suffix, words):
    def decode(self, files):  # stands for the decoder, which must not be reached by what cannot be stored
        return [Image.new("RGB", (4, 4)) for _ in files]

    monkeypatch.setattr(FakeCodec, "decompress_batch", decode)
    big = Container(Coding.HYPERPRIOR, 9, TAG, *size, b"", b"x")
    (tmp_path / "a.oscar").write_bytes(big.pack())
    if words is None:
        assert run("decompress", tmp_path / "a.oscar", tmp_path / f"a{suffix}") == 0
        return
    for options in ((), ("--partial",)):
        line = refuse(capsys, "decompress", tmp_path / "a.oscar", tmp_path / f"a{suffix}", *options)
        assert f"{tmp_path / 'a.oscar'}: " in line and words in line
    assert not loads and not (tmp_path / f"a{suffix}").exists()


def test_pillow_has_the_limits_that_are_refused():
    for side, kind in ((16383, "WEBP"), (16384, "WEBP")):
        image = Image.new("RGB", (side, 1))
        if side == 16383:
            image.save(io.BytesIO(), kind, lossless=True)
        else:
            with pytest.raises(ValueError):
                image.save(io.BytesIO(), kind, lossless=True)


def standard_input(monkeypatch, data: bytes, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(data))
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stream)


def test_standard_input_and_output(tmp_path, photo, loads, monkeypatch, capsysbinary):
    standard_input(monkeypatch, photo.read_bytes())
    assert run("compress", "-", "-") == 0
    packed, err = capsysbinary.readouterr()
    assert Container.unpack(packed).width == 70
    assert err.startswith(b"oscar: standard output: ") and err.count(b"\n") == 1
    for options, kind in (((), "PNG"), (("--format", "webp"), "WEBP"), (("--format", "PPM"), "PPM")):
        standard_input(monkeypatch, packed)
        assert run("decompress", "-", "-", *options) == 0
        out, _ = capsysbinary.readouterr()
        with Image.open(io.BytesIO(out)) as image:
            assert (image.format, image.size) == (kind, (70, 40))
    standard_input(monkeypatch, packed)
    assert run("info", "-", "--json") == 0
    assert json.loads(capsysbinary.readouterr().out)["width"] == 70
    standard_input(monkeypatch, photo.read_bytes())
    assert run("compress", "-", tmp_path / "a.oscar") == 0 and (tmp_path / "a.oscar").read_bytes() == packed
    assert run("decompress", tmp_path / "a.oscar", "-") == 0
    assert not (Path.cwd() / "-").exists()


def test_nothing_but_the_result_goes_to_standard_output(photo, loads, monkeypatch, capsysbinary):
    def talkative(self, images, *args):
        print("a library's remark")
        return [self.compress(image, 0.125) for image in images]

    monkeypatch.setattr(FakeCodec, "compress_batch", talkative)
    assert run("compress", photo, "-") == 0
    out, err = capsysbinary.readouterr()
    assert Container.unpack(out).width == 70 and b"a library's remark" in err


@pytest.mark.parametrize(
    ("args", "data", "words"),
    [
        (["compress", "-", "{dir}/a.oscar"], b"no image", "standard input: not an image of a known format"),
        (["compress", "-", "-"], b"", "standard input: not an image of a known format"),
        (["decompress", "-", "-"], b"no file", "standard input: not an .oscar file"),
        (["info", "-"], b"no file", "standard input: not an .oscar file"),
        (["compress", "-", "{dir}"], b"", "is a folder; allowed: a name for the result of standard input"),
        (["compress", "{dir}", "-"], b"", "is a folder, which cannot go to standard output; allowed: a folder"),
        (["compress", "-", "{dir}/a.oscar"], None, "standard input is a terminal; allowed: a file or a pipe"),
        (["info", "-"], None, "standard input is a terminal; allowed: a file or a pipe"),
        (["decompress", "{packed}", "-", "--format", "jpg"], b"", "--format 'jpg' does not exist; allowed: png, ppm"),
        (["decompress", "{packed}", "{dir}/a.png", "--format", "webp"], b"", "--format is webp, but OUT is "),
    ],
)
def test_refusals_of_standard_streams(tmp_path, photo, oscar_file, loads, monkeypatch, capsys, args, data, words):
    standard_input(monkeypatch, data or b"", terminal=data is None)
    before = sorted(tmp_path.iterdir())
    assert words in refuse(capsys, *(arg.format(dir=tmp_path, packed=oscar_file) for arg in args))
    assert not loads and sorted(tmp_path.iterdir()) == before


def test_a_terminal_gets_no_bytes(photo, loads, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "standard output is a terminal" in refuse(capsys, "compress", photo, "-")
    assert not loads


def test_format_of_a_folder(tmp_path, oscar_file, loads):
    assert run("decompress", oscar_file.parent, tmp_path / "out", "--format", "webp") == 0
    assert files(tmp_path / "out") == ["file.webp"]
    (tmp_path / "into").mkdir()
    assert run("decompress", oscar_file, tmp_path / "into", "--format", "tif") == 0
    assert files(tmp_path / "into") == ["file.tif"]


def test_pipes_in_the_place_of_files(tmp_path, photo, loads):
    """As a shell's <(command) gives them."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name, data in (("compress", photo.read_bytes()), ("decompress", _container(70, 40, 4).pack())):
        writer = threading.Thread(target=pipe.write_bytes, args=(data,))
        writer.start()
        assert run(name, pipe, tmp_path / ("a.oscar" if name == "compress" else "a.png")) == 0
        writer.join(timeout=10)


def test_info_as_json(oscar_file, capsys):
    assert run("info", oscar_file, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    size = oscar_file.stat().st_size
    assert (facts["width"], facts["height"], facts["rate"], facts["rate_id"]) == (100, 50, 0.125, 7)
    assert facts["model_tag"] == "0abc" and facts["coding"] == "packed"
    assert facts["bytes"] == size == sum(facts["parts"].values())
    assert facts["actual_bpp"] == 8 * size / 5000
    assert facts["nominal_bpp"] == 13 * 7 * 8 / 5000
    assert facts["parts"]["payload"] == 13 * 7


def test_info_as_text_and_of_a_folder(oscar_file, capsys):
    assert run("info", oscar_file) == 0
    text = capsys.readouterr().out
    for words in ("100 x 50 pixels", "0.1250 (id 7)", "0abc", "actual bpp", "nominal bpp", "payload"):
        assert words in text
    (oscar_file.parent / "broken.oscar").write_bytes(oscar_file.read_bytes()[:-1])
    assert run("info", oscar_file.parent, "--json") == 2
    captured = capsys.readouterr()
    assert [facts["file"] for facts in json.loads(captured.out)] == [str(oscar_file)]
    assert captured.err.count("\n") == 1 and "broken.oscar" in captured.err


def test_info_of_a_file_of_another_bottleneck(tmp_path, capsys):
    """What its operating point means, only its model knows."""
    from oscar.bitstream import Coding, Container

    path = tmp_path / "own.oscar"
    path.write_bytes(Container(Coding.EXTERNAL, 77, 0xABC, 100, 50, b"", b"payload").pack())
    assert run("info", path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["point_code"], facts["coding"]) == (77, "external") and not {"rate", "quality"} & facts.keys()
    assert run("info", path) == 0
    assert "operating point  77" in capsys.readouterr().out


def test_device_and_model_errors_end_the_run(tmp_path, photo, monkeypatch, capsys):
    assert "--device gpu is not available here" in refuse(
        capsys, "compress", photo, tmp_path / "a.oscar", "--device", "gpu"
    )

    def no_model(model, *args, **options):
        raise ValueError(f"model {model}:\nno such folder")

    monkeypatch.setattr("oscar.inference.load.load", no_model)
    images = make_folder(tmp_path / "in", ["a.png", "b.png"])
    line = refuse(capsys, "compress", images, tmp_path / "out", "--model", "other")
    assert line == "oscar: error: model other: no such folder"


def test_rate_that_the_model_lacks(tmp_path, photo, monkeypatch, capsys):
    monkeypatch.setattr("oscar.inference.load.load", lambda *args, **options: FakeCodec())
    lacking = ("compress", photo, tmp_path / "a.oscar", "--rate", "0.0625")
    line = refuse(capsys, *lacking)
    assert line.endswith("--rate is 0.0625, but this model has a hyperprior; allowed: --quality, or --model nano-vq")
    line = refuse(capsys, *lacking, "--model", "nano-vq")
    assert "rate 0.0625 does not exist; allowed: 0.0019, 0.0098, 0.0234" in line and "0.0024" not in line


def test_a_model_that_has_another_name_now():
    with pytest.raises(CheckpointError, match="^model 'nano-hyperprior' is not there; it is called nano now$"):
        locate("nano-hyperprior")


def test_merge(tmp_path, monkeypatch, capsys):
    from oscar.convert import merge

    calls = []
    monkeypatch.setattr(merge, "merge_rates", lambda *args: calls.append(args) or FakeCodec())
    assert run("merge", "low", "high", "--out", tmp_path / "all") == 0
    assert calls == [(["low", "high"], tmp_path / "all")]
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'all'}: rates 0.0019, 0.0098, ")


def test_no_arguments_and_version(capsys):
    assert run() == 0
    assert "compress" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == oscar.__version__


def start(*args: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("args", [["--help"], ["convert", "--help"], ["info", "{}"], ["info", "{}", "--json"]])
def test_light_commands_start_at_once_without_torch(oscar_file, args):
    args = [arg.format(oscar_file) for arg in args]
    program = "import sys; from oscar.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    assert start("-c", program, *args).stdout.splitlines()[-1] == "0 False"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert start("-m", "oscar", *args).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5  # of processor time, which a busy machine does not stretch; start-up has one thread


def test_refusals_in_a_process_of_their_own(tmp_path, photo):
    result = start("-m", "oscar", "compress", photo, tmp_path / "a.oscar", "--rate", "0.3")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_left_alone(tmp_path, oscar_file):
    for index in range(800):  # more than a pipe holds
        (tmp_path / f"{index}.oscar").write_bytes(oscar_file.read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # with which Python itself drops what is not taken
    command = [sys.executable, "-m", "oscar", "info", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 1  # as of Click


def test_through_pipes(photo):
    def oscar(command: str, data: bytes) -> bytes:
        args = [sys.executable, "-m", "oscar", command, "-", "-"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(args, input=data, capture_output=True, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    with Image.open(io.BytesIO(oscar("decompress", oscar("compress", photo.read_bytes())))) as image:
        assert image.size == (70, 40) and image.format == "PNG" and image.info["srgb"] == 0


# The page


def test_the_page_needs_its_extra(loads, monkeypatch, capsys):
    monkeypatch.setattr("oscar.utils.extras.is_installed", lambda name: False)
    assert "gradio is not installed; allowed: pip install 'oscar-codec[app]'" in refuse(capsys, "app")
    assert loads == []


def test_an_address_that_cannot_be_had_is_refused_before_a_model_is_loaded(loads, monkeypatch, capsys):
    monkeypatch.setattr("oscar.utils.extras.is_installed", lambda name: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refuse(capsys, "app", "--port", port)
    assert f"cannot serve at --host 127.0.0.1 --port {port}: " in line and line.endswith("; allowed: another one")
    assert "cannot serve at --host 203.0.113.1 --port 7860: " in refuse(capsys, "app", "--host", "203.0.113.1")
    line = refuse(capsys, "app", "--port", 70000)
    assert "'--port'" in line and "65535" in line
    assert loads == []


def test_sigterm_ends_like_an_interrupt(tmp_path, monkeypatch):
    def wait(backbones: list[str]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    codes: list[int] = []
    monkeypatch.setattr("oscar.cli.doctor.run_checks", wait)
    monkeypatch.setattr(sys, "argv", ["oscar", "doctor"])
    monkeypatch.setattr(lean, "is_own_process", False)
    monkeypatch.setattr(lean, "leave", codes.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        cli.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert codes == [130] and not list(tmp_path.iterdir())
