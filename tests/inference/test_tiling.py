from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from oscar.inference import tiling
from oscar.inference.load import load
from oscar.inference.memory import MemoryBudget
from oscar.inference.optimise import set_memory
from oscar.inference.tiling import TiledBackbone, can_be_cut, decode, encode
from oscar.models.backbone import Backbone

TIGHT = MemoryBudget(1)  # the least that can be done with


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max())


def test_full_size_at_4k_fits_four_gigabytes(backbone_config) -> None:
    with torch.device("meta"):
        full = AutoencoderKL.from_config(backbone_config("sd21_random")["vae"])
    for half in tiling.plan(full, 2160, 3840, torch.bfloat16, MemoryBudget.parse("4GB")):
        assert 2e9 < half.peak <= 4e9  # one map of the image's size has 128 channels of two bytes: 2.1 GB
        assert half.recomputed > 0


@torch.no_grad()
def test_strips_of_nanos_autoencoder(backbone_config, make_images, small_limits) -> None:
    config = backbone_config("nano_vq")
    torch.manual_seed(0)
    backbone = Backbone.from_configs(config["vae"], config["unet"], config["scheduler"]).eval()
    backbone.__class__, backbone.memory = TiledBackbone, TIGHT
    images = make_images(2, height=520, width=64)
    latent = backbone.vae.encode(images).latent
    assert difference(backbone.encode(images), latent * backbone.vae.config.scaling_factor) < 1e-5
    whole = backbone.vae.decode(latent).sample
    assert difference(decode(backbone.vae, latent), whole) < 1e-5 * float(whole.abs().max())


@torch.no_grad()
def test_strips_of_a_small_autoencoder(small_limits) -> None:
    torch.manual_seed(0)
    preview = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    latent = torch.randn(1, 4, 90, 6)
    whole = preview.decode(latent).sample
    assert difference(decode(preview, latent), whole) < 1e-5 * float(whole.abs().max())


def test_a_budget_too_small_is_said(make_images, small_limits, standin_vae, caplog) -> None:
    encode(standin_vae, make_images(), TIGHT)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("memory budget of 1e-09 GB is too small for an image of 136x152: it took")


def test_images_are_worked_on_one_by_one(make_images, small_limits, standin_vae) -> None:
    images = make_images(2)
    both = encode(standin_vae, images)
    assert torch.equal(both[1:], encode(standin_vae, images[1:]))


@pytest.mark.parametrize(
    ("value", "limit"),
    [("auto", None), (5, 5), ("1500000", 1_500_000), ("4GB", 4 * 10**9), ("2.5 GiB", 5 * 2**29), ("800m", 8 * 10**8)],
)
def test_budgets_from_text(value: str | int, limit: int | None) -> None:
    assert MemoryBudget.parse(value) == MemoryBudget(limit)


@pytest.mark.parametrize("value", ["", "much", "-1GB", "0", 0, -5, "4 GBs", "iB", "1e9"])
def test_budgets_that_are_refused(value: str | int) -> None:
    with pytest.raises(ValueError, match=r"^memory is .*; allowed: auto, or a size above 0 such as 4GB") as error:
        MemoryBudget.parse(value)
    assert str(value) in str(error.value)


def test_auto_is_a_share_of_what_is_free() -> None:
    assert MemoryBudget.parse(None) is None
    assert 2**20 < MemoryBudget.parse("auto").bytes(torch.device("cpu")) < 2**50


@pytest.fixture
def cuts(monkeypatch) -> list[str]:
    """What was done in parts."""
    done = []

    def note(function):
        def noted(*args):
            done.append(function.__name__)
            return function(*args)

        return noted

    for function in (encode, decode):
        monkeypatch.setattr(tiling, function.__name__, note(function))
    return done


def test_files_and_images_depend_on_whether_an_image_is_cut_alone(small_limits, tiny_folder, make_image, cuts) -> None:
    codec, image = load(tiny_folder, dtype=torch.float32), make_image(130, 84)
    results: dict[bool, set[tuple[bytes, bytes]]] = {True: set(), False: set()}
    for budget in (None, "auto", 1, 200_000, "1GB"):
        set_memory(codec, budget)
        cuts.clear()
        data = codec.compress(image, 0.0625)
        results[bool(cuts)].add((data, codec.decompress(data).tobytes()))
        assert cuts in ([], ["encode", "decode"]) and bool(cuts) == (budget in (1, 200_000))
    (whole,), (parts,) = results[False], results[True]
    pixels = [torch.frombuffer(bytearray(image), dtype=torch.uint8).int() for _, image in (whole, parts)]
    assert whole[0] == parts[0] and (pixels[0] - pixels[1]).abs().max() <= 1


def test_small_images_plain_codecs_and_training_are_not_cut(make_images, make_backbone, monkeypatch, cuts) -> None:
    plain, tiled, images = make_backbone(), make_backbone(), make_images(1, 64, 64)
    tiled.__class__, tiled.memory = TiledBackbone, TIGHT
    with torch.no_grad():
        tiled.decode(tiled.encode(images))
        monkeypatch.setattr(tiling, "WHOLE", 2**10)
        plain.decode(plain.encode(images))
    tiled.decode(tiled.encode(images)).sum().backward()
    assert not cuts
    with torch.no_grad():
        tiled.decode(tiled.encode(images))
    assert cuts == ["encode", "decode"]


@torch.no_grad()
def test_batches_on_a_gpu_are_shared_out(small_limits, make_backbone, make_images, monkeypatch) -> None:
    """As many images as fit go together; told of a batch on a CPU by a device that is said to be another."""
    backbone, sizes = make_backbone().eval(), []
    backbone.__class__, backbone.memory = TiledBackbone, MemoryBudget(1_600_000)
    run = Backbone.run_encoder

    def run_encoder(self: Backbone, vae: AutoencoderKL, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return run(self, vae, images)

    monkeypatch.setattr(Backbone, "run_encoder", run_encoder)
    monkeypatch.setattr(tiling, "device_type", lambda tensor: "cuda")
    images = make_images(5, 64, 64)
    together = backbone.encode(images)
    assert sizes == [1, 2, 2, 1]  # the first one by what memory is known
    sizes.clear()
    assert difference(together, backbone.encode(images)) == 0 and sizes == [2, 2, 1]
    backbone.memory = None
    sizes.clear()
    assert difference(together, backbone.encode(images)) < 1e-5 and sizes == [5]


@torch.no_grad()
def test_other_global_autoencoders_are_not_cut(backbone_config, make_images, small_limits) -> None:
    attention = {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    }
    one = AutoencoderKL(**attention, block_out_channels=(8, 8), norm_num_groups=4)
    config = backbone_config("nano_vq")
    multiscale = {
        "encoder_qkv_multiscales": [[], [], [], [5]],
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"],
    }
    other = Backbone.from_configs({**config["vae"], **multiscale}, config["unet"], config["scheduler"])
    assert not can_be_cut(one) and not can_be_cut(other.vae)
    other.__class__, other.memory = TiledBackbone, TIGHT
    assert other.encode(make_images(1, 64, 64)).shape == (1, 4, 8, 8)
