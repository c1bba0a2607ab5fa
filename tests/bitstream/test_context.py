"""Coding by context: every index comes back, from the same bytes everywhere, and damage ends in a named error."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from oscar.bitstream import Coding, PayloadError, context, packed_length
from oscar.bitstream.context import PASSES, WEIGHT_SETS, ContextModel, choose_indices, decode_grid, encode_grid
from oscar.bitstream.entropy import uniform_frequencies

GOLDEN = ["c11b119bffb276ae", "148dc6aff0653a1e"]  # SHA-256 of a payload and of its model, the first 8 bytes
SHAPES = [(1, 1), (1, 9), (5, 7), (8, 12), (33, 17)]


def make_model(size: int, seed: int = 0, neighbours: int = 5) -> ContextModel:
    """Random weights under which zeros are likelier than ones."""
    random = np.random.default_rng(seed)
    nodes = 2 ** (size - 1).bit_length() - 1

    def whole(low: int, high: int, *shape: int, dtype=np.int8) -> np.ndarray:
        return random.integers(low, high, shape).astype(dtype)

    return ContextModel(
        leaf=random.permutation(size).astype(np.int32),
        embedding=whole(-60, 61, size + 1, 4),
        hidden=whole(-40, 41, WEIGHT_SETS, neighbours * 4, 12),
        hidden_bias=whole(-900, 900, len(PASSES), 12, dtype=np.int32),
        mixing=whole(-40, 41, WEIGHT_SETS, 12, 8),
        mixing_bias=whole(-900, 900, len(PASSES), 8, dtype=np.int32),
        nodes=whole(-8, 9, nodes, 8),
        node_bias=whole(-4000, -1500, nodes, dtype=np.int32),
    )


def make_grid(model: ContextModel, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Codes that lead left in the tree."""
    random = np.random.default_rng(seed)
    leaves = (random.random(shape) ** 12 * model.codebook_size).astype(np.int64)
    return np.argsort(model.leaf)[leaves]


def encode(model: ContextModel, grid: np.ndarray) -> bytes:
    coding, payload = encode_grid(grid, uniform_frequencies(model.codebook_size), model)
    assert coding == Coding.CONTEXT
    return payload


def decode(model: ContextModel, payload: bytes, shape: tuple[int, int]) -> np.ndarray:
    return decode_grid(payload, Coding.CONTEXT, shape, uniform_frequencies(model.codebook_size), model)


@pytest.mark.parametrize("size", [2, 5, 16, 256, 2048])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_index_comes_back(size: int, shape: tuple[int, int]) -> None:
    model, table = make_model(size), uniform_frequencies(size)
    for grid in (make_grid(model, shape), np.random.default_rng(1).integers(0, size, shape)):
        coding, payload = encode_grid(grid, table, model)
        assert len(payload) <= len(encode_grid(grid, table)[1]) <= packed_length(grid.size, size)
        assert np.array_equal(decode_grid(payload, coding, shape, table, model), grid)


def test_the_shortest_coding_is_taken() -> None:
    model = make_model(256)
    grid = make_grid(model, (32, 48))
    payload = encode(model, grid)
    estimate = context.estimated_bits(grid, model)
    assert estimate < 8 * len(payload) <= estimate * 1.01 + 64 < 0.9 * 8 * grid.size
    noise = np.random.default_rng(0).integers(0, 256, (32, 48))
    assert encode_grid(noise, uniform_frequencies(256), model)[0] == Coding.PACKED
    flat = np.full((64, 64), np.argmin(model.leaf))  # so cheap that the payload is filled up
    sure = dataclasses.replace(model, node_bias=np.full_like(model.node_bias, -20000))
    assert len(encode(sure, flat)) == 64 and np.array_equal(decode(sure, encode(sure, flat), (64, 64)), flat)


def test_the_format() -> None:
    """A change here breaks existing files: give the coding another number instead."""
    model = make_model(32)
    payload = encode(model, make_grid(model, (13, 19)))
    digests = [hashlib.sha256(part).hexdigest()[:16] for part in (payload, model.digest)]
    assert digests == GOLDEN


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_positions_see_only_what_is_coded_before(shape: tuple[int, int]) -> None:
    field = make_model(16, neighbours=12).field(*shape)
    done, surrounded = [], False
    for number, places in field.parts(limit=10):
        seen = field.neighbours(number, places)
        assert set(seen[seen != 16].tolist()) <= set(range(number))
        field.put(places, np.full(len(places), number))
        done += field.positions(places).tolist()
        surrounded |= (seen != 16).all(axis=1).any()
    assert sorted(done) == list(range(shape[0] * shape[1])) and surrounded == (min(shape) > 1)


def test_sums_are_those_of_integers() -> None:
    model = make_model(256)
    random = np.random.default_rng(0)
    for number in range(len(PASSES)):
        neighbours = random.integers(0, 257, (50, 5))
        weights = PASSES[number].weights
        vectors = model.embedding.astype(np.int64)[neighbours].reshape(50, -1)
        hidden = (vectors @ model.hidden[weights].astype(np.int64) + model.hidden_bias[number] + 32 >> 6).clip(0, 255)
        expected = (hidden @ model.mixing[weights].astype(np.int64) + model.mixing_bias[number] + 32 >> 6).clip(0, 255)
        assert np.array_equal(model.features(number, neighbours), expected)
        logits = (expected @ model.nodes.T.astype(np.int64) + model.node_bias + 64 >> 7).clip(-80, 80) + 80
        nodes = random.integers(0, 255, 50)
        assert np.array_equal(model.levels(expected.astype(np.float32), nodes), logits[np.arange(50), nodes])


def test_costs_are_those_of_coding() -> None:
    model = make_model(20)
    grid, field = make_grid(model, (9, 10)), model.field(9, 10)
    total = 0.0
    for number, places in field.parts():
        bits = model.bits(model.features(number, field.neighbours(number, places)))
        assert bits.shape == (len(places), 20) and (2.0**-bits).sum(axis=1).max() < 1.001
        own = grid.reshape(-1)[field.positions(places)]
        total += bits[np.arange(len(own)), own].sum()
        field.put(places, own)
    assert total == pytest.approx(context.estimated_bits(grid, model), rel=1e-5)


OTHER_PROCESS = """
import sys; sys.path.insert(0, sys.argv[1])
from test_context import decode, encode, make_grid, make_model
import numpy as np
model = make_model(256)
assert "torch" not in sys.modules
print(encode(model, make_grid(model, (64, 96))).hex())
assert np.array_equal(decode(model, bytes.fromhex(sys.argv[2]), (64, 96)), make_grid(model, (64, 96)))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_other_processes_write_and_read_the_same(threads: str, monkeypatch) -> None:
    for library in ("OPENBLAS", "OMP", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", threads)
    model = make_model(256)
    payload = encode(model, make_grid(model, (64, 96)))
    command = [sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parent), payload.hex()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == payload.hex(), result.stderr


def test_parts_of_a_pass_do_not_matter(monkeypatch) -> None:
    model = make_model(64)
    grid = make_grid(model, (40, 40))
    bits = context.estimated_bits(grid, model)
    monkeypatch.setattr(context, "_ROWS", 7)
    assert context.estimated_bits(grid, model) == bits


@pytest.mark.slow
def test_random_damage_ends_in_a_named_error() -> None:
    """What a checksum cannot catch: an error, or indices in range that are coded as the payload says."""
    models = [make_model(size) for size in (5, 16, 64)]
    grids = [make_grid(model, (8, 12), seed) for seed, model in enumerate(models)]
    originals = [encode(model, grid) for model, grid in zip(models, grids, strict=True)]
    random, slowest, errors = np.random.default_rng(0), 0.0, 0
    for trial in range(2000):
        model, payload = models[trial % 3], bytearray(originals[trial % 3])
        if trial % 4 == 0:
            payload = payload[: random.integers(len(payload))]
        elif trial % 4 == 1:
            payload += random.bytes(int(random.integers(1, 40)))
        else:
            for position in random.integers(8 * len(payload), size=random.integers(1, 9)):
                payload[position // 8] ^= 1 << position % 8
        start = time.process_time()
        try:
            grid = decode(model, bytes(payload), (8, 12))
        except PayloadError:
            errors += 1
        else:
            assert encode(model, grid) == payload
        slowest = max(slowest, time.process_time() - start)
    assert errors > 1000 and slowest < 1.0


def test_short_payloads_cannot_claim_many_indices() -> None:
    model = make_model(256)
    payload = encode(model, make_grid(model, (13, 21)))
    with pytest.raises(PayloadError, match="take a multiple of 4 from 4096 to"):
        decode(model, payload, (512, 512))
    with pytest.raises(PayloadError, match="no context model"):
        decode_grid(payload, Coding.CONTEXT, (13, 21), uniform_frequencies(256))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("leaf", np.zeros(16, np.int32), "leaf is no permutation of 0 to 15"),
        ("embedding", np.zeros((16, 4), np.int8), r"embedding has shape \(16, 4\); allowed: \(17, 4\)"),
        ("nodes", np.zeros((15, 8), np.float32), "nodes of type float32"),
        ("mixing_bias", np.zeros((9, 8), np.int32), r"mixing_bias has shape \(9, 8\)"),
        ("hidden_bias", np.full((10, 12), 2**24, np.int32), r"hidden: sums reach \d+; allowed: below 2\*\*24"),
    ],
)
def test_models_that_cannot_be_are_refused(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_model(16), **{name: value})


def test_cheap_indices_are_chosen_where_they_are_near() -> None:
    model = make_model(32)
    distances = np.random.default_rng(0).random((63, 32), dtype=np.float32)
    chosen = [choose_indices(lambda at: distances[at], (7, 9), model, multiplier) for multiplier in (0, 0.02, 0.2)]
    assert np.array_equal(chosen[0].reshape(-1), distances.argmin(axis=1))
    bits = [context.estimated_bits(grid, model) for grid in chosen]
    lost = [distances[np.arange(63), grid.reshape(-1)].sum() for grid in chosen]
    assert bits[0] > bits[1] > bits[2] and lost[0] < lost[1] < lost[2]
