"""Latents of training crops on disk, made once by a frozen VAE, so that later epochs skip it.

    FOLDER/index.json                 how the latents were made: `LatentIndex`
    FOLDER/images.json              names of the images, in their order
    FOLDER/latents-00000.safetensors  a shard: `latent` (n, C, h, w), scaled posterior modes as `Backbone.encode` gives
                                      them, and `image` (n,), the number of the image that each was cut from

An image has `crops` latents, of as many crops drawn and turned as in training. Augmentation is done on pixels, since
the latent of a flipped crop is not the flipped latent; a run longer than `crops` epochs sees the same ones again. Crop
e of an image is the very one that a run from images with the same seed cuts in its epoch e.

A shard holds all crops of `shard_images` consecutive images and is written whole or not at all; a cache is complete
when every shard exists.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from oscar.config import DataConfig
from oscar.models.backbone import Backbone
from oscar.utils import former
from oscar.utils.errors import first_line
from oscar.utils.strict_json import dumps

FORMAT = 1
INDEX, IMAGES = "index.json", "images.json"
_FORMER_IMAGES = "pictures.json"


@dataclass(frozen=True)
class LatentIndex:
    """How the latents of a cache were made; what index.json holds."""

    crop: int
    """side of the crops in pixels"""
    augment: bool
    """random crops in one of eight orientations; otherwise the centre crop as it is"""
    scale: list[float]
    """range of the random shrinking before the crop"""
    seed: int
    """of crops and augmentation"""
    vae: str
    """SHA-256 of the VAE's encoder half, `vae_hash`"""
    crops: int
    """latents per image"""
    images: int
    count: int
    """latents in all"""
    shape: list[int]
    """C, h, w of a latent"""
    dtype: str
    """in which they are stored; they were computed in float32"""
    shard_images: int
    """images per shard; the last may have fewer"""
    posterior: str = "mode"
    """which point of the VAE's posterior: its mode"""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, under the keys of earlier versions, so that their runs go on."""
        old = {new: key for key, new in former.KEYS.items()}
        values = {old.get(name, name): value for name, value in asdict(self).items()}
        return hashlib.sha256(dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_images)

    def members(self, shard: int) -> range:
        """The images of a shard."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.images))

    def missing(self, folder: Path) -> list[int]:
        """The shards that do not exist yet."""
        return [shard for shard in range(self.shards) if not shard_path(folder, shard).is_file()]

    def difference(self, other: LatentIndex) -> str | None:
        """The first field in which two caches differ, in words."""
        for name, mine in asdict(self).items():
            theirs = getattr(other, name)
            if mine != theirs:
                return f"{name} is {theirs}, not {mine}"
        return None


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


def read_index(folder: str | Path) -> LatentIndex:
    """How the latents in a folder were made.

    Raises:
        ValueError: if it holds no latents that this version reads.
    """
    path = Path(folder) / INDEX
    try:
        values = former.with_new_keys(json.loads(path.read_text()))
        if set(values) != {field.name for field in fields(LatentIndex)} or values["format"] != FORMAT:
            raise ValueError(f"not an index of format {FORMAT}")
        return LatentIndex(**values)
    except FileNotFoundError:
        raise ValueError(f"latents: no {INDEX} in {folder}; allowed: a folder of oscar cache-latents") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"latents: {path} cannot be read: {first_line(error)}") from None


def read_names(folder: Path) -> list[str]:
    """Names of the images in a folder of latents, in their order.

    Raises:
        ValueError: if they cannot be read.
    """
    path = folder / IMAGES
    if not path.exists() and (folder / _FORMER_IMAGES).exists():
        path = folder / _FORMER_IMAGES
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"latents: {path} cannot be read: {first_line(error)}") from None


def vae_hash(backbone: Backbone) -> str:
    """SHA-256, in hexadecimal, of what makes latents of images: the VAE's class, encoder half and scaling factor."""
    vae = backbone.vae
    digest = hashlib.sha256(f"{type(vae).__name__};{vae.config.scaling_factor!r};".encode())
    for name, value in sorted(vae.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_latents(data: DataConfig, backbone: Backbone) -> None:
    """Refuse cached latents that a run on images with this configuration would not have seen.

    Args:
        data: names the latents, and the crop and augmentation that they must have.
        backbone: that the run trains on.

    Raises:
        ValueError: if crop, augmentation or VAE are others.
    """
    index = read_index(data.latents)
    for name in ("crop", "augment", "scale"):
        wanted, made = getattr(data, name), getattr(index, name)
        if wanted != made:
            raise ValueError(
                f"data.{name} is {wanted}, but the latents in {data.latents} were made with {made}; "
                "allowed: the same, or other latents"
            )
    if vae_hash(backbone) != index.vae:
        raise ValueError(
            f"data.latents is {data.latents}, whose latents come from another VAE than this backbone's; "
            "allowed: latents that oscar cache-latents makes with it"
        )


class LatentDataset(Dataset):
    """Cached latents under the numbers of their images; a drop-in for `PhotoDataset`.

    In epoch e of a run, image p gives its crop number e modulo `crops`. Files are opened for each latent, so that
    workers share nothing.

    Args:
        folder: the cache.

    Attributes:
        index: how the latents were made.
        paths: names of the images.

    Raises:
        ValueError: if the cache is not complete or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(folder)
        missing = self.index.missing(self.folder)
        if missing:
            raise ValueError(
                f"latents: {len(missing)} of {self.index.shards} shards are not in {folder} yet; "
                "run the same oscar cache-latents again"
            )
        self.paths = read_names(self.folder)

    def __len__(self) -> int:
        return self.index.images

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | int]:
        """One latent.

        Args:
            key: (image, sample number), or an image alone, whose first crop it then is.

        Returns:
            `latent`, float32 (C, h, w), and `index`, the image it was cut from.

        Raises:
            ValueError: naming the shard, if it is damaged.
        """
        image, number = (key, key) if isinstance(key, int | np.integer) else key
        if not 0 <= image < len(self):
            raise IndexError(f"image {image} does not exist; there are {len(self)}")
        shard, place = divmod(int(image), self.index.shard_images)
        row = place * self.index.crops + int(number) // len(self) % self.index.crops
        path = shard_path(self.folder, shard)
        try:
            with safe_open(path, "pt") as file:
                latent = file.get_slice("latent")[row]
                cut_from = file.get_slice("image" if "image" in file.keys() else "picture")[row]  # noqa: SIM118
        except (SafetensorError, OSError, IndexError) as error:
            raise ValueError(f"latents: {path} cannot be read: {first_line(error)}") from None
        return {"latent": latent.float(), "index": int(cut_from)}
