"""What the denoising step does: each variant against the parts that it is made of, for both kinds of bottleneck."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from oscar.baselines.base import ImageCodec
from oscar.config import AblateDenoiserConfig, ConfigError, MetricsConfig, PackagedImagesConfig
from oscar.data.folders import find_images
from oscar.data.images import read_image
from oscar.data.tensors import to_pil
from oscar.evaluation.codecs import load_oscar
from oscar.evaluation.denoiser import PartialCodec, ablate_denoiser_config
from oscar.evaluation.evaluate import EvaluationError
from oscar.metrics.image import psnr

POINTS = {"tiny": [0.0019, 0.125], "nano": [0.0, 1.0]}


@pytest.fixture
def ablate(photos: Path, tiny_folder: Path, tmp_path: Path):
    """Runs the ablation on one image; options are of the configuration."""

    def run(model: str = "tiny", **options) -> pd.DataFrame:
        settings = {"points": POINTS[model], "metrics": MetricsConfig(["psnr"]), **options}
        config = AblateDenoiserConfig(
            output=str(tmp_path / "out"),
            model=str(tiny_folder) if model == "tiny" else model,
            data=PackagedImagesConfig(images=str(photos), limit=1),
            **settings,
        )
        config.check()
        return ablate_denoiser_config(config)["psnr"]

    return run


@pytest.mark.parametrize("model", POINTS)
def test_every_variant_is_what_it_says(model: str, ablate, photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    table = ablate(model).set_index("point")
    whole = load_oscar(tiny_folder if model == "tiny" else model)
    codec, image = whole.codec, read_image(find_images(photos)[0])
    timestep = round(sum(table["timestep"]) / 2)

    def score(latent: torch.Tensor) -> float:
        return psnr(image, to_pil(codec.decode_image(latent)[..., : image.height, : image.width]))

    for point, row in table.iterrows():
        found = codec.find_point(point)
        data = codec.compress(image, found)
        with torch.inference_mode():
            z_hat = codec.bottleneck.dequantise(codec.read(data).symbols, found)
            assert row["timestep"] == codec.mapping(found)
            assert row["actual_bpp"] == pytest.approx(8 * len(data) / (image.width * image.height))
            assert row["codec"] == pytest.approx(psnr(image, codec.decompress(data)))
            assert row["bypassed"] == pytest.approx(score(z_hat), abs=1e-4)
            assert row["constant"] == pytest.approx(score(codec.denoiser(z_hat, timestep)), abs=1e-4)
    assert table["unquantised"].nunique() == table["vae"].nunique() == 1
    if model == "nano":  # which is trained: rounding costs, and the UNet gives something back
        best = table.iloc[-1]
        assert best["unquantised"] > best["codec"] > best["bypassed"]
    markdown = (tmp_path / "out/tables/denoiser_psnr.md").read_text()
    assert f"| UNet at t = {timestep} | no UNet | not quantised | neither |" in markdown


def test_at_its_own_timestep_a_point_is_as_it_is(ablate) -> None:
    own = ablate(points=[0.125])["timestep"].item()
    row = ablate(points=[0.125], timestep=int(own)).iloc[0]
    assert row["constant"] == pytest.approx(row["codec"], abs=1e-6)


def test_latents_at_the_scale_of_the_quantised_ones(tiny_folder: Path, photos: Path, monkeypatch) -> None:
    """A bottleneck that hands the latent on unchanged, but for its scale, loses nothing."""
    whole = load_oscar(tiny_folder)
    codec, image = whole.codec, read_image(find_images(photos)[0])
    latents = []
    encode = codec.encode_latent
    monkeypatch.setattr(codec, "encode_latent", lambda *given: latents.append(encode(*given)) or latents[-1])
    monkeypatch.setattr(codec.bottleneck, "dequantise", lambda symbols, point: 3 * latents[-1])
    trip = PartialCodec(whole, "vae").round_trip(image, 0.125)
    with torch.inference_mode():
        expected = to_pil(codec.decode_image(3 * latents[-1])[..., : image.height, : image.width])
    assert psnr(trip.decoded, expected) > 60 and trip.encoded is None
    with pytest.raises(ValueError, match="oscar-.*-vae: writes no files; allowed: round_trip"):
        ImageCodec.round_trip(PartialCodec(whole, "vae"), image, 0.125)


def test_mistakes_are_one_line(ablate) -> None:
    for options, error, words in (
        ({"points": []}, ConfigError, "points is empty; allowed: one or more"),
        ({"points": [0.3]}, ValueError, "rate 0.3"),
        ({"timestep": 1000}, EvaluationError, "timestep is 1000; allowed: 0 to 999"),
        ({"metrics": MetricsConfig(["fid"], download=False)}, EvaluationError, "fid, which has no value per image"),
    ):
        with pytest.raises(error, match=words):
            ablate(**options)
