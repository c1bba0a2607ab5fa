"""Tables: their three forms, and the means that stand in them."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from oscar.benchmark.tables import (
    bd_frame_table,
    matched_frame,
    matched_tables,
    means_frame,
    means_table,
    timing_frame,
    timing_table,
)
from oscar.utils.tables import Table, escape_latex


@pytest.fixture
def table() -> Table:
    frame = pd.DataFrame({"label": ["A_1 & co", "b|c"], "value": [1 / 3, np.nan], "bytes": [1234, 5], "hidden": [0, 1]})
    shown = {"label": "codec", "value": "PSNR dB", "bytes": "bytes"}
    return Table("some_table", "100 % of it.", frame, shown, {"value": "{:.2f}".format}, ["not all is there"])


def test_csv_has_all_columns_and_digits(table, tmp_path):
    table.write(tmp_path / "new/folder")
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [
        "some_table.csv",
        "some_table.md",
        "some_table.tex",
    ]
    read = pd.read_csv(tmp_path / "new/folder/some_table.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(read, table.frame)


def test_markdown(table):
    assert table.to_markdown().splitlines() == [
        "100 % of it.",
        "",
        "| codec | PSNR dB | bytes |",
        "| :-- | --: | --: |",
        "| A_1 & co | 0.33 | 1,234 |",
        r"| b\|c | – | 5 |",
        "",
        "- not all is there",
    ]


def test_latex_is_a_booktabs_table_with_its_text_escaped(table):
    text = table.to_latex()
    assert r"\caption{100 \% of it.}" in text and r"\label{tab:some-table}" in text
    body = text[text.index(r"\toprule") :].splitlines()
    assert body[:6] == [
        r"\toprule",
        r"codec & PSNR dB & bytes \\",
        r"\midrule",
        r"A\_1 \& co & 0.33 & 1,234 \\",
        r"b\textbar{}c & -- & 5 \\",
        r"\bottomrule",
    ]
    assert r"\begin{tabular}{lrr}" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_every_special_character_is_escaped():
    assert escape_latex(r"\&%$#_{}~^<>") == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"
    )
    assert escape_latex("3.4× −1") == r"3.4$\times$ $-$1"


RATES = ["nominal_bpp", "estimated_bpp", "actual_bpp"]


def rows(codec: str, label: str, points, images=("a", "b"), **metrics) -> pd.DataFrame:
    """Rows whose rate is the point and whose metrics are given per image and point."""
    return pd.DataFrame(
        [
            {
                "image": image,
                "codec": codec,
                "label": label,
                "protocol": "bitstream",
                "point": point,
                **dict.fromkeys(RATES, point),
                "file_bytes": 1000 * point,
                "encode_seconds": 1.0,
                "decode_seconds": 2.0,
                **{name: values[i][j] for name, values in metrics.items()},
            }
            for i, image in enumerate(images)
            for j, point in enumerate(points)
        ]
    )


@pytest.fixture
def ours() -> pd.DataFrame:
    return rows("oscar-nano", "OSCAR nano", [0.1, 0.5], psnr=[[20.0, 22.0], [30.0, 34.0]])


def test_means_keep_the_codecs_order_and_count_images(ours):
    jpeg = rows("jpeg", "JPEG", [0.8, 0.2], images=("b",), psnr=[[40.0, 30.0]])
    sets = pd.DataFrame([{"codec": "jpeg", "point": 0.2, "fid": 7.0}])
    means = means_frame(pd.concat([ours, jpeg]), sets, ["psnr", "fid", "dists"])
    assert list(means["codec"]) == ["oscar-nano"] * 2 + ["jpeg"] * 2
    assert list(means["point"]) == [0.1, 0.5, 0.2, 0.8]
    assert list(means["psnr"]) == [25, 28, 30, 40]
    assert list(means["images"]) == [2, 2, 1, 1]
    assert means["fid"].notna().sum() == 1 and "dists" not in means


def test_what_is_unavailable_stands_in_the_table_of_means(ours):
    means = means_frame(ours, pd.DataFrame(), ["psnr", "dists"])
    table = means_table(means, ["psnr", "dists"], {"vtm": "EncoderAppStatic is not on the PATH", "dists": "no weights"})
    text = table.to_markdown()
    assert "unavailable: EncoderAppStatic is not on the PATH |" in text
    assert text.endswith("- DISTS: unavailable: no weights\n")
    assert len(pd.read_csv(io.StringIO(table.frame.to_csv()))) == 3


@pytest.fixture
def matched() -> pd.DataFrame:
    """At rate 0.5 JPEG has a file for one of two images, at 0.1 for none; WebP always has one."""

    def row(image, point, codec, bytes_, psnr):
        target = 1000 * point
        return {
            "image": image,
            "target": "oscar-nano",
            "target_point": point,
            "target_bytes": target,
            "codec": codec,
            "label": codec.upper(),
            "file_bytes": bytes_,
            "actual_bpp": bytes_ / 1000,
            "fits": bytes_ <= target,
            "psnr": psnr,
        }

    return pd.DataFrame(
        [
            row("a", 0.1, "jpeg", 300, 21.0),
            row("b", 0.1, "jpeg", 500, 31.0),
            row("a", 0.5, "jpeg", 600, 23.0),
            row("b", 0.5, "jpeg", 499, 33.0),
            row("a", 0.1, "webp", 90, 21.5),
            row("b", 0.1, "webp", 100, 30.0),
            row("a", 0.5, "webp", 480, 23.0),
            row("b", 0.5, "webp", 500, 36.0),
        ]
    )


def test_matched_means_are_over_the_images_that_fit_for_both_sides(matched, ours):
    means = matched_frame(matched, ours, ["psnr"]).set_index(["target_point", "codec"])
    half = means.loc[(0.5, "jpeg")]
    assert (half["fits"], half["images"], half["bytes"]) == (1, 2, 499)
    assert (half["psnr"], half["target_psnr"], half["delta_psnr"]) == (33, 34, -1)  # of image b alone
    assert half["smallest_ratio"] == pytest.approx(600 / 500)
    none = means.loc[(0.1, "jpeg")]
    assert none["fits"] == 0 and np.isnan(none["psnr"]) and none["smallest_ratio"] == pytest.approx((3 + 5) / 2)
    assert means.loc[(0.5, "webp")]["psnr"] == pytest.approx(29.5)


def test_the_table_to_read_says_value_difference_and_number(matched, ours):
    whole, psnr = matched_tables(matched_frame(matched, ours, ["psnr"]), ours, ["psnr"])
    assert (whole.name, psnr.name) == ("matched", "matched_psnr")
    assert psnr.cells() == [
        ["0.1000", "100", "25.00", "smallest 4.0×", "25.75 (+0.75)"],
        ["0.5000", "500", "28.00", "33.00 (−1.00; 1/2)", "29.50 (+1.50)"],
    ]
    assert list(psnr.shown) == ["rate", "bytes", "OSCAR nano", "JPEG", "WEBP"]
    assert "PSNR dB (higher is better)" in psnr.caption


def test_bd_table_names_metrics_and_shows_reasons():
    bd = pd.DataFrame(
        [
            {
                "codec": "a",
                "label": "A",
                "anchor": "b",
                "anchor_label": "B",
                "metric": "ms_ssim_db",
                "protocol": "bitstream",
                "bd_rate_percent": -12.34,
                "overlap_percent": 55.5,
                "note": "",
            },
            {
                "codec": "a",
                "label": "A",
                "anchor": "c",
                "anchor_label": "C",
                "metric": "psnr",
                "protocol": "bitstream",
                "bd_rate_percent": None,
                "overlap_percent": 0.0,
                "note": "no overlap",
            },
        ]
    )
    lines = bd_frame_table(bd, "pchip").to_markdown().splitlines()
    assert lines[-2:] == ["| A | B | MS-SSIM dB | −12.3 | 56 | – |", "| A | C | PSNR dB | – | 0 | no overlap |"]
    assert "pchip" in lines[0]


def test_timing_puts_calls_before_their_stages():
    call = {"codec": "oscar-nano", "point": 0.1}
    latency = {**call, "label": "OSCAR nano", "note": None}
    latency |= {f"{d}_p{p}_ms": 1.0 * p for d in ("encode", "decode") for p in (50, 90, 99)}
    jpeg = {**latency, "codec": "jpeg", "label": "JPEG"}
    stages = [
        {**call, "direction": d, "stage": s, "p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "share_percent": 50.0}
        for d in ("encode", "decode")
        for s in ("vae", "whole call")
    ]
    memory = [
        {**call, "direction": "decode", "call_peak_mib": 100.0},
        {**call, "direction": "encode", "note": "killed"},
    ]
    throughput = [{**call, "direction": "encode", "images_per_s": v, "megapixels_per_s": v} for v in (1.0, 3.0)]
    macs = [{**call, "direction": "encode", "stage": "vae", "gmacs": 2.5}]
    frame = timing_frame(*map(pd.DataFrame, ([latency, jpeg], stages, throughput, memory, macs)))
    assert list(zip(frame["codec"], frame["direction"], frame["stage"], strict=True)) == [
        ("oscar-nano", "encode", "whole call"),
        ("oscar-nano", "encode", "vae"),
        ("oscar-nano", "decode", "whole call"),
        ("oscar-nano", "decode", "vae"),
        ("jpeg", "encode", "whole call"),
        ("jpeg", "decode", "whole call"),
    ]
    assert frame["images_per_s"].tolist()[0] == 3 and frame["gmacs"].tolist()[1] == 2.5
    assert frame["call_peak_mib"].tolist()[2] == 100 and frame["note"].tolist()[0] == "killed"
    text = timing_table(frame, "an image", 3).to_markdown()
    assert "peak MiB" in text and "GPU" not in text
