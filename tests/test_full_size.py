"""From a published checkpoint to images by commands alone: tiny in the suite, and on request at full size.

OSCAR_FULL_SIZE=1 python -m pytest tests/test_full_size.py       # minutes, and 5 GB of disk
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import OmegaConf
from PIL import Image

from oscar.bitstream import Container
from oscar.cli.main import main
from oscar.models.backbone import Backbone
from oscar.rates import PAPER_RATES
from oscar.runtime import Codec
from oscar.training.build import build_stage
from oscar.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
FULL = pytest.mark.skipif(os.environ.get("OSCAR_FULL_SIZE") != "1", reason="takes minutes; set OSCAR_FULL_SIZE=1")


@pytest.fixture
def make_random_model(load_script) -> Callable[..., int]:
    return lambda *args: load_script("make_random_model").main(list(args))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "bottleneck"), [("tiny", "tiny"), pytest.param("sd21_random", "paper", marks=FULL)]
)
def test_from_a_published_checkpoint_to_images(
    make_random_model, make_image, tmp_path: Path, backbone: str, bottleneck: str
) -> None:
    def run(*args: str | Path) -> None:
        assert main([str(arg) for arg in args]) == 0

    random, model, files = tmp_path / "random", tmp_path / "model", tmp_path / "files"
    assert make_random_model(str(random), "--backbone", backbone, "--bottleneck", bottleneck) == 0
    run("convert", random / "oscar.pkl", model, "--backbone", random / "backbone")
    photo = tmp_path / "photo.png"
    make_image(160, 120).save(photo)
    files.mkdir()
    for rate in PAPER_RATES:
        packed = files / f"{rate.bpp:.4f}.oscar"
        run("compress", photo, packed, "--rate", f"{rate.bpp:.4f}", "--model", model)
        container = Container.unpack(packed.read_bytes())
        assert container.rate == rate and packed.stat().st_size <= 16 + -(-rate.nominal_bits(120, 160) // 8)
    run("decompress", files, tmp_path / "images", "--model", model)
    for rate in PAPER_RATES:
        with Image.open(tmp_path / f"images/{rate.bpp:.4f}.png") as image:
            assert image.size == (160, 120)
            assert max(high - low for low, high in image.getextrema()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "small"),
    [
        ("tiny", ["bottleneck=tiny_hyperprior", "denoiser.lora_rank=2", "denoiser.prompt_tokens=4", "data.crop=64"]),
        pytest.param("sd21_random", [], marks=FULL),
    ],
)
def test_the_hyperprior_from_training_to_images(
    make_random_model,
    compose,
    make_image,
    tmp_path: Path,
    backbone: str,
    small: list[str],
) -> None:
    """Two steps of both stages on random weights, then a file and back, all by command."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        make_image(300, 280, number).save(tmp_path / f"photos/{number}.png")
    assert make_random_model(str(tmp_path / "random"), "--backbone", backbone, "--backbone-only") == 0
    common = [f"data.train=[{tmp_path / 'photos'}]", "data.batch_size=2", "data.workers=0", "trainer.max_steps=2"]
    common += [
        f"backbone.source={tmp_path / 'random/backbone'}",
        "trainer.log_every=1",
        "logger.tensorboard=false",
        *small,
    ]
    stages = {
        "stage1": ["data.total_batch_size=2", "stage.table_batches=1"],
        # DISTS' weights are not in the repository
        "stage2": [
            f"init_from={tmp_path / 'stage1/final'}",
            "stage.image_losses.dists=0",
            "stage.image_losses.edges_dists=0",
        ],
    }
    if backbone != "tiny":
        stages["stage2"].append("trainer.gradient_checkpointing=true")
    for name, own in stages.items():
        config = compose(f"experiment=sd21_hyperprior/{name}", f"output={tmp_path / name}", *common, *own)
        assert Trainer(build_stage(config), config).run()
        print((tmp_path / name / "log.csv").read_text())
    make_image(160, 120).save(tmp_path / "photo.png")
    model = ("--model", str(tmp_path / "stage2/final"))
    for quality in ("0", "0.37", "1"):
        packed, unpacked = tmp_path / f"{quality}.oscar", tmp_path / f"{quality}.png"
        assert main(["compress", str(tmp_path / "photo.png"), str(packed), "--quality", quality, *model]) == 0
        assert main(["decompress", str(packed), str(unpacked), *model]) == 0
        assert Container.unpack(packed.read_bytes()).quality == pytest.approx(float(quality), abs=1e-3)
        with Image.open(unpacked) as decoded:
            assert decoded.size == (160, 120) and max(high - low for low, high in decoded.getextrema()) > 0
    # Its adapters merged, as graphs: compared with torch by the command itself.
    assert main(["export", model[1], str(tmp_path / "graphs")]) == 0
    decoded = Codec(tmp_path / "graphs", threads=1).decompress((tmp_path / "1.oscar").read_bytes())
    with Image.open(tmp_path / "1.png") as expected:
        assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(expected)).max() <= 1


def test_a_configuration_that_does_not_exist(make_random_model, tmp_path: Path, capsys) -> None:
    assert make_random_model(str(tmp_path), "--backbone", "none") == 2
    assert "none.yaml" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_random_backbone_has_the_published_shape(sd21) -> None:
    random = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/backbone/sd21_random.yaml"))
    for part, file in (("vae", "config.json"), ("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        published = json.loads((sd21 / part / file).read_text())
        for name, value in random[part].items():
            assert published.get(name, value) == value, f"{part}.{name}"
    with torch.device("meta"):
        vae, unet = (
            kind.from_config(json.loads((sd21 / f"{part}/config.json").read_text()))
            for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
        )
        ours = Backbone.from_configs(random["vae"], random["unet"], random["scheduler"])
    for network, published in ((ours.vae, vae), (ours.unet, unet)):
        shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (network, published)]
        assert shapes[0] == shapes[1]
    assert ours.vae.config.scaling_factor == vae.config.scaling_factor
