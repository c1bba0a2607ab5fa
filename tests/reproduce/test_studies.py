"""Every study from end to end on tiny models, through all of its jobs to tables, figures and page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from oscar import OscarCodec
from oscar.evaluation.curves import paper_curves
from oscar.reproduce.study import make_study

pytestmark = pytest.mark.slow


def table(output: Path, name: str) -> pd.DataFrame:
    for suffix in ("md", "tex"):
        assert (output / "tables" / f"{name}.{suffix}").stat().st_size
    return pd.read_csv(output / "tables" / f"{name}.csv")


def check_page(output: Path, figures: list[str]) -> str:
    """The page has all figures, commands and the commit."""
    page, record = (output / "index.html").read_text(), json.loads((output / "study.json").read_text())
    for name in figures:
        assert (output / "plots" / f"{name}.svg").stat().st_size
    assert page.count("<img") == len(figures) and "http" not in page.replace("http://www.w3.org", "")
    assert page.count("python scripts/") >= 1 + len(record["jobs"]) - page.count("oscar add-rates")
    assert record["failed"] == {} and (record["commit"] is None or record["commit"] in page)
    return page


def test_timesteps(study, stage1, tmp_path: Path) -> None:
    asked = (f"model={stage1}", "seeds=[0,1]", "~variants.shuffled", "~variants.constant", "calibrated=[cosine]")
    assert study("timesteps", tmp_path, *asked, "sweep=[]") == 0
    jobs = len(list(tmp_path.glob("jobs/*.json")))
    assert study("timesteps", tmp_path, *asked, "sweep=[0,500]", "+grid={0.125: [300]}") == 0
    assert len(list(tmp_path.glob("jobs/*.json"))) == jobs + 3  # what is new alone
    check_page(tmp_path, ["differences_psnr_photos", "timesteps_psnr_photos"])
    chosen = table(tmp_path, "timesteps")
    assert chosen["paper"].to_list() == [500, 150]
    calibration = json.loads((tmp_path / "runs/calibration/calibration.json").read_text())
    assert calibration["images"] == ["3.png", "4.png"]  # training images alone
    assert chosen["cosine"].to_list() == list(calibration["mappings"]["cosine"]["timesteps"].values())
    means = table(tmp_path, "mean_psnr_photos")
    assert means["variant"].to_list() == ["paper", "cosine"] and set(means["images"]) == {3}
    rows = {
        (variant, seed): pd.read_csv(tmp_path / f"runs/{variant}-seed{seed}-on-photos/results.csv")
        for variant in ("paper", "cosine") for seed in (0, 1)
    }  # fmt: skip
    value = {key: frame["psnr"].mean() for key, frame in rows.items()}
    expected = (value["cosine", 0] + value["cosine", 1] - value["paper", 0] - value["paper", 1]) / 2
    row = means.set_index("variant").loc["cosine"]
    assert row["difference"] == pytest.approx(expected, abs=1e-9) and row["low"] <= row["difference"] <= row["high"]
    grid = OscarCodec.from_pretrained(tmp_path / "runs/grid-0.1250-t300/final")
    assert grid.points == (0.125,) and grid.mapping(grid.bottleneck.rates[0]) == 300


def test_timesteps_of_rates_beyond_the_papers(make_config, make_codec, tmp_path: Path) -> None:
    """As nano-vq's: the table lies between its neighbours there."""
    model = tmp_path / "runs/paper-seed0/final"
    codec = make_codec(rates=(0, 8))
    codec.save_pretrained(model)
    study = make_study(make_config("timesteps", tmp_path, f"model={model}", "sweep=[]", "calibrated=[]"))
    chosen = study.timesteps(["paper-seed0"])
    expected = {rate.bpp: codec.mapping(rate) for rate in codec.bottleneck.rates}
    assert dict(zip(chosen["rate"], chosen["timestep"], strict=True)) == expected and len(expected) == 2


def test_unseen_rates(study, stage1, tmp_path: Path) -> None:
    assert study("unseen_rates", tmp_path, f"model={stage1}", "rates=[0.0024]") == 0
    check_page(tmp_path, ["unseen_psnr_paper_photos", "unseen_psnr_bitstream_photos"])
    joined = OscarCodec.from_pretrained(tmp_path / "runs/joined")
    assert joined.points == (0.0019, 0.0024, 0.125)
    points = table(tmp_path, "unseen_paper_photos").set_index("rate")
    seen = points["psnr"].loc[[0.0019, 0.125]]
    share = [math.log(bpp / 0.0019) for bpp in (0.0024, 0.125)]
    line = seen.iloc[0] + share[0] / share[1] * (seen.iloc[1] - seen.iloc[0])
    assert points.loc[0.0024, "psnr_off"] == pytest.approx(points.loc[0.0024, "psnr"] - line)
    assert points["psnr_off"].isna().to_list() == [True, False, True]


@pytest.mark.parametrize(
    ("name", "overrides", "variants"),
    [
        ("lora_rank", ["~variants.rank64", "~variants.rank16", "reference=rank4"], ["rank4", "whole_unet"]),
        ("stages", ["rates=[0.125]"], ["both_stages", "without_stage1", "single_rate"]),
    ],
)
def test_ablations(study, stage1, tmp_path: Path, name: str, overrides: list[str], variants: list[str]) -> None:
    assert study(name, tmp_path, f"model={stage1}", "seeds=[0]", "metrics=basic", *overrides) == 0
    check_page(tmp_path, ["differences_psnr_photos"])
    means = table(tmp_path, "mean_psnr_photos")
    assert means["variant"].to_list() == variants and means["value"].notna().all()
    if name == "lora_rank":
        denoisers = [OscarCodec.from_pretrained(tmp_path / f"runs/{v}-seed0/final").denoiser for v in variants]
        assert [denoiser.tuning for denoiser in denoisers] == ["lora", "full"]
        assert denoisers[0].options["lora_rank"] == 4
    if name == "stages":  # the single rate is compared at its own rate alone
        by_rate = table(tmp_path, "by_rate_psnr_photos")
        assert by_rate[by_rate["variant"] == "single_rate"]["rate"].to_list() == [0.125]


def test_rd(study, stage1, tmp_path: Path, root: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/kodak").symlink_to(root / "photos")
    here = [f"data.root={tmp_path}/root", "data.datasets=[kodak]", "data.limit=2", "metrics.names=[psnr,ms_ssim,dists]"]
    assert study("rd", tmp_path / "out", f"model={stage1}", *here) == 0
    output = tmp_path / "out"
    page = (output / "index.html").read_text()
    assert "dists is unavailable: " in page
    published = table(output, "published_kodak")
    oscar = paper_curves("kodak")
    assert len(published) == (oscar["codec"] == "oscar").sum()
    assert set(published["verdict"]) == {"not measured"}  # weights are not here: never a number
    protocols = table(output, "protocols_kodak").set_index("rate")
    files = pd.read_csv(output / "runs/bitstream-on-kodak/results.csv")
    bpp = files[files["point"] == 0.125]["actual_bpp"].mean()
    assert protocols.loc[0.125, "actual_bpp_file"] == pytest.approx(bpp)
    assert {"ms_ssim", "ms_ssim_y"} <= set(files) and {"psnr_paper", "psnr_file"} <= set(protocols)
    assert {"PSNR dB", "MS-SSIM dB"} <= set(table(output, "rivals_kodak")["metric"])
    latency = table(output, "latency")
    assert {"bitstream", "published"} <= set(latency["protocol"]) and latency["hardware"].notna().all()


def test_entropy(study, stage1, tmp_path: Path) -> None:
    assert study("entropy", tmp_path, f"model={stage1}", "data.limit=1") == 0
    check_page(tmp_path, ["codings_photos"])
    assert OscarCodec.from_pretrained(tmp_path / "runs/context/final").bottleneck.contexts
    files, rows = table(tmp_path, "files_photos"), pd.read_csv(tmp_path / "runs/codings-on-photos/rows.csv")
    assert files["rate"].to_list() == [0.0019, 0.125]
    assert files["context_bpp"].iloc[1] == pytest.approx(8 * rows["context_bytes"].iloc[1] / (176 * 168))


def test_complexity(study, stage1, tmp_path: Path, monkeypatch) -> None:
    from oscar.benchmark.speed import timing

    columns = ["codec", "point", "direction", "call_peak_mib", "note"]
    monkeypatch.setattr(timing, "_memory_table", lambda *_: pd.DataFrame(columns=columns))  # processes of their own
    assert study("complexity", tmp_path, f"model={stage1}", "repeats=1") == 0
    check_page(tmp_path, [])
    timed = table(tmp_path, "timing_photos")
    assert {"encode", "decode"} == set(timed["direction"]) and timed["gmacs"].notna().any()
    assert table(tmp_path, "parameters_photos")["parameters"].sum() > 0
