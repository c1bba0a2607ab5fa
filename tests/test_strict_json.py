"""JSON without NaN and Infinity: the helper, that everything uses it, and the values that results take."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from oscar.baselines.base import Encoded, ImageCodec
from oscar.evaluation.evaluate import evaluate
from oscar.evaluation.results import load_results, means_per_point
from oscar.metrics.image import MetricSet
from oscar.utils.strict_json import as_read, dumps, write_json

ROOT = Path(__file__).parents[1]
NAN, INF = float("nan"), float("inf")


def refuse(word: str):
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (NAN, "null"), (INF, "null"), (-INF, "null"), (np.float64("nan"), "null"), ([1.0, NAN], "[1.0, null]"),
        ({"a": {"b": [INF, (NAN, 2)]}}, '{"a": {"b": [null, [null, 2]]}}'), (1e308, "1e+308"), (0.1, "0.1"),
        (True, "true"), (None, "null"), (3, "3"), ("NaN", '"NaN"'), ({}, "{}"), ((), "[]"), (-0.0, "-0.0"),
        ({1: NAN, 0.5: 1}, '{"1": null, "0.5": 1}'), (np.float64(0.25), "0.25"), ("\u7167", '"\\u7167"'),
    ],
)  # fmt: skip
def test_values(value, text: str, tmp_path: Path) -> None:
    assert dumps(value) == text and as_read(value) == json.loads(text, parse_constant=refuse)
    write_json(tmp_path / "file.json", value, indent=None)
    assert (tmp_path / "file.json").read_text() == text + "\n"


def test_what_is_no_json_is_still_refused() -> None:
    for value in (np.zeros(2), {1, 2}, object(), b"bytes"):
        with pytest.raises(TypeError):
            dumps(value)


def test_nothing_writes_json_that_is_not_strict() -> None:
    """Where a number that is not finite would be a fault, json itself refuses it: `allow_nan=False`."""
    calls = 0
    for path in [*ROOT.glob("oscar/**/*.py"), *ROOT.glob("scripts/*.py")]:
        text = path.read_text()
        assert not re.search(r"json\.dump\(|to_json\(|from json import", text), path
        for match in re.finditer(r"json\.dumps\(", text):
            calls += 1
            assert "allow_nan=False" in text[match.end() : match.end() + 100], (path, text[match.start() :][:80])
    assert calls > 3


class Lossless(ImageCodec):
    """PNG, whose decoded images equal the originals."""

    name, label, point_name, points, grid = "png-test", "PNG", "level", (1.0,), (1.0,)

    def describe(self) -> dict:
        return {**super().describe(), "limit": INF, "unknown": NAN}

    def encode(self, image: Image.Image, point: float) -> Encoded:
        file = io.BytesIO()
        image.save(file, "PNG")
        return Encoded(file.getvalue(), estimated_bpp=NAN)

    def decode(self, data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")


def test_results_of_equal_images(make_image, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a", (180, 170)), ("b", (60, 40))):
        make_image(*size).save(folder / f"{name}.png")
    metrics = MetricSet(["psnr", "ms_ssim", "ms_ssim_y", "psnr_p256"])
    for _ in range(2):  # the second finds all that the first wrote
        frame = evaluate(Lossless(), sorted(folder.iterdir()), metrics, tmp_path / "out", progress=False)
    assert list(frame["psnr"]) == [80, 80] and frame["ms_ssim_y"][0] == pytest.approx(1)
    assert frame["ms_ssim"].isna().tolist() == [False, True]
    files = [*(tmp_path / "out").rglob("*.json"), *(tmp_path / "out").rglob("*.jsonl")]
    assert {path.name for path in files} == {"results.json", "run.json", "0.jsonl"}
    for path in files:
        for document in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(document, parse_constant=refuse)
    record = load_results(tmp_path / "out")[1]
    small = {"images": ["b.png"], "needed": "161 pixels a side"}
    no_patch = {"images": ["a.png", "b.png"], "needed": "a patch of 256x256 pixels"}
    assert record["without_value"] == {"ms_ssim": small, "ms_ssim_y": small, "psnr_p256": no_patch}
    assert record["codec"]["limit"] is None
    assert "inf" not in (tmp_path / "out/results.csv").read_text().lower()
    assert means_per_point(frame)["psnr"].tolist() == [80]
    if (tmp_path / "out/results.parquet").exists():
        assert pd.read_parquet(tmp_path / "out/results.parquet")["psnr"].tolist() == [80, 80]
