"""Coding for the page: one image by a model and by other codecs in as many bytes, and what a part of a file shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from oscar.app.uploads import check_pixels
from oscar.baselines import BaselineUnavailable, CodecError, encode_to_size, make_baseline
from oscar.bitstream import BitstreamError, Container, WrongModelError
from oscar.bottlenecks import Payload
from oscar.data.tensors import as_batch
from oscar.metrics.image import ms_ssim, psnr
from oscar.rate_control import reachable

if TYPE_CHECKING:
    from PIL import Image

    from oscar.codec import OscarCodec

BASELINES = ("avif", "webp", "jpeg")


@dataclass(frozen=True)
class Coded:
    """One image as a codec keeps it.

    Attributes:
        label: of the codec.
        setting: its operating point, in words.
        data: the file.
        image: what is decoded of it.
        psnr, ms_ssim: against the original; None where there is none, or the metric has no value.
        bound: most bytes that were allowed, if it was to be as large as another file.
    """

    label: str
    setting: str
    data: bytes
    image: Image.Image
    psnr: float | None = None
    ms_ssim: float | None = None
    bound: int | None = None

    @property
    def bpp(self) -> float:
        return 8 * len(self.data) / (self.image.width * self.image.height)


@dataclass(frozen=True)
class Scale:
    """What a slider goes over.

    Attributes:
        label: of the slider.
        low, high, step: its numbers.
        start: where it stands at first.
    """

    label: str
    low: float
    high: float
    step: float
    start: float


class Model:
    """A codec under the name by which the page has it."""

    def __init__(self, name: str, codec: OscarCodec):
        self.name, self.codec = name, codec

    @property
    def point_name(self) -> str:
        return self.codec.bottleneck.point_name

    @property
    def _has_few_points(self) -> bool:
        return len(self.codec.bottleneck.points) == len(self.codec.bottleneck.all_points)

    def points(self) -> Scale:
        """The slider of operating points: of a few their numbers from 1, of many their values."""
        bottleneck = self.codec.bottleneck
        points, word = bottleneck.points, self.point_name.capitalize()
        if self._has_few_points:
            start = 1 + points.index(bottleneck.default_point)
            return Scale(f"{word}, from 1 (smallest file) to {len(points)}", 1, len(points), 1, start)
        low, high = points[0].value, points[-1].value
        return Scale(
            f"{word}, from {low:g} (smallest file) to {high:g}", low, high, (high - low) / 100, (low + high) / 2
        )

    def sizes(self, image: Image.Image) -> Scale:
        """The slider of file sizes for an image."""
        with torch.inference_mode():
            low, high = reachable(self.codec, as_batch(image))
        return Scale("File size in bytes", low, high, 1, (low + high) // 2)

    def compress(self, image: Image.Image, max_bytes: int | None = None, place: float | None = None) -> bytes:
        """The file of an image, by size or by a number on the slider of `points`."""
        if max_bytes is not None:
            return self.codec.compress(image, max_bytes=max_bytes)
        points = self.codec.bottleneck.points
        return self.codec.compress(image, points[int(place) - 1] if self._has_few_points else place)

    def decode(self, data: bytes, original: Image.Image | None = None) -> Coded:
        """The image of a whole file."""
        bottleneck = self.codec.bottleneck
        setting = f"{self.point_name} {bottleneck.label(self.codec.open(data)[1])}"
        return self._coded(data, self.codec.decompress(data), setting, original)

    def decode_part(self, data: bytes, share: float, original: Image.Image | None = None) -> Coded:
        """What the header and a share (0 to 1) of the rest of a file show."""
        header = len(data) - len(Container.unpack(data).payload)
        part = data[: header + round(share * (len(data) - header))]
        preview = self.codec.decompress_prefix(part)
        return self._coded(part, preview.image, f"first {share:.0%} of the file", original)

    def has_previews(self, data: bytes) -> bool:
        """Whether parts of a file can be decoded."""
        container, point = self.codec.open(data)
        start = Payload(container.coding, container.side, b"")
        try:
            self.codec.bottleneck.read_prefix(start, point, self.codec.latent_shape(container))
        except BitstreamError:
            return False
        return True

    def _coded(self, data: bytes, image: Image.Image, setting: str, original: Image.Image | None) -> Coded:
        scores = (None, None) if original is None else (psnr(original, image), ms_ssim(original, image))
        return Coded(f"OSCAR {self.name}", setting, data, image, *scores)


def find_model(models: Mapping[str, Model], data: bytes, name: str) -> Model:
    """The model that wrote a file.

    Raises:
        BitstreamError: if the file is damaged, of another model, or its image too large.
    """
    container = Container.unpack(data)
    check_pixels(container.width, container.height, name)
    for model in models.values():
        try:
            model.codec.open(data)
        except WrongModelError:
            continue
        return model
    raise WrongModelError(
        f"the file was written with model {container.model_tag:04x}, which is not here; here are: {', '.join(models)}"
    )


def compare(image: Image.Image, max_bytes: int) -> Iterator[Coded]:
    """The image by each of `BASELINES` that is available, at its largest file of at most `max_bytes`, or else at its
    smallest."""
    for name in BASELINES:
        try:
            codec = make_baseline(name)
            point, encoded = encode_to_size(codec, image, max_bytes)
            decoded = codec.decode(encoded.data)
        except (BaselineUnavailable, CodecError):
            continue
        scores = psnr(image, decoded), ms_ssim(image, decoded)
        yield Coded(codec.label, f"{codec.point_name} {point:g}", encoded.data, decoded, *scores, bound=max_bytes)
