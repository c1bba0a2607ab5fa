"""Rate-distortion plots: what they draw, how it is called, and that the same data make the same file."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from oscar.benchmark.plots import measured_series, plot_rates, published_series
from oscar.evaluation.curves import published_curves


@pytest.fixture
def means() -> pd.DataFrame:
    def codec(name, label, nominal, actual, values):
        return [
            {"codec": name, "label": label, "nominal_bpp": n, "actual_bpp": a, "psnr": v}
            for n, a, v in zip(nominal, actual, values, strict=True)
        ]

    none = [np.nan] * 3
    return pd.DataFrame(
        codec("oscar-nano", "OSCAR nano", [0.1, 0.02, 0.01], [0.11, 0.03, 0.02], [23, 21, 18])
        + codec("oscar-nano-paper", "OSCAR nano (paper protocol)", [0.1, 0.02, 0.01], none, [24, 22, np.nan])
        + codec("jpeg", "JPEG", none, [0.2, 0.4, 0.8], [25, 30, np.inf])
    )


def test_measured_series_take_the_rate_that_there_is(means):
    ours, paper, jpeg = measured_series(means, "psnr")
    assert ours.ours and ours.bpp == [0.02, 0.03, 0.11] and ours.value == [18, 21, 23]
    assert paper.label == "OSCAR nano (paper protocol) (nominal bpp)" and paper.bpp == [0.02, 0.1]
    assert not jpeg.ours and jpeg.value == [25, 30]  # lossless has no place on the axis
    assert measured_series(means, "dists") == []


def test_published_series_start_with_the_paper_s_codec():
    series = published_series(published_curves("kodak", "paper"), "dists")
    assert series[0].label == "OSCAR" and series[0].ours and len(series[0].bpp) == 8
    assert [curve.label for curve in series[1:]] == sorted(curve.label for curve in series[1:])
    assert all(curve.published for curve in series)


def text_of(svg: Path) -> str:
    """What is written in a plot; matplotlib draws letters as paths and leaves the text in comments."""
    ET.parse(svg)
    return " ".join(part.split("-->")[0].strip() for part in svg.read_text().split("<!--")[1:])


def test_plots_are_vector_files_that_name_everything(means, tmp_path, all_formats):
    published = published_curves("kodak")
    by_rivals = ("psnr", "ms_ssim", "lpips_alex", "dists", "fid")
    written = plot_rates(tmp_path, means, published, "Means over Kodak, 24 images", {"dists": "no weights"})
    assert [path.name for path in written] == [f"rd_{name}.pdf" for name in by_rivals]
    assert all(path.read_bytes().startswith(b"%PDF") for path in written)
    assert Image.open(tmp_path / "rd_psnr.png").width > 1000
    psnr = text_of(tmp_path / "rd_psnr.svg")
    for words in (
        "Means over Kodak, 24 images",
        "OSCAR nano",
        "JPEG",
        "PSNR, dB",
        "Measured here",
        "OneDC",
        "published by",
    ):
        assert words in psnr, words
    dists = text_of(tmp_path / "rd_dists.svg")
    for words in ("not measured here: no weights", "OneDC", "lower is better", "published by"):
        assert words in dists, words
    assert "Measured here" not in dists and "OSCAR" not in dists
    assert "not among the metrics of this run" in text_of(tmp_path / "rd_lpips_alex.svg")


def test_the_paper_s_curves_are_drawn_under_its_protocol(means, tmp_path):
    ours = means[means["codec"] == "oscar-nano-paper"].rename(columns={"psnr": "dists"})
    names = ["lpips_vgg", "dists", "musiq", "clipiqa_plus"]
    written = plot_rates(tmp_path, ours, published_curves("kodak", "paper"), "Means over Kodak", protocol="paper")
    assert [path.name for path in written] == [f"rd_{name}_paper.pdf" for name in names]
    dists = text_of(tmp_path / "rd_dists_paper.svg")
    for words in ("Means over Kodak, protocol paper", "Measured here", "nominal bpp", "OSCAR", "read off"):
        assert words in dists, words


def test_published_curves_are_dashed_and_measured_ones_are_not(means, tmp_path):
    plot_rates(tmp_path, means, published_curves(None), "photos")
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["rd_psnr.svg"]
    assert "stroke-dasharray" not in (tmp_path / "rd_psnr.svg").read_text()
    plot_rates(tmp_path, means, published_curves("kodak").query("metric == 'psnr'"), "photos")
    assert "stroke-dasharray" in (tmp_path / "rd_psnr.svg").read_text()


def test_the_same_data_make_the_same_files(means, tmp_path, all_formats):
    for folder in ("a", "b"):
        plot_rates(tmp_path / folder, means, published_curves(None), "photos")
    for suffix in ("pdf", "svg", "png"):
        first, second = ((tmp_path / folder / f"rd_psnr.{suffix}").read_bytes() for folder in ("a", "b"))
        assert first == second, suffix
