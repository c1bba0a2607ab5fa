"""Our own rANS coder beside CompressAI's, whose place it takes where that is not installed."""

from __future__ import annotations

import functools
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from oscar.bitstream import BitstreamError, Coding, Container, PayloadError, python_rans, rans
from oscar.bitstream.context import ContextModel, decode_grid, encode_grid
from oscar.bitstream.hyperprior import HyperpriorCoder
from oscar.bitstream.python_rans import PRECISION, BufferedRansEncoder, RansDecoder

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
FOLDERS = {  # of models, by the folders of their files
    "vq": GOLDEN / "ours/vq",
    "hyperprior": GOLDEN / "ours/hyperprior",
    "nano-vq": ROOT / "oscar/assets/nano-vq",
    "nano": ROOT / "oscar/assets/nano",
}
FILES = sorted([*GOLDEN.glob("ours/files/*/*.oscar"), *GOLDEN.glob("shipped/*/*.oscar")])
needs_compressai = pytest.mark.skipif(find_spec("compressai") is None, reason="compares with CompressAI's coder")

Tables = tuple[list[list[int]], list[int], list[int]]
Parts = list[tuple[list[int], list[int]]]


def random_table(random: np.random.Generator, symbols: int, spread: float, escape: int) -> list[int]:
    """Cumulative frequencies, from nearly even ones to one that takes all but a unit for each of the others."""
    total = 2**PRECISION - escape
    widths = 1 + random.multinomial(total - symbols, random.dirichlet(np.full(symbols, spread)))
    return [0, *np.cumsum(widths).tolist(), 2**PRECISION]


def random_case(seed: int) -> tuple[Tables, Parts]:
    """Tables of many sizes, and symbols in parts, some of them empty."""
    random = np.random.default_rng(seed)
    escape = int(random.integers(2))  # of no width, or a unit
    cdfs, sizes, offsets = [], [], []
    for _ in range(random.integers(1, 6)):
        symbols = int(2 ** random.uniform(0, 9 + 7 * (random.random() < 0.02)))
        symbols = max(symbols, 2 - escape)  # CompressAI has no frequency of 2**16
        cdf = random_table(random, min(symbols, 2**PRECISION - 2), 10 ** random.uniform(-3, 2), escape)
        cdfs.append(cdf + [0] * int(random.integers(3)))  # what stands behind the end of a table does not matter
        sizes.append(len(cdf))
        offsets.append(int(random.integers(-400, 400)))
    parts = []
    for _ in range(random.integers(1, 5)):
        tables = random.integers(len(cdfs), size=int(random.integers(60)) * (random.random() > 0.1))
        places = random.integers(2**PRECISION - escape, size=len(tables)) if random.random() < 0.7 else None
        symbols = [
            int(random.integers(sizes[table] - 2))  # improbable ones too
            if places is None
            else int(np.searchsorted(cdfs[table][: sizes[table] - 1], places[number], side="right") - 1)
            for number, table in enumerate(tables.tolist())
        ]
        parts.append(([s + offsets[t] for s, t in zip(symbols, tables, strict=True)], tables.tolist()))
    return (cdfs, sizes, offsets), parts


@pytest.fixture
def use_own(monkeypatch) -> None:
    """Files are coded as where CompressAI is not installed."""
    monkeypatch.setattr(rans, "ans", lambda: python_rans)


@needs_compressai
@pytest.mark.parametrize(
    "seeds", [range(300), pytest.param(range(300, 10_300), marks=pytest.mark.slow)], ids=["300", "10000"]
)
def test_same_bytes_as_compressai(seeds, monkeypatch) -> None:
    """Payloads are equal, and each coder reads the other's; so are symbols that are read on behind the end."""
    coders = {"own": python_rans, "compressai": rans.ans()}
    for seed in seeds:
        tables, parts = random_case(seed)
        payloads = {}
        for name, coder in coders.items():
            monkeypatch.setattr(rans, "ans", lambda coder=coder: coder)
            payloads[name] = rans.encode_symbols(parts, *tables)
        assert payloads["own"] == payloads["compressai"], seed
        more = [0] * 3 if sum(len(symbols) for symbols, _ in parts) < 3 else []
        for coder in coders.values():
            monkeypatch.setattr(rans, "ans", lambda coder=coder: coder)
            stream = rans.decoder(payloads["own"], sum(len(symbols) for symbols, _ in parts) + len(more))
            assert [stream.decode_stream(indexes, *tables) for _, indexes in parts] == [symbols for symbols, _ in parts]
            assert len(stream.decode_stream(more, *tables)) == len(more)


@needs_compressai
def test_any_bytes_as_compressai(monkeypatch) -> None:
    """Damaged payloads decode to the same symbols, where tables give the escape no width; zeros follow at the end."""
    random = np.random.default_rng(0)
    compressai = rans.ans()
    cdfs = [random_table(random, symbols, 1, 0) for symbols in (2, 3, 40, 300)]
    tables = cdfs, [len(cdf) for cdf in cdfs], [0, -1, -20, 5]
    for length in range(8, 80, 4):
        payload = random.bytes(length - 1) + b"\x01"
        payload = payload[:7] + b"\x11" + payload[8:]  # a state within its range
        indexes = random.integers(4, size=200).tolist()
        found = []
        for coder in (python_rans, compressai):
            monkeypatch.setattr(rans, "ans", lambda coder=coder: coder)
            found.append(rans.decoder(payload, 200).decode_stream(indexes, *tables))
        assert found[0] == found[1]


@pytest.mark.parametrize("cdf", [[0, 2**16 - 1, 2**16], [0, 1, 2**16 - 1, 2**16], [0, 1, 2, 2**16, 2**16]])
def test_round_trip_at_the_edges(cdf: list[int]) -> None:
    """One symbol, frequencies of one unit, one part or none; and beyond a chunk of the encoder."""
    symbols = [place % (len(cdf) - 2) for place in range(python_rans._CHUNK + 3)]
    for count in (0, 1, 2, 5, len(symbols)):
        encoder, decoder = BufferedRansEncoder(), RansDecoder()
        half = count // 2
        for part in (symbols[:half], [], symbols[half:count]):
            encoder.encode_with_indexes(part, [0] * len(part), [cdf], [len(cdf)], [0])
        payload = encoder.flush()
        decoder.set_stream(payload)
        assert decoder.decode_stream([0] * count, [cdf], [len(cdf)], [0]) == symbols[:count]
        assert (decoder._state, next(decoder._words, None)) == (python_rans.SMALLEST_STATE, None)
    assert encoder.flush() == BufferedRansEncoder().flush() == (2**31).to_bytes(8, "little")


def test_a_symbol_that_no_table_has() -> None:
    cdf = [0, 5, 2**16 - 1, 2**16]
    for symbol in (-4, -1, 5):
        with pytest.raises(ValueError, match=f"symbol {symbol} is not in table 1"):
            BufferedRansEncoder().encode_with_indexes([0, symbol], [0, 1], [cdf, cdf], [4, 4], [0, -3 * (symbol < -3)])


def test_escapes_and_ends_do_not_hang() -> None:
    """An escape is a symbol of its own, for which nothing is read; a payload that ends gives no more symbols."""
    escape, decoder = [0, 1, 2**16], RansDecoder()
    decoder.set_stream((2**16 - 1 + 2**40).to_bytes(8, "little") + b"\xff" * 4 * 3 + b"\x01\x02")
    found = decoder.decode_stream([0] * 10**7, [escape], [3], [7])
    assert set(found) == {7, 8} and len(found) < 10**7
    assert decoder.decode_stream([0], [escape], [3], [7]) == []
    for payload in (b"", b"\xff" * 7, bytes(8), b"\xff" * 8, bytes(12)):
        decoder.set_stream(payload)
        assert decoder.decode_stream([0] * 5, [escape], [3], [7]) == []


def test_it_is_taken_where_compressai_is_missing(monkeypatch) -> None:
    monkeypatch.delitem(rans.sys.modules, "compressai.ans", raising=False)
    monkeypatch.setattr(rans.importlib.util, "find_spec", lambda name: None)
    assert rans.ans.__wrapped__() is python_rans


@functools.cache
def read_model(folder: Path) -> dict:
    """Of a model, what reads its payloads, by rate id or in all."""
    arrays = load_file(folder / "oscar.safetensors")

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    if coder := part("coder."):
        return {"coder": HyperpriorCoder.from_arrays(coder)}
    contexts = {number: part(f"context.{number}.") for number in part("frequencies.")}
    return {
        int(number): (arrays[f"frequencies.{number}"], ContextModel(**own) if own else None)
        for number, own in contexts.items()
    }


@pytest.mark.slow
@needs_compressai
@pytest.mark.parametrize("width, height", [(768, 512), (3840, 2160)])
def test_seconds(width: int, height: int, monkeypatch) -> None:
    """Print the processor time of reading a file, which codes it anew, beside CompressAI's coder, in turns."""
    random, tables = np.random.default_rng(0), read_model(FOLDERS["nano"])["coder"]._tables
    side, positions = len(tables.cdfs) - 64, width * height // 256
    indexes = [np.tile(np.arange(side), positions // 16)]  # then groups of 8, 8, 16 and 32 channels, in two passes each
    indexes += [
        side + random.normal(20, 8, positions * channels // 2).clip(0, 63).astype(int)
        for channels in (8, 8, 8, 8, 16, 16, 32, 32)
    ]
    parts = []
    for part in indexes:
        symbols, places = np.empty_like(part), random.integers(2**PRECISION, size=len(part))
        for table in np.unique(part):
            own = part == table
            symbols[own] = np.searchsorted(tables.cdfs[table][:-1], places[own], "right") - 1 + tables.lowest[table]
        parts.append((symbols.tolist(), part.tolist()))
    count = sum(len(symbols) for symbols, _ in parts)
    coders, seconds, payloads = {"compressai": rans.ans(), "own": python_rans}, {"compressai": [], "own": []}, set()
    for name, coder in list(coders.items()) * 3:
        monkeypatch.setattr(rans, "ans", lambda coder=coder: coder)
        begin = time.process_time()
        payloads.add(rans.encode_symbols(parts, *tables[:3]))
        middle = time.process_time()
        stream = rans.decoder(next(iter(payloads)), count)
        found = [stream.decode_stream(indexes, *tables[:3]) for _, indexes in parts]
        seconds[name].append((time.process_time() - middle, middle - begin))
        assert found == [symbols for symbols, _ in parts]
    assert len(payloads) == 1
    bpp = 8 * len(payloads.pop()) / (width * height)
    for name, times in seconds.items():
        decode, encode = np.median(times, axis=0)
        print(f"{width}x{height} {bpp:.2f} bpp, {count} symbols, {name}: decode {decode:.3f} s, encode {encode:.3f} s")


def read_symbols(container: Container, model: dict, payload: bytes, shape: tuple[int, ...]) -> np.ndarray:
    if container.coding == Coding.HYPERPRIOR:
        return model["coder"].read(payload, shape[1:], container.point_code)[1]
    frequencies, context = model[container.point_code]
    return decode_grid(payload, container.coding, shape, frequencies, context)


@functools.cache
def golden_symbols(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "arrays.safetensors")


def golden_case(path: Path) -> tuple[Container, dict, np.ndarray]:
    """A golden file, its model and its symbols."""
    model = read_model(FOLDERS[path.parent.name.removesuffix("_per_image")])
    return Container.unpack(path.read_bytes()), model, golden_symbols(path.parent)[f"{path.stem}.symbols"]


def test_golden_files(use_own) -> None:
    """They decode to their symbols; and symbols are coded anew, to the same bytes, by reading itself."""
    for path in FILES:
        container, model, expected = golden_case(path)
        found = read_symbols(container, model, container.payload, expected.shape)
        assert np.array_equal(found, expected), path
        if container.has_indices:
            coded = encode_grid(found, *model[container.point_code])
            assert coded == (container.coding, container.payload), path
    kinds = {golden_case(path)[0].coding for path in FILES}
    assert kinds == {Coding.PACKED, Coding.TABLE, Coding.CONTEXT, Coding.HYPERPRIOR}


def test_damaged_files_end_in_named_errors(use_own) -> None:
    """500 payloads, as behind a checksum that fits: they are refused, by name, but for one that is of other symbols."""
    random = np.random.default_rng(0)
    cases = [golden_case(path) for path in FILES if "131x67" in path.stem]
    cases = [case for case in cases if case[0].coding != Coding.PACKED]  # any bits are indices there
    others = 0
    for number in range(500):
        container, model, expected = cases[number % len(cases)]
        payload = bytearray(container.payload)
        kind = random.integers(4)
        if kind == 0:
            payload = payload[: random.integers(len(payload))]
        elif kind == 1:
            payload += random.bytes(int(random.integers(1, 40)))
        elif kind == 2:
            payload[random.integers(len(payload))] ^= 1 << random.integers(8)
        else:
            payload = payload[:8] + random.bytes(max(len(payload) - 8, 0))
        if payload == container.payload:  # of eight bytes, all kept
            payload += b"\0"
        try:
            others += bool(np.any(read_symbols(container, model, bytes(payload), expected.shape) != expected))
        except PayloadError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert others == 1
        damaged = bytearray(container.pack())
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        with pytest.raises(BitstreamError):
            Container.unpack(bytes(damaged))
