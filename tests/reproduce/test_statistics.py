"""Intervals, tests and corrections equal what is computed by hand; pairs, seeds and missing rows are taken as said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from oscar.reproduce.statistics import bootstrap_mean, compare, compare_bytes, holm, sign_flip_p


def test_the_interval_of_a_mean_is_that_of_resampled_means() -> None:
    values = np.random.default_rng(1).normal(3, 1, 40)
    found = bootstrap_mean(values)
    assert found == bootstrap_mean(values) and found.mean == pytest.approx(values.mean())
    draws = np.random.default_rng(2).choice(values, (20000, 40)).mean(axis=1)
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)


@pytest.mark.parametrize(("values", "mean"), [([2.0], 2.0), ([], np.nan)])
def test_of_one_image_there_is_no_interval(values, mean) -> None:
    found = bootstrap_mean(values)
    assert np.isnan([found.low, found.high]).all() and np.isnan(sign_flip_p(values))
    assert found.mean == mean or np.isnan(mean)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert bootstrap_mean([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_few_images_flip_their_signs_in_all_ways() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)  # all of one sign: two of the eight ways are as extreme
    assert sign_flip_p([1.0, 2.0, -3.0]) == 1


def test_holm_is_that_of_its_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm([0.5, np.nan, 0.9])
    assert found[0] == found[2] == 1 and np.isnan(found[1])
    assert holm([]) == []


def rows(
    variant: str, shift: float, seeds=(0, 1), rates=(0.1, 0.2), images=range(8), noise: float = 0.0
) -> pd.DataFrame:
    return pd.DataFrame(
        {"variant": variant, "seed": seed, "rate": rate, "image": f"{image}", "psnr": 20 + 10 * rate + image + shift
         + noise * seed}
        for seed in seeds for rate in rates for image in images
    )  # fmt: skip


def test_differences_are_of_pairs() -> None:
    found = compare(pd.concat([rows("a", 0), rows("b", 0.1)]), "psnr", "a", ["a", "b"])
    assert found["rate"].isna().to_list() == [True, True, False, False, False, False]
    one = found[(found["variant"] == "b") & found["rate"].isna()].iloc[0]
    assert one["difference"] == pytest.approx(0.1) and one["low"] == pytest.approx(0.1)  # images differ by 7, pairs not
    assert one["p"] == pytest.approx(2 / 2**8) and one["seeds_agree"] is True
    assert one["value"] == pytest.approx(25.1) and (one["images"], one["seeds"]) == (8, 2)
    reference = found[(found["variant"] == "a") & found["rate"].isna()].iloc[0]
    assert reference["value"] == pytest.approx(25) and np.isnan(reference["difference"])


def test_spread_and_agreement_are_over_seeds() -> None:
    table = pd.concat([rows("a", 0), rows("b", -0.1, noise=0.3)])
    found = compare(table, "psnr", "a", ["a", "b"]).iloc[1]
    assert found["seed_sd"] == pytest.approx(0.3 / np.sqrt(2)) and found["difference"] == pytest.approx(0.05)
    assert found["seeds_agree"] is False  # -0.1 at one, 0.2 at the other


def test_only_what_both_have_is_compared() -> None:
    table = pd.concat([rows("a", 0), rows("b", 1, seeds=[1], rates=[0.2], images=range(4))])
    found = compare(table, "psnr", "a", ["a", "b"])
    mean = found[(found["variant"] == "b") & found["rate"].isna()].iloc[0]
    assert mean["difference"] == pytest.approx(1) and mean["images"] == 4 and pd.isna(mean["seeds_agree"])
    assert list(found[found["variant"] == "b"]["rate"].dropna()) == [0.2]
    lacking = table.assign(psnr=table["psnr"].where((table["image"] != "0") | (table["variant"] != "b")))
    assert compare(lacking, "psnr", "a", ["b"])["images"].to_list() == [3, 3]


def curves(variant: str, seed: int, bytes_needed: float, images=range(6), lift: float = 0.0) -> pd.DataFrame:
    """Curves of one shape, whose BD-rate is the ratio of their bytes."""
    return pd.DataFrame(
        {"variant": variant, "seed": seed, "image": f"{image}", "point": point, "actual_bpp": bytes_needed * bpp,
         "nominal_bpp": np.nan, "psnr": 20 + image + 5 * np.log2(bpp / 0.05) + (100 if image < lift else 0)}
        for image in images for point, bpp in enumerate((0.05, 0.1, 0.2, 0.4))
    )  # fmt: skip


def test_bytes_are_compared_at_equal_quality_by_seed() -> None:
    rows = pd.concat(
        [curves("a", 0, 1), curves("a", 1, 2), curves("b", 0, 0.9), curves("b", 1, 1.6), curves("c", 0, 1)]
    )
    found = compare_bytes(rows, "psnr", True, "a", ["a", "b", "c"]).set_index("variant")
    assert list(found.index) == ["a", "b", "c", "a, seed 1 against 0"] and np.isnan(found.loc["a", "difference"])
    b, spread = found.loc["b"], found.loc["a, seed 1 against 0"]
    assert b["difference"] == pytest.approx(-15) and b["low"] == pytest.approx(-15)  # of -10 and -20 %
    assert b["seed_sd"] == pytest.approx(10 / np.sqrt(2)) and b["seeds_agree"] and b["seeds"] == 2
    assert b["p"] == pytest.approx(2 / 2**6) and b["p_holm"] == pytest.approx(4 / 2**6)  # of b and c, not of the spread
    assert spread["difference"] == pytest.approx(100) and np.isnan(spread["p"]) and 0 < spread["overlap_percent"] <= 100


def test_images_without_a_common_range_of_quality_are_left_out() -> None:
    rows = pd.concat([curves("a", 0, 1), curves("a", 1, 1), curves("b", 0, 0.9), curves("b", 1, 0.9, lift=2)])
    b = compare_bytes(rows, "psnr", True, "a", ["a", "b"]).set_index("variant").loc["b"]
    assert (b["images"], b["of_images"]) == (4, 6) and b["difference"] == pytest.approx(-10)
    none = compare_bytes(pd.concat([curves("a", 0, 1), curves("b", 0, 1, lift=6)]), "psnr", True, "a", ["a", "b"])
    assert none["images"].to_list()[1] == 0 and none["difference"].isna().all()
    alone = compare_bytes(curves("b", 0, 1), "psnr", True, "a", ["a", "b"])
    assert alone["variant"].to_list() == ["b"] and "difference" not in alone  # the reference has failed
