"""Stages bottleneck and joint with a hyperprior: what they train, by which loss, and what they leave behind."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oscar import OscarCodec
from oscar.bitstream.hyperprior_weights import KNOTS
from oscar.bottlenecks.hyperprior import Estimate, latent_cosine
from oscar.config import ConfigError, TrainConfig
from oscar.inference.load import load
from oscar.timesteps import CurveMapping
from oscar.training.build import build_stage
from oscar.training.trainer import Trainer
from oscar.utils.rng import StepRng

QUICK = ("logger.tensorboard=false", "trainer.threads=1", "stage.table_batches=1")


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, *overrides: str) -> TrainConfig:
        if stage == "joint":
            overrides = ("stage.table_batches=128", *overrides)
        return compose(
            f"experiment=tiny/hyperprior_{stage}",
            f"data.train=[{photos}]",
            f"output={tmp_path / stage}",
            *QUICK,
            *overrides,
        )

    return make


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("stage", "override", "parts"),
    [
        ("bottleneck", "seed=0", {"bottleneck"}),
        ("joint", "stage.vae=frozen", {"bottleneck", "denoiser"}),
        ("joint", "stage.denoiser=frozen", {"bottleneck"}),
        ("joint", "stage.vae=decoder", {"bottleneck", "denoiser", "decoder"}),
        ("joint", "stage.vae=all", {"bottleneck", "denoiser", "decoder", "encoder"}),
    ],
)
def test_what_is_trained(configure, stage: str, override: str, parts: set[str]) -> None:
    built = build_stage(configure(stage, override))
    built.train()
    built(images(), StepRng(0, 0))["loss"].backward()
    found = {name for name, value in built.named_parameters() if value.grad is not None and value.grad.any()}
    places = {
        "bottleneck": "codec.bottleneck.",
        "denoiser": ".lora_",
        "encoder": ".vae.encoder.",
        "decoder": ".vae.decoder.",
    }
    assert {part for part, place in places.items() if any(place in name for name in found)} == parts
    assert all(".lora_" in name for name in found if ".unet." in name)


def test_the_loss_is_rate_plus_lambda_times_distortion(configure, monkeypatch) -> None:
    bits = torch.tensor([4096.0, 8192.0, 0.0])  # of 64 x 64 pixels: 1, 2 and 0 bpp
    distortion, quality = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0.0, 0.5, 1.0])
    z_hat = distortion.sqrt()[:, None, None, None].expand(3, 4, 8, 8)
    each = [(1 + 0.25 * 1) / 0.5, (2 + 1 * 0.5) / 1, (0 + 4 * 0.25) / 2]
    for name in ("bottleneck", "joint"):
        stage = build_stage(configure(name, "stage.lambdas=[0.25,4]"))
        bottleneck = stage.codec.bottleneck
        monkeypatch.setattr(bottleneck, "estimate", lambda latent, quality: Estimate(z_hat, bits))
        output = bottleneck(torch.zeros(3, 4, 8, 8), quality)
        assert output.statistics["bpp"] == 1
        torch.testing.assert_close(output.statistics["distortion"], distortion.mean())
        loss, _ = stage.weigh(output)
        if name == "joint":  # where images say how far off they are
            loss = loss + (output.weight * distortion).mean()
        torch.testing.assert_close(loss, torch.tensor(sum(each) / 3))


def test_every_distortion_of_stage_joint_counts_by_lambda(configure) -> None:
    """Losses of images of high quality weigh more: adversarial, cosine and latent ones as those of pixels."""
    low_high, weights = (0.25, 4.0), {"cosine": 2.0, "latent": 0.5, "gan": 0.1}
    stage = build_stage(
        configure(
            "joint", f"stage.lambdas={list(low_high)}", *(f"stage.{name}={value}" for name, value in weights.items())
        )
    ).eval()
    batch, rng = images(), StepRng(3, 0)
    total = stage(batch, rng)["loss"]
    codec = stage.codec
    latent = codec.backbone.encode(batch)
    ((quality, _),) = codec.bottleneck.draw(rng, latent, every=False)
    estimate = codec.bottleneck.estimate(latent, quality)
    x0 = codec.denoiser(estimate.z_hat, codec.bottleneck.timesteps(codec.mapping, quality, latent))
    pixels, _ = stage.image_loss.by_image(codec.backbone.decode(x0), batch)
    logits = stage.critic(x0, codec.denoiser.prompt, rng.noise(x0.device))
    cosine = torch.nn.functional.cosine_similarity(estimate.z_hat.flatten(2), latent.flatten(2), dim=2).mean(dim=1)
    distortion = (
        pixels
        - weights["cosine"] * cosine
        + weights["latent"] * (x0 - latent).square().mean(dim=(1, 2, 3))
        + weights["gan"] * torch.nn.functional.softplus(-logits).mean(dim=(1, 2, 3))
    )
    lambdas = low_high[0] * (low_high[1] / low_high[0]) ** quality
    expected = ((estimate.bits / 64**2 + lambdas * distortion) / lambdas.sqrt()).mean()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    total.backward()
    assert codec.denoiser.prompt.grad.abs().max() > 0


def test_channels_of_zeros_have_a_bounded_gradient(configure) -> None:
    bottleneck = build_stage(configure("joint", "stage.cosine=2")).codec.bottleneck
    with torch.no_grad():
        bottleneck.log_gain.fill_(-20)  # all is rounded to zero
    output = bottleneck(images(2)[:, :1].expand(2, 4, 64, 64), torch.tensor([0.0, 1.0]))
    (gradient,) = torch.autograd.grad(output.losses["cosine"].sum(), output.z_hat)
    assert output.z_hat.abs().max() == 0 and 0 < gradient.abs().max() < 10


def test_qualities_are_a_function_of_the_pass(configure) -> None:
    stage = build_stage(configure("bottleneck")).eval()
    latent = stage.codec.backbone.encode(images(64)).detach()
    draws = [
        stage.codec.bottleneck.draw(rng, latent, every)
        for rng, every in ((StepRng(7, 1), True), (StepRng(7, 1), False), (StepRng(8, 1), True))
    ]
    ((first, _),), ((again, _),), ((other, _),) = draws
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() < 0.1 and first.max() > 0.9


def test_timesteps_follow_the_cosine(configure) -> None:
    codec = build_stage(configure("bottleneck")).codec
    latent = codec.backbone.encode(images()).detach()
    mapping = codec.eval().bottleneck.finish([latent, latent], codec.backbone.schedule)
    assert codec.mapping == CurveMapping.straight()  # not set here
    signal = codec.backbone.schedule.alphas_cumprod.sqrt()
    assert len(mapping.values) == KNOTS
    for place, (timestep, value) in enumerate(zip(mapping.timesteps, mapping.values, strict=True)):
        with torch.no_grad():
            z_hat = codec.bottleneck.estimate(latent, torch.full((3,), place / (KNOTS - 1))).z_hat
        assert value == pytest.approx(latent_cosine(z_hat, latent).item(), abs=1e-4)
        assert (signal - value).abs().argmin() == timestep
    assert mapping.values[0] < mapping.values[-1]


def test_stages_follow_one_another(configure, make_image, tmp_path: Path) -> None:
    hyper = configure("bottleneck", "trainer.max_steps=2")
    assert Trainer(build_stage(hyper), hyper).run()
    mapping = OscarCodec.from_pretrained(tmp_path / "bottleneck/final").mapping
    assert isinstance(mapping, CurveMapping) and len(mapping.values) == KNOTS
    folder = tmp_path / "images"
    folder.mkdir()
    make_image(70, 50).save(folder / "a.png")
    joint = configure(
        "joint",
        f"init_from={tmp_path / 'bottleneck/final'}",
        "trainer.max_steps=2",
        f"validation.images={folder}",
        "validation.qualities=[0,1]",
        "validation.metrics.names=[psnr]",
    )
    assert Trainer(build_stage(joint), joint).run()
    codec = load(tmp_path / "joint/final", dtype=torch.float32)
    assert codec.mapping == mapping
    data = codec.compress(make_image(70, 50), quality=1.0)
    assert codec.decompress(data).size == (70, 50)
    with (tmp_path / "joint/validation.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["bpp_1.0000"]) == pytest.approx(8 * len(data) / (70 * 50))
    assert {f"{name}_{quality}.0000" for name in ("psnr", "bpp", "cosine") for quality in (0, 1)} < row.keys()
    assert all(math.isfinite(float(value)) for value in row.values())


def test_another_kind_of_checkpoint_is_refused(configure, tiny_folder) -> None:
    with pytest.raises(ConfigError, match="^bottleneck.kind is 'hyperprior', but init_from has 'vq'"):
        build_stage(configure("joint", f"init_from={tiny_folder}"))
