"""The demo with a stand-in codec, and the page, sheet and CSV made from its results."""

from __future__ import annotations

import csv
import importlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import oscar
from oscar.benchmark.report.sheet import Result, means_per_rate, write_contact_sheet, write_csv, write_html
from oscar.rates import PAPER_RATES


class JpegCodec:
    """Behaves as the codec does, by JPEG: quality rises with rate."""

    points = tuple(rate.bpp for rate in PAPER_RATES[-3:])
    bottleneck = SimpleNamespace(point_name="rate")

    def compress_batch(self, images: list[Image.Image], rate: float) -> list[bytes]:
        return [self.compress(image, rate) for image in images]

    def compress(self, image: Image.Image, rate: float = 0.125) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=round(rate * 400))
        return buffer.getvalue()

    def decompress(self, data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return importlib.import_module("oscar.benchmark.demo")


def save_image(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:height, 0:width]
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_image(tmp_path / "in" / "a <b> & c.png", 200, 170)
    save_image(tmp_path / "in" / "deep" / "small.png", 20, 90)
    save_image(tmp_path / "in" / "small.bmp", 30, 30)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    return tmp_path / "in"


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {value for name, value in attrs if name in ("src", "href", "data-original")}


def test_demo_end_to_end(demo, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oscar, "load", lambda *_: JpegCodec(), raising=False)
    out = tmp_path / "out"
    assert demo.main(["--images", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "left out" in printed and "broken.png" in printed and "Means per rate" in printed

    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3
    for row in rows:
        path = out / "files" / f"{row['image']}_{float(row['rate']):.4f}.oscar"
        assert path.stat().st_size == int(row["file_bytes"])
        bpp = 8 * int(row["file_bytes"]) / (int(row["width"]) * int(row["height"]))
        assert float(row["actual_bpp"]) == pytest.approx(bpp, abs=1e-6)
        assert (row["ms_ssim"] == "") == (row["image"] != "a <b> & c")
    assert {row["image"] for row in rows} == {"a <b> & c", "small", "small-2"}

    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) == 3 * (1 + 3)
    assert all((out / unquote(link)).is_file() for link in links.found)
    assert "<b> &" not in page and "unavailable: image smaller than 161" in page
    assert not re.search(r"https?://|\$[a-z{]", page)
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 4 * 256


def test_demo_refusals(demo, tmp_path, capsys):
    assert demo.main(["--images", str(tmp_path / "none")]) == 2
    assert demo.main(["--images", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def results(tmp_path: Path) -> list[Result]:
    save_image(tmp_path / "x.png", 64, 300)
    common = {"encode_seconds": 1.0, "decode_seconds": 2.0, "original": tmp_path / "x.png"}
    return [
        Result("p", 0.125, 64, 300, 300, 20.0, None, reconstruction=tmp_path / "x.png", **common),
        Result("q", 0.125, 64, 300, 100, 30.0, 0.5, reconstruction=tmp_path / "x.png", **common),
        Result("p", 0.0019, 64, 300, 20, 80.0, None, reconstruction=tmp_path / "x.png", **common),
    ]


def test_means(tmp_path):
    low, high = means_per_rate(results(tmp_path))
    assert (low.rate, low.images, low.ms_ssim) == (0.0019, 1, None)
    assert (high.rate, high.images, high.file_bytes, high.psnr, high.ms_ssim) == (0.125, 2, 200, 25.0, 0.5)
    assert high.actual_bpp == 8 * 200 / (64 * 300)


def test_uneven_results_can_be_shown(tmp_path):
    rows = results(tmp_path)
    write_csv(rows, tmp_path / "r.csv")
    write_html(rows, tmp_path / "index.html", "<title>", "note")
    write_contact_sheet(rows, tmp_path / "sheet.png", most_images=1)
    assert "&lt;title&gt;" in (tmp_path / "index.html").read_text()
    assert "80.00 dB" in (tmp_path / "index.html").read_text()
