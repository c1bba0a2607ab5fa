"""Image to bytes and back with the tiny random model."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oscar import checkpoint, model_folder
from oscar.bitstream import BitstreamError, Coding, Container, HeaderError, UnknownRateError, WrongModelError
from oscar.bitstream.norms import dequantise_rms, quantise_rms
from oscar.bottlenecks.vq import channel_rms, rescale
from oscar.codec import OscarCodec
from oscar.data.images import ImageError
from oscar.data.tensors import to_pil, to_tensor
from oscar.diffusion import channel_cosine
from oscar.inference.load import load
from oscar.metrics.protocol import image_noise, sample_of
from oscar.rates import PAPER_RATES, RATES, find_rate
from oscar.timesteps import ConstantMapping, LearnedMapping, PerImageMapping, TableMapping, timestep_of_code

TOP = PAPER_RATES[7]
SIZES = [(1, 1), (7, 5), (333, 517), (64, 2048)]


@pytest.fixture
def no_networks(monkeypatch) -> None:
    """Fail if a decoder gets past the bitstream."""

    def fail(*_):
        raise AssertionError("damage reached the networks")

    monkeypatch.setattr(OscarCodec, "decode", fail)


@pytest.mark.parametrize("rate", PAPER_RATES, ids=str)
def test_round_trip_at_every_rate(tiny: OscarCodec, make_image, rate) -> None:
    image = make_image(96, 72)
    data = tiny.compress(image, rate.bpp)
    decoded = tiny.decompress(data)
    assert decoded.size == image.size and decoded.mode == "RGB"
    container = Container.unpack(data)
    assert (container.point_code, container.width, container.height) == (rate.id, 96, 72)
    assert container.model_tag == tiny.model_tag
    in_process = tiny.reconstruct(to_tensor(image), rate, protocol="bitstream")
    assert torch.equal(tiny.read(data).symbols.indices, in_process.symbols.indices)
    assert np.array_equal(np.asarray(decoded), np.asarray(to_pil(in_process.image)))


def test_the_networks_get_latents_in_plain_order(tiny: OscarCodec, make_image) -> None:
    """On a CPU torch's group normalisation is inexact in the channels-last order, which look-ups in codebooks leave."""
    orders = []
    hook = tiny.denoiser.register_forward_pre_hook(lambda _, inputs: orders.append(inputs[0].is_contiguous()))
    for rate in PAPER_RATES:
        tiny.decompress(tiny.compress(make_image(96, 72), rate))
    hook.remove()
    assert orders == [True] * len(PAPER_RATES)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_size(tiny: OscarCodec, make_image, size: tuple[int, int]) -> None:
    image = make_image(*size)
    for rate in (PAPER_RATES[0], TOP):
        data = tiny.compress(image, rate)
        decoded = tiny.decompress(data)
        assert decoded.size == size
        in_process = tiny.reconstruct(to_tensor(image), rate)
        assert np.array_equal(np.asarray(decoded), np.asarray(to_pil(in_process.image)))


@pytest.mark.parametrize("rate", PAPER_RATES, ids=str)
def test_real_length_is_bounded_by_the_nominal_one(tiny: OscarCodec, make_image, rate) -> None:
    for size in ((96, 72), (1, 1), (130, 257)):
        data = tiny.compress(make_image(*size), rate)
        container = Container.unpack(data)
        header = len(data) - len(container.payload)
        assert header <= 16
        assert len(data) <= header + -(-rate.nominal_bits(size[1], size[0]) // 8)


def test_tables_pay(tiny: OscarCodec, make_image) -> None:
    """The tiny model's indices are far from uniform, so that its files are shorter than fixed-length ones."""
    data = tiny.compress(make_image(256, 256), TOP)
    nominal = TOP.nominal_bits(256, 256) / 8
    assert len(data) < 0.9 * nominal
    container, point, symbols = tiny.read(data)
    estimated = tiny.bottleneck.estimated_bits(symbols, point)[0] / 8
    assert abs(len(container.payload) - estimated) < 16


def test_images_arrays_and_tensors_are_the_same(tiny: OscarCodec, make_image) -> None:
    image = make_image(40, 24)
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = tiny.compress(image, TOP)
    for other in (pixels, tensor, tensor[None], tensor.float() / 127.5 - 1):
        assert tiny.compress(other, TOP) == expected


def test_grey_is_rgb_with_equal_channels(tiny: OscarCodec, make_image) -> None:
    grey = make_image(40, 24).convert("L")
    expected = tiny.compress(grey.convert("RGB"), TOP)
    assert tiny.compress(grey, TOP) == tiny.compress(np.asarray(grey), TOP) == expected
    assert tiny.compress(np.asarray(grey)[..., None], TOP) == expected


def test_alpha_is_dropped_if_opaque_and_refused_otherwise(tiny: OscarCodec, make_image) -> None:
    image = make_image(40, 24)
    opaque = image.convert("RGBA")
    expected = tiny.compress(image, TOP)
    assert tiny.compress(opaque, TOP) == tiny.compress(np.asarray(opaque), TOP) == expected
    opaque.putpixel((3, 3), (0, 0, 0, 254))
    with pytest.raises(ImageError, match="transparent pixels"):
        tiny.compress(opaque, TOP)


@pytest.mark.parametrize(
    "image", ["photo.png", np.zeros((4, 4), dtype=np.float32), torch.zeros(1, 4, 4), torch.full((3, 4, 4), 2.0), None]
)
def test_what_is_no_image_is_refused(tiny: OscarCodec, image) -> None:
    with pytest.raises(ImageError, match="not allowed; allowed: "):
        tiny.compress(image)


def test_too_wide_an_image_is_refused_before_it_is_encoded(tiny: OscarCodec, monkeypatch) -> None:
    monkeypatch.setattr(OscarCodec, "encode_latent", lambda *_: pytest.fail("was encoded"))
    with pytest.raises(ImageError, match="65537x1 pixels is not allowed; allowed: 65536 a side"):
        tiny.compress(np.zeros((1, 65537, 3), dtype=np.uint8))


@pytest.mark.parametrize("rate", [0.3, 0.0, -1, float("nan"), RATES[8]], ids=str)
def test_unknown_rate(tiny: OscarCodec, make_image, rate) -> None:
    with pytest.raises(ValueError, match=r"does not exist; allowed: 0\.0019, .*0\.1250"):
        tiny.compress(make_image(8, 8), rate)


def test_the_default_rate(tiny: OscarCodec, make_image) -> None:
    assert Container.unpack(tiny.compress(make_image(8, 8))).rate.bpp == 0.0625


def test_reconstruction_has_its_parts(tiny: OscarCodec, make_image) -> None:
    batch = torch.cat([to_tensor(make_image(70, 50, seed)) for seed in range(2)])
    whole = torch.cat([to_tensor(make_image(80, 64, seed)) for seed in range(2)])
    for images, protocol in ((batch, "bitstream"), (whole, "paper")):  # the latter pads nothing
        result = tiny.reconstruct(images, 0.0313, protocol)
        assert result.symbols.indices.shape == (2, 4, 5) and result.z_hat.shape == result.x0.shape == (2, 4, 8, 10)
        assert result.image.shape == images.shape and result.image.abs().max() <= 1
    with pytest.raises(ValueError, match="70x50 pixels are not allowed in protocol paper, .* multiples of 128"):
        tiny.reconstruct(batch, 0.0313, "paper")
    with pytest.raises(ValueError, match="protocol 'file' does not exist; allowed: bitstream, paper"):
        tiny.reconstruct(batch, 0.0313, "file")


def test_protocols_differ_by_the_sample_and_the_norms(tiny: OscarCodec, make_image) -> None:
    batch = to_tensor(make_image(64, 64))
    paper, file = tiny.reconstruct(batch, TOP, "paper"), tiny.reconstruct(batch, TOP)
    with torch.inference_mode():
        posterior = tiny.backbone.vae.encode(batch).latent_dist
    noise = image_noise(batch, posterior.mean.shape)
    latent = (posterior.mean + posterior.std * noise) * tiny.backbone.vae.config.scaling_factor
    assert torch.equal(paper.symbols.indices, tiny.bottleneck.at(TOP).encode(latent))
    assert torch.equal(tiny.encode_latent(batch, TOP, sample_of), latent)
    z_hat = tiny.bottleneck.at(TOP).decode(paper.symbols.indices)
    expected = tiny.denoiser(
        z_hat * latent.norm(dim=(2, 3), keepdim=True) / z_hat.norm(dim=(2, 3), keepdim=True), TOP.timestep
    )
    torch.testing.assert_close(paper.x0, expected, rtol=1e-4, atol=1e-5)
    mode = tiny.encode_latent(batch, TOP)
    assert torch.equal(mode, posterior.mode() * tiny.backbone.vae.config.scaling_factor)
    stored = torch.from_numpy(dequantise_rms(quantise_rms(channel_rms(mode).numpy())))
    z_hat = tiny.bottleneck.at(TOP).decode(file.symbols.indices)
    torch.testing.assert_close(file.x0, tiny.denoiser(rescale(z_hat, stored), TOP.timestep))
    assert not torch.equal(paper.x0, file.x0)


def test_the_sample_is_the_image_s_own(tiny: OscarCodec, make_image) -> None:
    """So that a run can be repeated, in any order and any batch."""
    images = [to_tensor(make_image(128, 64, seed)) for seed in range(2)]
    single = [tiny.encode_latent(image, TOP, sample_of) for image in images]
    batch = torch.cat(images[::-1])
    both = tiny.encode_latent(batch, TOP, sample_of)
    torch.testing.assert_close(both, torch.cat(single[::-1]))
    noise = image_noise(torch.cat(images), (2, 4, 8, 16))
    assert torch.equal(image_noise(images[1], (1, 4, 8, 16))[0], noise[1]) and not torch.equal(noise[0], noise[1])
    assert noise.mean().abs() < 0.1 and abs(noise.std() - 1) < 0.1  # 1,024 values


def test_rescale() -> None:
    z_hat = torch.randn(2, 4, 5, 6)
    z_hat[0, 0] = 0
    rms = torch.tensor([[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0]])
    scaled = channel_rms(rescale(z_hat, rms))
    assert scaled[0, 0] == 0  # nothing to scale, and no division by zero
    torch.testing.assert_close(scaled[0, 1:], rms[0, 1:])
    torch.testing.assert_close(scaled[1], rms[1])


def test_a_batch_is_decoded_as_its_files_one_by_one(tiny: OscarCodec, make_image) -> None:
    images = [make_image(72, 40, 0), make_image(64, 64, 1), make_image(72, 40, 2), make_image(72, 40, 3)]
    rates = [TOP, TOP, TOP, PAPER_RATES[2]]
    files = [tiny.compress(image, rate) for image, rate in zip(images, rates, strict=True)]
    together = tiny.decompress_tensor(files)
    for image, data, decoded in zip(images, files, together, strict=True):
        assert decoded.shape == (3, image.height, image.width)
        torch.testing.assert_close(decoded, tiny.decompress_tensor([data])[0], rtol=1e-4, atol=1e-4)
    assert tiny.decompress_tensor([]) == []


def test_a_batch_is_encoded_as_its_images_one_by_one(tiny: OscarCodec, make_image) -> None:
    images = [make_image(72, 40, seed) for seed in range(3)]
    batch = torch.cat([to_tensor(image) for image in images])
    assert tiny.compress_tensor(batch, TOP) == [tiny.compress(image, TOP) for image in images]


def test_symbols_do_not_depend_on_threads(tiny: OscarCodec, make_image) -> None:
    image = make_image(200, 120)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        data = tiny.compress(image, TOP)
        results.append((data, tiny.read(data)[1], np.asarray(tiny.decompress(data)).astype(int)))
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])
    assert np.abs(results[0][2] - results[1][2]).max() <= 1


def test_a_file_of_another_model(tiny: OscarCodec, make_codec, make_image, no_networks) -> None:
    other = make_codec(seed=1)
    assert other.model_tag != tiny.model_tag
    with pytest.raises(WrongModelError, match=f"model {other.model_tag:04x}; this model is {tiny.model_tag:04x}"):
        tiny.decompress(other.compress(make_image(64, 64), TOP))


def test_a_rate_that_this_model_lacks(tiny: OscarCodec, make_image, no_networks) -> None:
    container = Container.unpack(tiny.compress(make_image(64, 64), TOP))
    foreign = Container(Coding.PACKED, 11, tiny.model_tag, 64, 64, container.side, bytes(56))
    with pytest.raises(UnknownRateError, match=r"0\.1093, which this model does not have"):
        tiny.decompress(foreign.pack())


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_in_named_errors(tiny: OscarCodec, make_image, no_networks, seed: int) -> None:
    """500 of the 2,000 random truncations, bit flips and extensions, each refused before the networks run."""
    random = np.random.default_rng(seed)
    files = [tiny.compress(make_image(width, 96, seed), rate) for rate in PAPER_RATES for width in (8, 160)]
    slowest = 0.0
    for trial in range(500):
        data = bytearray(files[random.integers(len(files))])
        kind = trial % 3
        if kind == 0:
            data = data[: random.integers(len(data))]
        elif kind == 1:
            for position in random.choice(8 * len(data), size=random.integers(1, 9), replace=False):
                data[position // 8] ^= 1 << position % 8
        else:
            data += random.bytes(random.integers(1, 40))
        start = time.perf_counter()
        with pytest.raises(BitstreamError) as error:
            tiny.decompress(bytes(data))
        slowest = max(slowest, time.perf_counter() - start)
        assert str(error.value) and "\n" not in str(error.value)
    assert slowest < 1


def test_damage_behind_a_valid_checksum(tiny: OscarCodec, make_image, no_networks) -> None:
    """Payloads that someone crafted: refused or decoded to indices of the right shape, without any other error."""
    random = np.random.default_rng(0)
    container = Container.unpack(tiny.compress(make_image(160, 96), TOP))
    refused = 0
    for _ in range(200):
        payload = bytearray(container.payload)
        payload[random.integers(len(payload))] ^= 1 << random.integers(8)
        crafted = Container(
            container.coding, container.point_code, container.model_tag, 160, 96, container.side, bytes(payload)
        )
        try:
            indices = tiny.read(crafted.pack()).symbols.indices
            assert indices.shape == (12, 20) and 0 <= indices.min() and indices.max() < TOP.codebook_size
        except BitstreamError:
            refused += 1
    assert refused > 0


def test_one_bad_file_spoils_the_batch_before_anything_is_decoded(tiny: OscarCodec, make_image, no_networks) -> None:
    data = tiny.compress(make_image(8, 8))
    with pytest.raises(BitstreamError):
        tiny.decompress_tensor([data, data[:-1]])


# Other mappings.


@pytest.fixture(scope="module")
def per_image_folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny codec with a timestep for each image."""
    codec = OscarCodec.from_pretrained(tiny_folder).eval()
    codec.set_mapping(PerImageMapping())
    folder = tmp_path_factory.mktemp("per-image") / "model"
    codec.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def per_image(per_image_folder) -> OscarCodec:
    return load(per_image_folder, dtype=torch.float32)


@pytest.mark.parametrize("rate", (PAPER_RATES[0], PAPER_RATES[4], TOP), ids=str)
def test_an_image_carries_its_own_timestep(per_image: OscarCodec, tiny: OscarCodec, make_image, rate) -> None:
    for size in ((96, 72), (1, 1), (130, 257)):
        image = make_image(*size)
        data, plain = per_image.compress(image, rate), tiny.compress(image, rate)
        container = Container.unpack(data)
        assert len(data) == len(plain) + 1 and len(data) - len(container.payload) <= 17
        encoded = per_image.quantise(per_image.encode_latent(to_tensor(image), rate), rate)
        z_hat = per_image.bottleneck.dequantise(per_image.bottleneck.stored(encoded.symbols, rate), rate)
        signal = per_image.backbone.schedule.alphas_cumprod.sqrt()
        distance = (signal - channel_cosine(z_hat, encoded.latent).mean()).abs()
        reached = [timestep_of_code(code, 1000) for code in range(256)]
        timestep = timestep_of_code(container.timestep, 1000)
        assert abs(timestep - distance.argmin().item()) <= 2 and timestep in reached  # the nearest of 256
        decoded = per_image.decompress(data)
        assert container.side == quantise_rms(encoded.symbols.rms.numpy()).tobytes()
        expected = per_image.denoiser(z_hat, timestep)
        in_process = per_image.reconstruct(to_tensor(image), rate)
        torch.testing.assert_close(in_process.x0, expected)
        assert np.array_equal(np.asarray(decoded), np.asarray(to_pil(in_process.image)))


def test_images_of_a_batch_keep_their_timesteps(per_image: OscarCodec, make_image) -> None:
    images = [make_image(72, 40, seed) for seed in range(3)]
    batch = torch.cat([to_tensor(image) for image in images])
    files = per_image.compress_tensor(batch, PAPER_RATES[1])
    assert files == [per_image.compress(image, PAPER_RATES[1]) for image in images]
    for image, data in zip(per_image.decompress_tensor(files), files, strict=True):
        torch.testing.assert_close(image, per_image.decompress_tensor([data])[0], rtol=1e-3, atol=1e-4)


def test_a_file_with_or_without_a_timestep_where_it_should_not(
    tiny: OscarCodec, per_image: OscarCodec, make_image, no_networks
) -> None:
    """Only someone who knows the other model's tag can make one."""

    def crafted(codec: OscarCodec, timestep: int | None) -> bytes:
        norms, payload = bytes(4), bytes(64)
        return Container(Coding.PACKED, TOP.id, codec.model_tag, 64, 64, norms, payload, timestep).pack()

    with pytest.raises(HeaderError, match="a timestep of its own; allowed for this model: none"):
        tiny.decompress(crafted(tiny, 100))
    with pytest.raises(HeaderError, match="no timestep of its own; allowed for this model: one"):
        per_image.decompress(crafted(per_image, None))


def test_damaged_files_with_a_timestep_end_in_named_errors(per_image: OscarCodec, make_image, no_networks) -> None:
    data = per_image.compress(make_image(96, 72), TOP)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            per_image.decompress(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            per_image.decompress(data[:length])


def test_another_mapping_is_another_model(make_codec, make_image) -> None:
    codec = make_codec(rates=[0, 7])
    tags, images = set(), []
    mappings = (TableMapping.paper(), ConstantMapping(500), LearnedMapping({0: 500.0, 7: 150.5}), PerImageMapping())
    for mapping in mappings:
        codec.set_mapping(mapping)
        tags.add(codec.model_tag)
        images.append(codec.reconstruct(to_tensor(make_image(64, 48)), TOP).image)
    assert len(tags) == len(mappings)
    assert not torch.equal(images[0], images[1])
    assert 0 < (images[2] - images[0]).abs().max() < (images[1] - images[0]).abs().max()
    for mapping in (ConstantMapping(1000), LearnedMapping({0: 3.5})):
        with pytest.raises(ValueError, match="timesteps: "):
            codec.set_mapping(mapping)
    assert codec.mapping == PerImageMapping()


@pytest.mark.parametrize("mapping", (LearnedMapping({0: 481.37, 7: 150.5}), PerImageMapping()), ids=lambda m: m.kind)
def test_a_mapping_is_stored(make_codec, make_image, tmp_path, mapping) -> None:
    codec = make_codec(rates=[0, 7])
    codec.set_mapping(mapping)
    codec.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model", dtype=torch.float32)
    assert loaded.mapping == mapping and loaded.fingerprint == codec.fingerprint
    data = codec.compress(make_image(64, 48), TOP)
    before, after = (np.asarray(model.decompress(data)).astype(int) for model in (codec, loaded))
    assert np.abs(before - after).max() <= 1  # merging the adapters rounds


def test_the_shipped_model_keeps_its_tag() -> None:
    """Files that it wrote must stay readable: neither the mapping's description nor anything else may change it."""
    stored = json.loads((model_folder.SHIPPED / "nano-vq/oscar.json").read_text())
    codec = OscarCodec.from_pretrained("nano-vq")
    assert checkpoint.fingerprint(codec, torch.float16) == stored["fingerprint"] == codec.fingerprint
    assert (codec.mapping.kind, codec.mapping(find_rate(0.125))) == ("cosine", 94)


# Halves, batches and options of loading.


@pytest.fixture(scope="module")
def encoder(tiny_folder, tmp_path_factory) -> OscarCodec:
    """The encoder half, loaded where nothing of the UNet is."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("encoder") / "model"))
    shutil.rmtree(folder / "unet")
    return load(folder, components="encoder", dtype=torch.float32)


@pytest.fixture(scope="module")
def decoder(tiny_folder) -> OscarCodec:
    return load(tiny_folder, components="decoder", dtype=torch.float32)


@pytest.mark.parametrize("rate", (PAPER_RATES[0], TOP), ids=str)
def test_halves_do_what_the_whole_does(tiny, encoder, decoder, make_image, rate) -> None:
    image = make_image(130, 72)
    data = encoder.compress(image, rate)
    assert encoder.model_tag == decoder.model_tag == tiny.model_tag
    assert data == tiny.compress(image, rate)
    assert np.array_equal(np.asarray(decoder.decompress(data)), np.asarray(tiny.decompress(data)))


def test_a_half_has_nothing_of_the_other(tiny, encoder, decoder) -> None:
    one, other = set(encoder.state_dict()), set(decoder.state_dict())
    for codec in (encoder, decoder):
        assert not any(value.is_meta for value in (*codec.parameters(), *codec.buffers()))
    assert one | other == set(tiny.state_dict())
    assert all("._codebook." in name for name in one & other)
    assert any("vae.encoder" in name for name in one) and any("vae.decoder" in name for name in other)


def test_a_half_refuses_the_other_direction(encoder, decoder, make_image, tmp_path) -> None:
    image = make_image(64, 48)
    with pytest.raises(ValueError, match="components is 'encoder', which cannot decompress; allowed: both, decoder"):
        encoder.decompress(encoder.compress(image))
    with pytest.raises(ValueError, match="components is 'decoder', which cannot compress; allowed: both, encoder"):
        decoder.compress(image)
    for codec in (encoder, decoder):
        with pytest.raises(checkpoint.CheckpointError, match="the other one is not there to be saved"):
            codec.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_half_under_timesteps_of_images(per_image: OscarCodec, per_image_folder, make_image) -> None:
    """That encoder decodes to the quantised latent, to measure the timestep."""
    half = load(per_image_folder, components="encoder", dtype=torch.float32)
    assert half.compress(make_image(96, 72), TOP) == per_image.compress(make_image(96, 72), TOP)


def test_images_of_several_sizes_at_once(tiny: OscarCodec, make_image) -> None:
    images = [make_image(72, 40, 0), make_image(64, 64, 1), make_image(72, 40, 2)]
    files = tiny.compress_batch(images, TOP)
    assert files == [tiny.compress(image, TOP) for image in images]
    for image, data in zip(tiny.decompress_batch(files), files, strict=True):
        difference = np.asarray(image).astype(int) - np.asarray(tiny.decompress(data))
        assert np.abs(difference).max() <= 1
    assert tiny.compress_batch([], TOP) == tiny.decompress_batch([]) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"components": "left"}, "components is 'left'; allowed: both, encoder, decoder"),
        ({"compile": "max"}, "compile is 'max'; allowed: False, True, graphs"),
        ({"dtype": "float32"}, "dtype is 'float32'; allowed: auto, torch.float32, torch.bfloat16, torch.float16"),
        ({"compile": "graphs"}, "compile is 'graphs' on device cpu; allowed: a CUDA device"),
        ({"memory": "much"}, "memory is 'much'; allowed: auto, or a size"),
        ({"tiny_vae": "no/where"}, "tiny_vae 'no/where' cannot be read"),
    ],
)
def test_options_that_are_not_allowed(tiny_folder, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny_folder, **options)


def test_half_precision(tiny_folder, tiny: OscarCodec, make_image) -> None:
    half = load(tiny_folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model_tag == tiny.model_tag
    data = half.compress(make_image(64, 48), TOP)
    assert isinstance(tiny.decompress(data), Image.Image)  # a file does not say in which precision it was made
    assert half.decompress(data).size == (64, 48)


def test_inference_leaves_no_gradients(tiny: OscarCodec, make_image) -> None:
    assert not tiny.training and not any(parameter.requires_grad for parameter in tiny.parameters())
    assert not tiny.reconstruct(to_tensor(make_image(8, 8)), TOP).image.requires_grad
