"""Making a latent cache (`oscar.data.latents`): resumable, over any number of processes, same bytes with any."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from oscar.config import CacheLatentsConfig, ConfigError
from oscar.data.crops import PhotoDataset, epoch_order
from oscar.data.latents import IMAGES, INDEX, LatentIndex, read_index, read_names, shard_path, vae_hash
from oscar.models.backbone import Backbone
from oscar.training.build import build_backbone
from oscar.utils.files import atomic_write
from oscar.utils.strict_json import dumps


class _CropsOfImages(Dataset):
    """All crops of an image at once, under the sample numbers that they have in a run with the same seed."""

    def __init__(self, photos: PhotoDataset, crops: int):
        self.photos = photos
        length = len(photos)
        # number of image p in epoch e: where it stands in that epoch's order
        self.numbers = np.stack(
            [epoch * length + np.argsort(epoch_order(length, photos.seed, epoch)) for epoch in range(crops)]
        )

    def __getitem__(self, image: int) -> tuple[Tensor, int]:
        index, crops = self.photos.crops(image, self.numbers[:, image])
        return crops, index


def cache_latents(config: CacheLatentsConfig, progress: bool = True) -> LatentIndex:
    """Make the latents that a configuration describes, or those shards that are not there yet.

    Processes (torchrun, accelerate launch) share the shards. A latent depends on its own crop alone.

    Args:
        config: the run.
        progress: show a bar on the main process.

    Raises:
        ConfigError: if the output holds other latents, or the device cannot be used.
        ValueError: see PhotoDataset and `build_backbone`.
    """
    state = _start(config)
    torch.manual_seed(config.seed)  # of random weights, as in training
    backbone = build_backbone(config, unet=False)
    backbone.unet = None
    data = config.data
    photos = PhotoDataset(data.train, data.crop, data.augment, data.cache, data.scale, config.seed)
    folder, index = Path(config.output), _describe(config, backbone, photos)
    _open(folder, index, [str(path) for path in photos.paths])
    todo = [shard for shard in index.missing(folder) if shard % state.num_processes == state.process_index]
    images = [image for shard in todo for image in index.members(shard)]
    batches = iter(
        DataLoader(
            _CropsOfImages(photos, config.crops),
            batch_size=None,
            sampler=images,
            num_workers=data.workers,
            pin_memory=state.device.type == "cuda",
        )
    )
    backbone.vae.to(state.device).eval().requires_grad_(False)
    every = 0.1 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    hidden = not (progress and state.is_main_process and images)
    with tqdm(total=len(images), desc="images", mininterval=every, disable=hidden) as bar:
        for shard in todo:
            latents, cut_from = [], []
            for _ in index.members(shard):
                crops, image = next(batches)
                latents += [
                    encode(backbone, part.to(state.device, non_blocking=True)) for part in crops.split(data.batch_size)
                ]
                cut_from += [image] * len(crops)
                bar.update()
            tensors = {
                "latent": torch.cat(latents).to(getattr(torch, index.dtype)),
                "image": torch.tensor(cut_from, dtype=torch.int32),
            }
            atomic_write(shard_path(folder, shard), save(tensors))
    state.wait_for_everyone()
    return index


@torch.no_grad()
def encode(backbone: Backbone, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> latents (B, C, H/8, W/8) on the CPU."""
    return backbone.encode(images).float().cpu().contiguous()  # safetensors takes no other layout


def _start(config: CacheLatentsConfig) -> PartialState:
    """The processes of this run, which wait for each other for as long as it takes."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=30))


def _describe(config: CacheLatentsConfig, backbone: Backbone, photos: PhotoDataset) -> LatentIndex:
    data = config.data
    side = data.crop // backbone.factor
    return LatentIndex(
        vae=vae_hash(backbone),
        crop=data.crop,
        augment=data.augment,
        scale=list(data.scale),
        seed=config.seed,
        crops=config.crops,
        images=len(photos),
        count=config.crops * len(photos),
        shape=[backbone.vae.config.latent_channels, side, side],
        dtype=config.dtype,
        shard_images=max(1, config.shard_size // config.crops),
    )


def _open(folder: Path, index: LatentIndex, names: Sequence[str]) -> None:
    """Say in the folder what it is for, or refuse it if it is for something else. Every process may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():
        difference = index.difference(read_index(folder))
        if difference is None and read_names(folder) != list(names):
            difference = "its images are others"
        if difference is not None:
            raise ConfigError(f"output is {folder}, which holds other latents: {difference}; allowed: another folder")
        return
    atomic_write(folder / IMAGES, dumps(list(names), indent=0).encode())
    atomic_write(folder / INDEX, (dumps(asdict(index), indent=2) + "\n").encode())
