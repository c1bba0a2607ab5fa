"""Images of every kind: the right result or a clear refusal."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oscar.data.images import ImageError, image_suffixes, list_images, read_image, to_rgb
from oscar.data.tensors import to_pil, to_tensor

RAMP = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def save(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb(tmp_path):
    assert (pixels(read_image(save(tmp_path, Image.fromarray(RAMP)))) == RAMP).all()


def test_one_pixel(tmp_path):
    image = read_image(str(save(tmp_path, Image.new("RGB", (1, 1), (9, 8, 7)))))
    assert pixels(image).tolist() == [[[9, 8, 7]]]
    assert to_tensor(image).shape == (1, 3, 1, 1)


def test_grey(tmp_path):
    grey = RAMP[:, :, 0]
    assert (pixels(read_image(save(tmp_path, Image.fromarray(grey)))) == grey[:, :, None]).all()


def test_one_bit(tmp_path):
    bits = RAMP[:, :, 0] % 2 == 0
    assert (pixels(read_image(save(tmp_path, Image.fromarray(bits)))) == np.where(bits, 255, 0)[:, :, None]).all()


def test_palette(tmp_path):
    image = Image.fromarray(RAMP).quantize(8)
    assert image.mode == "P"
    assert (pixels(read_image(save(tmp_path, image))) == np.asarray(image.convert("RGB"))).all()


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(read_image(save(tmp_path, image, "image.tif"))).astype(int) - (255, 0, 0)).max() == 0
    assert np.abs(pixels(read_image(save(tmp_path, image, "image.jpg"))).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_opaque_alpha_is_dropped(mode):
    image = Image.new("RGBA" if mode == "RGBA" else "LA", (3, 2), (50, 50, 50, 255) if mode == "RGBA" else (50, 255))
    assert (pixels(to_rgb(image.convert(mode))) == 50).all()


@pytest.mark.parametrize("name", ["image.png", "image.webp"])
def test_transparency_is_refused_or_laid_on_a_background(tmp_path, name):
    image = Image.new("RGBA", (2, 1), (200, 100, 0, 255))
    image.putpixel((1, 0), (200, 100, 0, 0))
    path = save(tmp_path, image, name, lossless=True)
    with pytest.raises(ImageError, match="transparent") as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert pixels(read_image(path, background=(1, 2, 3))).tolist() == [[[200, 100, 0], [1, 2, 3]]]


def test_half_transparent_pixels_are_blended():
    image = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert np.abs(pixels(to_rgb(image, (0, 0, 0))).astype(int) - (100, 50, 0)).max() <= 1


def test_transparent_colours(tmp_path):
    """Transparency without an alpha channel: a grey level, a colour, a palette entry."""
    grey16 = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    for name, image, transparent in [
        ("grey", Image.fromarray(np.array([[0, 255]], dtype=np.uint8)), 0),
        ("colour", Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8)), (0, 0, 0)),
        ("palette", Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).quantize(2), None),
        ("grey of 16 bits", grey16, 0),
    ]:
        if transparent is None:
            transparent = image.getpixel((0, 0))
        path = save(tmp_path, image, f"{name}.png", transparency=transparent)
        with pytest.raises(ImageError, match="transparent"):
            read_image(path)
        assert pixels(read_image(path, (7, 8, 9))).tolist() == [[[7, 8, 9], [255, 255, 255]]], name
        unused = (1, 2, 3) if name == "colour" else 100
        if name != "palette":  # a transparent colour that no pixel has
            assert pixels(read_image(save(tmp_path, image, "opaque.png", transparency=unused))).max() == 255


@pytest.mark.parametrize("background", [(0, 0), (0, 0, 256), (0, 0, -1), (0.0, 0, 0)])
def test_bad_backgrounds_are_refused(background):
    with pytest.raises(ImageError, match="background"):
        to_rgb(Image.new("RGB", (1, 1)), background)


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_grey_of_16_bits_is_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65406, 65407, 65535]], dtype=np.uint16)
    image = read_image(save(tmp_path, Image.fromarray(values), name))
    assert pixels(image)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 254, 255, 255]


def test_grey_of_32_bits():
    assert pixels(to_rgb(Image.fromarray(np.array([[0, 257, 65535]], dtype=np.int32))))[0, :, 1].tolist() == [0, 1, 255]
    for value in (-1, 65536):
        with pytest.raises(ImageError, match="grey values"):
            to_rgb(Image.fromarray(np.array([[0, value]], dtype=np.int32)))


def test_floats_and_odd_modes_are_refused(tmp_path):
    with pytest.raises(ImageError, match="floats"):
        read_image(save(tmp_path, Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "image.tif"))
    with pytest.raises(ImageError, match="mode La"):
        to_rgb(Image.new("La", (2, 2)))
    with pytest.raises(ImageError, match="0x3 pixels"):
        to_rgb(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    upright = {
        1: grey,
        2: grey[:, ::-1],
        3: grey[::-1, ::-1],
        4: grey[::-1],
        5: grey.T,
        6: np.rot90(grey, -1),
        7: grey[::-1, ::-1].T,
        8: np.rot90(grey),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("image.png", "image.tif"):  # Pillow has turned TIFF itself, sometimes wrongly
        image = read_image(save(tmp_path, Image.fromarray(grey), name, exif=exif))
        assert image.getexif().get(0x0112, 1) == 1
        assert (pixels(image)[:, :, 0] == upright).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "ppm"])
def test_damaged_files_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), f"image.{suffix}")
    assert read_image(path).size == (64, 64)
    data = path.read_bytes()
    for length in (0, 1, 10, len(data) // 10, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_gives_an_image_or_an_image_error(tmp_path):
    generator = np.random.default_rng(1)
    noise = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "ppm"):
        path = save(tmp_path, noise, f"image.{suffix}")
        data = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(data)
            for position in generator.integers(min(len(data), 200), size=3):
                damaged[position] = generator.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(ImageError):
                assert read_image(path, (0, 0, 0)).mode == "RGB"


def test_what_is_no_image_is_refused(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    for path, message in [(text, "not an image"), (tmp_path / "none.png", "no such file"), (tmp_path, "is a folder")]:
        with pytest.raises(ImageError, match=message) as caught:
            read_image(path)
        assert str(path) in str(caught.value)


def test_tensor_and_back_is_exact():
    import torch

    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(Image.fromarray(ramp))
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert (pixels(to_pil(tensor)) == ramp).all()
    assert (pixels(to_pil(tensor[0].double())) == ramp).all()


def test_tensor_axes():
    tensor = to_tensor(RAMP)
    assert tensor[0, 2, 1, 5].item() == pytest.approx(RAMP[1, 5, 2] / 127.5 - 1)


def test_all_forms_of_an_image_agree():
    import torch

    expected = to_tensor(Image.fromarray(RAMP))
    channels_first = torch.from_numpy(RAMP.copy()).permute(2, 0, 1)
    opaque = np.dstack([RAMP, np.full((4, 6), 255, np.uint8)])
    for form in (RAMP, opaque, channels_first, channels_first[None], expected, expected[0], expected.double()):
        assert torch.equal(to_tensor(form), expected)
    assert torch.equal(to_tensor(RAMP[::-1, ::-1].copy()[::-1, ::-1]), expected)
    assert torch.allclose(to_tensor(expected.bfloat16()), expected, atol=0.01)
    grey = RAMP[:, :, 0]
    assert torch.equal(to_tensor(grey), to_tensor(grey[:, :, None]))
    assert torch.equal(to_tensor(grey)[:, 2], to_tensor(RAMP)[:, 0])


def test_bad_forms_are_refused():
    import torch

    for form in [
        None,
        "image.png",
        RAMP.astype(np.float32),
        RAMP.astype(np.uint16),
        RAMP[:, :, :2],
        RAMP[:0],
        RAMP[None],
        np.dstack([RAMP, RAMP[:, :, 0]]),
        torch.zeros(4, 4),
        torch.zeros(1, 4, 4),
        torch.zeros(2, 3, 4, 4),
        torch.zeros(3, 0, 4),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        torch.full((3, 4, 4), 255.0),
        torch.full((3, 4, 4), float("nan")),
    ]:
        with pytest.raises(ImageError):
            to_tensor(form)
    for form in (torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4)):
        with pytest.raises(ImageError):
            to_pil(form)


def test_to_pil_clamps_and_rounds():
    import torch

    values = torch.tensor([-3.0, 3.0, 0.0, -1 + 0.6 / 127.5, -1 + 0.4 / 127.5])
    assert pixels(to_pil(values.expand(3, 1, 5)))[0, :, 0].tolist() == [0, 255, 128, 1, 0]


def test_to_pil_truncates_as_torchvision_does():
    functional = pytest.importorskip("torchvision.transforms.functional")
    torch = pytest.importorskip("torch")
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    pixels[0, 0, :4] = torch.tensor([-1.0, 1.0, 2 * 200.4 / 255 - 1, 2 * 200.9 / 255 - 1])
    expected = np.asarray(functional.to_pil_image((pixels / 2 + 0.5).clamp(0, 1)))
    truncated, rounded = np.asarray(to_pil(pixels, truncate=True)), np.asarray(to_pil(pixels))
    assert (truncated == expected).all() and truncated[0, :4, 0].tolist() == [0, 255, 200, 200]
    assert rounded[0, :4, 0].tolist() == [0, 255, 200, 201]
    assert set(np.unique(rounded.astype(int) - truncated)) == {0, 1}


def test_list_images(tmp_path):
    (tmp_path / "b" / "folder.png").mkdir(parents=True)
    for name in ("z.JPG", "a.png", "notes.txt", "b/c.Tiff", "b/d.webp"):
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == [tmp_path / name for name in ("a.png", "b/c.Tiff", "b/d.webp", "z.JPG")]
    assert list_images(str(tmp_path), recursive=False) == [tmp_path / "a.png", tmp_path / "z.JPG"]
    with pytest.raises(ImageError, match="no such folder"):
        list_images(tmp_path / "none")


BLOCKS = np.kron(np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *((f"a.{suffix}", 8) for suffix in "bmp dib png ppm pnm ras tif tiff jp2 webp jpg pgm".split()),
        *((f"a.{suffix}", 16) for suffix in "png ppm tif pgm".split()),
    ],
)
def test_files_of_opencv(tmp_path, name, bits):
    cv2 = pytest.importorskip("cv2")
    colours = BLOCKS[:, :, :1] if name == "a.pgm" else BLOCKS[:, :, ::-1]
    options = {
        "a.webp": [cv2.IMWRITE_WEBP_QUALITY, 101],
        "a.jpg": [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111],
        "a.jp2": [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000],
    }.get(name, [])
    values = colours if bits == 8 else colours.astype(np.uint16) * 257
    assert cv2.imwrite(str(tmp_path / name), np.ascontiguousarray(values), options)
    (found,) = list_images(tmp_path)
    right = BLOCKS[:, :, :1] if name == "a.pgm" else BLOCKS
    assert np.abs(pixels(read_image(found)).astype(int) - right).max() <= {"a.jpg": 2, "a.jp2": 1}.get(name, 0)


def test_jpeg_2000_of_16_bits(tmp_path):
    """Grey is read rightly; of colour Pillow makes black from white."""
    cv2 = pytest.importorskip("cv2")
    levels = np.kron(np.array([[0, 128, 129, 32768, 65407, 65535]], np.uint16), np.ones((64, 16), np.uint16))
    options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    assert cv2.imwrite(str(tmp_path / "grey.jp2"), levels, options)
    assert pixels(read_image(tmp_path / "grey.jp2"))[0, ::16, 0].tolist() == [0, 0, 1, 128, 255, 255]
    assert cv2.imwrite(str(tmp_path / "colour.jp2"), np.dstack([levels] * 3), options)
    with pytest.raises(ImageError, match="colour.jp2: JPEG 2000 with 16 bits per channel in colour is not allowed"):
        read_image(tmp_path / "colour.jp2")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"planarconfig": "separate"},
        {"tile": (16, 16)},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"rowsperstrip": 7},
        {"dtype": np.uint16},
    ],
    ids=str,
)
def test_files_of_tifffile(tmp_path, options):
    tifffile = pytest.importorskip("tifffile")
    values = BLOCKS.astype(options.pop("dtype", np.uint8))
    values = values * (257 if values.dtype == np.uint16 else 1)
    if "planarconfig" in options:
        values = values.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", **options)
    assert (pixels(read_image(tmp_path / "a.tif")) == BLOCKS).all()


def test_pages_of_tifffile(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.stack([BLOCKS // 4, BLOCKS // 2, BLOCKS]), photometric="rgb")
    assert read_image(tmp_path / "a.tif").info["frames"] == 3
    for frame, divisor in ((None, 4), (1, 4), (2, 2), (3, 1)):
        assert (pixels(read_image(tmp_path / "a.tif", frame=frame)) == BLOCKS // divisor).all()


def test_files_of_scikit_image():
    """An animation of 24 frames, and a scan of two pages."""
    imageio, tifffile = pytest.importorskip("imageio.v3"), pytest.importorskip("tifffile")
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec else Path()
    for name, count in (("no_time_for_that_tiny.gif", 24), ("multipage.tif", 2)):
        if not (folder / name).is_file():
            pytest.skip("scikit-image's images are not installed")
        assert read_image(folder / name, (0, 0, 0)).info["frames"] == count
        for frame in (1, 2, count):
            if name.endswith(".tif"):
                right = np.dstack([tifffile.imread(folder / name, key=frame - 1)] * 3)
            else:
                right = imageio.imread(folder / name, index=frame - 1)
            assert (pixels(read_image(folder / name, (0, 0, 0), frame)) == right[:, :, :3]).all()
        with pytest.raises(ImageError, match=f"frame {count + 1} does not exist; allowed: 1 to {count}"):
            read_image(folder / name, frame=count + 1)


def test_jpeg_xl(tmp_path):
    pytest.importorskip("pillow_jxl")
    Image.fromarray(BLOCKS).save(tmp_path / "a.jxl", lossless=True)
    (found,) = list_images(tmp_path)
    assert (pixels(read_image(found)) == BLOCKS).all()


def test_a_damaged_later_frame_leaves_the_first(tmp_path):
    frames = [Image.fromarray(np.roll(BLOCKS, 9 * index, 1)) for index in range(3)]
    for name in ("a.tif", "a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        whole = pixels(read_image(tmp_path / name))
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: -len(data) // 4])
        with contextlib.suppress(ImageError):  # WebP holds no frame unless it is whole
            assert (pixels(read_image(tmp_path / name)) == whole).all()
            continue
        assert name == "a.webp"


def test_orientation_of_a_later_page(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for orientation in (1, 6):
            file.write(BLOCKS, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    assert (pixels(read_image(tmp_path / "a.tif", frame=2)) == np.rot90(BLOCKS, -1)).all()


def test_opened_files(tmp_path):
    path = save(tmp_path, Image.fromarray(RAMP))
    assert (pixels(read_image(io.BytesIO(path.read_bytes()))) == RAMP).all()
    with pytest.raises(ImageError, match="^the stream: not an image of a known format"):
        read_image(io.BytesIO(b"no image"), name="the stream")


def test_suffixes_are_those_of_images():
    suffixes = image_suffixes()
    usual = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".qoi", ".tga", ".tif", ".tiff"}
    assert usual <= suffixes
    assert not suffixes & {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}


def test_import_brings_no_torch():
    command = "import sys, oscar.data.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], timeout=60).returncode == 0
