"""The container: layout, limits, and damage of every kind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from oscar.bitstream import (
    BitstreamError,
    ChecksumError,
    Coding,
    Container,
    HeaderError,
    NotAnOscarFileError,
    PayloadError,
    TruncatedFileError,
    UnknownRateError,
    UnsupportedVersionError,
    WrongModelError,
    packed_length,
)
from oscar.bitstream.entropy import decode_indices, encode_indices, normalise_counts, uniform_frequencies
from oscar.rates import RATES, rate_by_id

# The format's bytes. A change here breaks existing files: raise the version instead.
GOLDEN = Container(Coding.PACKED, 4, 0xBEEF, 333, 17, bytes([0, 1, 128, 255]), bytes(range(63)))
GOLDEN_HEX = (
    "05c1"
    "04"
    "beef"
    "cc02"
    "10"
    "000180ff"
    "df822d"
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637"
    "38393a3b3c3d3e"
)
GOLDEN_OWN = dataclasses.replace(GOLDEN, timestep=0x9A)  # with a timestep of its own
GOLDEN_OWN_HEX = "05c184beefcc0210000180ff9a39dbab" + GOLDEN.payload.hex()


def header_bytes(container: Container) -> int:
    return len(container.pack()) - len(container.payload)


def skewed_table(size: int) -> np.ndarray:
    return normalise_counts((1_000_000 / (1 + np.arange(size)) ** 1.3).astype(np.int64))


def make(
    rate_id: int = 4, width: int = 333, height: int = 517, skewed: bool = True, timestep: int | None = None
) -> Container:
    rate = rate_by_id(rate_id)
    rows, columns = rate.grid_shape(height, width)
    table = skewed_table(rate.codebook_size)
    generator = np.random.default_rng(0)
    indices = generator.choice(len(table), rows * columns, p=table / table.sum() if skewed else None)
    coding, payload = encode_indices(indices, table)
    return Container(coding, rate_id, 0xA55A, width, height, bytes([1, 2, 200, 255]), payload, timestep)


def read(data: bytes) -> np.ndarray:
    """All that a decoder does with a file before the networks."""
    container = Container.unpack(data)
    return decode_indices(
        container.payload, container.coding, container.index_count, skewed_table(container.rate.codebook_size)
    )


def with_checksum(before: bytes, payload: bytes) -> bytes:
    return before + zlib.crc32(before + payload).to_bytes(4, "big")[1:] + payload


@pytest.mark.parametrize("skewed", [True, False])
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{rate.bpp:.4f}")
def test_round_trip(rate, skewed):
    sizes = [(1, 1), (7, 5), (128, 128), (129, 127), (333, 517), (64, 2048)]
    for (width, height), timestep in zip(sizes, (None, 0, 255, None, 17, None), strict=True):
        container = make(rate.id, width, height, skewed, timestep=timestep)
        data = container.pack()
        assert Container.unpack(data) == container
        assert Container.unpack(data).pack() == data
        assert container.rate is rate
        # The file is never longer than the nominal bits, in whole bytes, and 16 bytes, 17 with its own timestep.
        assert len(data) <= -(-rate.nominal_bits(height, width) // 8) + 16 + (timestep is not None)


def test_parts_are_the_file():
    parts = GOLDEN.parts()
    assert list(parts) == ["magic_version", "coding_rate", "model_tag", "size", "norms", "checksum", "payload"]
    assert [len(part) for part in parts.values()] == [2, 1, 2, 3, 4, 3, 63]
    assert b"".join(parts.values()) == GOLDEN.pack()


def test_golden_bytes():
    for golden, expected in ((GOLDEN, GOLDEN_HEX), (GOLDEN_OWN, GOLDEN_OWN_HEX)):
        assert golden.pack().hex() == expected
        assert Container.unpack(bytes.fromhex(expected)) == golden


def test_a_timestep_of_its_own_is_one_byte():
    parts = GOLDEN_OWN.parts()
    names = list(GOLDEN.parts())
    assert list(parts) == [*names[:-2], "timestep", *names[-2:]]
    assert header_bytes(GOLDEN_OWN) == header_bytes(GOLDEN) + 1 and parts["timestep"] == b"\x9a"
    for timestep in range(256):
        container = dataclasses.replace(GOLDEN, timestep=timestep)
        assert Container.unpack(container.pack()).timestep == timestep
    assert Container.unpack(GOLDEN.pack()).timestep is None


@pytest.mark.parametrize(
    ("width", "height", "header"),
    [(1, 1, 14), (128, 128, 14), (129, 1, 15), (16384, 16384, 16), (16385, 1, 16), (65536, 65536, 18)],
)
def test_header_length(width, height, header):
    rows, columns = RATES[0].grid_shape(height, width)
    container = Container(Coding.PACKED, 0, 65535, width, height, bytes(4), bytes(rows * columns))
    assert header_bytes(container) == header
    assert Container.unpack(container.pack()) == container


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, UnsupportedVersionError, "format version 2"),
        ({"point_code": 12}, UnknownRateError, "rate id 12"),
        ({"coding": 4}, HeaderError, "coding 4"),
        ({"model_tag": 65536}, HeaderError, "model tag 65536"),
        ({"model_tag": -1}, HeaderError, "model tag -1"),
        ({"width": 0}, HeaderError, "width 0"),
        ({"height": 65537}, HeaderError, "height 65537"),
        ({"side": bytes(3)}, HeaderError, "3 codes"),
        ({"timestep": 256}, HeaderError, "timestep code 256"),
        ({"timestep": -1}, HeaderError, "timestep code -1"),
        ({"payload": bytes(62)}, PayloadError, "62 bytes"),
        ({"payload": bytes(64)}, PayloadError, "64 bytes"),
        ({"coding": 1}, PayloadError, "fewer than 63"),
        ({"width": 8}, PayloadError, "8x17"),
    ],
)
def test_bad_fields_are_refused(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        dataclasses.replace(GOLDEN, **changes)
    assert "allowed" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", TruncatedFileError),
        (b"\x05", TruncatedFileError),
        (b"\x05\xc1\x00\x00\x00\x80", TruncatedFileError),
        (GOLDEN.pack()[:14], TruncatedFileError),
        (GOLDEN_OWN.pack()[:15], TruncatedFileError),
        (GOLDEN_OWN.pack()[:-1], ChecksumError),
        (GOLDEN.pack()[:-1], ChecksumError),
        (GOLDEN.pack() + b"\0", ChecksumError),
        (b"\x89PNG\r\n\x1a\n", NotAnOscarFileError),
        (b"\x05\xd1", NotAnOscarFileError),
        (b"\x05\xc2" + GOLDEN.pack()[2:], UnsupportedVersionError),
    ],
)
def test_each_damage_has_its_name(data, error):
    with pytest.raises(error):
        Container.unpack(data)


@pytest.mark.parametrize(
    ("start", "size", "error", "message"),
    [
        ("05c10cbeef", "0000", UnknownRateError, "rate id 12"),
        ("05c144beef", "0000", HeaderError, "coding 4"),
        ("05c1c4beef", "0000", HeaderError, "coding 4"),
        ("05c1e4beef", "0000", HeaderError, "coding 6"),
        ("05c104beef", "800000", HeaderError, "fewest bytes"),
        ("05c104beef", "00818000", HeaderError, "fewest bytes"),
        ("05c104beef", "ffffff0000", HeaderError, "width takes more than 3"),
        ("05c104beef", "0080807f", HeaderError, "height 2080769"),
        ("05c104beef", "0000", PayloadError, "2 bytes"),
        ("05c114beef", "0000", PayloadError, "2 bytes"),
    ],
)
def test_bad_headers_under_a_good_checksum(start, size, error, message):
    norms = bytes(5 if int(start[4], 16) & 8 else 4)  # and a timestep
    with pytest.raises(error, match=message):
        Container.unpack(with_checksum(bytes.fromhex(start + size) + norms, b"ab"))


def test_bytes_like_data_and_other_data():
    assert Container.unpack(bytearray(GOLDEN.pack())) == Container.unpack(memoryview(GOLDEN.pack())) == GOLDEN
    with pytest.raises(TypeError):
        Container.unpack(5)


def test_every_single_bit_counts():
    for data in (GOLDEN.pack(), make(0).pack(), make(0, timestep=100).pack()):
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BitstreamError):
                read(bytes(damaged))


def test_random_damage_ends_in_a_named_error():
    originals = [
        make(rate.id, 333, 517, skewed, timestep=timestep).pack()
        for rate in RATES
        for skewed, timestep in ((True, None), (False, 100))
    ]
    generator = np.random.default_rng(2)
    slowest, kinds = 0.0, set()
    for trial in range(2000):
        data = bytearray(originals[trial % len(originals)])
        if trial % 3 == 0:
            data = data[: generator.integers(len(data))]
        elif trial % 3 == 1:
            for position in {int(bit) for bit in generator.integers(8 * len(data), size=generator.integers(1, 9))}:
                data[position // 8] ^= 1 << position % 8
        else:
            data += generator.bytes(int(generator.integers(1, 100)))
        start = time.process_time()
        with pytest.raises(BitstreamError) as caught:
            read(bytes(data))
        slowest = max(slowest, time.process_time() - start)
        kinds.add(caught.type)
    assert slowest < 1.0
    assert {ChecksumError, TruncatedFileError, NotAnOscarFileError, UnsupportedVersionError} <= kinds


def test_random_damage_under_a_good_checksum():
    """What a checksum cannot catch: a decoder gets an error or indices in range, and no more of them than they cost."""
    originals = [
        make(rate.id, 333, 517, skewed, timestep=timestep)
        for rate in RATES
        for skewed, timestep in ((True, None), (False, 100))
    ]
    generator = np.random.default_rng(3)
    for trial in range(1000):
        original = originals[trial % len(originals)]
        before = bytearray(b"".join(list(original.parts().values())[:-2]))
        payload = bytearray(original.payload)
        target = before if trial % 2 else payload
        for position in generator.integers(8 * len(target), size=generator.integers(1, 4)):
            target[position // 8] ^= 1 << position % 8
        data = with_checksum(bytes(before), bytes(payload))
        try:
            indices = read(data)
        except BitstreamError:
            continue
        container = Container.unpack(data)
        assert len(indices) == container.index_count
        assert not len(indices) or 0 <= indices.min() <= indices.max() < container.rate.codebook_size
        assert len(payload) <= packed_length(len(indices), container.rate.codebook_size)


def test_noise_and_other_files_end_in_a_named_error():
    generator = np.random.default_rng(4)
    for _ in range(500):
        data = generator.bytes(int(generator.integers(0, 60)))
        for candidate in (data, b"\x05\xc1" + data):
            with pytest.raises(BitstreamError):
                read(candidate)


def test_errors_are_one_family():
    for error in (WrongModelError, HeaderError, PayloadError, ChecksumError, UnknownRateError):
        assert issubclass(error, BitstreamError)
    assert issubclass(BitstreamError, ValueError)


def test_imports_no_torch():
    command = (
        "import sys, oscar.bitstream, oscar.rates; sys.exit('torch' in sys.modules or 'compressai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", command], timeout=60).returncode == 0


def test_uniform_tables_cost_the_nominal_rate():
    indices = np.arange(4096) % 256
    coding, payload = encode_indices(indices, uniform_frequencies(256))
    assert (coding, len(payload)) == (Coding.PACKED, 4096)


class TestQuality:
    """Files of a model with a hyperprior."""

    def container(self, **changes) -> Container:
        fields = {
            "coding": Coding.HYPERPRIOR,
            "point_code": 1234,
            "model_tag": 0xBEEF,
            "width": 768,
            "height": 512,
            "side": b"",
            "payload": b"payload",
        }
        return Container(**{**fields, **changes})

    def test_header_is_spelled_out(self):
        data = self.container().pack()
        assert data[:9].hex() == "05c1" + "34d2" + "beef" + "ff05" + "ff"  # 0x4d2 is 1234, 767 is ff 05, 511 ff 03
        assert len(data) == 13 + len(b"payload")
        assert Container.unpack(data) == self.container()

    def test_parts_add_up(self):
        container = self.container()
        assert b"".join(container.parts().values()) == container.pack()
        assert header_bytes(container) == 13

    @pytest.mark.parametrize("code", [0, 1, 255, 256, 4095])
    def test_every_quality(self, code):
        container = Container.unpack(self.container(point_code=code).pack())
        assert container.point_code == code and container.quality == code / 4095 and container.rate is None

    def test_codings_of_ones_own(self):
        """As with a hyperprior; what the operating point means, only the model knows."""
        container = self.container(coding=Coding.EXTERNAL)
        assert container.pack()[:6].hex() == "05c1" + "74d2" + "beef"
        assert Container.unpack(container.pack()) == container
        assert container.quality is None and container.rate is None and header_bytes(container) == 13

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"point_code": 4096}, "quality 4096"),
            ({"point_code": -1}, "quality -1"),
            ({"side": b"1234"}, "norms is b'1234'; allowed with coding hyperprior: none"),
            ({"timestep": 3}, "timestep is 3; allowed with coding hyperprior: none"),
            ({"coding": Coding.EXTERNAL, "timestep": 3}, "timestep is 3; allowed with coding external: none"),
        ],
    )
    def test_fields_that_do_not_go_together(self, changes, message):
        with pytest.raises(HeaderError, match=message):
            self.container(**changes)

    def test_a_quality_is_no_rate(self):
        with pytest.raises(UnknownRateError, match="rate id 1234 does not exist; allowed: 0 to 11"):
            self.container(coding=Coding.TABLE, side=b"1234")

    def test_damage(self):
        data, generator = self.container().pack(), np.random.default_rng(0)
        for _ in range(500):
            broken = bytearray(data)
            broken[generator.integers(len(data))] ^= 1 << generator.integers(8)
            with pytest.raises(BitstreamError):
                Container.unpack(bytes(broken))
        for length in range(len(data)):
            with pytest.raises(BitstreamError):
                Container.unpack(data[:length])
