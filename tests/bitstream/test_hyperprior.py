"""The hyperprior coder: latents come back as predicted, from the same bytes everywhere, and damage is named."""

from __future__ import annotations

import hashlib
import itertools
import operator
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from oscar.bitstream import PayloadError, hyperprior, hyperprior_weights
from oscar.bitstream.hyperprior import HyperpriorCoder, side_shape
from oscar.bitstream.hyperprior_weights import KNOTS, SCALES

GOLDEN = [
    "12dbd7e89db060d2",
    "0cb64f19e17cc095",
    "27eea7cc932dd300",
]  # SHA-256 of a payload, of what is decoded and of the model, the first 8 bytes
SHAPES = [(1, 1), (1, 9), (2, 1), (5, 7), (8, 12), (33, 17)]


def bell(width: float, reach: int, room: int) -> np.ndarray:
    """Frequencies (2 * room + 1,) of a bell curve over -reach..reach that sum to 2**16."""
    symbols = np.arange(-room, room + 1)
    shares = np.exp(-0.5 * (symbols / width) ** 2) * (np.abs(symbols) <= reach)
    frequencies = np.floor(shares / shares.sum() * (2**16 - 2 * reach - 1)).astype(np.int32) + (
        np.abs(symbols) <= reach
    )
    frequencies[room] += 2**16 - frequencies.sum()
    return frequencies.astype(np.int32)


def make_model(
    groups: tuple[int, ...] = (2, 3),
    side_channels: int = 3,
    side_features: int = 4,
    features: int = 5,
    hidden: int = 8,
    seed: int = 0,
) -> HyperpriorCoder:
    """Random weights under which activations reach both ends of their range now and then, and all scales occur."""
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return np.rint(random.normal(0, 1600 / np.sqrt(np.prod(shape[1:])), shape)).astype(np.int16)

    def biases(*shape: int) -> np.ndarray:
        return random.integers(-(2**16), 2**16, shape).astype(np.int32)

    widths = 0.11 * (64 / 0.11) ** (np.arange(SCALES) / (SCALES - 1))
    reaches = np.clip(np.ceil(6 * widths), 8, 384).astype(int)
    arrays = {
        "groups": np.array(groups, dtype=np.int32),
        "side_frequencies": np.stack([bell(1 + channel, 8 + channel, 40) for channel in range(side_channels)]),
        "scale_frequencies": np.stack([bell(*pair, 384) for pair in zip(widths, reaches, strict=True)]),
        "up1": weights(4 * side_features, side_channels, 3, 3),
        "up1_bias": biases(KNOTS, 4 * side_features),
        "up2": weights(4 * features, side_features, 3, 3),
        "up2_bias": biases(4 * features),
    }
    for group, own in enumerate(groups):
        last_bias = np.concatenate([biases(own), (random.random(own) * 60 * 2**16).astype(np.int32)])
        arrays |= {
            f"known.{group}": weights(hidden, sum(groups[: group + 1]), 5, 5),
            f"side.{group}": weights(hidden, features),
            f"first_bias.{group}": biases(2, KNOTS, hidden),
            f"middle.{group}": weights(hidden, hidden),
            f"middle_bias.{group}": biases(hidden),
            f"last.{group}": weights(2 * own, hidden),
            f"last_bias.{group}": last_bias,
        }
    return HyperpriorCoder.from_arrays(arrays)


def make_latent(
    model: HyperpriorCoder, shape: tuple[int, int], seed: int = 0, spread: float = 8
) -> tuple[np.ndarray, np.ndarray]:
    """y and z."""
    random = np.random.default_rng(seed)
    y = random.normal(0, spread, (model.channels, *shape)).astype(np.float32)
    return y, np.rint(random.normal(0, 2, (model.side_channels, *side_shape(shape)))).astype(np.int32)


def change(model: HyperpriorCoder, **values: np.ndarray) -> HyperpriorCoder:
    """The model with other arrays; `_` in a name stands for the dot before a group's number."""
    names = {name: name[:-2] + "." + name[-1] if name[-2] == "_" else name for name in values}
    return HyperpriorCoder.from_arrays(model.arrays() | {names[name]: value for name, value in values.items()})


def wide(model: HyperpriorCoder) -> HyperpriorCoder:
    """The model with the widest table everywhere, so that no symbol is clipped."""
    changes = {}
    for group, own in enumerate(model.groups):
        weights, bias = model.last[group].copy(), model.last_bias[group].copy()
        weights[own:], bias[own:] = 0, 63 * 2**16
        changes |= {f"last_{group}": weights, f"last_bias_{group}": bias}
    return change(model, **changes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("code", [0, 1, 2000, 4095])
@pytest.mark.parametrize("groups", [(1,), (2, 3), (1, 4, 2)], ids=str)
def test_every_latent_comes_back(shape: tuple[int, int], code: int, groups: tuple[int, ...]) -> None:
    model = make_model(groups, seed=code)
    y, z = make_latent(model, shape, seed=code)
    payload, y_hat = model.encode(y, z, code)
    assert y_hat.dtype == np.int32 and y_hat.shape == y.shape and y_hat.any()
    assert np.array_equal(model.decode(payload, shape, code), y_hat)
    near = wide(model).encode(y, z, code)[1] / 64
    assert np.abs(near - y).max() <= 0.5


def reference(model: HyperpriorCoder, y: np.ndarray, z: np.ndarray, code: int) -> tuple[bytes, np.ndarray, set[int]]:
    """Payload, y_hat and scales by the definition, one number after the other, in Python's integers."""
    own = {name: array.tolist() for name, array in model.arrays().items()}
    (channels, rows, columns), side_rows, side_columns = y.shape, *z.shape[1:]
    knot, rest = divmod(7 * code, 4095)

    def at_quality(knots: list[list[int]], output: int) -> int:
        return (knots[knot][output] * (4095 - rest) + knots[min(knot + 1, 7)][output] * rest) // 4095

    def activate(total: int, lowest: int) -> int:
        return max(lowest, min(32767, (total + 512) >> 10))

    def at(plane: list[list[int]], row: int, column: int) -> int:
        inside = 0 <= row < len(plane) and 0 <= column < len(plane[0])
        return plane[row][column] if inside else 0

    def convolved(planes: list, kernels: list, row: int, column: int) -> int:
        reach = len(kernels[0]) // 2
        return sum(
            weight * at(plane, row + down - reach, column + right - reach)
            for plane, kernel in zip(planes, kernels, strict=False)
            for down, line in enumerate(kernel)
            for right, weight in enumerate(line)
        )

    def upsampled(planes: list, kernels: list, bias: list[int]) -> list:
        return [
            [
                [
                    activate(convolved(planes, kernels[which], row // 2, column // 2) + bias[which], 0)
                    for column in range(2 * len(planes[0][0]))
                    for which in [4 * output + 2 * (row % 2) + column % 2]
                ]
                for row in range(2 * len(planes[0]))
            ]
            for output in range(len(kernels) // 4)
        ]

    def table(frequencies: list[int]) -> dict[int, tuple[int, int]]:
        """Start and frequency of each symbol."""
        centre = len(frequencies) // 2
        return {at - centre: (sum(frequencies[:at]), width) for at, width in enumerate(frequencies) if width}

    side_tables = [table(frequencies) for frequencies in own["side_frequencies"]]
    scale_tables, coded, scales = {}, [], set()

    def code_symbol(symbol: int, symbols: dict[int, tuple[int, int]]) -> int:
        symbol = max(min(symbols), min(max(symbols), symbol))
        coded.append(symbols[symbol])
        return symbol

    planes = [[[0] * side_columns for _ in range(side_rows)] for _ in side_tables]
    for row, column, channel in itertools.product(range(side_rows), range(side_columns), range(len(side_tables))):
        planes[channel][row][column] = 64 * code_symbol(int(z[channel, row, column]), side_tables[channel])
    planes = upsampled(planes, own["up1"], [at_quality(own["up1_bias"], which) for which in range(len(own["up1"]))])
    planes = upsampled(planes, own["up2"], own["up2_bias"])

    y_hat = [[[0] * columns for _ in range(rows)] for _ in range(channels)]
    start = 0
    for group, size in enumerate(own["groups"]):
        for number in (0, 1):
            found = {}
            for row, column in itertools.product(range(rows), range(columns)):
                if (row + column) % 2 != number:
                    continue
                features = [plane[row][column] for plane in planes]
                hidden = [
                    activate(
                        convolved(y_hat, kernels, row, column)
                        + sum(map(operator.mul, weights, features))
                        + at_quality(own[f"first_bias.{group}"][number], output),
                        0,
                    )
                    for output, (kernels, weights) in enumerate(
                        zip(own[f"known.{group}"], own[f"side.{group}"], strict=True)
                    )
                ]
                for name, lowest in (("middle", 0), ("last", -32768)):
                    hidden = [
                        activate(sum(map(operator.mul, weights, hidden)) + bias, lowest)
                        for weights, bias in zip(own[f"{name}.{group}"], own[f"{name}_bias.{group}"], strict=True)
                    ]
                for channel in range(size):
                    mean, scale = hidden[channel], max(0, min(63, (hidden[size + channel] + 32) >> 6))
                    symbols = scale_tables.setdefault(scale, table(own["scale_frequencies"][scale]))
                    symbol = code_symbol(round(float(y[start + channel, row, column]) - mean / 64), symbols)
                    found[start + channel, row, column] = max(-32768, min(32767, 64 * symbol + mean))
                    scales.add(scale)
            for (channel, row, column), value in found.items():
                y_hat[channel][row][column] = value
        start += size

    state, words = 2**31, []
    for first, frequency in reversed(coded):
        if state >= frequency << 47:
            words.insert(0, state & 0xFFFFFFFF)
            state >>= 32
        state = (state // frequency << 16) + state % frequency + first
    return struct.pack(f"<Q{len(words)}I", state, *words), np.array(y_hat), scales


@pytest.mark.parametrize(("shape", "code"), [((1, 1), 0), ((1, 4), 4095), ((6, 5), 1234), ((9, 7), 3000)])
def test_numbers_are_those_of_the_definition(shape: tuple[int, int], code: int) -> None:
    model = make_model((1, 2), side_channels=2, side_features=3, features=3, hidden=6, seed=3)
    y, z = make_latent(model, shape, spread=20)
    payload, y_hat, scales = reference(model, y, z, code)
    assert model.encode(y, z, code)[0] == payload
    assert np.array_equal(model.encode(y, z, code)[1], y_hat)
    assert shape == (1, 1) or len(scales) > 3


def test_activations_stay_in_their_range() -> None:
    model, random = make_model((1, 3), side_channels=2, side_features=3, features=3, hidden=6), np.random.default_rng(0)
    names = ("up1_bias", "up2_bias", "first_bias.0", "middle_bias.1", "last_bias.1")
    extremes = {name: random.choice([-(2**31), 2**31 - 1], model.arrays()[name].shape) for name in names}
    for name in names:
        changed = HyperpriorCoder.from_arrays(model.arrays() | {name: extremes[name]})
        y, z = make_latent(changed, (4, 3))
        payload, y_hat, _ = reference(changed, y, z, 500)
        assert changed.encode(y, z, 500)[0] == payload and np.array_equal(changed.decode(payload, (4, 3), 500), y_hat)


def test_the_format() -> None:
    """A change here breaks existing files: give the bottleneck another number instead."""
    model = make_model()
    payload, y_hat = model.encode(*make_latent(model, (13, 19)), 1234)
    parts = (payload, y_hat.astype("<i4").tobytes(), model.digest)
    assert [hashlib.sha256(part).hexdigest()[:16] for part in parts] == GOLDEN


OTHER_PROCESS = """
import sys; sys.path.insert(0, sys.argv[1])
from test_hyperprior import make_latent, make_model
import hashlib
model = make_model((8, 16), 8, 8, 16, 64)
assert "torch" not in sys.modules
payload, y_hat = model.encode(*make_latent(model, (24, 32)), 777)
decoded = model.decode(bytes.fromhex(sys.argv[2]), (24, 32), 777)
print(payload.hex(), *(hashlib.sha256(each.tobytes()).hexdigest() for each in (y_hat, decoded)))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_other_processes_write_and_read_the_same(threads: str, monkeypatch) -> None:
    for library in ("OPENBLAS", "OMP", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", threads)
    model = make_model((8, 16), 8, 8, 16, 64)
    payload, y_hat = model.encode(*make_latent(model, (24, 32)), 777)
    command = [sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parent), payload.hex()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    digest = hashlib.sha256(y_hat.tobytes()).hexdigest()
    assert result.stdout.split() == [payload.hex(), digest, digest], result.stderr


def test_parts_of_a_pass_do_not_matter(monkeypatch) -> None:
    model = make_model()
    y, z = make_latent(model, (11, 14))
    payload, y_hat = model.encode(y, z, 100)
    monkeypatch.setattr(hyperprior, "_ROWS", 7)
    assert model.encode(y, z, 100)[0] == payload and np.array_equal(model.decode(payload, (11, 14), 100), y_hat)


def test_quality_changes_predictions() -> None:
    model = make_model()
    y, z = make_latent(model, (8, 8))
    assert len({model.encode(y, z, code)[0] for code in (0, 1000, 2000, 4095)}) == 4


def test_symbols_beyond_the_tables_are_clipped() -> None:
    model = make_model((2,), hidden=4)
    outputs = np.array([500, -500, 63, 63], dtype=np.int32) * 2**16  # two means and their scales, everywhere
    model = change(model, last_0=np.zeros((4, 4), np.int16), last_bias_0=outputs)
    _, z = make_latent(model, (3, 3))
    for value, expected in ((1e30, [2**15 - 1, -116 * 64]), (-1e30, [116 * 64, -(2**15)])):
        payload, y_hat = model.encode(np.full((2, 3, 3), value), z, 0)
        assert [np.unique(plane).tolist() for plane in y_hat] == [[each] for each in expected]
        assert np.array_equal(model.decode(payload, (3, 3), 0), y_hat)
    y, _ = make_latent(model, (3, 3))
    limits = np.array([8, 9, 10])[:, None, None]  # of z's tables
    assert model.encode(y, np.full_like(z, 1000), 0)[0] == model.encode(y, np.zeros_like(z) + limits, 0)[0]


def test_estimates_are_the_payloads() -> None:
    model = make_model((2, 3))
    y, z = make_latent(model, (40, 40))
    payload, _ = model.encode(y, z, 2000)
    side, *values = model.bits(model.choose(y, z, 2000)[0])
    main, bits = sum(values), 8 * len(payload)
    assert sum(model.bits(model.read(payload, y.shape[1:], 2000)[0])) == pytest.approx(side + main)
    assert side + main < bits <= (side + main) * 1.001 + 64
    frequencies = np.take_along_axis(model.side_frequencies, z.reshape(3, -1) + 40, axis=1)
    assert side == pytest.approx((16 - np.log2(frequencies)).sum())


def damage(trials: int) -> None:
    """What a checksum cannot catch: an error, or a latent that is coded as the payload says."""
    shape, random, slowest, errors = (8, 6), np.random.default_rng(0), 0.0, 0
    models = [make_model(groups, seed=seed) for seed, groups in enumerate([(4,), (2, 3), (1, 1, 3)])]
    originals = [model.encode(*make_latent(model, shape), 1000)[0] for model in models]
    for trial in range(trials):
        model, payload = models[trial % 3], bytearray(originals[trial % 3])
        if trial % 4 == 0:
            payload = payload[: random.integers(len(payload))]
        elif trial % 4 == 1:
            payload += random.bytes(4 * int(random.integers(1, 10)))
        elif trial % 8 == 2:
            payload[8:] = random.bytes(len(payload) - 8)
        else:
            for position in random.integers(8 * len(payload), size=random.integers(1, 9)):
                payload[position // 8] ^= 1 << position % 8
        start = time.process_time()
        try:
            y_hat = model.decode(bytes(payload), shape, 1000)
        except PayloadError as error:
            assert str(error).startswith("payload ") and "\n" not in str(error)
            errors += 1
        else:
            assert y_hat.shape == (model.channels, *shape) and y_hat.dtype == np.int32
        slowest = max(slowest, time.process_time() - start)
    assert errors > 0.7 * trials and slowest < 1.0


def test_damage_ends_in_a_named_error() -> None:
    damage(300)


@pytest.mark.slow
def test_much_damage_ends_in_a_named_error() -> None:
    damage(2000)


def test_no_bytes_are_missing_or_left_over() -> None:
    model = make_model()
    payload = model.encode(*make_latent(model, (6, 6)), 0)[0]
    for wrong in (payload[:-4], payload + bytes(4), payload + payload[-4:]):
        with pytest.raises(PayloadError, match=f"payload of {len(wrong)} bytes is not a coding of 6x6 positions"):
            model.decode(wrong, (6, 6), 0)
    for wrong in (b"", payload[:4], payload[:-1], payload + bytes(1000)):
        with pytest.raises(PayloadError, match=f"payload has {len(wrong)} bytes; 6x6 positions take a multiple of 4"):
            model.decode(wrong, (6, 6), 0)
    with pytest.raises(PayloadError, match="coder state 0; allowed"):
        model.decode(bytes(8) + payload[8:], (6, 6), 0)


def test_short_payloads_cannot_claim_many_positions() -> None:
    model = make_model((2,), hidden=4)
    with pytest.raises(PayloadError, match="take a multiple of 4 from 65536 to"):
        model.decode(model.encode(*make_latent(model, (2, 2)), 0)[0], (2048, 2048), 0)
    sure = change(model, last_0=np.zeros((4, 4), np.int16), last_bias_0=np.zeros(4, np.int32))
    sure = change(sure, side_frequencies=np.array([[1, 2**16 - 2, 1]] * 3))
    y, z = np.zeros((2, 64, 40)), np.zeros((3, 16, 10), np.int32)
    payload, y_hat = sure.encode(y, z, 0)
    assert len(payload) == 40 and payload.endswith(bytes(20))
    assert np.array_equal(sure.decode(payload, (64, 40), 0), y_hat)
    with pytest.raises(PayloadError, match="not a coding"):
        sure.decode(payload[:-1] + b"1", (64, 40), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.zeros((4, 6, 7))}, r"y of type float64 and shape \(4, 6, 7\).*finite numbers of shape \(5, h, w\)"),
        ({"y": np.zeros((5, 6, 7), np.int32)}, "y of type int32"),
        ({"y": np.full((5, 6, 7), np.nan)}, "allowed: finite"),
        ({"y": np.zeros((5, 0, 7))}, "shape 0x7 is not allowed; allowed: from 1x1"),
        ({"z": np.zeros((3, 2, 3), np.int32)}, r"z of type int32 and shape \(3, 2, 3\).*of shape \(3, 2, 2\)"),
        ({"z": np.zeros((3, 2, 2))}, "z of type float64"),
        ({"code": -1}, "code -1 is not allowed; allowed: 0 to 4095"),
        ({"code": 4096}, "code 4096 is not allowed"),
    ],
)
def test_latents_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    given = {"y": np.zeros((5, 6, 7)), "z": np.zeros((3, 2, 2), np.int32), "code": 0} | changes
    with pytest.raises(ValueError, match=message) as raised:
        make_model().encode(**given)
    assert "\n" not in str(raised.value)


def row(*values: int, width: int = 9) -> np.ndarray:
    """Tables whose middle is as given."""
    margin = (width - len(values)) // 2
    return np.tile(np.pad(np.array(values), margin), (3, 1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("up1", np.zeros((16, 3, 3), np.int16), r"up1 and up2 have shapes \(16, 3, 3\)"),
        ("up1_bias", np.zeros((7, 16), np.int32), r"up1_bias has shape \(7, 16\); allowed: \(8, 16\)"),
        ("up2", np.full((20, 4, 3, 3), 2**15), "up2 from 32768 to 32768 is not allowed; allowed: -32768 to 32767"),
        ("up2_bias", np.full(20, -(2**31) - 1), "up2_bias from -2147483649 to"),
        ("known_1", np.zeros((8, 5, 3, 3), np.int16), r"known.1 has shape \(8, 5, 3, 3\); allowed: \(8, 5, 5, 5\)"),
        ("last_0", np.zeros((4, 8)), "last.0 of type float64"),
        ("last_bias_1", np.zeros(5, np.int32), r"last_bias.1 has shape \(5,\); allowed: \(6,\)"),
        ("middle_bias_0", np.array(3), r"known.0 has shape .*; allowed: \(1, 2, 5, 5\)"),
        ("groups", np.array([2, 0]), r"groups \[2, 0\] is not allowed"),
        ("groups", np.array([3, 2]), r"known.0 has shape \(8, 2, 5, 5\); allowed: \(8, 3, 5, 5\)"),
        ("groups", np.array([2, 3, 1]), "missing or unknown arrays first_bias.2, known.2, last.2"),
        ("groups", np.array([5]), "missing or unknown arrays first_bias.1, known.1"),
        ("side_frequencies", row(1, 2**16 - 3, 1), "side_frequencies: row 0 is no table"),
        ("side_frequencies", row(2**16), "row 0 is no table"),
        ("side_frequencies", row(-1, 2**16 - 1, 2), "row 0 is no table"),
        ("side_frequencies", row(1, 0, 2**16 - 2, 1, 0), "row 0 is no table"),
        ("side_frequencies", row(2**15, 0, 2**15), "row 0 is no table"),
        ("side_frequencies", row(2**15, 2**15, 0, 0, 0), "row 0 is no table"),
        (
            "side_frequencies",
            row(2**15, 2**15, width=8),
            "side_frequencies has 8 symbols; allowed: odd numbers up to 255",
        ),
        ("side_frequencies", row(1, 2**16 - 2, 1, width=257), "side_frequencies has 257 symbols"),
        ("scale_frequencies", row(1, 2**16 - 2, 1), r"scale_frequencies has shape \(3, 9\); allowed: \(64, 9\)"),
    ],
)
def test_models_that_cannot_be_are_refused(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(make_model(), **{name: value})


def test_sums_that_are_not_exact_are_refused(monkeypatch) -> None:
    model, changes = make_model((2,)), {}
    changes["known_0"] = np.full_like(model.known[0], -(2**15))
    changes["side_0"] = np.zeros_like(model.side[0])
    changes["side_0"][0, :2] = 3, -3
    reached = (2 * 25 * 2**15 + 6) * 2**15 + 2**31 + 2**10  # products, bias and rounding
    monkeypatch.setattr(hyperprior_weights, "_EXACT", reached + 1)
    change(model, **changes)
    monkeypatch.setattr(hyperprior_weights, "_EXACT", reached)
    with pytest.raises(ValueError, match=rf"known.0: sums reach {reached}; allowed: below 2\*\*53"):
        change(model, **changes)


def test_coders_of_few_channels_are_refused() -> None:
    make_model((1,), side_channels=3)
    with pytest.raises(ValueError, match="1 channels and 2 of z are not allowed; allowed: 4 in all"):
        make_model((1,), side_channels=2)


def test_arrays_make_the_coder_again() -> None:
    model = make_model()
    again = HyperpriorCoder.from_arrays(model.arrays())
    assert model.arrays().keys() == again.arrays().keys() and again.digest == model.digest
    assert all(value is again.arrays()[name] for name, value in model.arrays().items())
    for name in ("up1", "known.1", "groups"):
        with pytest.raises(ValueError, match=f"missing or unknown arrays .*{name}"):
            HyperpriorCoder.from_arrays({key: value for key, value in model.arrays().items() if key != name})
    with pytest.raises(ValueError, match="missing or unknown arrays known.2$"):
        HyperpriorCoder.from_arrays(model.arrays() | {"known.2": np.zeros(1, np.int16)})


@pytest.mark.parametrize("name", [name for name in make_model().arrays() if name != "groups"])
def test_the_digest_covers_every_array(name: str) -> None:
    model = make_model()
    value = model.arrays()[name].astype(np.int64)
    if name.endswith("frequencies"):
        value[-1, value.shape[1] // 2 + np.arange(2)] += (-1, 1)
    else:
        value.reshape(-1)[-1] += 1
    changed = HyperpriorCoder.from_arrays(model.arrays() | {name: value})
    assert changed.digest != model.digest
    same = HyperpriorCoder.from_arrays(model.arrays() | {name: model.arrays()[name].astype(np.int64)})
    assert same.digest == model.digest
