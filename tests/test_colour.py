"""Colour profiles: what is read is sRGB, as colour science has it, and what is written says so.

Expected colours come from the definitions of the spaces, without a colour management system.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from oscar.cli.image_files import IMAGE_FORMATS, encode_image
from oscar.data import images
from oscar.data.images import read_image, to_rgb
from oscar.data.sources import find_images, open_source
from oscar.data.tensors import to_tensor

D50, D65 = np.array([0.9642, 1, 0.8249]), np.array([0.95047, 1, 1.08883])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
COLOURS = np.array(
    [
        [0, 0, 0],
        [255, 255, 255],
        [128, 128, 128],
        [200, 120, 80],
        [90, 140, 60],
        [60, 90, 160],
        [255, 0, 0],
        [10, 20, 30],
        [230, 220, 200],
        [128, 60, 130],
    ],
    dtype=np.uint8,
)


def adapt(white: np.ndarray, to: np.ndarray) -> np.ndarray:
    return np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ to / (BRADFORD @ white)) @ BRADFORD


def to_xyz(primaries: tuple, white: np.ndarray = D65) -> np.ndarray:
    """From linear RGB to XYZ of the same white."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, white)


def srgb_encode(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_decode(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_xyz_d50(xyz: np.ndarray) -> np.ndarray:
    return srgb_encode(xyz @ adapt(D50, D65).T @ np.linalg.inv(to_xyz(SRGB)).T)


def lab_to_xyz(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* to XYZ, both of D50."""
    f = np.array([16 / 116, 16 / 116, 16 / 116]) + lab @ np.array(
        [[1 / 116, 1 / 116, 1 / 116], [1 / 500, 0, 0], [0, 0, -1 / 200]]
    )
    return D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


def expected(primaries: tuple, decode, white: np.ndarray = D65, colours: np.ndarray = COLOURS) -> np.ndarray:
    return from_xyz_d50(decode(colours / 255) @ to_xyz(primaries, white).T @ adapt(white, D50).T)


def icc(space: str, tags: dict[str, bytes], kind: str = "mntr", pcs: str = "XYZ ") -> bytes:
    """An ICC profile of version 2."""
    table, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name.encode(), start + len(data), len(content))
        data += content
    date = bytes.fromhex("07d0 0001 0001 0000 0000 0000")
    head = struct.pack(
        ">I4sI4s4s4s12s4s",
        start + len(data),
        b"test",
        0x02400000,
        kind.encode(),
        space.encode(),
        pcs.encode(),
        date,
        b"acsp",
    )
    head = head.ljust(68, b"\0") + fixed(D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def fixed(values) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in np.ravel(values))


def curve(decode) -> bytes:
    values = np.round(65535 * decode(np.linspace(0, 1, 4096))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(values)) + values.tobytes()


def rgb_profile(primaries: tuple, decode, white: np.ndarray = D65) -> bytes:
    colorants = (adapt(white, D50) @ to_xyz(primaries, white)).T
    tags = {f"{name}XYZ": b"XYZ \0\0\0\0" + fixed(values) for name, values in zip("rgb", colorants, strict=True)}
    return icc("RGB ", tags | {f"{name}TRC": curve(decode) for name in "rgb"} | {"wtpt": b"XYZ \0\0\0\0" + fixed(D50)})


def gamma(power: float):
    return lambda values: values**power


SPACES = {
    "display p3": (P3, srgb_decode, D65),
    "adobe rgb": (ADOBE, gamma(563 / 256), D65),
    "prophoto": (PROPHOTO, gamma(1.8), D50),
    "srgb primaries, gamma 1.8": (SRGB, gamma(1.8), D65),
    "linear srgb": (SRGB, gamma(1.0), D65),
}


def image_of(colours: np.ndarray = COLOURS, mode: str = "RGB") -> Image.Image:
    """One pixel a colour, repeated so that lossy formats keep it."""
    return Image.fromarray(np.repeat(np.repeat(colours[None], 16, 0), 16, 1), mode)


def colours_of(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB" and "icc_profile" not in image.info
    return np.asarray(image)[8, 8::16].astype(float)


def near(image: Image.Image, values: np.ndarray, tolerance: float = 1.5) -> bool:
    return np.abs(colours_of(image) - values).max() <= tolerance


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "avif"])
def test_rgb_spaces(tmp_path, space, suffix):
    primaries, decode, white = SPACES[space]
    options = {
        "webp": {"lossless": True},
        "jpg": {"quality": 100, "subsampling": 0},
        "avif": {"quality": 100, "subsampling": "4:4:4"},
    }.get(suffix, {})
    path = tmp_path / f"a.{suffix}"
    if f".{suffix}" not in images.image_suffixes():
        pytest.skip("not in this build of Pillow")
    image_of().save(path, icc_profile=rgb_profile(primaries, decode, white), **options)
    with Image.open(path) as stored:  # lossy formats change the colours before the profile does
        stored = np.asarray(stored.convert("RGB"))[8, 8::16]
    right = expected(primaries, decode, white, stored)
    assert np.abs(right - stored).max() > 10  # the profile matters
    assert near(read_image(path), right)
    with Image.open(path) as image:  # without a file's name: the same
        assert near(to_rgb(image), right)
        assert np.allclose((to_tensor(image)[0, :, 8, 8::16].T.numpy() + 1) * 127.5, right, atol=1.5)


def test_profiles_are_applied_once(tmp_path):
    image_of().save(tmp_path / "a.png", icc_profile=rgb_profile(ADOBE, gamma(563 / 256)))
    image = read_image(tmp_path / "a.png")
    assert (colours_of(to_rgb(image)) == colours_of(image)).all()
    image.save(tmp_path / "b.png")
    assert (colours_of(read_image(tmp_path / "b.png")) == colours_of(image)).all()


@pytest.mark.parametrize("profile", ["standard", "ours", "little cms"])
def test_srgb_profiles_change_nothing(tmp_path, profile):
    data = {
        "standard": rgb_profile(SRGB, srgb_decode),
        "ours": images.srgb_mark("TIFF")["icc_profile"],
        "little cms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }[profile]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png", icc_profile=data)
    assert (np.asarray(read_image(tmp_path / "a.png")) == np.asarray(noise)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_profiles(tmp_path, mode):
    profile = icc("GRAY", {"kTRC": curve(gamma(1.8)), "wtpt": b"XYZ \0\0\0\0" + fixed(D50)})
    levels = np.array([0, 255] if mode == "1" else [0, 30, 128, 200, 255], dtype=np.uint8)
    image = image_of(levels, "L").convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    assert near(read_image(tmp_path / "a.png"), np.repeat(srgb_encode((levels / 255) ** 1.8)[:, None], 3, 1))


def test_grey_of_an_rgb_space(tmp_path):
    """Grey pixels made in an RGB space, whose profile stays with them."""
    levels = np.array([0, 30, 128, 200, 255], dtype=np.uint8)
    image_of(levels, "L").save(tmp_path / "a.jpg", quality=100, icc_profile=rgb_profile(PROPHOTO, gamma(1.8), D50))
    assert near(read_image(tmp_path / "a.jpg"), np.repeat(srgb_encode((levels / 255) ** 1.8)[:, None], 3, 1), 2)


def test_grey_of_16_bits(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    profile = icc("GRAY", {"kTRC": curve(gamma(1.8)), "wtpt": b"XYZ \0\0\0\0" + fixed(D50)})
    levels = np.array([0, 8000, 33000, 50000, 65535], dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", np.repeat(np.repeat(levels[None], 16, 0), 16, 1), iccprofile=profile)
    right = np.repeat(srgb_encode(np.round(levels / 257) ** 1.8 / 255**1.8)[:, None], 3, 1)
    assert near(read_image(tmp_path / "a.tif"), right)


def test_palettes_and_transparency(tmp_path):
    """The background is in sRGB: it is laid under what the profile was applied to."""
    profile = rgb_profile(ADOBE, gamma(563 / 256))
    colours = np.array([[200, 120, 80], [90, 140, 60]], dtype=np.uint8)
    right = expected(ADOBE, gamma(563 / 256), colours=colours)
    palette = image_of(colours).quantize(2)
    palette.save(tmp_path / "a.png", icc_profile=profile)
    assert near(read_image(tmp_path / "a.png"), right)
    clear = palette.getpixel((24, 8))
    palette.save(tmp_path / "b.png", icc_profile=profile, transparency=clear)
    assert near(read_image(tmp_path / "b.png", (1, 2, 3)), np.array([right[0], [1, 2, 3]]))
    alpha = image_of(colours)
    alpha.putalpha(128)
    alpha.save(tmp_path / "c.png", icc_profile=profile)
    assert near(read_image(tmp_path / "c.png", (10, 20, 30)), right * 128 / 255 + np.array([10, 20, 30]) * 127 / 255, 2)


def cmyk_profile(black: float) -> tuple[bytes, np.ndarray]:
    """A profile of a table of 16 mixtures of full inks, and its L*a*b* values by C, M, Y, K."""
    inks = np.array([[60, -20, -30], [50, 45, 0], [90, -5, 60]], dtype=float)
    lab = np.zeros((2, 2, 2, 2, 3))
    for index in np.ndindex(2, 2, 2, 2):
        on = [ink for ink, there in zip(inks, index, strict=False) if there]
        lab[index] = [black, 0, 0] if index[3] else np.mean(on, 0) if on else [100, 0, 0]
    lab = np.round(lab * [255 / 100, 1, 1]) / [255 / 100, 1, 1]  # as 8 bits hold it
    codes = np.round(lab * [255 / 100, 1, 1] + [0, 128, 128]).astype(np.uint8)
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(np.eye(3)) + ramp * 4 + codes.tobytes() + ramp * 3
    return icc("CMYK", {"A2B0": table, "wtpt": b"XYZ \0\0\0\0" + fixed(D50)}, "prtr", "Lab "), lab


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(tmp_path, suffix):
    """Perceptual with black-point compensation: the paper is white and the darkest ink black."""
    profile, lab = cmyk_profile(black=20)
    indices = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 0, 0), (1, 1, 1, 0), (0, 0, 0, 1)]
    image_of(np.array(indices, dtype=np.uint8) * 255, "CMYK").save(
        tmp_path / f"a.{suffix}", icc_profile=profile, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {})
    )
    xyz = np.array([lab_to_xyz(lab[index]) for index in indices])
    darkest = lab_to_xyz(lab[0, 0, 0, 1])
    right = from_xyz_d50((xyz - darkest) / (D50 - darkest) * D50)
    assert right[0].min() > 254 and right[-1].max() < 1
    naive = np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB"))[8, 8::16]
    assert np.abs(naive - right).max() > 30
    assert near(read_image(tmp_path / f"a.{suffix}"), right, 3)


def test_lab(tmp_path):
    lab = np.array([[50, 20, -30], [80, -10, 40], [100, 0, 0], [0, 0, 0], [30, 5, 5]], dtype=float)
    codes = np.round(lab * [255 / 100, 1, 1] + [0, 128, 128]).astype(np.uint8)
    Image.merge("LAB", image_of(codes).split()).save(tmp_path / "a.tif")
    lab = np.round(lab * [255 / 100, 1, 1]) / [255 / 100, 1, 1]
    assert near(read_image(tmp_path / "a.tif"), from_xyz_d50(lab_to_xyz(lab)), 2)


def test_profiles_of_other_programs():
    """Photographs of scikit-image: one that Photoshop saved in Adobe RGB, and a scan with a curve of printed grey."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec else Path()
    if not (folder / "rocket.jpg").is_file() or not (folder / "page.png").is_file():
        pytest.skip("scikit-image is not installed")
    with Image.open(folder / "rocket.jpg") as image:
        stored = np.asarray(image)[::40, ::40].reshape(-1, 3)
    read = np.asarray(read_image(folder / "rocket.jpg"))[::40, ::40].reshape(-1, 3)
    right = expected(ADOBE, gamma(563 / 256), colours=stored)
    assert np.abs(read - right).max() <= 2 and np.abs(right - stored).max() > 10
    with Image.open(folder / "page.png") as image:
        stored, profile = np.asarray(image)[::9, ::9], image.info["icc_profile"]
    at = profile.index(b"curv")
    points = np.frombuffer(profile, ">u2", struct.unpack_from(">I", profile, at + 8)[0], at + 12) / 65535
    right = srgb_encode(np.interp(stored / 255, np.linspace(0, 1, len(points)), points))
    assert np.abs(np.asarray(read_image(folder / "page.png"))[::9, ::9, 1] - right).max() <= 1.5
    assert np.abs(right - stored).max() > 10


BROKEN = {
    "garbage": b"not a profile",
    "cut off": rgb_profile(P3, srgb_decode)[:300],
    "zeroed": rgb_profile(P3, srgb_decode)[:200] + bytes(600),
    "without colours": icc("RGB ", {"wtpt": b"XYZ \0\0\0\0" + fixed(D50)}),
    "of another kind of pixels": cmyk_profile(20)[0],
    "of grey": icc("GRAY", {"kTRC": curve(gamma(1.8)), "wtpt": b"XYZ \0\0\0\0" + fixed(D50)}),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_profiles_cost_a_warning(tmp_path, caplog, fault):
    path = tmp_path / f"{fault}.png"
    image_of().save(path, icc_profile=BROKEN[fault])
    with caplog.at_level(logging.WARNING):
        image = read_image(path)
    assert (colours_of(image) == COLOURS).all()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: colour profile ") and "not applied" in record.getMessage()


def test_gamma_without_a_profile_is_not_applied_and_said(tmp_path, caplog):
    from PIL.PngImagePlugin import PngInfo

    for value, words in ((45455, []), (100000, ["gamma of 1 is not applied"])):
        chunks = PngInfo()
        chunks.add(b"gAMA", struct.pack(">I", value))
        caplog.clear()
        image_of().save(tmp_path / f"{value}.png", pnginfo=chunks)
        assert (colours_of(read_image(tmp_path / f"{value}.png")) == COLOURS).all()
        assert len(caplog.records) == len(words) and all(word in caplog.text for word in words)


def test_shards_are_read_as_files_are(tmp_path):
    import tarfile

    data = io.BytesIO()
    image_of().save(data, "PNG", icc_profile=rgb_profile(P3, srgb_decode))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.png", "._b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
    (found,) = find_images(tmp_path / "a.tar")
    assert near(open_source(found), expected(P3, srgb_decode))


@pytest.mark.parametrize("suffix", sorted(IMAGE_FORMATS))
def test_decoded_files_are_marked(suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    data = encode_image(noise, suffix)
    images._srgb_profile.cache_clear()
    assert encode_image(noise, suffix) == data
    with Image.open(io.BytesIO(data)) as image:
        assert (np.asarray(image) == np.asarray(noise)).all()
        if suffix == ".png":
            assert image.info["srgb"] == 0 and data.count(b"sRGB") == 1
        elif suffix in (".tif", ".tiff", ".webp"):
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            assert "sRGB" in ImageCms.getProfileDescription(profile)
            assert (np.asarray(to_rgb(image)) == np.asarray(noise)).all()
