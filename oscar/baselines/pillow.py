"""JPEG, JPEG 2000, WebP, AVIF and JPEG XL through Pillow and its plug-in, with the settings that favour compression.

All work on 8-bit RGB and write no metadata.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import PIL
from PIL import Image, features

from oscar.baselines.base import BaselineUnavailable, CodecError, Encoded, ImageCodec, check_choice, check_whole
from oscar.utils.errors import first_line

_SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")


class PillowCodec(ImageCodec):
    """One of Pillow's formats.

    Attributes:
        format: Pillow's name of it.
        feature: Pillow's name of the library behind it, for its presence and version.
        continuous: whether any point between the ends of the grid is allowed, not only those on it.
        settings: what is passed to Pillow at every point.

    Raises:
        BaselineUnavailable: if Pillow was built without the format.
    """

    format: str
    feature: str
    point_name = "quality"
    continuous = False

    def __init__(self, **settings: Any):
        self.settings = settings
        if self.library_version() is None:
            raise BaselineUnavailable(f"{self.name}: Pillow {PIL.__version__} lacks {self.label}; {self.remedy()}")

    def remedy(self) -> str:
        """How to get the format."""
        return "install a wheel of Pillow 11.3 or later"

    def library_version(self) -> str | None:
        """Version of the library behind the format; None without it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a Pillow that is too old to know the feature
            return (features.version(self.feature) or "unknown") if features.check(self.feature) else None

    def options(self, point: float) -> dict[str, Any]:
        """What is passed to Pillow at a point, besides `settings`."""
        return {"quality": int(point)}

    def save(self, image: Image.Image, **options: Any) -> bytes:
        """The bytes of an image's file."""
        buffer = io.BytesIO()
        image.save(buffer, format=self.format, **self.settings, **options)
        return buffer.getvalue()

    def encode(self, image: Image.Image, point: float) -> Encoded:
        point = self.check_point(point)
        plain = Image.frombytes("RGB", image.size, image.tobytes())  # without the source's profile, comment or EXIF
        try:
            return Encoded(self.save(plain, **self.options(point)))
        except Exception as error:  # the libraries' own types, by format
            raise CodecError(
                f"{self.name}: cannot encode {image.width}x{image.height} pixels at {self.point_name} {point:g}: "
                f"{first_line(error)}"
            ) from error

    def decode(self, data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data), formats=[self.format]) as image:
            return image.convert("RGB")

    def check_point(self, point: float) -> float:
        if not self.continuous:
            return super().check_point(point)
        low, high = self.grid[0], self.grid[-1]
        if not (isinstance(point, Real) and low <= point <= high):
            raise ValueError(f"{self.name}: {self.point_name} {point!r} is not allowed; allowed: {low:g} to {high:g}")
        return float(point)

    def describe(self) -> dict:
        return {
            **super().describe(),
            "library": f"Pillow {PIL.__version__}",
            "codec_version": self.library_version(),
            "settings": self.settings,
        }


class JPEG(PillowCodec):
    """JPEG with the standard quantisation tables and optimised Huffman tables.

    Args:
        subsampling: of chroma.
        progressive: the scan order; None writes both and keeps the smaller file, which is mostly the sequential one
            at low rates and the progressive one above 1 bpp.
    """

    name, label = "jpeg", "JPEG"
    format, feature = "JPEG", "jpg"
    points = (1, 5, 10, 15, 20, 30, 40, 50, 60)
    grid = tuple(range(1, 101))

    def __init__(self, subsampling: str = "4:2:0", progressive: bool | None = None):
        check_choice(self.name, "subsampling", subsampling, _SUBSAMPLINGS)
        check_choice(self.name, "progressive", progressive, (None, False, True))
        super().__init__(subsampling=subsampling, optimize=True)
        self.progressive = progressive

    def library_version(self) -> str | None:
        turbo = features.version("libjpeg_turbo")
        return f"libjpeg-turbo {turbo}" if turbo else super().library_version()

    def save(self, image: Image.Image, **options: Any) -> bytes:
        orders = (False, True) if self.progressive is None else (self.progressive,)
        return min((super(JPEG, self).save(image, progressive=order, **options) for order in orders), key=len)

    def describe(self) -> dict:
        return {**super().describe(), "progressive": "smaller" if self.progressive is None else self.progressive}


class JPEG2000(PillowCodec):
    """JPEG 2000 (OpenJPEG): 9/7 wavelet, colour transform, one quality layer at a target rate, bare codestream."""

    name, label = "jpeg2000", "JPEG 2000"
    format, feature = "JPEG2000", "jpg_2000"
    point_name = "bpp"
    points = (0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0)
    grid = tuple(round(0.001 * 1.02**step, 6) for step in range(450))  # to 7.3 bpp
    continuous = True

    def __init__(self):
        # Without a comment of ours OpenJPEG writes its name, 38 bytes, into each file; an empty one counts as none.
        super().__init__(quality_mode="rates", irreversible=True, mct=1, no_jp2=True, comment=" ")

    def options(self, point: float) -> dict[str, Any]:
        return {"quality_layers": [24 / point]}  # compression ratio

    def encode(self, image: Image.Image, point: float) -> Encoded:
        return Encoded(super().encode(image, point).data, nominal_bpp=float(point))


class WebP(PillowCodec):
    """Lossy WebP, always 4:2:0.

    Args:
        method: effort, 0 to 6.
    """

    name, label = "webp", "WebP"
    format, feature = "WEBP", "webp"
    points = (0, 0.2, 1, 5, 10, 20, 35, 50, 65)
    # From 0 to 1 files grow by half: fine steps there.
    grid = (*(i / 50 for i in range(50)), *(1 + i / 10 for i in range(90)), *(10 + i / 2 for i in range(181)))
    continuous = True

    def __init__(self, method: int = 6):
        super().__init__(method=check_whole(self.name, "method", method, 0, 6))

    def options(self, point: float) -> dict[str, Any]:
        return {"quality": point}


class AVIF(PillowCodec):
    """AVIF (AV1 intra), untiled.

    Args:
        speed: 0 (best) to 10; 6 is the default of Pillow and of libavif's own program.
        subsampling: of chroma.
        advanced: further options of the AV1 encoder, for example {"tune": "ssim"}.
    """

    name, label = "avif", "AVIF"
    format, feature = "AVIF", "avif"
    points = (0, 10, 20, 30, 40, 50, 60)
    grid = tuple(range(0, 101))

    def __init__(self, speed: int = 6, subsampling: str = "4:2:0", advanced: dict[str, str] | None = None):
        check_choice(self.name, "subsampling", subsampling, _SUBSAMPLINGS)
        check_whole(self.name, "speed", speed, 0, 10)
        if not isinstance(advanced or {}, Mapping):
            raise ValueError(f"{self.name}: advanced {advanced!r} is not allowed; allowed: names with values")
        super().__init__(speed=speed, subsampling=subsampling, autotiling=False)
        if advanced:
            self.settings["advanced"] = {str(key): str(value) for key, value in advanced.items()}

    def library_version(self) -> str | None:
        version = super().library_version()
        if version is None:
            return None
        from PIL import _avif

        return f"libavif {version} ({_avif.codec_versions()})"


class JPEGXL(PillowCodec):
    """Lossy JPEG XL in its XYB colour space, bare codestream.

    libjxl's distance falls with quality: 25 at 0, its largest, to 6.4 at 30, and 0.1 + 0.09 * (100 - quality) from
    there on.

    Args:
        effort: 1 to 10; 7 is the default of libjxl.
    """

    name, label = "jxl", "JPEG XL"
    format, feature = "JXL", "jxl"
    points = (0, 5, 10, 20, 30, 45, 60, 75)
    grid = tuple(step / 2 for step in range(200))  # 100 would be lossless
    continuous = True

    def __init__(self, effort: int = 7):
        super().__init__(effort=check_whole(self.name, "effort", effort, 1, 10), use_container=False)

    def remedy(self) -> str:
        return "pip install pillow-jxl-plugin"

    def library_version(self) -> str | None:
        from importlib.metadata import version

        try:
            import pillow_jxl  # noqa: F401 (registers the format)
        except ImportError:
            return None
        return f"pillow-jxl-plugin {version('pillow-jxl-plugin')}"

    def options(self, point: float) -> dict[str, Any]:
        return {"quality": float(point)}
