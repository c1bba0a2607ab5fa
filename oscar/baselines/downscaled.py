"""Coding at reduced resolution, the common way to reach rates below a format's smallest file."""

from __future__ import annotations

from PIL import Image

from oscar.baselines.base import Encoded, ImageCodec
from oscar.baselines.framing import pack_size, split_size


class Downscaled(ImageCodec):
    """Another codec on images shrunk by a whole factor (Lanczos) and enlarged after decoding (bicubic).

    The original's size goes before the other codec's file, in 4 bytes that count.
    """

    def __init__(self, codec: ImageCodec, factor: int):
        self.codec, self.factor = codec, factor
        self.name, self.label = f"{codec.name}-x{factor}", f"{codec.label} at 1/{factor}"
        self.point_name, self.points, self.grid = codec.point_name, codec.points, codec.grid

    def encode(self, image: Image.Image, point: float) -> Encoded:
        header = pack_size(self.name, image)
        small = tuple(-(-side // self.factor) for side in image.size)
        encoded = self.codec.encode(image.resize(small, Image.Resampling.LANCZOS), point)
        return Encoded(header + encoded.data, {"size": len(header), **encoded.parts})

    def decode(self, data: bytes) -> Image.Image:
        size, stream = split_size(self.name, data)
        return self.codec.decode(stream).resize(size, Image.Resampling.BICUBIC)

    def check_point(self, point: float) -> float:
        return self.codec.check_point(point)

    def describe(self) -> dict:
        return {**self.codec.describe(), **super().describe(), "downscale": self.factor}
