"""BD-rate equals the bjontegaard package on published curves, says over what it holds and refuses where it does not."""

from __future__ import annotations

import bjontegaard
import numpy as np
import pandas as pd
import pytest

from oscar.evaluation.curves import (
    METHODS,
    bd_delta,
    bd_table,
    dataset_of,
    mean_curve,
    paper_curves,
    peer_curves,
    published_curves,
    published_latencies,
    to_decibel,
)
from oscar.rates import PAPER_RATES


def curve(bpp, value) -> pd.DataFrame:
    return pd.DataFrame({"bpp": bpp, "value": value})


def published(frame: pd.DataFrame, codec: str, metric: str) -> pd.DataFrame:
    return frame[(frame["codec"] == codec) & (frame["metric"] == metric)].sort_values("bpp")


@pytest.fixture
def anchor() -> pd.DataFrame:
    return curve([0.1, 0.2, 0.4, 0.8], [22.0, 25.0, 28.0, 30.0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("test, base", [("onedc", "diffeic_50"), ("onedc", "ms_illm"), ("aeic_me", "stablecodec")])
def test_bd_rate_of_published_psnr_is_the_package_s(test, base, method):
    peers = peer_curves("kodak")
    a, t = published(peers, base, "psnr"), published(peers, test, "psnr")
    if method == "cubic" and len(a) < 4:
        assert "3 points, 4 are needed" in bd_delta(a, t, method=method).note
        return
    arguments = [list(column) for column in (a["bpp"], a["value"], t["bpp"], t["value"])]
    options = {"method": method, "require_matching_points": False, "min_overlap": 0}
    delta = bd_delta(a, t, method=method)
    assert delta.bd_rate_percent == pytest.approx(bjontegaard.bd_rate(*arguments, **options), rel=1e-12)
    assert delta.bd_metric == pytest.approx(bjontegaard.bd_psnr(*arguments, **options), rel=1e-12)


@pytest.mark.parametrize("dataset", ["kodak", "div2k_val", "clic2020"])
@pytest.mark.parametrize("base", ["perco", "ms_illm"])
def test_bd_rate_of_the_paper_s_dists_is_the_package_s_with_the_sign_changed(base, dataset):
    curves = paper_curves(dataset)
    a, t = published(curves, base, "dists"), published(curves, "oscar", "dists")
    options = {"method": "pchip", "require_matching_points": False, "min_overlap": 0}
    expected = bjontegaard.bd_rate(list(a["bpp"]), list(-a["value"]), list(t["bpp"]), list(-t["value"]), **options)
    delta = bd_delta(a, t, higher_is_better=False)
    assert delta.bd_rate_percent == pytest.approx(expected, rel=1e-12)
    assert delta.overlap_low == max(a["value"].min(), t["value"].min())
    assert delta.overlap_high == min(a["value"].max(), t["value"].max())


@pytest.mark.parametrize("method", METHODS)
def test_half_the_bits_are_minus_fifty_percent(anchor, method):
    delta = bd_delta(anchor, anchor.assign(bpp=anchor["bpp"] / 2), method=method)
    assert delta.bd_rate_percent == pytest.approx(-50)
    assert delta.overlap_percent == pytest.approx(100) and delta.note == ""


def test_a_constant_gain_in_quality_is_found_with_the_metric_s_own_sign(anchor):
    assert bd_delta(anchor, anchor.assign(value=anchor["value"] + 1)).bd_metric == pytest.approx(1)
    falling = anchor.assign(value=40 - anchor["value"])
    better = bd_delta(falling, falling.assign(value=falling["value"] - 1), higher_is_better=False)
    assert better.bd_metric == pytest.approx(-1) and better.bd_rate_percent < 0


def test_overlap_is_that_of_quality(anchor):
    delta = bd_delta(anchor, curve([0.05, 0.1, 0.2], [20.0, 23.0, 26.0]))
    assert (delta.overlap_low, delta.overlap_high) == (22, 26)
    assert delta.overlap_percent == pytest.approx(40)  # 22 to 26 of 20 to 30


def test_without_common_quality_there_is_a_reason_and_no_number(anchor):
    delta = bd_delta(anchor, curve([0.1, 0.2], [10.0, 20.0]))
    assert delta.bd_rate_percent is None and delta.overlap_low is None and delta.overlap_percent == 0
    assert "no overlap in quality, anchor 22 to 30, test 10 to 20" in delta.note
    assert delta.bd_metric is not None  # they have rates in common
    touching = bd_delta(anchor, curve([0.01, 0.02], [20.0, 22.0]))
    assert touching.bd_rate_percent is None and touching.bd_metric is None
    assert "no overlap in rate, anchor 0.1 to 0.8, test 0.01 to 0.02 bpp" in touching.note


def test_dominated_and_infinite_points_are_left_out_and_counted(anchor):
    more = pd.concat([anchor, curve([0.3, 2.0], [24.0, np.inf])])
    delta = bd_delta(more, anchor)
    assert delta.bd_rate_percent == pytest.approx(0, abs=1e-9)
    assert delta.note == "2 of the 6 points of the anchor left out as dominated"


def test_a_single_point_is_no_curve(anchor):
    delta = bd_delta(anchor, anchor.head(1))
    assert delta.bd_rate_percent is None and "the test has 1 points, 2 are needed" in delta.note


def test_unknown_methods_are_refused(anchor):
    with pytest.raises(ValueError, match="'spline'.*allowed: pchip, akima, cubic"):
        bd_delta(anchor, anchor, method="spline")


def rows(codec: str, factor: float, images=("a", "b"), nominal: bool = False, protocol="bitstream") -> pd.DataFrame:
    table = pd.DataFrame(
        [
            {
                "image": image,
                "codec": codec,
                "label": codec.upper(),
                "protocol": protocol,
                "point": point,
                "bpp": factor * point * (1 + index),
                "psnr": 20 + 5 * point + index,
                "ms_ssim": 1 - 0.1**point,
            }
            for index, image in enumerate(images)
            for point in (1, 2, 3, 4)
        ]
    )
    return table.rename(columns={"bpp": "nominal_bpp" if nominal else "actual_bpp"}).reindex(
        columns=["image", "codec", "label", "protocol", "point", "nominal_bpp", "actual_bpp", "psnr", "ms_ssim"]
    )


def test_mean_curve_averages_over_images_and_orders_by_rate():
    table = rows("a", 1.0).assign(point=lambda t: 9 - t["point"])
    table.loc[0, "psnr"] = np.nan  # first image, bpp 1
    found = mean_curve(table, "psnr")
    assert list(found["point"]) == [8, 7, 6, 5]
    assert list(found["bpp"]) == [2.0, 3.0, 4.5, 6.0]
    assert list(found["value"]) == [26.0, 30.5, 35.5, 40.5]
    assert list(found["images"]) == [1, 2, 2, 2]


def test_bd_table_compares_means_and_single_images():
    table = pd.concat([rows("ours", 0.5, nominal=True), rows("jpeg", 1.0), rows("webp", 2.0, images=("a", "c"))])
    bd = bd_table(table, {"psnr": True, "ms_ssim": True}, ["ours"], ["ours", "jpeg", "webp"])
    assert list(bd["metric"]) == ["psnr", "psnr", "ms_ssim_db", "ms_ssim_db"]
    assert list(bd["anchor_label"]) == ["JPEG", "WEBP"] * 2
    assert list(bd["bd_rate_percent"]) == pytest.approx([-50, -75] * 2)
    assert list(bd["mean_of_images_percent"]) == pytest.approx([-50, -75] * 2)
    assert list(bd["images"]) == [2, 1] * 2  # those that both have
    assert bd["overlap_high"].iloc[-1] == pytest.approx(40)  # 1 - 10^-4, in dB


def test_bd_rates_stay_within_a_protocol():
    paper = [
        rows(name, factor, nominal=True, protocol="paper").rename(columns={"ms_ssim": "ms_ssim_y"})
        for name, factor in (("ours-paper", 0.5), ("theirs-paper", 1.0))
    ]
    table = pd.concat([rows("ours", 0.5), *paper, rows("jpeg", 1.0)])
    tests = ["ours", "ours-paper"]
    bd = bd_table(table, dict.fromkeys(("psnr", "ms_ssim", "ms_ssim_y"), True), tests, [*tests, "theirs-paper", "jpeg"])
    found = list(zip(bd["protocol"], bd["codec"], bd["anchor"], bd["metric"], strict=True))
    assert found == [
        ("bitstream", "ours", "jpeg", "psnr"),
        ("paper", "ours-paper", "theirs-paper", "psnr"),
        ("bitstream", "ours", "jpeg", "ms_ssim_db"),
        ("paper", "ours-paper", "theirs-paper", "ms_ssim_y_db"),
    ]
    assert list(bd["bd_rate_percent"]) == pytest.approx([-50] * 4)


def test_decibel():
    assert to_decibel(0.9) == pytest.approx(10) and to_decibel(1) == np.inf


# Published curves.


@pytest.mark.parametrize("dataset", ["kodak", "div2k_val", "clic2020"])
def test_the_paper_s_curves_have_its_eight_rates(dataset):
    curves = paper_curves(dataset)
    for metric in ("lpips_vgg", "dists", "musiq", "clipiqa+"):
        assert list(published(curves, "oscar", metric)["bpp"]) == [rate.bpp for rate in PAPER_RATES]


@pytest.mark.parametrize(("peer", "percent"), [("stablecodec", -68), ("aeic_me", -75), ("onedc", -61), ("ms_illm", 57)])
def test_bits_of_rivals_at_equal_dists_on_kodak(peer, percent):
    """As computed elsewhere from the same published points."""
    delta = bd_delta(
        published(paper_curves("kodak"), "oscar", "dists"),
        published(peer_curves("kodak"), peer, "dists"),
        higher_is_better=False,
    )
    assert delta.bd_rate_percent == pytest.approx(percent, abs=1.5)


def test_what_rivals_publish_is_all_there_and_named():
    peers = peer_curves()
    assert peers.groupby("dataset").size().to_dict() == {
        "kodak": 271, "div2k_val": 218, "clic2020": 218, "clic2020_diffeic": 162, "kodak_512": 12,
    }  # fmt: skip
    assert peers["label"].notna().all() and "lpips" not in set(peers["metric"])
    point = peers[(peers["codec"] == "stablecodec") & (peers["dataset"] == "kodak") & (peers["metric"] == "psnr")]
    assert point.set_index("bpp").loc[0.0058, "value"] == 20.27
    latencies = published_latencies()
    assert len(latencies) == 124 and latencies.notna().all().all()
    one = latencies[(latencies["codec"] == "aeic_me") & (latencies["task"] == "decode")]
    assert one.set_index(["resolution", "hardware"])["ms"]["768x512", "RTX 4090D"] == 106.7


def test_published_curves_name_their_reading_and_our_metrics():
    found = {protocol: published_curves("kodak", protocol) for protocol in ("bitstream", "paper")}
    by_metric = {
        name: curves.groupby("metric")["reading"].unique().map(list).to_dict() for name, curves in found.items()
    }
    paper, peers = ["read off the paper's figure"], ["published by their authors"]
    assert by_metric["paper"] == dict.fromkeys(["lpips_vgg", "dists", "musiq", "clipiqa+"], paper)
    assert by_metric["bitstream"] == dict.fromkeys(["psnr", "ms_ssim", "lpips_alex", "dists", "fid"], peers)
    assert all(curves.notna().all().all() for curves in found.values())
    assert published_curves(None).empty and published_curves(None, "paper").empty
    with pytest.raises(ValueError, match="'tecnick'.*allowed: kodak, div2k_val, clic2020"):
        published_curves("tecnick")


@pytest.mark.parametrize(
    "folder, dataset",
    [
        ("/data/kodak", "kodak"),
        ("Kodak24/png", "kodak"),
        ("DIV2K_val_HR", "div2k_val"),
        ("DIV2K_train_HR", None),
        ("clic2020-test", "clic2020"),
        ("photos", None),
        (None, None),
    ],
)
def test_data_sets_are_known_by_their_folder(folder, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dataset_of(folder) == dataset
