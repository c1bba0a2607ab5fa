"""The decoder of prefixes beside CompressAI's."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from oscar.bitstream.rans import PRECISION, PrefixDecoder, decoder, encode_symbols

SYMBOLS = 500


def make_tables(random: np.random.Generator) -> tuple[list[list[int]], list[int], list[int]]:
    """Three tables as CompressAI takes them, the escape of no width, with their sizes and offsets."""
    cdfs = []
    for count in (2, 5, 9):
        widths = 1 + random.multinomial(2**PRECISION - count, random.dirichlet(np.ones(count)))
        cdfs.append([0, *np.cumsum(widths).tolist(), 2**PRECISION])
    return cdfs, [len(cdf) for cdf in cdfs], [0, -2, -4]


@pytest.fixture(params=range(5))
def coded(request) -> tuple[list[int], list[int], tuple, bytes]:
    """Symbols, the number of each one's table, the tables, and the payload."""
    random = np.random.default_rng(request.param)
    cdfs, sizes, offsets = make_tables(random)
    tables = random.integers(3, size=SYMBOLS).tolist()
    symbols = [int(random.integers(sizes[table] - 2)) + offsets[table] for table in tables]
    payload = encode_symbols([(symbols, tables)], cdfs, sizes, offsets)
    return symbols, tables, (cdfs, sizes, offsets), payload


def test_a_whole_payload(coded) -> None:
    symbols, tables, options, payload = coded
    assert decoder(payload, SYMBOLS).decode_stream(tables, *options) == symbols
    stream = PrefixDecoder(payload)
    assert stream.decode_stream(tables[:200], *options) + stream.decode_stream(tables[200:], *options) == symbols
    assert stream.asked == stream.known == SYMBOLS


OVERRUN = """
from oscar.bitstream.rans import decoder, encode_symbols
improbable = [[0, 1, 2**16 - 1, 2**16]], [4], [0]
for count in (1, 2, 3, 4, 5):
    for _ in range(2000):
        symbols = [0] * count
        payload = encode_symbols([(symbols, symbols)], *improbable)
        assert decoder(payload, count).decode_stream(symbols, *improbable) == symbols
"""


def test_few_improbable_symbols() -> None:
    """They would make CompressAI's encoder write before its buffer, which ends a process now or later."""
    assert subprocess.run([sys.executable, "-c", OVERRUN]).returncode == 0


def test_every_prefix(coded) -> None:
    """Some symbols more with each word, and the most probable ones behind them."""
    symbols, tables, (cdfs, sizes, offsets), payload = coded
    probable = [int(np.argmax(np.diff(cdfs[table]))) + offsets[table] for table in tables]
    before = 0
    for length in range(len(payload) + 1):
        stream = PrefixDecoder(payload[:length])
        found = stream.decode_stream(tables, cdfs, sizes, offsets)
        assert stream.asked == SYMBOLS
        assert before <= stream.known and (length < 8) == (stream.known == 0)
        assert found == symbols[: stream.known] + probable[stream.known :]
        before = stream.known
    assert before == SYMBOLS


def test_any_bytes() -> None:
    random = np.random.default_rng(0)
    cdfs, sizes, offsets = make_tables(random)
    for length in range(64):
        found = PrefixDecoder(random.bytes(length)).decode_stream([0, 1, 2] * 50, cdfs, sizes, offsets)
        assert all(0 <= symbol - offsets[number % 3] < sizes[number % 3] - 1 for number, symbol in enumerate(found))
