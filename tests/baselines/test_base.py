import pytest
from PIL import Image

from oscar.baselines import Encoded, encode_to_size

IMAGE = Image.new("RGB", (4, 3))


@pytest.mark.parametrize("max_bytes", [99, 100, 101, 555, 1000, 5000])
def test_size_search_gives_the_largest_file_that_fits(fake_codec, max_bytes):
    codec = fake_codec([100 * step for step in range(1, 31)])
    point, encoded = encode_to_size(codec, IMAGE, max_bytes)
    expected = max([size for size in codec.sizes if size <= max_bytes], default=100)
    assert len(encoded.data) == codec.sizes[point] == expected
    assert len(codec.encoded) == len(set(codec.encoded)) <= 8  # no point twice


def test_size_search_survives_a_dip_in_file_sizes(fake_codec):
    sizes = [100, 200, 300, 390, 410, 395, 398, 500, 600]
    point, encoded = encode_to_size(fake_codec(sizes), IMAGE, 400)
    assert len(encoded.data) == 398


def test_size_search_never_exceeds_the_size_if_anything_fits(fake_codec):
    sizes = [300, 120, 350, 360, 420, 380, 500]
    for max_bytes in range(350, 510, 7):
        _, encoded = encode_to_size(fake_codec(sizes), IMAGE, max_bytes)
        assert len(encoded.data) <= max_bytes


def test_size_search_says_by_its_size_that_nothing_fits(fake_codec):
    point, encoded = encode_to_size(fake_codec([50, 60, 70]), IMAGE, 10)
    assert (point, len(encoded.data)) == (0, 50)


def test_parts_sum_to_the_file():
    assert Encoded(b"abc").parts == {"file": 3}
    with pytest.raises(ValueError, match="do not sum to the file's 3 bytes"):
        Encoded(b"abc", {"header": 1, "y": 1})


def test_points_off_the_grid_are_refused_in_one_line(fake_codec):
    codec = fake_codec([1, 2, 3])
    assert codec.check_point(1.0000000001) == 1
    with pytest.raises(ValueError, match=r"^fake: quality 7 is not allowed; allowed: whole numbers from 0 to 2$"):
        codec.check_point(7)
    for wrong in ("1", None, float("nan")):
        with pytest.raises(ValueError, match="not allowed"):
            codec.check_point(wrong)


def test_round_trip_is_timed_and_scored_against_the_original(fake_codec):
    result = fake_codec([10]).round_trip(IMAGE, 0)
    assert result.reference is IMAGE and result.decoded.size == IMAGE.size
    assert len(result.encoded.data) == 10
    assert result.encode_seconds >= 0 and result.decode_seconds >= 0
