"""The codec without torch: image <-> bytes, the flow of `oscar.codec` on ONNX Runtime, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oscar import model_folder
from oscar.bitstream import Container
from oscar.data.images import ImageError, check_sides, to_pixels
from oscar.file_identity import FileIdentity, Preview
from oscar.operating_points import Point
from oscar.rate_control import compress_within
from oscar.registry import load_plugins
from oscar.runtime.bottlenecks import make, pad
from oscar.runtime.files import ModelFiles, RuntimeModelError, providers
from oscar.timesteps import mapping_from_config
from oscar.utils.free_memory import AUTO_SHARE, available_memory


class TooLargeError(ImageError):
    """An image that would fill the memory, since it goes through the networks whole."""


class Codec(FileIdentity):
    """A model whose folder has graphs, ready to code.

    Args:
        source: name of a shipped model, a folder that `oscar export` wrote, or a hub id of one.
        device: cpu, cuda, cuda:1, coreml or directml, as far as ONNX Runtime has them here.
        threads: that networks compute with; None takes ONNX Runtime's choice.

    Raises:
        CheckpointError: if there is no such model, it has no graphs, or it is damaged.
        RuntimeModelError: if the device is not there.
    """

    def __init__(self, source: str | Path = "nano", device: str = "cpu", threads: int | None = None):
        found = providers(device)
        load_plugins()  # what fails there is not the model's fault
        with model_folder.reading(source, RuntimeModelError) as (folder, config):
            self.files = ModelFiles(folder, config, found, threads)
            self.mapping = mapping_from_config(config["timesteps"])
            self.bottleneck: Any = make(self.files)
            self.mapping.check(self.bottleneck.points, self.files.description["schedule_length"])

    @property
    def fingerprint(self) -> str:
        return self.files.description["fingerprint"]

    @property
    def factor(self) -> int:
        return self.files.description["factor"]

    # Images and bytes; the arguments are those of `OscarCodec`.

    def compress(
        self,
        image: Image.Image | np.ndarray,
        point: float | Point | None = None,
        effort: int = 0,
        max_bytes: int | None = None,
        **named: float | None,
    ) -> bytes:
        """Compress one image into the bytes of an `.oscar` file.

        Args:
            image: PIL image, or uint8 array (H, W), (H, W, 3) or (H, W, 4).
            point: operating point, the bottleneck's default unless it or `max_bytes` is set.
            effort: 0 to 9: the higher, the smaller the file, at a little loss.
            max_bytes: length of the file at most, in place of point and effort.
            named: `rate=` or `quality=` in place of `point`.

        Raises:
            ImageError: for an image that cannot be represented, or is too large for the memory.
            ValueError: for an operating point, effort or length that this model does not have.
        """
        batch = self._batch(image)
        if max_bytes is None:
            found = self.bottleneck.find(point, **named)
            symbols = self.quantise(self.encode_latent(batch, found), found, effort)
            return self.write(symbols, found, *batch.shape[-2:])[0]
        self.bottleneck.refuse_beside_max_bytes(point, effort, *named.values())
        return compress_within(self, batch, max_bytes)

    def compress_batch(
        self, images: Sequence[Image.Image | np.ndarray], point: float | Point | None = None, effort: int = 0
    ) -> list[bytes]:
        """Compress several images, one by one."""
        return [self.compress(image, point, effort) for image in images]

    def decompress(self, data: bytes) -> Image.Image:
        """Restore the image of an `.oscar` file.

        Raises:
            BitstreamError: if the data is damaged, foreign, or was written with another model.
            TooLargeError: if its image is too large for the memory.
        """
        container, point = self.open(data)
        return self.decode(self.bottleneck.read(container.coded, point, self.latent_shape(container)), point, container)

    def decompress_batch(self, files: Sequence[bytes]) -> list[Image.Image]:
        """Restore the images of several files, one by one."""
        return [self.decompress(data) for data in files]

    def decompress_prefix(self, data: bytes) -> Preview:
        """What the first bytes of a file show; see `OscarCodec.decompress_prefix`."""
        container, point = self.open(data, whole=False)
        symbols, share = self.bottleneck.read_prefix(container.coded, point, self.latent_shape(container))
        return Preview(self.decode(symbols, point, container), share)

    partial = decompress_prefix

    # The two halves.

    def encode_latent(self, batch: np.ndarray, point: Point) -> np.ndarray:
        """Image (1, 3, H, W) in [-1, 1] -> latent (1, C, h, w)."""
        padded = pad(batch, self.factor * self.bottleneck.multiple(point))
        self._check_memory("encode", *padded.shape[-2:])
        return self.files.run("vae_encoder", image=padded)

    def quantise(self, latent: np.ndarray, point: Point, effort: int = 0) -> Any:
        """Latent (1, C, h, w) -> symbols."""
        return self.bottleneck.quantise(latent, point, effort)

    def write(self, symbols: Any, point: Point, height: int, width: int) -> list[bytes]:
        """Symbols of an image of `height` x `width` -> the bytes of one file."""
        payload = self.bottleneck.write(symbols, point)
        tag = self.file_tag(payload, point)
        return [Container(payload.coding, point.code, tag, width, height, payload.side, payload.data).pack()]

    def decode(self, symbols: Any, point: Point, container: Container) -> Image.Image:
        """Symbols of a file -> its image."""
        z_hat = self.bottleneck.dequantise(symbols, point)
        rows, columns = z_hat.shape[-2:]
        self._check_memory("decode", self.factor * rows, self.factor * columns)
        timestep = np.array([self.mapping(point)], dtype=np.float32)
        x0 = self.files.run("denoiser", z_hat=pad(z_hat, self.files.description["unet_multiple"]), timestep=timestep)
        image = self.files.run("vae_decoder", x0=x0[..., :rows, :columns])
        pixels = image[0, :, : container.height, : container.width].transpose(1, 2, 0)
        return Image.fromarray(np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8))

    def _batch(self, image: Image.Image | np.ndarray) -> np.ndarray:
        pixels = to_pixels(image).astype(np.float32)
        check_sides(*pixels.shape[:2])
        return (pixels / np.float32(127.5) - 1).transpose(2, 0, 1)[None]

    def _check_memory(self, direction: str, height: int, width: int) -> None:
        """Refuse an image that would fill the memory; the torch engine takes such ones in blocks."""
        needed, free = self.files.description["bytes_per_pixel"][direction] * height * width, available_memory()
        if needed > AUTO_SHARE * free:
            raise TooLargeError(
                f"{width}x{height} pixels take {needed / 1e9:.1f} GB to {direction}, of which {free / 1e9:.1f} are "
                "free; allowed: fewer pixels, or --engine torch, which takes an image in parts"
            )
