import io
import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from oscar.baselines import BaselineUnavailable, CodecError, encode_to_size, make_baseline
from oscar.baselines import pillow as module
from oscar.metrics.image import psnr

NAMES = ("jpeg", "jpeg2000", "webp", "avif", "jxl")


@pytest.fixture(params=NAMES)
def codec(request):
    try:
        return make_baseline(request.param, **({"speed": 9} if request.param == "avif" else {}))
    except BaselineUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def photo():
    """Smooth colours with texture, 96 x 67."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:67, 0:96]
    base = np.stack([x * 2, y * 3, 255 - x - y], axis=-1) + random.normal(0, 12, (67, 96, 1))
    return Image.fromarray(base.clip(0, 255).astype(np.uint8))


def test_files_grow_and_images_improve_with_the_point(codec, photo):
    low, high = (codec.round_trip(photo, point) for point in (codec.points[2], codec.points[-1]))
    assert low.decoded.size == high.decoded.size == photo.size and low.decoded.mode == "RGB"
    assert len(low.encoded.data) < len(high.encoded.data)
    assert 10 < psnr(low.decoded, photo) < psnr(high.decoded, photo)


def test_decoding_needs_only_the_bytes(codec, photo):
    data = codec.encode(photo, codec.points[-1]).data
    fresh = make_baseline(codec.name)
    assert np.array_equal(np.asarray(fresh.decode(data)), np.asarray(codec.decode(data)))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 17)])
def test_small_and_odd_sizes(codec, size):
    image = Image.new("RGB", size, (200, 30, 90))
    assert codec.decode(codec.encode(image, codec.points[1]).data).size == size


def test_size_search_on_real_files(codec, photo):
    sizes = [len(codec.encode(photo, point).data) for point in (codec.grid[0], codec.points[-1])]
    target = sum(sizes) // 2
    point, encoded = encode_to_size(codec, photo, target)
    assert codec.check_point(point) == point
    assert 0.8 * target < len(encoded.data) <= target


def test_the_grid_starts_with_the_smallest_file(codec, photo):
    smallest = len(codec.encode(photo, codec.grid[0]).data)
    assert all(smallest <= len(codec.encode(photo, point).data) for point in codec.points)
    assert all(low < high for low, high in pairwise(codec.grid))


def test_metadata_of_the_source_does_not_enter_the_file(codec, photo):
    rich = photo.copy()
    rich.info.update(icc_profile=b"x" * 5000, comment=b"y" * 5000)
    rich.getexif()[0x010E] = "z" * 5000
    point = codec.points[3]
    assert len(codec.encode(rich, point).data) == len(codec.encode(photo, point).data)


def test_description_is_json_with_versions(codec):
    described = json.loads(json.dumps(codec.describe()))
    assert described["name"] == codec.name and described["library"].startswith("Pillow ")
    assert described["codec_version"]


@pytest.mark.parametrize("point", [-1, 101, 1e9, "x"])
def test_points_out_of_range_are_one_line(codec, photo, point):
    with pytest.raises(ValueError, match=f"^{codec.name}: .* is not allowed; allowed: .* to "):
        codec.encode(photo, point)


def test_files_of_other_formats_are_refused(codec, photo):
    stream = io.BytesIO()
    photo.save(stream, format="PNG")
    with pytest.raises(OSError):
        codec.decode(stream.getvalue())


def test_jpeg_keeps_the_smaller_scan_order(photo):
    sizes = {order: len(make_baseline("jpeg", progressive=order).encode(photo, 50).data) for order in (False, True)}
    assert sizes[False] != sizes[True]
    assert len(make_baseline("jpeg").encode(photo, 50).data) == min(sizes.values())


def test_jpeg2000_meets_its_target_rate():
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    encoded = make_baseline("jpeg2000").encode(image, 1.0)
    assert encoded.nominal_bpp == 1.0
    assert 8 * len(encoded.data) / 128**2 == pytest.approx(1.0, rel=0.03)
    assert b"OpenJPEG" not in encoded.data


def test_what_a_library_refuses_is_one_line():
    with pytest.raises(CodecError, match=r"^webp: cannot encode 20000x1 pixels at quality 5: .*16383"):
        make_baseline("webp").encode(Image.new("RGB", (20000, 1)), 5)


def test_a_missing_format_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module.features, "check", lambda name: False)
    with pytest.raises(BaselineUnavailable, match=r"^webp: Pillow [\d.]+ lacks WebP; install "):
        make_baseline("webp")


def test_a_missing_plugin_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_jxl", None)
    with pytest.raises(BaselineUnavailable, match=r"^jxl: .* pip install pillow-jxl-plugin$"):
        make_baseline("jxl")


def test_downscaling_reaches_below_the_smallest_file(photo):
    plain, small = make_baseline("jpeg"), make_baseline("jpeg", downscale=4)
    encoded = small.encode(photo, 5)
    assert small.name == "jpeg-x4" and encoded.parts["size"] == 4
    assert len(encoded.data) < len(plain.encode(photo, 1).data)
    decoded = small.decode(encoded.data)
    assert decoded.size == photo.size and psnr(decoded, photo) > 15
    with pytest.raises(CodecError, match="too short"):
        small.decode(encoded.data[:4])
