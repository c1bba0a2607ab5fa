"""Image to bytes and back with a tiny random model that has a hyperprior."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from oscar import OscarCodec, checkpoint
from oscar.benchmark.speed.stages import WHOLE, stage_costs
from oscar.bitstream import BitstreamError, Coding, Container, PayloadError, WrongModelError
from oscar.bitstream.container import MAX_QUALITY
from oscar.bottlenecks import Payload
from oscar.checkpoint import CheckpointError
from oscar.convert.merge import merge_rates
from oscar.convert.published import export
from oscar.data.images import ImageError
from oscar.data.tensors import to_pil, to_tensor
from oscar.evaluation.calibration import calibrate
from oscar.evaluation.codecs import OscarImageCodec
from oscar.inference.load import load
from oscar.operating_points import Quality
from oscar.rate_control import TargetError
from tests.processes import read_elsewhere

ROOT = Path(__file__).parents[1]
SIZES = [(1, 1), (7, 5), (133, 217), (64, 1024)]


@pytest.fixture(scope="module")
def folder(make_backbone, tmp_path_factory) -> Path:
    """A checkpoint of the tiny codec with a hyperprior. Not to be changed by tests."""
    options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/bottleneck/tiny_hyperprior.yaml"))
    codec = OscarCodec(
        *checkpoint.build(
            {
                "bottleneck": {"kind": "hyperprior", **options["hyperprior"]},
                "denoiser": {"lora_rank": 2, "prompt_tokens": 4},
                "timesteps": {"kind": "curve"},
            },
            make_backbone(),
        )
    )
    codec.bottleneck.update()
    folder = tmp_path_factory.mktemp("continuous") / "model"
    codec.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codec(folder) -> OscarCodec:
    """It as a user loads it. Not to be changed by tests."""
    return load(folder, dtype=torch.float32)


def symbols_of(codec: OscarCodec, data: bytes) -> np.ndarray:
    """The decoded latent of a file in the coder's integers, (C, h, w)."""
    return codec.read(data).symbols.values[0].numpy()


@pytest.mark.parametrize("quality", [0, 0.3, 0.5, 1])
def test_round_trip(codec, make_image, quality) -> None:
    image = make_image(96, 72)
    data = codec.compress(image, quality=quality)
    container = Container.unpack(data)
    assert (container.coding, container.width, container.height) == (Coding.HYPERPRIOR, 96, 72)
    assert container.point_code == Quality.of(quality).code == round(quality * MAX_QUALITY)
    assert container.quality == container.point_code / MAX_QUALITY and container.rate is None
    assert container.model_tag == codec.model_tag
    decoded = codec.decompress(data)
    assert decoded.size == image.size
    in_process = codec.reconstruct(to_tensor(image), quality)
    assert np.array_equal(symbols_of(codec, data), in_process.symbols.values[0].numpy())
    assert np.array_equal(np.asarray(decoded), np.asarray(to_pil(in_process.image)))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_size(codec, make_image, size) -> None:
    assert codec.decompress(codec.compress(make_image(*size))).size == size


def test_quality_is_precision(codec) -> None:
    """More of a latent is left at a higher quality: finer steps, longer files."""
    latent = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    points = [Quality.of(quality) for quality in (0, 0.25, 0.5)]  # untrained, it expects values of about 1
    found = [codec.bottleneck.quantise(latent, point) for point in points]
    payloads = [codec.bottleneck.write(symbols, point)[0] for symbols, point in zip(found, points, strict=True)]
    read = [codec.bottleneck.read(payload, point, (12, 12)) for payload, point in zip(payloads, points, strict=True)]
    errors = [
        (codec.bottleneck.dequantise(symbols, point) - latent).square().mean()
        for symbols, point in zip(read, points, strict=True)
    ]
    assert len(payloads[0].data) < len(payloads[1].data) < len(payloads[2].data)
    assert errors[0] > errors[1] > errors[2]


def test_batches_and_threads_change_no_symbol(codec, make_image) -> None:
    images = [make_image(96, 72, seed) for seed in range(4)]
    together = codec.compress_batch(images, 0.7)
    torch.set_num_threads(2)
    one_by_one = [codec.compress(image, quality=0.7) for image in images]
    symbols = [symbols_of(codec, data) for data in together]
    for data, again, found in zip(together, one_by_one, symbols, strict=True):
        assert len(data) == len(again)  # networks in floating point: a batch may round a latent differently
        assert np.array_equal(symbols_of(codec, data), found)
    for image, data in zip(codec.decompress_batch(together), together, strict=True):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(codec.decompress(data), dtype=int)).max() <= 1


def test_another_process_reads_the_same_symbols(codec, folder, make_image, tmp_path) -> None:
    data = codec.compress(make_image(96, 72), quality=0.6)
    (tmp_path / "a.oscar").write_bytes(data)
    assert read_elsewhere(folder, tmp_path / "a.oscar") == symbols_of(codec, data).tobytes()


def test_halves(codec, folder, make_image) -> None:
    image = make_image(96, 72)
    encoder, decoder = (load(folder, components=half, dtype=torch.float32) for half in ("encoder", "decoder"))
    data = encoder.compress(image, quality=0.4)
    assert data == codec.compress(image, quality=0.4)
    assert np.array_equal(np.asarray(decoder.decompress(data)), np.asarray(codec.decompress(data)))
    with pytest.raises(ValueError, match="components is 'decoder', which cannot compress"):
        decoder.compress(image)
    with pytest.raises(ValueError, match="components is 'encoder', which cannot decompress"):
        encoder.decompress(data)


def test_bfloat16(codec, folder, make_image) -> None:
    """What is written in one precision is read in the other: symbols are integers."""
    low = load(folder, dtype=torch.bfloat16)
    data = low.compress(make_image(96, 72), quality=0.5)
    assert np.array_equal(symbols_of(low, data), symbols_of(codec, data))
    assert low.decompress(data).size == codec.decompress(data).size == (96, 72)


def test_saved_and_loaded_for_training(codec, folder, tmp_path, make_image) -> None:
    loaded = OscarCodec.from_pretrained(folder)
    assert loaded.fingerprint == codec.fingerprint
    loaded.save_pretrained(tmp_path / "again")
    for name in ("oscar.json", "oscar.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert json.loads((folder / "oscar.json").read_text())["bottleneck"]["kind"] == "hyperprior"


def test_trained_on_from_half_precision(folder, tmp_path) -> None:
    """A value that the model holds for impossible costs many bits but not infinitely many."""
    OscarCodec.from_pretrained(folder).save_pretrained(tmp_path / "half", torch.float16)
    bottleneck = OscarCodec.from_pretrained(tmp_path / "half").bottleneck.train()
    latent = torch.zeros(1, sum(bottleneck.groups), 4, 4)
    latent[..., 0, 0] = 1e4
    assert bottleneck.estimate(latent, torch.tensor([1.0])).bits.isfinite().all()


def test_the_fingerprint_follows_what_decoding_depends_on(folder) -> None:
    def changed(change) -> bool:
        codec = OscarCodec.from_pretrained(folder)
        before = codec.fingerprint
        with torch.no_grad():
            change(codec.bottleneck)
        codec.forget_fingerprint()
        return codec.fingerprint != before

    def finer(bottleneck) -> None:
        bottleneck.predictors[0].last_bias += 1
        bottleneck.update()

    assert changed(lambda bottleneck: bottleneck.log_inverse.add_(0.1))
    assert changed(finer)
    assert not changed(lambda bottleneck: bottleneck.log_gain.add_(0.1))
    assert not changed(lambda bottleneck: bottleneck.hyper_encoder[0].weight.add_(0.1))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_max_bytes(codec, make_image, share) -> None:
    image = make_image(256, 192)
    low, high = (len(codec.compress(image, quality=quality)) for quality in (0, 1))
    target = round(low + share * (high - low))
    data = codec.compress(image, max_bytes=target)
    assert 0.95 * target <= len(data) <= target


def test_targets_that_cannot_be_met(codec, make_image) -> None:
    with pytest.raises(TargetError, match=r"max_bytes is 10, which no quality meets.*reachable: \d+ to \d+ bytes"):
        codec.compress(make_image(96, 72), max_bytes=10)
    assert codec.compress(make_image(96, 72), max_bytes=10**6) == codec.compress(make_image(96, 72), quality=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 1.01}, "quality is 1.01; allowed: 0 to 1"),
        ({"quality": float("nan")}, "quality is nan"),
        ({"rate": 0.0625}, "rate is 0.0625, but this model has a hyperprior"),
        ({"effort": 3}, "effort is 3, but this model has a hyperprior"),
        ({"quality": 0.5, "max_bytes": 4000}, "max_bytes is set"),
    ],
)
def test_wrong_options(codec, make_image, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        codec.compress(make_image(96, 72), **options)


def test_the_other_kind_refuses(codec, tiny, make_image) -> None:
    image = make_image(96, 72)
    with pytest.raises(WrongModelError, match="this one has a vector quantiser"):
        tiny.decompress(codec.compress(image))
    with pytest.raises(WrongModelError, match="this one has a hyperprior"):
        codec.decompress(tiny.compress(image))
    with pytest.raises(ValueError, match="quality is 0.5, but this model has rates"):
        tiny.compress(image, quality=0.5)


def test_protocol_paper_is_refused(codec, make_image) -> None:
    with pytest.raises(ValueError, match="allowed: bitstream"):
        codec.reconstruct(to_tensor(make_image(96, 72)), 0.5, protocol="paper")
    with pytest.raises(ValueError, match="protocol 'file' does not exist"):
        codec.reconstruct(to_tensor(make_image(96, 72)), 0.5, protocol="file")
    with pytest.raises(ValueError, match="protocol is 'paper', but tiny has a hyperprior; allowed: bitstream"):
        OscarImageCodec(codec, "tiny", "paper")


def test_images_too_large_are_refused(codec) -> None:
    with pytest.raises(ImageError, match="65537x1"):
        codec.compress(np.zeros((1, 65537, 3), dtype=np.uint8))


def damaged(data: bytes, count: int) -> list[bytes]:
    random = np.random.default_rng(0)
    result = []
    for number in range(count):
        broken = bytearray(data)
        if number % 3 == 0:
            del broken[random.integers(len(data)) :]
        elif number % 3 == 1:
            broken[random.integers(len(data))] ^= 1 << random.integers(8)
        else:
            broken += random.bytes(random.integers(1, 9))
        result.append(bytes(broken))
    return result


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files(codec, make_image, count) -> None:
    for broken in damaged(codec.compress(make_image(96, 72), quality=0.6), count):
        with pytest.raises(BitstreamError):
            codec.decompress(broken)


def test_damaged_payloads_under_a_good_checksum(codec, make_image) -> None:
    container = Container.unpack(codec.compress(make_image(96, 72), quality=0.6))
    for payload in damaged(container.payload, 60):
        fields = {**vars(container), "payload": payload}
        with pytest.raises(PayloadError):
            codec.decompress(Container(**fields).pack())


def test_a_prefix_shows_the_image(codec, make_image) -> None:
    data = codec.compress(make_image(160, 128), quality=0.8)
    whole = codec.decompress_prefix(data)
    assert whole.share == 1
    assert np.array_equal(np.asarray(whole.image), np.asarray(codec.decompress(data)))
    symbols = symbols_of(codec, data)
    errors, header = [], len(data) - len(Container.unpack(data).payload)
    for length in np.linspace(header, len(data), 5).astype(int):
        container, point = codec.open(data[:length], whole=False)
        payload = Payload(container.coding, b"", container.payload)
        found, _ = codec.bottleneck.read_prefix(payload, point, codec.latent_shape(container))
        errors.append(np.abs(found.values[0].numpy() - symbols).mean())
        assert codec.decompress_prefix(data[:length]).image.size == (160, 128)
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[2] > errors[4] == 0
    for length in range(header):
        with pytest.raises(BitstreamError):
            codec.decompress_prefix(data[:length])


def test_a_checkpoint_with_damaged_integers_is_refused(folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "oscar.safetensors")
    codec = OscarCodec.from_pretrained(folder)
    del state["coder.up2"]
    codec.save_pretrained(tmp_path / "bad")
    save_file(state, tmp_path / "bad" / "oscar.safetensors")
    config = json.loads((tmp_path / "bad" / "oscar.json").read_text())
    config["sha256"]["oscar.safetensors"] = checkpoint.sha256(tmp_path / "bad" / "oscar.safetensors")
    (tmp_path / "bad" / "oscar.json").write_text(json.dumps(config))
    for read in (load, OscarCodec.from_pretrained):
        with pytest.raises(CheckpointError, match="coder"):
            read(tmp_path / "bad")


def test_under_evaluation(codec, make_image) -> None:
    image = make_image(96, 72)
    under_test = OscarImageCodec(codec, "tiny")
    assert under_test.point_name == "quality" and len(under_test.points) == 25
    assert all(under_test.check_point(point) == point for point in under_test.points)
    encoded = under_test.encode(image, under_test.check_point(0.5))
    assert encoded.nominal_bpp is None
    assert sum(encoded.parts.values()) == len(encoded.data)
    actual_bpp = 8 * len(encoded.data) / (96 * 72)
    assert encoded.estimated_bpp == pytest.approx(actual_bpp, abs=12 * 8 / (96 * 72))  # rANS's final state
    trip = under_test.round_trip(image, 0.5)
    assert trip.decoded.size == image.size
    with pytest.raises(ValueError, match="quality is 2"):
        under_test.check_point(2)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_stages_of_the_flow_under_timing(codec, make_image, direction) -> None:
    image = make_image(96, 72)
    data = codec.compress(image)
    call = (lambda: codec.compress(image)) if direction == "encode" else (lambda: codec.decompress(data))
    costs = stage_costs(codec, direction, call, time.perf_counter)
    assert {"vae_encode", "entropy_encode"} <= costs.keys() or {"vae_decode", "unet_step"} <= costs.keys()
    assert sum(cost for stage, cost in costs.items() if stage != WHOLE) == pytest.approx(costs[WHOLE])


def test_what_needs_rates_refuses(codec, folder, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="merging is for models with rates"):
        merge_rates([folder, folder], tmp_path / "merged")
    with pytest.raises(ValueError, match="the published layout is for models with rates"):
        export(folder, tmp_path / "oscar.pkl")
    with pytest.raises(ValueError, match="the calibration is for models with rates"):
        calibrate(codec, [tmp_path / "a.png"])
    assert not list(tmp_path.iterdir())
