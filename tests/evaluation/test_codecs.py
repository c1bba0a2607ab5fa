"""OSCAR under the interface of the baselines, in both protocols, and codecs by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from oscar.bitstream import Container
from oscar.data.images import ImageError
from oscar.data.tensors import to_pil, to_tensor
from oscar.evaluation.codecs import OscarImageCodec, make_codec
from oscar.metrics.image import MetricSet, metrics_of
from oscar.metrics.protocol import image_noise, paper_size
from oscar.timesteps import PerImageMapping


@pytest.fixture(scope="module")
def bitstream(tiny) -> OscarImageCodec:
    return OscarImageCodec(tiny, "tiny")


@pytest.fixture(scope="module")
def paper(tiny) -> OscarImageCodec:
    return OscarImageCodec(tiny, "tiny", "paper")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_points_are_the_rates(bitstream, tiny) -> None:
    assert bitstream.points == bitstream.grid == (0.0019, 0.0098, 0.0313, 0.043, 0.0625, 0.0781, 0.0937, 0.125)
    assert bitstream.check_point(0.04302) == 0.043
    with pytest.raises(ValueError, match=r"rate 0\.3 does not exist; allowed: 0\.0019"):
        bitstream.check_point(0.3)


@pytest.mark.parametrize("rate", [0.0019, 0.125])
def test_a_round_trip_is_that_of_the_codec(bitstream, tiny, make_image, rate: float) -> None:
    image = make_image(70, 50)
    trip = bitstream.round_trip(image, rate)
    data = tiny.compress(image, rate)
    assert trip.encoded.data == data == bitstream.encode(image, rate).data
    assert (pixels(trip.decoded) == pixels(tiny.decompress(data))).all()
    assert trip.reference is image and trip.decoded.size == (70, 50)
    assert trip.encode_seconds > 0 and trip.decode_seconds > 0


def test_bytes_by_part_and_the_three_rates(bitstream, tiny, make_image) -> None:
    trip = bitstream.round_trip(make_image(70, 50), 0.0625)
    container = Container.unpack(trip.encoded.data)
    assert trip.encoded.parts == {name: len(part) for name, part in container.parts().items()}
    assert sum(trip.encoded.parts.values()) == len(trip.encoded.data)
    assert trip.nominal_bpp == 0.0625  # its name, although 70x50 pixels are padded to more indices
    indices = tiny.read(trip.encoded.data).symbols.indices.numpy()
    table = tiny.bottleneck.frequencies[container.point_code]
    ideal = (16 - np.log2(table[indices])).sum()  # rANS has 16 bits of precision
    header = 8 * (len(trip.encoded.data) - trip.encoded.parts["payload"])
    assert trip.estimated_bpp == pytest.approx((header + ideal) / (70 * 50))
    assert trip.estimated_bpp * 70 * 50 <= 8 * len(trip.encoded.data)


@pytest.mark.parametrize(
    ("size", "resized"),
    [((768, 512), (768, 512)), ((2040, 1356), (1920, 1280)), ((255, 256), (128, 256)), ((128, 2000), (128, 1920))],
)
def test_paper_sizes(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert paper_size(*size) == resized


@pytest.mark.parametrize("size", [(127, 512), (512, 127), (1, 1)])
def test_what_the_paper_s_sizes_leave_nothing_of_is_refused(paper, size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=rf"image of {size[0]}x{size[1]} pixels .*; allowed: from 128 a side"):
        paper.round_trip(Image.new("RGB", size), 0.0625)


def test_the_paper_protocol(paper, tiny, make_image) -> None:
    image = make_image(300, 150)
    trip = paper.round_trip(image, 0.0625)
    reference = image.resize((256, 128), Image.Resampling.LANCZOS)
    assert (pixels(trip.reference) == pixels(reference)).all()
    expected = tiny.reconstruct(to_tensor(reference), 0.0625, protocol="paper")
    assert (pixels(trip.decoded) == pixels(to_pil(expected.image, truncate=True))).all()
    assert (pixels(trip.decoded) != pixels(to_pil(expected.image))).any()
    assert (pixels(paper.round_trip(image, 0.0625).decoded) == pixels(trip.decoded)).all(), "a run can be repeated"
    assert trip.encoded is None and trip.nominal_bpp == 0.0625
    (bits,) = tiny.bottleneck.estimated_bits(expected.symbols, tiny.bottleneck.parse(0.0625))
    assert trip.estimated_bpp == pytest.approx(bits / (256 * 128))
    stored = tiny.reconstruct(to_tensor(reference), 0.0625, protocol="bitstream")
    assert not torch.equal(stored.image, expected.image)  # so that the comparison above says something


def test_the_published_evaluation_written_out(paper, tiny, make_image) -> None:
    """Step by step with the calls that the published code makes, of torchvision and pyiqa."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    pyiqa = pytest.importorskip("pyiqa")
    image, rate = make_image(400, 290), tiny.bottleneck.parse(0.0781)
    reference = image.resize((384, 256), Image.Resampling.LANCZOS)
    vae = tiny.backbone.vae
    with torch.inference_mode():
        pixels = functional.to_tensor(reference)[None] * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        draw = image_noise(pixels, posterior.mean.shape)
        latent = (posterior.mean + posterior.std * draw) * vae.config.scaling_factor
        encoder = tiny.bottleneck.at(rate)
        z_hat = encoder.decode(encoder.encode(latent))
        z_hat = z_hat * latent.norm(dim=(2, 3), keepdim=True) / z_hat.norm(dim=(2, 3), keepdim=True)
        x0 = tiny.denoiser(z_hat, rate.timestep)
        output = vae.decode(x0 / vae.config.scaling_factor).sample.clamp(-1, 1)
    decoded = functional.to_pil_image(output[0] / 2 + 0.5)
    trip = paper.round_trip(image, 0.0781)
    difference = np.asarray(trip.decoded, dtype=int) - np.asarray(decoded)
    assert np.abs(difference).max() <= 1 and (difference == 0).mean() > 0.999  # but for rounding in float32
    scores = MetricSet(metrics_of("paper", ["psnr", "ms_ssim"])).score(trip.reference, trip.decoded)
    assert list(scores) == ["psnr", "ms_ssim_y"]
    for name, value in zip(("psnr", "ms_ssim"), scores.values(), strict=True):
        own = pyiqa.create_metric(name, device=torch.device("cpu"))
        expected = own(*(functional.to_tensor(side)[None] for side in (trip.decoded, reference))).item()
        assert value == pytest.approx(expected, abs=1e-4 if name == "psnr" else 1e-6)


@pytest.mark.parametrize("protocol", ["bitstream", "paper"])
def test_timesteps_of_the_image_are_used(make_codec, make_image, protocol: str) -> None:
    tiny = make_codec()
    tiny.set_mapping(PerImageMapping())
    image = make_image(128, 128)
    trip = OscarImageCodec(tiny, "tiny", protocol).round_trip(image, 0.0625)
    with torch.inference_mode():
        expected = tiny.reconstruct(to_tensor(image), 0.0625, protocol)
    assert (pixels(trip.decoded) == pixels(to_pil(expected.image, truncate=protocol == "paper"))).all()
    assert trip.encoded is None or trip.encoded.parts["timestep"] == 1


def test_the_paper_protocol_writes_no_files(paper, make_image) -> None:
    with pytest.raises(ValueError, match="protocol paper writes no files; allowed: bitstream"):
        paper.encode(make_image(64, 64), 0.0625)


def test_descriptions_tell_models_and_protocols_apart(bitstream, paper, make_codec) -> None:
    other = OscarImageCodec(make_codec(seed=1), "tiny")
    descriptions = [json.loads(json.dumps(codec.describe())) for codec in (bitstream, paper, other)]
    assert descriptions[0]["fingerprint"] == bitstream.codec.fingerprint != descriptions[2]["fingerprint"]
    assert [description["protocol"] for description in descriptions] == ["bitstream", "paper", "bitstream"]
    assert descriptions[1]["rules"]["pixels"] == "truncated" and "rules" not in descriptions[0]
    assert bitstream.name == "oscar-tiny" and paper.name == "oscar-tiny-paper"


def test_codecs_by_name(tiny_folder, tiny) -> None:
    codec = make_codec("oscar", model=tiny_folder, protocol="paper")
    assert codec.name == "oscar-model-paper" and codec.label == "OSCAR model (paper protocol)"
    stored = json.loads((tiny_folder / "oscar.json").read_text())
    assert codec.describe()["sha256"] == stored["sha256"] and codec.codec.fingerprint == tiny.fingerprint
    assert make_codec("jpeg").name == "jpeg"


def test_names_that_do_not_exist(tiny_folder) -> None:
    with pytest.raises(ValueError, match="codec 'jpg' does not exist; allowed: oscar, jpeg, "):
        make_codec("jpg")
    with pytest.raises(ValueError, match="protocol 'official' does not exist; allowed: bitstream, paper"):
        make_codec("oscar", model=tiny_folder, protocol="official")
    with pytest.raises(ValueError, match="model 'nowhere'"):
        make_codec("oscar", model="nowhere")
