"""The codec: image <-> bytes. The whole flow of the method can be read on this page.

encode   image - VAE encoder - latent z0 - bottleneck.quantise(point) - symbols - bottleneck.write - payload - bytes
decode   bytes - payload - bottleneck.read - symbols - bottleneck.dequantise - z_hat - UNet at t(point), ONE step - x0
         - VAE decoder - image

An operating point is a rate of the paper or a quality from 0 to 1: whatever the bottleneck (`oscar.bottlenecks`) has.
Only under mapping `per_image` is t the image's own: encoding measures it, and the file carries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oscar.base_codec import BaseCodec
from oscar.bitstream import Container
from oscar.bottlenecks import Point, concatenate
from oscar.data.images import ImageError
from oscar.data.tensors import as_batch, to_pil
from oscar.file_identity import Preview
from oscar.metrics.protocol import Protocol, check_protocol, sample_of
from oscar.models.backbone import SampleRule
from oscar.models.padding import pad_to_multiple
from oscar.models.precision import without_tf32
from oscar.timesteps import timestep_code, timestep_of_code
from oscar.utils.groups import group

AnyImage = Image.Image | np.ndarray | Tensor


class Encoded(NamedTuple):
    """What the encoder finds: z0 (B, C, h, w), symbols, and the images' own timesteps, int64 (B,), if they have any."""

    latent: Tensor
    symbols: Any
    timesteps: Tensor | None


class Decoded(NamedTuple):
    """What the decoder gets and makes: symbols, UNet's input and x0 (B, C, h, w), images (B, 3, H, W) in [-1, 1]."""

    symbols: Any
    z_hat: Tensor
    x0: Tensor
    image: Tensor


class Parsed(NamedTuple):
    """A file that has been read: header, operating point, and symbols of batch 1."""

    container: Container
    point: Point
    symbols: Any


class OscarCodec(BaseCodec):
    """One model for all of its operating points: images to files and back. `BaseCodec` says what it consists of."""

    # Images and bytes.

    def compress(
        self,
        image: AnyImage,
        point: float | Point | None = None,
        effort: int = 0,
        max_bytes: int | None = None,
        **named: float | None,
    ) -> bytes:
        """Compress one image into the bytes of an `.oscar` file.

        Args:
            image: PIL image, uint8 array (H, W), (H, W, 3) or (H, W, 4), or tensor (3, H, W), uint8 or in [-1, 1].
            point: operating point, the bottleneck's default unless it or `max_bytes` is set.
            effort: 0 to 9: the higher, the smaller the file, at a little loss (see `oscar.bitstream.rdo`).
            max_bytes: length of the file at most, in place of point and effort (see `oscar.rate_control`).
            named: `rate=` or `quality=` in place of `point`.

        Raises:
            ImageError: for an image that cannot be represented (transparency, more than 65536 pixels a side).
            ValueError: for an operating point, effort or length that this model does not have.
        """
        if max_bytes is None:
            return self.compress_batch([image], self.find_point(point, **named), effort)[0]
        self.bottleneck.refuse_beside_max_bytes(point, effort, *named.values())
        from oscar.rate_control import compress_within  # it stands above, and compresses by this class

        with torch.inference_mode():
            return compress_within(self, as_batch(image), max_bytes)

    def compress_batch(
        self, images: Sequence[AnyImage], point: float | Point | None = None, effort: int = 0
    ) -> list[bytes]:
        """Compress several images; those of one size go through the networks together. See `compress`."""
        batches = [as_batch(image) for image in images]
        result: dict[int, bytes] = {}
        for positions in group(tuple(batch.shape) for batch in batches).values():
            batch = torch.cat([batches[position] for position in positions])
            result |= zip(positions, self.compress_tensor(batch, point, effort), strict=True)
        return [result[position] for position in range(len(batches))]

    def decompress(self, data: bytes) -> Image.Image:
        """Restore the image of an `.oscar` file.

        Raises:
            BitstreamError: if the data is damaged, foreign, or was written with another model.
        """
        return self.decompress_batch([data])[0]

    def decompress_batch(self, files: Sequence[bytes]) -> list[Image.Image]:
        """Restore the images of several files; BitstreamError if one cannot be decoded, and nothing is decoded then."""
        return [to_pil(image) for image in self.decompress_tensor(files)]

    def decompress_prefix(self, data: bytes) -> Preview:
        """What the first bytes of a file show: symbols are coded from coarse to fine, and those that are not there yet
        are taken to be the likeliest.

        Args:
            data: the header and as much of the rest as there is. Damage is not noticed.

        Raises:
            BitstreamError: if the header is not there, is foreign or another model's, or the coding has no preview.
        """
        container, point = self.open(data, whole=False)
        symbols, share = self.bottleneck.read_prefix(container.coded, point, self.latent_shape(container))
        return Preview(to_pil(self.decode_files([Parsed(container, point, symbols)])[0]), share)

    # The encoder.

    @torch.inference_mode()
    def compress_tensor(self, batch: Tensor, point: float | Point | None = None, effort: int = 0) -> list[bytes]:
        """Images (B, 3, H, W) in [-1, 1] -> the bytes of one file each."""
        point = self.find_point(point)
        encoded = self.quantise(self.encode_latent(batch, point), point, effort)
        return self.write(encoded, point, *batch.shape[-2:])

    def encode_latent(self, batch: Tensor, point: Point, sample: SampleRule | None = None) -> Tensor:
        """Images (B, 3, H, W), padded by replicating the edge -> latent z0 (B, C, h, w): the posterior's mode, or with
        `sample` a sample (see `Backbone.encode_finite`)."""
        self.need("encoder")
        if not batch.isfinite().all():
            raise ImageError("image has values that are not finite; allowed: -1 to 1")
        multiple = self.backbone.factor * self.bottleneck.multiple(point)
        batch = batch.to(self.device)
        with without_tf32():
            return self.backbone.encode_finite(pad_to_multiple(batch, multiple), batch, sample)

    def quantise(self, latent: Tensor, point: Point, effort: int = 0) -> Encoded:
        """Latent z0 (B, C, h, w) -> symbols."""
        with without_tf32():
            symbols, timesteps = self.bottleneck.quantise(latent, point, effort), None
        if self.mapping.per_image:
            timesteps = self.backbone.schedule.measure(self.bottleneck.dequantise(symbols, point), latent)
        return Encoded(latent, symbols, timesteps)

    def write(self, encoded: Encoded, point: Point, height: int, width: int, **options) -> list[bytes]:
        """Symbols of images of `height` x `width` -> the bytes of one file each; options are of `Bottleneck.write`."""
        payloads = self.bottleneck.write(encoded.symbols, point, **options)
        codes: list[int | None] = [None] * len(payloads)
        if encoded.timesteps is not None:
            codes = timestep_code(encoded.timesteps, len(self.backbone.schedule)).tolist()
        return [
            Container(
                payload.coding,
                point.code,
                self.file_tag(payload, point),
                width,
                height,
                payload.side,
                payload.data,
                code,
            ).pack()
            for payload, code in zip(payloads, codes, strict=True)
        ]

    # The decoder.

    @torch.inference_mode()
    def decompress_tensor(self, files: Sequence[bytes]) -> list[Tensor]:
        """Files -> images (3, H, W) in [-1, 1]; files of equal size and operating point are decoded as one batch."""
        parsed = [self.read(data) for data in files]
        result: dict[int, Tensor] = {}
        for positions in group((file.point, file.container.height, file.container.width) for file in parsed).values():
            result |= zip(positions, self.decode_files([parsed[position] for position in positions]), strict=True)
        return [result[position] for position in range(len(files))]

    def read(self, data: bytes) -> Parsed:
        """Bytes of a file -> symbols (BitstreamError as `open`)."""
        container, point = self.open(data)
        symbols = self.bottleneck.read(container.coded, point, self.latent_shape(container))
        return Parsed(container, point, symbols)

    @torch.inference_mode()
    def decode_files(self, parsed: Sequence[Parsed]) -> Tensor:
        """Files of one size and operating point -> images (B, 3, H, W)."""
        container, point, timesteps = *parsed[0][:2], None
        if self.mapping.per_image:
            codes = [file.container.timestep for file in parsed]
            timesteps = timestep_of_code(torch.tensor(codes), len(self.backbone.schedule)).to(self.device)
        image = self.decode(concatenate([file.symbols for file in parsed]), point, timesteps).image
        return image[..., : container.height, : container.width]

    def decode(self, symbols: Any, point: Point, timesteps: Tensor | float | None = None) -> Decoded:
        """Symbols -> padded images and what led there, at the point's timestep or at `timesteps` (one, or B)."""
        self.need("decoder")
        assert self.denoiser is not None
        z_hat = self.bottleneck.dequantise(symbols, point)
        x0 = self.denoiser(z_hat, self.mapping(point) if timesteps is None else timesteps)
        return Decoded(symbols, z_hat, x0, self.decode_image(x0))

    def decode_image(self, x0: Tensor) -> Tensor:
        """Denoised latent (B, C, h, w) -> images in [-1, 1]."""
        return self.backbone.decode_finite(x0).clamp_(-1, 1)

    @torch.inference_mode()
    def reconstruct(
        self, batch: Tensor, point: float | Point | None = None, protocol: Protocol = "bitstream"
    ) -> Decoded:
        """Both directions in one call, of images (B, 3, H, W) in [-1, 1] of any size.

        Protocol "bitstream" gives the decoder what a file holds; "paper" does what the published implementation does
        (`oscar.metrics.protocol`), without any file: the latent is a sample, and the decoder gets its exact norms.

        Raises:
            ValueError: for what does not exist, or images that protocol paper would have to pad.
        """
        point, paper = self.find_point(point), check_protocol(protocol) == "paper"
        if paper:
            self.bottleneck.check_published(point, *batch.shape[-2:])
        encoded = self.quantise(self.encode_latent(batch, point, sample_of if paper else None), point)
        symbols = encoded.symbols if paper else self.bottleneck.stored(encoded.symbols, point)
        decoded = self.decode(symbols, point, encoded.timesteps)
        return decoded._replace(image=decoded.image[..., : batch.shape[-2], : batch.shape[-1]])
