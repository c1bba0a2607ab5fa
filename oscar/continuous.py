"""The codec with a hyperprior: a quality from 0 to 1 in the place of rates, and so a file of any length.

compress    image - VAE encoder - latent z0 - gain(quality) - symbols under the hyperprior - bytes
decompress  bytes - symbols - inverse gain(quality) - z_hat - UNet at t(quality), one step - x0 - VAE decoder - image

Means and gains give z_hat its scale, so that files hold no norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oscar.bitstream import MAX_QUALITY, Coding, Container, WrongModelError
from oscar.bitstream.rans import MEAN_STATE_BITS
from oscar.codec import OscarCodec, as_batch
from oscar.models.precision import without_tf32
from oscar.protocol import check_protocol
from oscar.rates import RatePoint
from oscar.targets import quality_within

DEFAULT_QUALITY = 0.5
POINTS = 25  # qualities that stand for all


class Quality(NamedTuple):
    """A quality as a file holds it.

    Attributes:
        code: 0 to 4095.
    """

    code: int

    @property
    def value(self) -> float:
        """0 to 1."""
        return self.code / MAX_QUALITY

    @classmethod
    def of(cls, value: float) -> Quality:
        """The nearest to a value (ValueError if it is not from 0 to 1)."""
        if not 0 <= value <= 1:
            raise ValueError(f"quality is {value}; allowed: 0 to 1")
        return cls(round(value * MAX_QUALITY))


class ContinuousReconstruction(NamedTuple):
    """What the decoder gets and makes.

    Attributes:
        symbols: the decoded latent in the coder's integers, (B, C, h, w).
        z_hat: the same as a latent, (B, C, h, w).
        x0: denoised latent (B, C, h, w).
        image: images (B, 3, H, W), clamped to [-1, 1].
    """

    symbols: Tensor
    z_hat: Tensor
    x0: Tensor
    image: Tensor


class ContinuousCodec(OscarCodec):
    """One model for every rate: its bottleneck is a hyperprior (`oscar.models.hyperprior`).

    Where `OscarCodec`'s methods take a rate, these take a quality, 0 to 1 or a `Quality`.
    """

    point_name = "quality"

    @property
    def rates(self) -> tuple[RatePoint, ...]:
        """None: see `Quality`."""
        return ()

    @property
    def points(self) -> tuple[float, ...]:
        return tuple(Quality.of(step / (POINTS - 1)).value for step in range(POINTS))

    @property
    def default_point(self) -> float:
        return DEFAULT_QUALITY

    def find_point(self, point: float | Quality) -> Quality:
        return point if isinstance(point, Quality) else Quality.of(point)

    def compress(
        self,
        image: Image.Image | np.ndarray | Tensor,
        rate: None = None,
        effort: int = 0,
        max_bytes: int | None = None,
        quality: float | Quality | None = None,
    ) -> bytes:
        """Compress one picture into the bytes of an `.oscar` file.

        Args:
            image: as in `OscarCodec.compress`.
            rate, effort: not set.
            max_bytes: length of the file at most, in place of a quality: the highest that fits is taken.
            quality: 0 to 1; 0.5 unless it or `max_bytes` is set.

        Raises:
            ImageError: for a picture that cannot be represented (transparency, more than 65536 pixels a side).
            ValueError: for a rate, an effort, a quality outside its range, or a length that no quality meets.
        """
        if rate is not None or effort:
            name, value = ("rate", rate) if rate is not None else ("effort", effort)
            raise ValueError(f"{name} is {value}, but this model has a hyperprior; allowed: quality or max_bytes")
        if max_bytes is None:
            return self.compress_batch([image], DEFAULT_QUALITY if quality is None else quality)[0]
        if quality is not None:
            raise ValueError("max_bytes is set, which chooses the quality itself; allowed: it alone")
        return quality_within(self, as_batch(image), max_bytes)

    @torch.inference_mode()
    def compress_tensor(self, batch: Tensor, rate: float | Quality, effort: int = 0) -> list[bytes]:
        """Images (B, 3, H, W) in [-1, 1] at a quality -> the bytes of one file each."""
        if effort:
            raise ValueError(f"effort is {effort}, but this model has a hyperprior; allowed: 0")
        return self.write_latent(self.encode_latent(batch), self.find_point(rate), *batch.shape[-2:])

    @torch.inference_mode()
    def write_latent(self, latent: Tensor, quality: Quality, height: int, width: int) -> list[bytes]:
        """Latents (B, C, h, w) of images of `height` x `width` -> the bytes of one file each."""
        with without_tf32():
            payloads = self.bottleneck.encode(latent, quality.code)
        return [
            Container(Coding.HYPERPRIOR, None, self.model_tag, width, height, b"", payload, quality=quality.code).pack()
            for payload in payloads
        ]

    def read(self, data: bytes) -> tuple[Container, np.ndarray]:
        """Bytes of a file -> its container and the decoded latent in the coder's integers, int32 (C, h, w).

        Raises:
            BitstreamError: if it is damaged, foreign, or was written with another model.
        """
        container = self.open(data)
        return container, self.bottleneck.coder.decode(container.payload, self.shape(container), container.quality)

    def open(self, data: bytes, whole: bool = True) -> Container:
        container = Container.unpack(data, whole)
        if container.quality is None:
            raise WrongModelError("the file was written by a model with a vector quantiser; this one has a hyperprior")
        if container.model_tag != self.model_tag:
            raise WrongModelError(
                f"the file was written with model {container.model_tag:04x}; this model is {self.model_tag:04x}"
            )
        return container

    def shape(self, container: Container) -> tuple[int, int]:
        """Rows and columns of the latent of a file's picture."""
        return tuple(-(-side // self.backbone.factor) for side in (container.height, container.width))

    def read_prefix(self, container: Container) -> tuple[np.ndarray, float]:
        return self.bottleneck.coder.decode_prefix(container.payload, self.shape(container), container.quality)

    def examine(self, data: bytes) -> tuple[Container, float]:
        """The container of a file and the estimated length of its payload in bits: the ideal code length of its symbols
        and the mean of rANS's final state, which weighs several per cent in the smallest files.

        Raises:
            BitstreamError: as `read`.
        """
        container = self.open(data)
        coder, payload = self.bottleneck.coder, container.payload
        bits = coder.payload_bits(payload, self.shape(container), container.quality)
        return container, bits + MEAN_STATE_BITS

    def restore(self, containers: Sequence[Container], symbols: Tensor) -> Tensor:
        return self.synthesise(symbols, Quality(containers[0].quality)).image

    @torch.inference_mode()
    def reconstruct(
        self, batch: Tensor, rate: float | Quality, protocol: Literal["bitstream"] = "bitstream"
    ) -> ContinuousReconstruction:
        """Both directions in one call, of images (B, 3, H, W) in [-1, 1] at a quality; exactly what a file holds."""
        check_protocol(protocol)
        if protocol != "bitstream":
            raise ValueError(f"protocol {protocol!r} is the published quantiser's; allowed: bitstream")
        height, width = batch.shape[-2:]
        files = self.compress_tensor(batch, rate)
        symbols = np.stack([self.read(data)[1] for data in files])
        result = self.synthesise(torch.from_numpy(symbols).to(self.device), self.find_point(rate))
        return result._replace(image=result.image[..., :height, :width])

    @torch.inference_mode()
    def synthesise(self, symbols: Tensor, quality: Quality) -> ContinuousReconstruction:
        """Decoder half: the coder's integers (B, C, h, w) -> the padded images and what led there."""
        self._need("decoder", "decompress")
        z_hat = self.bottleneck.dequantise(symbols, quality.code)
        x0 = self.denoiser(z_hat, self.mapping(quality.value))
        return ContinuousReconstruction(symbols, z_hat, x0, self.render(x0))
