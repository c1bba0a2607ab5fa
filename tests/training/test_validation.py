"""Validation measures real files of a fixed set, shares it out over processes, and leaves training as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from oscar.bottlenecks.vq import perplexity
from oscar.config import ConfigError, TrainConfig
from oscar.data.tensors import to_pil
from oscar.metrics.image import psnr
from oscar.training import validation
from oscar.training.build import build_stage
from oscar.training.stages.base import Stage
from oscar.training.validation import Validator, centre, summarise
from oscar.utils.rng import StepRng

SIZES = [(200, 170), (70, 50), (64, 64)]  # the last two are too small for MS-SSIM
RATES = ("0.0313", "0.1250")


@pytest.fixture(autouse=True)
def accelerator():
    return Accelerator()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory, make_image) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    for seed, size in enumerate(SIZES):
        make_image(*size, seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def configure(compose, photos: Path, image_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, *overrides: str) -> TrainConfig:
        if stage in ("bottleneck", "joint"):
            overrides = ("bottleneck.rates=[0.0313,0.125]", *overrides)
        return compose(
            f"experiment=tiny/{stage}",
            f"data.train=[{photos}]",
            f"output={tmp_path}",
            "logger.tensorboard=false",
            f"validation.images={image_folder}",
            *overrides,
        )

    return make


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def originals(folder: Path) -> list[Image.Image]:
    return [Image.open(folder / f"{seed}.png") for seed in range(len(SIZES))]


def trained(config: TrainConfig) -> Stage:
    """A stage after a few training passes, so that its moving averages say something."""
    stage = build_stage(config).train()
    for number in range(4):
        stage(images(), StepRng(number, 0))
    return stage


def test_scalars_are_those_of_real_files(configure, accelerator, image_folder: Path) -> None:
    config = configure("joint", "stage.gan=0")
    stage = trained(config)
    validator = Validator(config, accelerator)
    scalars = validator.run(stage, 10)
    assert (validator.best, validator.higher_is_better) == ("psnr", True)
    names = ("psnr", "ms_ssim", "bpp", "cosine")
    columns = [f"{name}_{rate}" for rate in RATES for name in (*names, "perplexity", "used")]
    assert list(scalars) == [*names, *columns]

    codec = stage.eval().codec
    with codec.bottleneck.ready_to_code():
        codec.forget_fingerprint()
        for rate in codec.bottleneck.rates:
            files = [codec.compress(image, rate) for image in originals(image_folder)]
            pixels = [image.width * image.height for image in originals(image_folder)]
            bpp = fmean(8 * len(data) / count for data, count in zip(files, pixels, strict=True))
            quality = fmean(
                psnr(image, codec.decompress(data)) for image, data in zip(originals(image_folder), files, strict=True)
            )
            codes = np.concatenate([codec.read(data).symbols.indices.numpy().ravel() for data in files])
            share = np.unique(codes, return_counts=True)[1] / len(codes)
            assert scalars[f"bpp_{rate.bpp:.4f}"] == pytest.approx(bpp)
            assert scalars[f"psnr_{rate.bpp:.4f}"] == pytest.approx(quality)
            assert scalars[f"perplexity_{rate.bpp:.4f}"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))
            assert scalars[f"used_{rate.bpp:.4f}"] == pytest.approx(len(share) / rate.codebook_size)
    for name in names:
        assert scalars[name] == pytest.approx(fmean(scalars[f"{name}_{rate}"] for rate in RATES))


def test_training_goes_on_as_if_there_had_been_none(configure, accelerator) -> None:
    config = configure("joint")
    stage = trained(config)
    state = {name: value.clone() for name, value in stage.state_dict().items()}
    tables = {key: table.copy() for key, table in stage.codec.bottleneck.frequencies.items()}
    losses = []
    for _ in range(2):
        stage.load_state_dict(state)
        losses.append(stage(images(), StepRng(7, 0))["loss"].item())
        stage.load_state_dict(state)
        Validator(config, accelerator).run(stage, 1)
        assert stage.training and stage.codec.bottleneck.training and not stage.codec.backbone.vae.training
        assert all(torch.equal(value, state[name]) for name, value in stage.state_dict().items())
        assert all(np.array_equal(table, stage.codec.bottleneck.frequencies[key]) for key, table in tables.items())
    assert losses[0] == losses[1]


def test_the_grid_is_written_and_given_to_the_trackers(configure, accelerator, tmp_path: Path) -> None:
    seen = {}

    def tracker(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            log_images=lambda values, step, **options: seen.update({name: (values["validation"], step, options)}),
        )

    accelerator.trackers = [tracker("tensorboard"), tracker("wandb")]
    config = configure("joint", "stage.gan=0", "validation.grid=2")
    Validator(config, accelerator).run(trained(config), 40)
    grid = Image.open(tmp_path / "validation/step-0000040.png")
    cell = validation._CELL + validation._GAP
    assert grid.size == (3 * cell + validation._GAP, 2 * (cell + validation._CAPTION) + validation._GAP)
    values, step, options = seen["tensorboard"]
    assert np.array_equal(values[0], np.asarray(grid)) and (step, options) == (40, {"dataformats": "NHWC"})
    assert np.array_equal(np.asarray(seen["wandb"][0][0]), np.asarray(grid)) and seen["wandb"][1] == 40
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step-0000040.png"]


@pytest.mark.parametrize("count", [2, 5])  # of processes; five have more than there are images
def test_processes_share_the_set(configure, accelerator, monkeypatch, count: int) -> None:
    config = configure("bottleneck")
    stage = trained(config)
    whole = Validator(config, accelerator).run(stage, 1)
    gathered: list = []
    monkeypatch.setattr(validation, "gather_object", lambda rows: gathered.extend(rows) or list(gathered))
    monkeypatch.setattr(validation, "summarise", lambda rows: {})
    turns = []
    for rank in reversed(range(count)):  # the first process is the last to run, and then holds everyone's rows
        if rank == 0:
            monkeypatch.setattr(validation, "summarise", summarise)
        process = SimpleNamespace(
            process_index=rank,
            num_processes=count,
            device="cpu",
            trackers=[],
            is_main_process=rank == 0,
            main_process_first=nullcontext,
        )
        validator = Validator(config, process)
        turns.append(len(validator.images))
        shared = validator.run(stage, 1)
    assert len(set(turns)) == 1  # every process makes as many forward passes
    assert shared.keys() == whole.keys()
    for name, value in whole.items():
        assert shared[name] == pytest.approx(value), name


def test_hyper_goes_by_the_cosine(configure, accelerator) -> None:
    config = configure("bottleneck", "validation.rates=[0.125]", "validation.crop=64", "validation.limit=1")
    stage = trained(config)
    validator = Validator(config, accelerator)
    assert (validator.best, validator.higher_is_better) == ("cosine", True)
    scalars = validator.run(stage, 1)
    assert not any("0.0313" in name for name in scalars)
    codec = stage.eval().codec
    with torch.no_grad():
        latent = codec.backbone.encode(to_batch(validator.images[0][1]))
        z_hat = codec.bottleneck.at(codec.bottleneck.rates[1])(latent).z_hat
    assert validator.images[0][1].size == (64, 64)
    assert scalars["cosine"] == pytest.approx(torch.cosine_similarity(z_hat, latent, dim=1).mean().item(), abs=1e-5)
    assert math.isnan(scalars["ms_ssim"])  # no image is large enough


def to_batch(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_learned_timesteps_are_the_codecs(configure, accelerator) -> None:
    config = configure("joint", "stage.gan=0", "timesteps=learned", "validation.grid=0")
    stage = trained(config)
    with torch.no_grad():
        stage.timesteps.offset += 0.5
    Validator(config, accelerator).run(stage, 1)
    for rate in stage.codec.bottleneck.rates:
        assert stage.codec.mapping(rate) == pytest.approx(stage.timesteps(rate).item())
        assert stage.codec.mapping(rate) > rate.timestep + 10


def test_the_autoencoder_and_the_prior(configure, accelerator, image_folder: Path, tmp_path: Path) -> None:
    config = configure("vae")
    stage = build_stage(config).train()
    scalars = Validator(config, accelerator).run(stage, 1)
    assert list(scalars) == ["psnr", "ms_ssim"]
    small = originals(image_folder)[2]
    with torch.no_grad():
        backbone = stage.eval().backbone
        decoded = to_pil(backbone.decode(backbone.encode(to_batch(small)))[0].clamp(-1, 1))
    (tmp_path / "one").mkdir()
    small.save(tmp_path / "one/only.png")
    config = configure("vae", f"validation.images={tmp_path}/one")
    assert Validator(config, accelerator).run(stage, 1)["psnr"] == pytest.approx(psnr(small, decoded))

    config = configure("diffusion_pretrain")
    stage = build_stage(config).train()
    validator = Validator(config, accelerator)
    assert (validator.best, validator.higher_is_better) == ("loss", False)
    first = validator.run(stage, 1)
    assert list(first) == ["loss"] and first == validator.run(stage, 2)  # at the same noise


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("joint", ["validation.metrics.names=[psnrr]"], "metric 'psnrr' does not exist; allowed: psnr"),
        ("joint", ["validation.metrics.names=[psnr,fid]"], "validation.metrics.names has fid, which compares sets"),
        ("joint", ["validation.best=loss"], "validation.best is 'loss'; allowed: psnr, ms_ssim, bpp, cosine"),
        ("vae", ["validation.best=bpp"], "validation.best is 'bpp'; allowed: psnr, ms_ssim"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    configure, accelerator, stage: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Validator(configure(stage, *overrides), accelerator)


def test_an_image_that_cannot_be_read_is_refused(configure, accelerator, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    config = configure("vae", f"validation.images={tmp_path / 'set'}")
    with pytest.raises(ValueError, match="set: no images"):
        Validator(config, accelerator)
    (tmp_path / "set/broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        Validator(config, accelerator)


def test_metrics_without_weights_are_left_out(configure, accelerator, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    config = configure("vae", "validation.metrics.names=[psnr,lpips_alex]", "validation.grid=0")
    assert list(Validator(config, accelerator).run(build_stage(config), 1)) == ["psnr"]
    without = "validation.metrics.names=[lpips_alex]"
    with pytest.raises(ConfigError, match="'lpips_alex', which is unavailable .alexnet weights .*; allowed: psnr$"):
        Validator(
            configure("vae", "validation.metrics.names=[psnr,lpips_alex]", "validation.best=lpips_alex"), accelerator
        )
    with pytest.raises(ConfigError, match="names has no metric that can be had: alexnet weights"):
        Validator(configure("vae", without), accelerator)
    assert Validator(configure("joint", without), accelerator).best == "cosine"


def test_running_tables_follow_the_moving_averages(configure) -> None:
    codec = trained(configure("bottleneck")).codec
    tables = codec.bottleneck.running_frequencies()
    for rate in codec.bottleneck.rates:
        usage = codec.bottleneck.at(rate).usage()
        assert tables[rate.id].sum() == 2**16 - 1 and tables[rate.id].argmax() == usage.argmax()
        expected = usage.numpy() / usage.sum().item()
        assert np.abs(tables[rate.id] / 2**16 - expected).max() < 2 * len(expected) / 2**16


def test_perplexity() -> None:
    assert perplexity(torch.ones(16)).item() == pytest.approx(16)
    assert perplexity(torch.tensor([0, 7, 0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([3.0, 3.0, 0.0, 0.0]) / 100).item() == pytest.approx(2)


def test_centre(make_image) -> None:
    image = make_image(70, 50)
    assert centre(image, None) is image
    assert centre(image, 64).size == (64, 50)
    assert np.array_equal(np.asarray(centre(image, 10)), np.asarray(image)[20:30, 30:40])
