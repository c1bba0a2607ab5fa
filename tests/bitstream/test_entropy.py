"""Frequency tables, packing and rANS, and payloads made to break a decoder."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.util import find_spec

import numpy as np
import pytest

from oscar.bitstream import Coding, PayloadError, packed_length
from oscar.bitstream.entropy import (
    FREQUENCY_TOTAL,
    decode_indices,
    encode_indices,
    estimated_bits,
    normalise_counts,
    uniform_frequencies,
)
from oscar.bitstream.rans import ans
from oscar.rates import RATES

needs_compressai = pytest.mark.skipif(find_spec("compressai") is None, reason="CompressAI is not installed")
RATE_SIZES = [rate.codebook_size for rate in RATES]


def skewed_counts(size: int) -> np.ndarray:
    return (1_000_000 / (1 + np.arange(size)) ** 1.3).astype(np.int64)


def degenerate_counts(size: int) -> np.ndarray:
    return np.where(np.arange(size) == size // 2, 10**12, 0)


TABLES = {
    "uniform": np.ones_like,
    "skewed": lambda symbols: skewed_counts(len(symbols)),
    "degenerate": lambda symbols: degenerate_counts(len(symbols)),
}


def draw(frequencies: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.choice(len(frequencies), size=count, p=frequencies / frequencies.sum())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{rate.bpp:.4f}")
def test_round_trip(rate, table):
    size = rate.codebook_size
    frequencies = normalise_counts(TABLES[table](np.arange(size)))
    generator = np.random.default_rng(rate.id)
    sources = [lambda n: draw(frequencies, n), lambda n: generator.integers(0, size, n), lambda n: np.full(n, size - 1)]
    for count in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65, 300, 5000):
        for source in sources:  # from the table, from another distribution, the last symbol alone
            indices = source(count)
            coding, payload = encode_indices(indices, frequencies)
            assert len(payload) <= packed_length(count, size) == -(-count * (size - 1).bit_length() // 8)
            assert (coding == Coding.PACKED) == (len(payload) == packed_length(count, size))
            decoded = decode_indices(payload, coding, count, frequencies)
            assert decoded.dtype == np.int32
            assert decoded.tolist() == indices.tolist()


def test_round_trip_beyond_one_chunk():
    frequencies = normalise_counts(skewed_counts(256))
    indices = draw(frequencies, 600_001)
    coding, payload = encode_indices(indices, frequencies)
    assert coding == Coding.TABLE
    assert (decode_indices(payload, coding, len(indices), frequencies) == indices).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100, 65535])
def test_round_trip_of_other_codebook_sizes(size):
    for frequencies in (uniform_frequencies(size), normalise_counts(skewed_counts(size))):
        for count in (0, 1, 5, 400):
            indices = draw(frequencies, count)
            coding, payload = encode_indices(indices, frequencies)
            assert len(payload) <= packed_length(count, size)
            assert (decode_indices(payload, coding, count, frequencies) == indices).all()


@pytest.mark.parametrize("size", sorted(set(RATE_SIZES)))
def test_size_is_the_estimate_and_the_state(size):
    frequencies = normalise_counts(skewed_counts(size))
    indices = draw(frequencies, 20_000)
    coding, payload = encode_indices(indices, frequencies)
    estimate = estimated_bits(indices, frequencies)
    assert coding == Coding.TABLE
    assert estimate == pytest.approx(-np.log2(frequencies[indices] / 2**16).sum())
    assert 8 * len(payload) - 0.9999 * estimate >= 31
    assert 8 * len(payload) - 1.0001 * estimate <= 64


def test_payloads_have_these_bytes():
    """Other bytes would mean that existing files no longer decode."""
    frequencies = normalise_counts(np.array([900, 60, 30, 10]))
    assert frequencies.tolist() == [58979, 3933, 1967, 656]
    for indices, table, golden in [
        (np.arange(100) % 97 // 90, frequencies, "0be45dbeef020000b516f4c3"),
        (
            np.arange(100) % 7 % 4,
            uniform_frequencies(5),
            "871d5b8792000000dd0dc0879615ede18316dba8afcbf9b5e39af218f3b98e17619e45bb",
        ),
    ]:
        assert encode_indices(indices, table) == (Coding.TABLE, bytes.fromhex(golden))
        assert (decode_indices(bytes.fromhex(golden), Coding.TABLE, 100, table) == indices).all()


@pytest.mark.parametrize(
    "counts", [[0] * 7, [1] * 7, [5, 0, 0], [2**62, 2**62, 1], list(range(8192)), [0] * 65535, [3]]
)
def test_normalised_counts_sum_and_order(counts):
    frequencies = normalise_counts(np.array(counts))
    assert frequencies.dtype == np.int32
    assert frequencies.sum() == FREQUENCY_TOTAL == 65535
    assert frequencies.min() >= 1
    assert (np.diff(frequencies[np.argsort(counts, kind="stable")[::-1]]) <= 1).all()  # more counts, no fewer units


def test_normalise_counts_by_hand():
    # 65532 units to share as 1 : 1 : 0: exact; 65531 among four alike: three are left over, to the first three.
    assert normalise_counts(np.array([7, 7, 0])).tolist() == [32767, 32767, 1]
    assert normalise_counts(np.ones(4, dtype=int)).tolist() == [16384, 16384, 16384, 16383]


@pytest.mark.parametrize(
    "counts", [np.array([1, -1]), np.array([0.5, 0.5]), np.ones((2, 2), int), np.array([], int), np.ones(65536, int)]
)
def test_bad_counts_are_refused(counts):
    with pytest.raises(ValueError, match="not allowed"):
        normalise_counts(counts)


@pytest.mark.parametrize("indices", [np.array([16]), np.array([-1]), np.array([0.0]), np.zeros((2, 2), int)])
def test_bad_indices_are_refused(indices):
    with pytest.raises(ValueError, match="not allowed"):
        encode_indices(indices, uniform_frequencies(16))


@pytest.mark.parametrize("frequencies", [[32767, 32767], [0, 65535], [1.0, 65534.0], [], [[65535]]])
def test_bad_frequencies_are_refused(frequencies):
    for call in (lambda table: encode_indices(np.array([0]), table), lambda table: decode_indices(b"", 0, 0, table)):
        with pytest.raises(ValueError, match="not allowed") as caught:
            call(np.array(frequencies))
        assert not isinstance(caught.value, PayloadError)


def test_packed_payloads_have_one_form():
    frequencies = uniform_frequencies(5)
    assert decode_indices(b"\x29\x80", Coding.PACKED, 3, frequencies).tolist() == [1, 2, 3]
    for payload, fault in [
        (b"\x29\x81", "after its last"),
        (b"\x29", "has 1 bytes"),
        (b"\x29\x80\x00", "has 3 bytes"),
        (b"\xa9\x80", "holds index 5"),
    ]:
        with pytest.raises(PayloadError, match=fault):
            decode_indices(payload, Coding.PACKED, 3, frequencies)


def test_table_payloads_have_one_form():
    frequencies = normalise_counts(skewed_counts(256))
    indices = draw(frequencies, 1000)
    _, payload = encode_indices(indices, frequencies)
    with pytest.raises(PayloadError, match="coding 2"):
        decode_indices(payload, 2, 1000, frequencies)
    for count in (0, 1, 8, 999, 1001, 100_000, 67_000_000):
        with pytest.raises(PayloadError):
            decode_indices(payload, Coding.TABLE, count, frequencies)
    with pytest.raises(PayloadError):
        decode_indices(payload, Coding.TABLE, 1000, normalise_counts(skewed_counts(256)[::-1]))


@needs_compressai
def test_escape_is_refused():
    """A payload of CompressAI's that does use the escape symbol."""
    frequencies = normalise_counts(skewed_counts(16))
    cdf = [0, *np.cumsum(frequencies).tolist(), 65536]
    payload = ans().RansEncoder().encode_with_indexes([0] * 50 + [16], [0] * 51, [cdf], [len(cdf)], [0])
    with pytest.raises(PayloadError, match="symbol 16"):
        decode_indices(payload, Coding.TABLE, 51, frequencies)


ATTACK = """
    import pathlib, sys, time
    import numpy as np
    from oscar.bitstream import PayloadError
    from oscar.bitstream.entropy import decode_indices, encode_indices, normalise_counts

    generator = np.random.default_rng(0)
    refused = accepted = 0
    slowest = 0.0
    for size in (16, 256, 8192):
        tables = [normalise_counts(np.ones(size, int)), normalise_counts((np.arange(size) == size - 1) * 10**9),
                  normalise_counts((1e6 / (1 + np.arange(size)) ** 1.3).astype(int))]
        for table in tables:
            payloads = [(bytes([value]) * length, count) for value in (0, 1, 127, 254, 255)
                        for length in (8, 12, 64, 4096) for count in (5, 20, 100, 9000, 200_000)]
            # An escape first, then ones: CompressAI reads a length from them, then as many bits, far out of the buffer.
            payloads += [(b"\\xff\\xff" + b"\\xff" * n + b"\\x7f" + tail, 4 * n + 99) for n in (5, 101, 4001)
                         for tail in (b"", b"\\xff" * 4000)]
            for trial in range(60):
                length = 4 * int(generator.integers(2, 60))
                body = bytearray(generator.integers(0, 256, length, dtype=np.uint8).tobytes())
                body[7] &= 0x7F
                payloads.append((bytes(body), int(generator.integers(1, 4000))))
            true = generator.choice(size, 400, p=table / table.sum())
            coding, payload = encode_indices(true, table)
            for trial in range(60):
                damaged = bytearray(payload)
                damaged[int(generator.integers(len(damaged)))] ^= 1 << int(generator.integers(8))
                payloads.append((bytes(damaged), 400))
            for payload, count in payloads:
                for coding in (0, 1):
                    start = time.process_time()
                    try:
                        indices = decode_indices(payload, coding, count, table)
                        assert encode_indices(indices, table)[1] == payload or coding == 0
                        accepted += 1
                    except PayloadError:
                        refused += 1
                    slowest = max(slowest, time.process_time() - start)
    assert "torch" not in sys.modules
    status = pathlib.Path("/proc/self/status")  # getrusage would count the peak of the process that started this one
    peak = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
    print(refused, accepted, slowest, int(peak) // 1024)
"""


def test_made_up_payloads_neither_crash_nor_hang():
    """In a process of its own, since a fault in C++ would end this one."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ATTACK)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    refused, _, slowest, megabytes = result.stdout.split()
    assert int(refused) > 2000
    assert float(slowest) < 1.0
    assert int(megabytes) < 500


BESIDE_COMPRESSAI = """
    import numpy as np
    from oscar.bitstream import Coding
    from oscar.bitstream.entropy import decode_indices, encode_indices, normalise_counts
    table = normalise_counts(np.array([90, 6, 4]))
    coding, payload = encode_indices(np.zeros(500, int), table)
    assert coding == Coding.TABLE and not decode_indices(payload, coding, 500, table).any()
    import torch
    from compressai.entropy_models import EntropyBottleneck
    model = EntropyBottleneck(2)
    model.update()
    pixels = torch.zeros(1, 2, 4, 4)
    assert model.decompress(model.compress(pixels), (4, 4)).shape == pixels.shape
"""


@needs_compressai
@pytest.mark.slow
def test_compressai_works_after_its_coder_was_loaded_alone():
    command = textwrap.dedent(BESIDE_COMPRESSAI)
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
