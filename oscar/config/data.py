"""Schemas of training data and of cached latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from oscar.config.checks import ConfigError, at_least, choose
from oscar.config.model import BackboneConfig


@dataclass
class DataConfig:
    """Training images."""

    train: list[str] = field(default_factory=list)
    """folders (searched recursively), text lists of images, WebDataset shards (.tar), patterns of these such as
    shards/{000..099}.tar, and hf:DATASET[#SPLIT] for a Hugging Face data set (`oscar.data.sources`)"""
    latents: str | None = None
    """bottleneck, context: folder of latents that `oscar cache-latents` made of such images; `train` is not
    read then"""
    crop: int = 256
    """side of the square crops in pixels; a multiple of 64, so that every rate's grid fits"""
    batch_size: int = 8
    """crops per process and forward pass"""
    total_batch_size: int | None = None
    """crops that an optimiser step must take over all processes and passes, or the run is refused; None takes any"""
    workers: int = 2
    augment: bool = True
    """flips and right-angle rotations"""
    crop_margin: int = 0
    """pixels by which a first crop is larger. After flips and rotations the crop is cut from it, half of the time at a
    random place and else at the top left. Published: 8. 0 cuts once, with all places alike"""
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """range of the random shrinking before the crop"""
    cache: bool = False
    """keep decoded images in memory"""

    def check(self, needs_images: bool = True) -> None:
        from oscar.utils.patterns import HUB, expand

        if self.latents is not None:
            if not Path(self.latents).is_dir():
                allowed = "a folder that oscar cache-latents wrote"
                raise ConfigError(f"data.latents is {self.latents!r}, which does not exist; allowed: {allowed}")
        elif not self.train and needs_images:
            raise ConfigError("data.train is empty; allowed: one or more folders or text lists of images")
        for root in self.train if self.latents is None and needs_images else ():
            if not root.startswith(HUB):
                try:
                    expand(root)
                except ValueError as error:
                    raise ConfigError(f"data.train names {root!r}: {error}") from None
        if self.crop < 64 or self.crop % 64:
            raise ConfigError(f"data.crop is {self.crop}; allowed: multiples of 64")
        at_least("data.batch_size", self.batch_size, 1)
        at_least("data.total_batch_size", self.total_batch_size, 1)
        at_least("data.workers", self.workers, 0)
        at_least("data.crop_margin", self.crop_margin, 0)
        if self.crop_margin and not self.augment:
            raise ConfigError(f"data.crop_margin is {self.crop_margin}, but data.augment is false; allowed: 0")
        if self.crop_margin and self.latents is not None:
            raise ConfigError(
                f"data.crop_margin is {self.crop_margin}, but data.latents are of crops without one; allowed: 0"
            )
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"data.scale is {list(self.scale)}; allowed: [low, high] with 0 < low <= high <= 1")


@dataclass
class CacheLatentsConfig:
    """One latent cache (`oscar.data.latents`)."""

    output: str = "runs/latents"
    """folder of the latents; a run that was interrupted goes on in it"""
    seed: int = 0
    """of the crops; with the seed of the training run they are the crops that it would cut itself"""
    crops: int = 8
    """crops, and so latents, per image"""
    dtype: str = "float16"
    """in which latents are stored; they are computed in float32"""
    shard_size: int = 1024
    """latents per file, about; what an interruption may cost"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    """images, crop and augmentation; batch_size is the number of crops that pass through the VAE at once, at most"""
    device: str | None = None
    """cpu, or None: a GPU per process if there are any"""
    threads: int | None = None
    """CPU threads of each process; None leaves the library's choice"""

    def check(self) -> None:
        choose("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        choose("device", self.device, (None, "cpu"))
        for name in ("crops", "shard_size", "threads"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.data.latents is not None:
            raise ConfigError(f"data.latents is {self.data.latents!r}, but latents are made of images; allowed: null")
        for name in ("total_batch_size", "crop_margin"):
            if getattr(self.data, name):
                raise ConfigError(
                    f"data.{name} is {getattr(self.data, name)}, but a latent cache does not use it; "
                    f"allowed: {getattr(DataConfig(), name)}"
                )
        if not self.data.augment and self.crops > 1:
            raise ConfigError(f"crops is {self.crops}, but data.augment is false, so all would be equal; allowed: 1")
        self.backbone.check()
        self.data.check()
