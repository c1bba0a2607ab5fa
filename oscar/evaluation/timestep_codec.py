"""OSCAR at one rate, decoded at any timestep: what an ablation of timesteps evaluates as a codec of its own."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from oscar.baselines.base import Encoded, ImageCodec, RoundTrip
from oscar.bitstream import Container
from oscar.codec import OscarCodec
from oscar.data.tensors import to_pil, to_tensor
from oscar.evaluation.timestep_plots import OWN
from oscar.rates import RatePoint


class _Coded(NamedTuple):
    """An image at one rate, encoded once for all timesteps."""

    data: bytes
    data_own: bytes  # with the byte that says the image's own timestep
    own: int
    z_hat: Tensor
    seconds: float


class TimestepCodec(ImageCodec):
    """OSCAR at one rate, decoded at any timestep: its points. `OWN` is the image's own, one byte more of file.

    Args:
        codec: the codec, in evaluation mode; its own mapping is not looked at.
        rate: one of its rate points.
        model: its name in file names and tables.
        content: of its checkpoint (`oscar.checkpoint.content_hash`), so that its results are not another's.
    """

    point_name = "timestep"
    points = grid = ()

    def __init__(self, codec: OscarCodec, rate: RatePoint, model: str, content: str | None = None):
        self.codec, self.rate, self.content = codec, rate, content
        self.name = f"oscar-{model}-{rate.bpp:.4f}"
        self.label = f"OSCAR {model} at {rate.bpp:.4f}"
        self._image: Image.Image | None = None
        self._coded: _Coded | None = None

    def describe(self) -> dict:
        return {
            **super().describe(),
            "fingerprint": self.codec.fingerprint,
            "rate": self.rate.bpp,
            "device": self.codec.device.type,
            "content": self.content,
        }

    def check_point(self, point: float) -> float:
        last = len(self.codec.backbone.schedule) - 1
        if point == OWN or 0 <= point <= last:
            return float(point)
        raise ValueError(f"{self.name}: timestep {point:g} is not allowed; allowed: 0 to {last}")

    def encode(self, image: Image.Image, point: float) -> Encoded:
        coded = self._encode(image)
        data = coded.data_own if point == OWN else coded.data
        parts = {name: len(part) for name, part in Container.unpack(data).parts().items()}
        return Encoded(data, parts, nominal_bpp=self.rate.bpp)

    def decode(self, data: bytes) -> Image.Image:
        """Not possible.

        Raises:
            ValueError: always, since a file does not say at which timestep it is to be decoded.
        """
        raise ValueError(f"{self.name}: a file does not say its timestep; allowed: round_trip")

    @torch.inference_mode()
    def round_trip(self, image: Image.Image, point: float) -> RoundTrip:
        """Encode an image, unless it was the last one too, and decode it at a timestep."""
        coded = self._encode(image)
        start = time.perf_counter()
        x0 = self.codec.denoiser(coded.z_hat, coded.own if point == OWN else _plain(point))
        decoded = to_pil(self.codec.decode_image(x0)[..., : image.height, : image.width])
        seconds = time.perf_counter() - start
        return RoundTrip.of_file(image, decoded, self.encode(image, point), coded.seconds, seconds)

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> _Coded:
        if image is not self._image:
            start = time.perf_counter()
            codec, rate = self.codec, self.rate
            encoded = codec.quantise(codec.encode_latent(to_tensor(image), rate), rate)
            z_hat = codec.bottleneck.dequantise(codec.bottleneck.stored(encoded.symbols, rate), rate)
            own = codec.backbone.schedule.measure(z_hat, encoded.latent)
            data, data_own = (
                codec.write(encoded._replace(timesteps=timesteps), rate, image.height, image.width)[0]
                for timesteps in (None, own)
            )
            self._coded = _Coded(data, data_own, own.item(), z_hat, time.perf_counter() - start)
            self._image = image
        return self._coded


def _plain(timestep: float) -> int | float:
    """Whole timesteps as integers, which is how a mapping gives them."""
    return int(timestep) if timestep == int(timestep) else timestep
