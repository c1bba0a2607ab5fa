"""Photographs for training: random square crops whose content is a pure function of seed and position.

Determinism: batch s of a run is the same whatever the number of workers, the number of processes it is split over and
the step at which the run was resumed. `ResumableSampler` numbers every sample of the run; the image follows from
(seed, epoch, position in the epoch) and its crop and augmentation from (seed, sample number), nothing else: workers
draw from no random stream of their own. `oscar.data.sources` says how images are numbered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from oscar.data.images import ImageError
from oscar.data.latents import LatentDataset
from oscar.data.sources import ImageSource, find_images, open_source

logger = logging.getLogger(__name__)

ORDER_STREAM, CROP_STREAM = 0, 1  # keep the random streams of one seed apart


class SampleKey(NamedTuple):
    """What the sampler hands to the dataset.

    Attributes:
        index: image in the dataset.
        number: sample number within the run, from 0, counted over all processes.
    """

    index: int
    number: int


class PhotoDataset(Dataset):
    """Square crops of photographs, each decoded once per crop.

    Images smaller than the crop are continued by mirroring at their right and bottom edges, where the codec pads too;
    enlarging them would teach blur. Unreadable images are logged once per process and replaced by the next readable
    one.

    Args:
        roots: folders (searched recursively), single images, text lists (.txt, .lst) with a path per line, relative
            to the list's folder (empty lines and those that start with # are skipped), WebDataset shards (.tar,
            uncompressed, on a local or mounted drive), patterns of all these ({000..099}, {a,b}, *, ?, [...]), and
            hf:DATASET[#SPLIT] for a Hugging Face data set, a hub id or a folder of images or Parquet files.
        crop_size: side of the crops in pixels.
        augment: random crop and one of the eight flips and right-angle rotations, as in the paper; otherwise the
            centre crop as it is.
        cache: decode every image now and keep it in memory (3 bytes a pixel), for small sets. Workers that are forked
            share it, spawned ones get a copy each.
        scale: range of a random factor by which an image is shrunk, with antialiasing, before cropping, drawn
            uniformly; raised where the image would get smaller than the crop. None or (1, 1): they keep their size.
        seed: of crops and augmentation.
        margin: pixels by which a first crop is larger; after flips and rotations the crop is cut from it, half of the
            time at a random place and else at the top left, as in the published code.

    Attributes:
        paths: where each image is; `str` of an item names it.

    Raises:
        ValueError: if a root does not exist or holds no readable image, or an argument is out of range.
    """

    def __init__(
        self,
        roots: str | Path | Iterable[str | Path],
        crop_size: int,
        augment: bool = True,
        cache: bool = False,
        scale: tuple[float, float] | None = None,
        seed: int = 0,
        margin: int = 0,
    ) -> None:
        if crop_size < 1:
            raise ValueError(f"crop_size = {crop_size} is not allowed; it must be 1 or more")
        if margin < 0 or (margin and not augment):
            raise ValueError(f"margin = {margin} is not allowed; it must be 0 or more, and 0 without augment")
        scale = None if scale is None or tuple(scale) == (1, 1) else scale
        if scale is not None:
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                allowed = "it must be (min, max) with 0 < min <= max <= 1"
                raise ValueError(f"scale = {tuple(scale)} is not allowed; {allowed}")
            if not augment:
                raise ValueError("scale is random and needs augment=True")
        roots = [roots] if isinstance(roots, str | Path) else list(roots)
        if not roots:
            raise ValueError("roots is empty; give at least one folder or list of images")
        self.crop_size, self.augment, self.seed, self.margin = crop_size, augment, seed, margin
        self.scale = None if scale is None else (float(scale[0]), float(scale[1]))
        self.unreadable: set[int] = set()
        self.images: list[np.ndarray | None] | None = None
        self.paths: list[ImageSource] = []
        for root in roots:
            start = len(self.paths)
            self.paths += find_images(root)
            # one image of each root is decoded here, so that a folder without any is refused before training starts
            if not any(self.decode(index) is not None for index in range(start, len(self.paths))):
                raise ValueError(f"{root} holds no readable image")
        if cache:
            with ThreadPoolExecutor() as threads:  # decoding JPEG or PNG leaves Python's lock to others
                self.images = list(threads.map(self.decode, range(len(self.paths))))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | int]:
        """One crop.

        Args:
            key: (image index, sample number), or an index alone, which is then also the sample number.

        Returns:
            `image`, float32 (3, crop_size, crop_size) in [-1, 1], and `index`, the image it was cut from.
        """
        index, number = (key, key) if isinstance(key, int | np.integer) else key
        index, (image,) = self.crops(index, [number])
        return {"image": image, "index": index}

    def crops(self, index: int, numbers: Sequence[int]) -> tuple[int, Tensor]:
        """Several crops of one image, decoded once.

        Args:
            index: the image.
            numbers: sample number of each crop.

        Returns:
            The image that they were cut from, and float32 (len(numbers), 3, crop_size, crop_size) in [-1, 1].
        """
        index, image = self.next_readable(int(index))
        crops = [self.cut(image, np.random.default_rng((self.seed, CROP_STREAM, int(n)))) for n in numbers]
        return index, torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1

    def next_readable(self, index: int) -> tuple[int, np.ndarray]:
        """The image at `index` or, if it is unreadable, at the first readable index after it, going round."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} does not exist; there are {len(self)}")
        for candidate in (*range(index, len(self)), *range(index)):
            if candidate not in self.unreadable:
                image = self.decode(candidate)
                if image is not None:
                    return candidate, image
        raise ValueError(f"none of the {len(self)} images can be read any more, the first is {self.paths[0]}")

    def decode(self, index: int) -> np.ndarray | None:
        """The image, uint8 (H, W, 3), or None, logged once, if it is unreadable."""
        if self.images is not None:
            return self.images[index]
        if index in self.unreadable:
            return None
        try:
            return np.asarray(open_source(self.paths[index]))
        except ImageError as error:
            self.unreadable.add(index)
            logger.warning("image left out: %s", error)
            return None

    def cut(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A crop (crop_size, crop_size, 3), uint8."""
        side = self.crop_size + self.margin
        factor = 1.0
        if self.scale is not None:
            factor = min(max(random.uniform(*self.scale), side / min(image.shape[:2])), 1.0)
        # cut first, then shrink the piece: the same as the reverse, and cheaper
        height, width = (min(round(side / factor), length) for length in image.shape[:2])
        free = image.shape[0] - height, image.shape[1] - width
        top, left = (random.integers(space + 1) for space in free) if self.augment else (space // 2 for space in free)
        piece = image[top : top + height, left : left + width]
        if factor < 1:
            piece = np.asarray(Image.fromarray(piece).resize((side, side), Image.Resampling.BICUBIC))
        if piece.shape[:2] != (side, side):
            piece = np.pad(piece, ((0, side - piece.shape[0]), (0, side - piece.shape[1]), (0, 0)), mode="symmetric")
        if self.augment:
            symmetry = random.integers(8)
            piece = np.rot90(piece, symmetry % 4)
            piece = piece[:, ::-1] if symmetry >= 4 else piece
        if self.margin:
            top, left = random.integers(self.margin + 1, size=2) if random.random() < 0.5 else (0, 0)
            piece = piece[top : top + self.crop_size, left : left + self.crop_size]
        return piece


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch in their order, a permutation of 0 to length - 1."""
    return np.random.default_rng((seed, ORDER_STREAM, epoch)).permutation(length)


class ResumableSampler(Sampler[SampleKey]):
    """An endless stream of sample keys that is a pure function of the step.

    At step s, process r of P draws the samples (s * P + r) * batch_size onwards, so that two processes with batch b see
    together what one with 2 b sees. Each epoch is a fresh permutation; batches run across the ends of epochs. A run
    resumed on another number of processes goes on in the same order if P * batch_size stays what it was.

    Args:
        dataset_len: number of images.
        batch_size: samples per step and process.
        seed: of the order of images.
        num_processes: P.
        rank: r.
        start_step: first step, counted in batches per process (micro-batches under gradient accumulation).

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dataset_len: int,
        batch_size: int,
        seed: int = 0,
        num_processes: int = 1,
        rank: int = 0,
        start_step: int = 0,
    ) -> None:
        for name, value, least in (
            ("dataset_len", dataset_len, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_processes", num_processes, 1),
            ("start_step", start_step, 0),
        ):
            if value < least:
                raise ValueError(f"{name} = {value} is not allowed; it must be {least} or more")
        if not 0 <= rank < num_processes:
            raise ValueError(f"rank = {rank} is not allowed; it must be from 0 to {num_processes - 1}")
        self.dataset_len, self.batch_size, self.seed = dataset_len, batch_size, seed
        self.num_processes, self.rank, self.start_step = num_processes, rank, start_step

    def __iter__(self) -> Iterator[SampleKey]:
        step, epoch, order = self.start_step, -1, None
        while True:
            first = (step * self.num_processes + self.rank) * self.batch_size
            for number in range(first, first + self.batch_size):
                if number // self.dataset_len != epoch:
                    epoch = number // self.dataset_len
                    order = epoch_order(self.dataset_len, self.seed, epoch)
                yield SampleKey(int(order[number % self.dataset_len]), number)
            step += 1


def build_loader(
    roots: str | Path | Sequence[str | Path],
    *,
    crop_size: int,
    batch_size: int,
    seed: int = 0,
    augment: bool = True,
    cache: bool = False,
    scale: tuple[float, float] | None = None,
    margin: int = 0,
    latents: str | Path | None = None,
    workers: int = 0,
    pin_memory: bool | None = None,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """An endless loader of training batches that starts at `start_step`.

    It shards itself: with Accelerate, do not pass it through `prepare`, move its batches to the device instead. To
    resume, build it anew with the step to resume at.

    Args:
        roots, crop_size, augment, cache, scale, margin: see PhotoDataset.
        batch_size: per process.
        seed: of order, crops and augmentation; equal on every process.
        latents: folder of cached latents in place of images; `roots` and what follows for them then does nothing.
        workers: loading processes; they change no batch.
        pin_memory: None pins where CUDA is present.
        start_step, rank, world: see ResumableSampler.

    Returns:
        A loader of {"image": float32 (batch_size, 3, crop_size, crop_size) in [-1, 1], "index": int64 (batch_size,)},
        or, from latents, of {"latent": float32 (batch_size, 4, crop_size / 8, crop_size / 8), "index": ...}. Its
        dataset's `paths` names the image of an index.

    Raises:
        ValueError: see PhotoDataset, LatentDataset and ResumableSampler.
    """
    if latents is not None:
        dataset: Dataset = LatentDataset(latents)
    else:
        dataset = PhotoDataset(roots, crop_size, augment, cache, scale, seed, margin)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=ResumableSampler(len(dataset), batch_size, seed, world, rank, start_step),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=torch.Generator().manual_seed(seed),  # else every new iterator would draw from torch's global stream
    )
