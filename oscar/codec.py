"""The codec: image <-> bytes. The whole flow of the method can be read on this page.

encode   image - VAE encoder - latent z0 - bottleneck.quantise(point) - symbols - bottleneck.write - payload - bytes
decode   bytes - payload - bottleneck.read - symbols - bottleneck.dequantise - z_hat - UNet at t(point), ONE step - x0
         - VAE decoder - image

An operating point is a rate of the paper or a quality from 0 to 1: whatever the bottleneck (`oscar.bottlenecks`) has.
Only under mapping `per_image` is t the image's own: encoding measures it, and the file carries it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from oscar import checkpoint
from oscar.bitstream import MAX_SIDE, Container, HeaderError, WrongModelError
from oscar.bottlenecks import Bottleneck, Components, Payload, Point, concatenate
from oscar.data.images import ImageError, to_pil, to_tensor
from oscar.models.backbone import Backbone
from oscar.models.denoiser import Denoiser
from oscar.models.padding import pad_to_multiple
from oscar.timesteps import TimestepMapping, timestep_code, timestep_of_code

Picture = Image.Image | np.ndarray | Tensor


class Encoded(NamedTuple):
    """What the encoder finds in a batch of images.

    Attributes:
        latent: z0, scaled posterior mode of the padded images (B, C, h, w).
        symbols: the bottleneck's.
        timesteps: the images' own, int64 (B,), as a file can say them; None where the operating point determines them.
    """

    latent: Tensor
    symbols: Any
    timesteps: Tensor | None


class Decoded(NamedTuple):
    """What the decoder gets and makes.

    Attributes:
        symbols: the bottleneck's.
        z_hat: the denoiser's input (B, C, h, w).
        x0: denoised latent (B, C, h, w).
        image: images (B, 3, H, W), clamped to [-1, 1].
    """

    symbols: Any
    z_hat: Tensor
    x0: Tensor
    image: Tensor


class Parsed(NamedTuple):
    """A file whose symbols have been read: its header, operating point, and symbols of batch 1."""

    container: Container
    point: Point
    symbols: Any


class Preview(NamedTuple):
    """What a part of a file shows: the image, and the share of its symbols that was read, 0 to 1."""

    image: Image.Image
    share: float


class OscarCodec(nn.Module):
    """One model for all of its operating points.

    Args:
        backbone: VAE, UNet and noise schedule.
        bottleneck: latents to bytes and back.
        denoiser: the backbone's UNet, adapted; None in the encoder's components.
        mapping: pseudo-timestep of each operating point, or of each image.

    Raises:
        ValueError: if these do not go together.
    """

    def __init__(
        self, backbone: Backbone, bottleneck: Bottleneck, denoiser: Denoiser | None, mapping: TimestepMapping
    ):
        super().__init__()
        if bottleneck.factor not in (None, backbone.factor):
            raise ValueError(f"the backbone reduces each side by {backbone.factor}; "
                             f"allowed with {bottleneck.point_name}s: {bottleneck.factor}")  # fmt: skip
        self.backbone, self.bottleneck, self.denoiser = backbone, bottleneck, denoiser
        self.components: Components = "both"
        self.set_mapping(mapping)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options) -> OscarCodec:
        """Load a checkpoint: the same as `oscar.load`, whose options these are."""
        from oscar.inference import load

        return load(source, **options)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder (see `oscar.checkpoint`), completely or not at all."""
        checkpoint.save(self, folder, dtype)

    # Operating points and identity.

    @property
    def points(self) -> tuple[float, ...]:
        """Numbers by which files are asked for, from small to large."""
        return tuple(point.value for point in self.bottleneck.points)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decoding depends on, in hexadecimal; see `checkpoint.fingerprint`."""
        if self._fingerprint is None:
            self._fingerprint = checkpoint.fingerprint(self)
        return self._fingerprint

    def forget_fingerprint(self) -> None:
        """Have the fingerprint computed anew, after weights or tables were changed."""
        self._fingerprint: str | None = None

    def model_tag(self, payload: Payload, point: Point) -> int:
        """The 16 bits by which a file names its model: of the fingerprint, and of what its coding needs beyond."""
        tag, more = bytes.fromhex(self.fingerprint), self.bottleneck.digest(payload.coding, point)
        return int.from_bytes((hashlib.sha256(tag + more).digest() if more else tag)[:2], "big")

    def set_mapping(self, mapping: TimestepMapping) -> None:
        """Decode at other timesteps from now on; files written before are another model's then.

        Raises:
            ValueError: if it lacks an operating point, or points outside the schedule.
        """
        mapping.check(self.bottleneck.points, len(self.backbone.schedule))
        if mapping.per_picture and not self.bottleneck.per_image_timesteps:
            raise ValueError(f"timesteps: kind {mapping.kind} is not for bottleneck {self.bottleneck.kind}")
        self.mapping = mapping
        self.forget_fingerprint()

    def train(self, mode: bool = True) -> OscarCodec:
        if mode:
            self.forget_fingerprint()  # the weights are about to change
        return super().train(mode)

    # Images and bytes.

    def compress(self, image: Picture, point: float | Point | None = None, effort: int = 0, **named) -> bytes:
        """Compress one image into the bytes of an `.oscar` file.

        Args:
            image: PIL image, uint8 array (H, W), (H, W, 3) or (H, W, 4), or tensor (3, H, W), uint8 or in [-1, 1].
            point: rate or quality, the bottleneck's default unless set.
            effort: 0 to 9: the higher, the smaller the file, at a little loss (see `oscar.bottlenecks.rdo`).
            named: `rate=` or `quality=` in place of `point`; `max_bytes=` for the best file of at most so many bytes.

        Raises:
            ImageError: for an image that cannot be represented (transparency, more than 65536 pixels a side).
            ValueError: for an operating point, effort or length that this model does not have.
        """
        if "max_bytes" in named:
            from oscar.rate_control import compress_within

            return compress_within(self, as_batch(image), **named)
        return self.compress_batch([image], self.find_point(point, **named), effort)[0]

    def find_point(self, point: float | Point | None = None, **named: float) -> Point:
        """The operating point that is meant (ValueError if this model has none such)."""
        for name, value in named.items():
            if value is not None and name != self.bottleneck.point_name:
                raise ValueError(f"{name} is {value}, but this model has a {self.bottleneck.point_name}; "
                                 f"allowed: {self.bottleneck.point_name} or max_bytes")  # fmt: skip
            point = value if point is None else point
        return self.bottleneck.default_point if point is None else self.bottleneck.parse(point)

    def compress_batch(
        self, pictures: Sequence[Picture], point: float | Point | None = None, effort: int = 0
    ) -> list[bytes]:
        """Compress several images; those of one size go through the networks together. See `compress`."""
        batches, result = [as_batch(picture) for picture in pictures], {}
        for positions in group(tuple(batch.shape) for batch in batches).values():
            images = torch.cat([batches[position] for position in positions])
            result |= zip(positions, self.compress_tensor(images, point, effort), strict=True)
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
        symbols, share = self.bottleneck.read_prefix(_payload(container), point, self.latent_shape(container))
        return Preview(to_pil(self.decode_files([Parsed(container, point, symbols)])[0]), share)

    # The encoder.

    @torch.inference_mode()
    def compress_tensor(self, batch: Tensor, point: float | Point | None = None, effort: int = 0) -> list[bytes]:
        """Images (B, 3, H, W) in [-1, 1] -> the bytes of one file each."""
        point = self.find_point(point)
        return self.write(self.encode(batch, point, effort), point, *batch.shape[-2:])

    def encode_latent(self, batch: Tensor, point: Point) -> Tensor:
        """Images (B, 3, H, W), padded by replicating the edge -> latent z0 (B, C, h, w)."""
        self.need("encoder")
        multiple = self.backbone.factor * self.bottleneck.multiple(point)
        return self.backbone.encode(pad_to_multiple(batch.to(self.device, self.dtype), multiple))

    def encode(self, batch: Tensor, point: Point, effort: int = 0) -> Encoded:
        """Images (B, 3, H, W) in [-1, 1] -> symbols."""
        latent = self.encode_latent(batch, point)
        return self.quantise(latent, point, effort)

    def quantise(self, latent: Tensor, point: Point, effort: int = 0) -> Encoded:
        """Latent z0 (B, C, h, w) -> symbols."""
        symbols, timesteps = self.bottleneck.quantise(latent, point, effort), None
        if self.mapping.per_picture:
            timesteps = self.measure_timesteps(self.bottleneck.dequantise(symbols, point), latent)
        return Encoded(latent, symbols, timesteps)

    def write(self, encoded: Encoded, point: Point, height: int, width: int, **options) -> list[bytes]:
        """Symbols of images of `height` x `width` -> the bytes of one file each."""
        payloads = self.bottleneck.write(encoded.symbols, point, **options)
        codes: list[int | None] = [None] * len(payloads)
        if encoded.timesteps is not None:
            codes = timestep_code(encoded.timesteps, len(self.backbone.schedule)).tolist()
        return [
            Container(payload.coding, point.code, self.model_tag(payload, point), width, height, payload.side,
                      payload.data, code).pack()
            for payload, code in zip(payloads, codes, strict=True)
        ]  # fmt: skip

    # The decoder.

    @torch.inference_mode()
    def decompress_tensor(self, files: Sequence[bytes]) -> list[Tensor]:
        """Files -> images (3, H, W) in [-1, 1]; files of equal size and operating point are decoded as one batch."""
        parsed, result = [self.read(data) for data in files], {}
        for positions in group((file.point, file.container.height, file.container.width) for file in parsed).values():
            result |= zip(positions, self.decode_files([parsed[position] for position in positions]), strict=True)
        return [result[position] for position in range(len(files))]

    def open(self, data: bytes, whole: bool = True) -> tuple[Container, Point]:
        """Bytes of a file -> header and operating point, if this model wrote it; without `whole` the end may be missing.

        Raises:
            BitstreamError: if it is damaged, foreign, or was written with another model.
        """
        container = Container.unpack(data, whole)
        if container.coding not in self.bottleneck.codings:
            raise WrongModelError(f"the file was written by a model with {container.coding.model}; "
                                  f"this one has {self.bottleneck.codings[0].model}")  # fmt: skip
        point = self.bottleneck.point_of_code(container.point_code)
        tag = self.model_tag(_payload(container), point)
        if container.model_tag != tag:
            raise WrongModelError(f"the file was written with model {container.model_tag:04x}; this model is {tag:04x}")
        if (container.timestep is not None) != self.mapping.per_picture:
            has, wants = ("no", "one") if self.mapping.per_picture else ("a", "none")
            raise HeaderError(f"the file has {has} timestep of its own; allowed for this model: {wants}")
        return container, point

    def read(self, data: bytes) -> Parsed:
        """Bytes of a file -> symbols (BitstreamError as `open`)."""
        container, point = self.open(data)
        symbols = self.bottleneck.read(_payload(container), point, self.latent_shape(container))
        return Parsed(container, point, symbols)

    @torch.inference_mode()
    def decode_files(self, parsed: Sequence[Parsed]) -> Tensor:
        """Files of one size and operating point -> images (B, 3, H, W)."""
        container, point, _ = parsed[0]
        timesteps = None
        if self.mapping.per_picture:
            steps = len(self.backbone.schedule)
            codes = [timestep_of_code(file.container.timestep, steps) for file in parsed]
            timesteps = torch.tensor(codes).to(self.device)
        decoded = self.decode(concatenate([file.symbols for file in parsed]), point, timesteps)
        return decoded.image[..., : container.height, : container.width]

    def decode(self, symbols: Any, point: Point, timesteps: Tensor | float | None = None) -> Decoded:
        """Symbols -> padded images and what led there, at the point's timestep or at `timesteps` (one, or B)."""
        self.need("decoder")
        z_hat = self.bottleneck.dequantise(symbols, point)
        x0 = self.denoiser(z_hat, self.mapping(point) if timesteps is None else timesteps)
        return Decoded(symbols, z_hat, x0, self.decode_image(x0))

    def decode_image(self, x0: Tensor) -> Tensor:
        """Denoised latent (B, C, h, w) -> images in [-1, 1]."""
        return self.backbone.decode(x0).clamp(-1, 1)

    @torch.inference_mode()
    def reconstruct(
        self, batch: Tensor, point: float | Point | None = None, protocol: Literal["bitstream", "paper"] = "bitstream"
    ) -> Decoded:
        """Both directions in one call.

        Args:
            batch: images (B, 3, H, W) in [-1, 1], of any size.
            point: rate or quality.
            protocol: "bitstream" gives the decoder what a file holds; "paper" what the encoder finds (of the published
                quantiser the original latent's norms), as the published implementation does, without any file.
        """
        if protocol not in ("bitstream", "paper"):
            raise ValueError(f"protocol {protocol!r} does not exist; allowed: bitstream, paper")
        point = self.find_point(point)
        encoded = self.encode(batch, point)
        symbols = self.bottleneck.stored(encoded.symbols, point) if protocol == "bitstream" else encoded.symbols
        decoded = self.decode(symbols, point, encoded.timesteps)
        return decoded._replace(image=decoded.image[..., : batch.shape[-2], : batch.shape[-1]])

    # Helpers.

    def measure_timesteps(self, z_hat: Tensor, latent: Tensor) -> Tensor:
        """The timesteps, int64 (B,), whose sqrt(alpha_bar) are nearest to the mean cosine similarity of z_hat and the
        latent (B, C, h, w), among those that a file can say."""
        steps = len(self.backbone.schedule)
        timesteps = self.backbone.schedule.timestep_of_signal(channel_cosine(z_hat, latent).mean(dim=1))
        return timestep_of_code(timestep_code(timesteps, steps), steps)

    def latent_shape(self, container: Container) -> tuple[int, int]:
        """Rows and columns of the latent of a file's image, before padding to the bottleneck's multiple."""
        return tuple(-(-side // self.backbone.factor) for side in (container.height, container.width))

    def need(self, components: Components) -> None:
        """Refuse (ValueError) what these components are needed for, where they were not loaded."""
        if self.components not in ("both", components):
            raise ValueError(f"components is {self.components!r}, which cannot do this; allowed: both, {components}")

    @property
    def device(self) -> torch.device:
        return next(self.bottleneck.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.bottleneck.parameters()).dtype


def _payload(container: Container) -> Payload:
    return Payload(container.coding, container.side, container.payload)


def as_batch(picture: Picture) -> Tensor:
    """An image as (1, 3, H, W) in [-1, 1]; ImageError if no file can hold it."""
    batch = to_tensor(picture)
    height, width = batch.shape[-2:]
    if max(height, width) > MAX_SIDE:
        raise ImageError(f"picture of {width}x{height} pixels is not allowed; allowed: {MAX_SIDE} a side")
    return batch


def group(keys) -> dict[Any, list[int]]:
    """Positions by key, in the order of the keys' first positions."""
    groups: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups


def channel_cosine(z_hat: Tensor, latent: Tensor) -> Tensor:
    """Cosine similarity over space of each channel: two of (B, C, h, w) -> (B, C), float32 (paper section 3.1)."""
    return F.cosine_similarity(z_hat.float().flatten(2), latent.float().flatten(2), dim=2)
