"""Files coded by context, by rate-distortion optimisation, and of at most so many bytes, with the tiny random model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from oscar import OscarCodec, checkpoint
from oscar.bitstream import BitstreamError, Coding, Container, PayloadError, WrongModelError, rdo
from oscar.bitstream.coding import MAX_EFFORT
from oscar.bottlenecks import Payload
from oscar.checkpoint import CONFIG, WEIGHTS, CheckpointError
from oscar.config import ContextConfig
from oscar.data.tensors import to_tensor
from oscar.inference.load import load
from oscar.rate_control import TargetError
from oscar.rates import PAPER_RATES
from oscar.timesteps import PerImageMapping
from oscar.training.stages.context import build_network
from tests.processes import read_elsewhere

TOP, SMALL = PAPER_RATES[7], PAPER_RATES[4]


def indices_of(codec: OscarCodec, data: bytes) -> np.ndarray:
    """The indices of a file, int64 (rows, columns)."""
    return codec.read(data).symbols.indices[0].numpy()


def read_prefix(codec: OscarCodec, data: bytes) -> tuple[np.ndarray, float]:
    """The indices that the first bytes of a file tell or suggest, and the share that was read."""
    container, point = codec.open(data, whole=False)
    payload = Payload(container.coding, container.side, container.payload)
    symbols, share = codec.bottleneck.read_prefix(payload, point, codec.latent_shape(container))
    return symbols.indices[0].numpy(), share


def train_contexts(codec: OscarCodec, make_image, rates=(SMALL, TOP)) -> None:
    """Context models of two rates, fitted to synthetic images."""
    torch.manual_seed(0)
    images = torch.cat([to_tensor(make_image(256, 256, seed)) for seed in range(4)])
    with torch.no_grad():
        latent = codec.backbone.encode(images)
    for rate in rates:
        encoder = codec.bottleneck.at(rate)
        network = build_network(encoder, ContextConfig(neighbours=6, embedding=6, hidden=16, features=12))
        contexts = network.contexts(encoder.encode(latent).numpy())
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(30):
            optimiser.zero_grad()
            network(*contexts).backward()
            optimiser.step()
        codec.bottleneck.contexts[rate.id] = network.integers()


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, make_image, tmp_path_factory) -> Path:
    """The tiny checkpoint with context models."""
    codec = OscarCodec.from_pretrained(tiny_folder)
    train_contexts(codec, make_image)
    codec.save_pretrained(tmp_path_factory.mktemp("context") / "model")
    return next(path.parent for path in tmp_path_factory.getbasetemp().glob("context*/model/oscar.json"))


@pytest.fixture(scope="module")
def codec(folder: Path) -> OscarCodec:
    return load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def data(codec: OscarCodec, make_image) -> bytes:
    """A file coded by context."""
    data = codec.compress(make_image(333, 200, 9), TOP)
    assert Container.unpack(data).coding == Coding.CONTEXT
    return data


@pytest.mark.parametrize("rate", PAPER_RATES, ids=str)
def test_no_file_is_longer_than_without(codec: OscarCodec, tiny: OscarCodec, make_image, rate) -> None:
    for size in ((1, 1), (70, 50), (400, 260)):
        image = make_image(*size)
        data, plain = codec.compress(image, rate), tiny.compress(image, rate)
        assert len(data) <= len(plain)
        assert np.array_equal(indices_of(codec, data), indices_of(tiny, plain))
        assert (Container.unpack(data).coding == Coding.CONTEXT) == (len(data) < len(plain))
        assert codec.decompress(plain) == tiny.decompress(plain)  # written without context models


def test_estimates_are_those_of_files(codec: OscarCodec, make_image) -> None:
    data = codec.compress(make_image(512, 512, 5), TOP)
    container, _, symbols = codec.read(data)
    (estimate,) = codec.bottleneck.estimated_bits(symbols, TOP)
    assert estimate <= 8 * len(container.payload) <= 1.01 * estimate + 100 or len(container.payload) == 64


def test_symbols_do_not_depend_on_threads_or_batch(codec: OscarCodec, make_image, data: bytes) -> None:
    images, threads = [make_image(333, 200, seed) for seed in (7, 8, 9)], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert codec.compress_batch(images, TOP)[-1] == data
            indices = indices_of(codec, data)
            (image,) = codec.decompress_batch([data])
            assert codec.decompress_batch([data] * 3)[1].size == image.size
            again = indices_of(codec, data)
            assert hashlib.sha256(indices.tobytes()).digest() == hashlib.sha256(again.tobytes()).digest()
    finally:
        torch.set_num_threads(threads)


def test_another_process_reads_the_same(codec: OscarCodec, folder: Path, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.oscar").write_bytes(data)
    assert read_elsewhere(folder, tmp_path / "a.oscar") == indices_of(codec, data).tobytes()


def test_files_of_other_context_models(codec: OscarCodec, tiny: OscarCodec, tiny_folder: Path, data: bytes) -> None:
    with pytest.raises(WrongModelError, match="coded by context; this model has none for rate 0.1250"):
        tiny.read(data)
    other = load(tiny_folder, dtype=torch.float32)
    other.bottleneck.contexts[TOP.id] = codec.bottleneck.contexts[SMALL.id]
    with pytest.raises(WrongModelError, match="written with model"):
        other.read(data)
    assert other.fingerprint == codec.fingerprint and other.model_tag == codec.model_tag


@pytest.mark.slow
def test_damaged_files_end_in_named_errors(codec: OscarCodec, data: bytes) -> None:
    random = np.random.default_rng(0)
    for trial in range(2000):
        damaged = bytearray(data)
        if trial % 3 == 0:
            damaged = damaged[: random.integers(len(data))]
        elif trial % 3 == 1:
            damaged += random.bytes(int(random.integers(1, 50)))
        else:
            for position in set(random.integers(8 * len(data), size=random.integers(1, 9)).tolist()):
                damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(BitstreamError):
            codec.read(bytes(damaged))


def test_halves_have_them_too(folder: Path, codec: OscarCodec, make_image, data: bytes) -> None:
    encoder = load(folder, components="encoder", dtype=torch.float32)
    decoder = load(folder, components="decoder", dtype=torch.float32)
    assert encoder.compress(make_image(333, 200, 9), TOP) == data
    assert decoder.decompress(data) == codec.decompress(data)
    half = load(folder, dtype=torch.bfloat16)
    assert half.bottleneck.contexts[TOP.id].digest == codec.bottleneck.contexts[TOP.id].digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("context.7.nodes"), "context.7: "),
        (lambda state: state.update({"context.7.more": torch.zeros(1)}), "context.7: "),
        (lambda state: state.update({"context.7.leaf": torch.zeros(256, dtype=torch.int32)}), "no permutation"),
        (
            lambda state: [
                state.update({f"context.9{name[9:]}": state[name].clone()})
                for name in list(state)
                if name.startswith("context.7")
            ],
            "allowed: none, as there is no such rate",
        ),
    ],
)
def test_damaged_context_models_are_refused(folder: Path, tmp_path: Path, change, message: str) -> None:
    import json
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    state = load_file(copy / WEIGHTS)
    change(state)
    save_file(state, copy / WEIGHTS)
    config = json.loads((copy / CONFIG).read_text())
    config["sha256"][WEIGHTS] = checkpoint.sha256(copy / WEIGHTS)
    (copy / CONFIG).write_text(json.dumps(config))
    for read in (load, OscarCodec.from_pretrained):
        with pytest.raises(CheckpointError, match=message) as error:
            read(copy)
        assert "\n" not in str(error.value)


# Effort.


def distance(codec: OscarCodec, image, rate, indices: np.ndarray) -> float:
    """Squared distance of the codes to the image's features."""
    encoder = codec.bottleneck.at(rate)
    features = encoder.codebook_features(codec.encode_latent(to_tensor(image), rate))[0]
    codes = encoder.quantizer.codebook[torch.from_numpy(indices)]
    return (features - codes).square().sum().item()


@pytest.mark.parametrize("rate", [PAPER_RATES[3], TOP], ids=["table", "context"])
def test_effort_trades_distance_for_bytes(codec: OscarCodec, make_image, monkeypatch, rate) -> None:
    monkeypatch.setattr(rdo, "STEP", 0.3)  # codes of random networks are far apart
    image = make_image(512, 384, 5)
    files = [codec.compress(image, rate, degree) for degree in (0, 3, MAX_EFFORT)]
    assert files[0] == codec.compress(image, rate)
    assert len(files[0]) > len(files[1]) >= len(files[2])
    distances = [distance(codec, image, rate, indices_of(codec, data)) for data in files]
    assert distances[0] < distances[1] < distances[2]
    assert codec.decompress(files[2]).size == image.size
    assert codec.compress_batch([image, image], rate, 3) == [files[1]] * 2


def test_effort_with_timesteps_of_images(make_codec, make_image) -> None:
    codec = make_codec()
    codec.set_mapping(PerImageMapping())
    image = make_image(128, 96)
    data = codec.compress(image, TOP, MAX_EFFORT)
    encoded = codec.quantise(codec.encode_latent(to_tensor(image), TOP), TOP, MAX_EFFORT)
    indices = codec.read(data).symbols.indices
    assert torch.equal(indices, encoded.symbols.indices)
    expected = codec.backbone.schedule.measure(codec.bottleneck.at(TOP).decode(indices), encoded.latent)
    assert torch.equal(encoded.timesteps, expected)


@pytest.mark.parametrize("degree", [-1, 10, 0.5])
def test_efforts_that_do_not_exist(tiny: OscarCodec, make_image, degree) -> None:
    with pytest.raises(ValueError, match=f"effort is {degree}; allowed: 0 to 9"):
        tiny.compress(make_image(64, 64), TOP, degree)


# Targets.


def test_the_best_file_that_fits(codec: OscarCodec, make_image) -> None:
    image = make_image(256, 192, 5)
    by_rate = {
        rate: [len(codec.compress(image, rate, degree)) for degree in range(MAX_EFFORT + 1)]
        for rate in (PAPER_RATES[6], TOP)
    }
    assert codec.compress(image, max_bytes=10**6) == codec.compress(image, TOP)
    for size in (by_rate[TOP][4], by_rate[TOP][MAX_EFFORT]):
        data = codec.compress(image, max_bytes=size)
        assert Container.unpack(data).rate == TOP and len(data) <= size
    below = codec.compress(image, max_bytes=min(by_rate[TOP]) - 1)
    assert Container.unpack(below).rate == PAPER_RATES[6]


@pytest.mark.slow
def test_targets_are_never_exceeded(codec: OscarCodec, make_image) -> None:
    random, used, refused = np.random.default_rng(0), [], 0
    for trial in range(60):
        image = make_image(*(int(side) for side in random.integers(16, 200, 2)), trial)
        target = int(np.exp(random.uniform(np.log(15), np.log(600))))
        try:
            data = codec.compress(image, max_bytes=target)
        except TargetError:
            refused += 1
            continue
        assert len(data) <= target and codec.decompress(data).size == image.size
        used.append(len(data) / target)
    assert len(used) > 30 and refused < 30


def test_what_cannot_be_met_is_refused(codec: OscarCodec, make_image) -> None:
    image = make_image(256, 192, 5)
    sizes = [len(codec.compress(image, rate, degree)) for rate, degree in ((PAPER_RATES[0], MAX_EFFORT), (TOP, 0))]
    words = f"max_bytes is 12, which no rate meets for this image; reachable: {sizes[0]} to {sizes[1]} bytes"
    with pytest.raises(TargetError, match=words):
        codec.compress(image, max_bytes=12)
    for options in ({"rate": TOP}, {"effort": 2}):
        with pytest.raises(ValueError, match="max_bytes is set, which chooses rate and effort itself"):
            codec.compress(image, max_bytes=500, **options)


def test_a_prefix_shows_the_image_coarsely(codec: OscarCodec, data: bytes) -> None:
    whole = codec.decompress_prefix(data)
    assert whole.share == 1
    assert np.array_equal(np.asarray(whole.image), np.asarray(codec.decompress(data)))
    indices = indices_of(codec, data)
    header = len(data) - len(Container.unpack(data).payload)
    shares, right = [], []
    for length in np.linspace(header, len(data), 6).astype(int):
        found, share = read_prefix(codec, data[:length])
        shares.append(share)
        right.append((found == indices).mean())
        assert codec.decompress_prefix(data[:length]).image.size == (333, 200)
    assert shares[0] == 0 and shares == sorted(shares) and right[-1] == 1
    assert right[0] < right[3] < right[5]


def test_a_prefix_tells_the_coarse_lattice_first(codec: OscarCodec, data: bytes) -> None:
    found, share = read_prefix(codec, data[: len(data) // 2])
    indices = indices_of(codec, data)
    assert 0.2 < share < 0.6
    assert np.array_equal(found[::4, ::4], indices[::4, ::4])  # a sixteenth of all positions
    assert not np.array_equal(found, indices)


def test_prefixes_that_show_nothing(codec: OscarCodec, tiny: OscarCodec, data: bytes, make_image) -> None:
    header = len(data) - len(Container.unpack(data).payload)
    for length in range(header):
        with pytest.raises(BitstreamError):
            codec.decompress_prefix(data[:length])
    with pytest.raises(WrongModelError):
        tiny.decompress_prefix(data)
    with pytest.raises(PayloadError, match="has no preview; allowed: context, hyperprior"):
        tiny.decompress_prefix(tiny.compress(make_image(96, 72), TOP)[:-3])


def test_damage_in_a_prefix(codec: OscarCodec, data: bytes) -> None:
    """It is not noticed, or ends in a named error."""
    random = np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data[: random.integers(20, len(data))])
        broken[random.integers(2, len(broken))] ^= 1 << random.integers(8)
        try:
            read_prefix(codec, bytes(broken))
        except BitstreamError:
            pass
