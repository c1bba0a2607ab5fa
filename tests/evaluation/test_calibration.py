"""Calibration against latents whose noise is known, and the choices of an ablation against made-up rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import kstest, kurtosis, skew

from oscar import OscarCodec
from oscar.bitstream import Container
from oscar.bottlenecks.hyper_encoder import HyperEncoder
from oscar.config import AblateTimestepsConfig, CalibrateTimestepsConfig, MetricsConfig, PackagedImagesConfig
from oscar.data.tensors import to_pil, to_tensor
from oscar.evaluation import ablation, calibration
from oscar.evaluation.ablation import BEST, OWN, TimestepCodec
from oscar.evaluation.results import EvaluationError
from oscar.inference.load import load
from oscar.rates import PAPER_RATES
from oscar.timesteps import ConstantMapping, PerImageMapping, TableMapping, mapping_from_config, timestep_of_code

RATES = PAPER_RATES[0], PAPER_RATES[7]


@pytest.fixture
def codec(tiny_folder: Path) -> OscarCodec:
    return OscarCodec.from_pretrained(tiny_folder).eval().requires_grad_(False)


@pytest.fixture
def noisy(codec: OscarCodec, monkeypatch) -> dict[int, int]:
    """Quantised latents become noisy ones, at the timestep that this dict gives by rate id."""
    timesteps = {rate.id: 900 - 100 * rate.id for rate in PAPER_RATES}
    draws = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None, None]

    def encode(images, *_):
        return scale * torch.randn(len(images), 4, images.shape[2] // 8, images.shape[3] // 8, generator=draws)

    def decode(self, indices):
        signal = codec.backbone.schedule.alpha_bar(timesteps[self.rate.id]).sqrt()
        noise = scale * torch.randn(latents[-1].shape, generator=draws)
        return 7 * (signal * latents[-1] + (1 - signal**2).sqrt() * noise)  # of any scale: rescaling undoes it

    latents: list[torch.Tensor] = []

    def remember(self, latent):
        latents.append(latent)
        return torch.zeros(len(latent), 1, 1, dtype=torch.long)

    monkeypatch.setattr(codec, "encode_latent", encode)
    monkeypatch.setattr(HyperEncoder, "encode", remember)
    monkeypatch.setattr(HyperEncoder, "decode", decode)
    return timesteps


def test_known_noise_is_found(codec: OscarCodec, noisy: dict[int, int], tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (512, 512), (number, 0, 0)).save(tmp_path / f"{number}.png")
    result = calibration.calibrate(codec, sorted(tmp_path.iterdir()), progress=False)
    assert len(result.images) == 3 * 8 and list(result.rates["rate"]) == sorted(rate.bpp for rate in PAPER_RATES)
    for mapping in result.mappings.values():
        for rate in PAPER_RATES:
            assert mapping(rate) == pytest.approx(noisy[rate.id], abs=12)
        mapping.check(codec.bottleneck.rates, 1000)
        assert mapping_from_config(json.loads(json.dumps(mapping.to_config()))) == mapping
    for row, rate in zip(result.rates.itertuples(), PAPER_RATES, strict=True):
        alpha = codec.backbone.schedule.alpha_bar(noisy[rate.id]).item()
        assert row.cosine == pytest.approx(math.sqrt(alpha), abs=0.015)
        assert row.residual_variance == pytest.approx(1 - alpha, abs=0.03)
        assert abs(row.skewness) < 0.1 and abs(row.excess_kurtosis) < 0.2 and row.ks_distance < 0.03
        assert abs(row.magnitude_correlation) < 0.05  # the noise does not depend on the latent
        assert row.timestep_per_image == pytest.approx(noisy[rate.id], abs=15) and row.timestep_own == rate.timestep
        # a timestep that is too low claims more signal than there is
        assert (row.correlation < 0) == (noisy[rate.id] > rate.timestep)
    assert result.rates["cosine_std"].between(0, 0.03).all()


def test_values_are_those_of_scipy_and_the_definition(tiny: OscarCodec, make_image) -> None:
    batch, rate = to_tensor(make_image(192, 128)), RATES[1]
    row = calibration.measure(tiny, batch, rate)
    with torch.inference_mode():
        latent = tiny.encode_latent(batch, rate)
        z_hat = tiny.bottleneck.at(rate).decode(tiny.quantise(latent, rate).symbols.indices)
    latent, z_hat = (value[0].flatten(1).double().numpy() for value in (latent, z_hat))
    by_position = (z_hat * latent).sum(0) / np.linalg.norm(z_hat, axis=0) / np.linalg.norm(latent, axis=0)
    assert row["cosine_position"] == pytest.approx(by_position.mean(), abs=1e-5)  # before rescaling
    noisy = z_hat * (np.linalg.norm(latent, axis=1) / np.linalg.norm(z_hat, axis=1))[:, None]
    cosine = (noisy * latent).sum(1) / np.linalg.norm(latent, axis=1) ** 2
    assert row["cosine"] == pytest.approx(cosine.mean(), abs=1e-5)
    residual = noisy - cosine[:, None] * latent
    assert row["signal_power"] + row["residual_power"] == pytest.approx((latent**2).mean(), rel=1e-4)
    assert row["residual_power"] == pytest.approx((residual**2).mean(), rel=1e-4)
    assert row["skewness"] == pytest.approx(skew(residual, axis=1).mean(), abs=1e-4)
    assert row["excess_kurtosis"] == pytest.approx(kurtosis(residual, axis=1).mean(), abs=1e-4)
    standard = (residual - residual.mean(1, keepdims=True)) / residual.std(1, keepdims=True)
    assert row["ks_distance"] == pytest.approx(np.mean([kstest(one, "norm").statistic for one in standard]), abs=1e-4)
    expected = np.mean([np.corrcoef(np.abs(a), np.abs(b))[0, 1] for a, b in zip(residual, latent, strict=True)])
    assert row["magnitude_correlation"] == pytest.approx(expected, abs=1e-4)


def test_far_from_normal() -> None:
    uniform = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    two_values = torch.ones(1000, dtype=torch.float64)
    two_values[::2] = -1
    found = calibration.normal_distance(torch.stack([uniform, two_values]))
    expected = [kstest(values.numpy(), "norm").statistic for values in (uniform, two_values)]
    assert found.tolist() == pytest.approx(expected)


def test_tiny_images_give_numbers(tiny: OscarCodec, make_image) -> None:
    for size in ((1, 1), (9, 70)):
        for rate in RATES:
            row = calibration.measure(tiny, to_tensor(make_image(*size)), rate)
            assert all(math.isfinite(value) for value in row.values())


def calibrate(photos: Path, tiny_folder: Path, output: Path, **options) -> calibration.Calibration:
    config = CalibrateTimestepsConfig(
        output=str(output), model=str(tiny_folder), data=PackagedImagesConfig(str(photos), limit=2), **options
    )
    return calibration.calibrate_config(config)


def test_files_of_a_calibration(photos: Path, tiny_folder: Path, tmp_path: Path, capsys, all_formats) -> None:
    result = calibrate(photos, tiny_folder, tmp_path / "out", save_to=str(tmp_path / "model"), save_mapping="snr")
    record = json.loads((tmp_path / "out/calibration.json").read_text())
    assert record["images"] == ["0.png", "1.png"] and record["failed"] == {}
    assert record["fingerprint"] == OscarCodec.from_pretrained(tiny_folder).fingerprint
    assert mapping_from_config(record["mappings"]["cosine"]) == result.mappings["cosine"]
    pd.testing.assert_frame_equal(pd.DataFrame(record["rates"]), pd.read_csv(tmp_path / "out/calibration.csv"))
    assert len(pd.read_csv(tmp_path / "out/images.csv")) == 2 * 8
    for suffix, magic in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        assert (tmp_path / f"out/calibration.{suffix}").read_bytes().startswith(magic)
    saved = load(tmp_path / "model")
    assert saved.mapping == result.mappings["snr"]
    assert str(tmp_path / "out/calibration.json") in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_left_out(codec, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"none of the 1 images can be read: .*broken\.png"):
        calibration.calibrate(codec, [tmp_path / "broken.png"], progress=False)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/0.png").write_bytes((photos / "0.png").read_bytes())
    result = calibration.calibrate(codec, [tmp_path / "broken.png", tmp_path / "deep/0.png"], progress=False)
    assert list(result.failed) == ["broken.png"] and set(result.images["image"]) == {"deep/0.png"}
    assert capsys.readouterr().err.count("left out: ") == 2


# The ablation.


def test_a_codec_whose_points_are_timesteps(tiny: OscarCodec, make_image, monkeypatch) -> None:
    image, rate = make_image(96, 72), RATES[1]
    codec = TimestepCodec(tiny, rate, "tiny")
    encoded = []
    quantise = OscarCodec.quantise
    monkeypatch.setattr(OscarCodec, "quantise", lambda *args, **named: encoded.append(args) or quantise(*args, **named))
    trips = {point: codec.round_trip(image, point) for point in (rate.timestep, 500, 499.5, OWN)}
    assert len(encoded) == 1  # once for all timesteps
    assert trips[rate.timestep].encoded.data == tiny.compress(image, rate)
    assert len({trip.decoded.tobytes() for trip in trips.values()}) == 4
    own = trips[OWN].encoded
    assert len(own.data) == len(trips[500].encoded.data) + 1 and own.parts["timestep"] == 1
    timestep = timestep_of_code(Container.unpack(own.data).timestep, 1000)
    assert trips[OWN].decoded.tobytes() == codec.round_trip(image, timestep).decoded.tobytes()
    with pytest.raises(ValueError, match="timestep 1000 is not allowed; allowed: 0 to 999"):
        codec.check_point(1000)
    with pytest.raises(ValueError, match="does not say its timestep"):
        codec.decode(own.data)
    expected = tiny.reconstruct(to_tensor(image), rate).image
    assert np.array_equal(np.asarray(trips[rate.timestep].decoded), np.asarray(to_pil(expected)))


def test_choices_and_tables() -> None:
    mappings = {"paper": TableMapping.paper(), "flat": ConstantMapping(300), "own": PerImageMapping()}
    rows = pd.DataFrame(
        [
            {
                "image": image,
                "rate": rate.bpp,
                "timestep": timestep,
                "actual_bpp": rate.bpp + (timestep == OWN),
                "psnr": 30 - abs(timestep - 250) / 100 + shift,
                "niqe": timestep + 2 * shift,
            }
            for rate in RATES
            for timestep in (OWN, 150.0, 200.0, 300.0, 500.0)
            for image, shift in (("a", 0), ("b", 1))
        ]
    )
    own = pd.DataFrame({"rate": [RATES[0].bpp] * 2 + [RATES[1].bpp] * 2, "timestep": [100, 104, 50, 50]})
    choices = ablation.choose(rows, RATES, mappings, ["psnr", "niqe"], own)
    assert len(choices) == 2 * (3 + 2)
    table = choices.set_index(["rate", "mapping"])
    low = table.loc[0.0019]
    assert low.loc["paper", "timestep"] == 500 and low.loc["paper", "psnr"] == pytest.approx(28.0)
    assert low.loc["flat", "psnr"] == pytest.approx(30.0) and low.loc["own", "timestep"] == 102
    assert low.loc["own", "actual_bpp"] == pytest.approx(1.0019)
    best = low.loc[BEST]
    assert best["timestep"].tolist() == [200, 150]  # highest PSNR, the first of equals; lowest NIQE, not at OWN
    tables = {table.name: table for table in ablation.make_tables(choices, mappings, ["psnr", "niqe"])}
    assert list(tables) == ["timesteps", "mappings_psnr", "side_by_side_psnr", "mappings_niqe", "side_by_side_niqe"]
    assert tables["timesteps"].cells() == [["0.0019", "500", "300", "102"], ["0.1250", "150", "300", "50"]]
    assert tables["mappings_psnr"].cells()[0] == ["0.0019", "28.00", "30.00", "27.99", "30.00"]
    assert tables["mappings_psnr"].cells()[-1][:3] == ["mean", "28.75", "30.00"]
    side = tables["side_by_side_psnr"]
    assert list(side.shown.values()) == ["rate", "paper t", "paper PSNR dB", "best t", "best PSNR dB"]
    assert side.cells() == [
        ["0.0019", "500", "28.00", "200", "30.00"],
        ["0.1250", "150", "29.50", "200", "30.00"],
        ["mean", "–", "28.75", "–", "30.00"],
    ]
    assert r"\begin{tabular}" in side.to_latex()


@pytest.fixture
def ablate(photos: Path, tiny_folder: Path, tmp_path: Path):
    def run(**options) -> pd.DataFrame:
        settings = {
            "mappings": {"paper": {"kind": "table"}, "cosine": {"kind": "cosine"}, "own": {"kind": "per_image"}},
            "sweep": [0, 500],
            "rates": [0.125],
            "metrics": MetricsConfig(["psnr"]),
            **options,
        }
        data = PackagedImagesConfig(str(photos), limit=2)
        config = AblateTimestepsConfig(output=str(tmp_path / "out"), model=str(tiny_folder), data=data, **settings)
        return ablation.ablate_config(config)

    return run


def test_an_ablation_goes_on_where_it_stopped(ablate, tmp_path: Path, monkeypatch) -> None:
    decoded = []
    round_trip = TimestepCodec.round_trip
    monkeypatch.setattr(
        TimestepCodec, "round_trip", lambda self, image, point: decoded.append(point) or round_trip(self, image, point)
    )
    first = ablate()
    assert set(first["mapping"]) == {"paper", "cosine", "own", BEST}
    rows = pd.read_csv(tmp_path / "out/sweep.csv")
    assert len(rows) == 2 * len(set(rows["timestep"])) and set(rows["timestep"]) >= {OWN, 0, 150, 500}
    count = len(decoded)
    assert ablate().equals(first) and len(decoded) == count  # nothing is decoded twice
    others = {"paper": {"kind": "table"}, "flat": {"kind": "constant", "timestep": 3}}
    more = ablate(sweep=[0, 500, 700], mappings=others)
    assert set(decoded[count:]) == {3, 700} and set(more["mapping"]) == {"paper", "flat", BEST}
    assert 700 in set(pd.read_csv(tmp_path / "out/sweep.csv")["timestep"])
    for name in (
        "tables/side_by_side_psnr.md",
        "tables/mappings_psnr.tex",
        "tables/timesteps.csv",
        "plots/sweep_psnr.svg",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mappings": {"a": {"kind": "cosin"}}}, "timesteps.kind 'cosin' does not exist"),
        ({"mappings": {"a": {"kind": "constant", "timestep": 1000}}}, "1000 of rate 0.1250 is outside the schedule"),
        ({"mappings": {"a": {"kind": "snr", "calibration": "no.json"}}}, "timesteps.calibration is 'no.json'"),
        ({"sweep": [1000]}, "timestep 1000 is not allowed; allowed: 0 to 999"),
        ({"rates": [0.3]}, "rate 0.3 does not exist"),
        ({"metrics": MetricsConfig(["psnr", "fid"])}, "metrics.names has fid, which has no value per image"),
        ({"metrics": MetricsConfig(["snr"])}, "metric 'snr' does not exist"),
    ],
)
def test_what_an_ablation_refuses(ablate, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(**options)
    assert not (tmp_path / "out/sweep.csv").exists()
