"""How fast training is: steps of the hyper-encoders, waiting for images, and a step of stage joint at full size.

Three schedules of stage bottleneck train every rate by one step in each round, on the same codec, batch and crop:

    published   a run per rate, so that the VAE encodes a batch for each rate's step
    shared      all rates on one VAE pass
    cached      all rates on cached latents, without a VAE pass

Everything runs in the training loop itself (`oscar.training.trainer.Trainer`); only the configuration differs. What was
measured on this machine with these settings is kept in OUTPUT/training and not measured again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from oscar.benchmark.speed.clocks import interleaved, paired_ratio, synchroniser
from oscar.benchmark.speed.joint_step import advance, measure_joint
from oscar.benchmark.speed.tables import run_part
from oscar.config import (
    BackboneConfig,
    CacheLatentsConfig,
    DataConfig,
    LoggerConfig,
    OptimiserConfig,
    StageConfig,
    TrainConfig,
    TrainerConfig,
    TrainingSpeedConfig,
)
from oscar.data.folders import find_images
from oscar.data.images import read_image
from oscar.evaluation.evaluate import make_accelerator
from oscar.utils.tables import Table

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oscar.training.trainer import Trainer

SCHEDULES = {
    "published": "a VAE pass for every rate's every step",
    "shared": "one VAE pass for all rates",
    "cached": "cached latents, no VAE pass",
}
OURS = ("shared", "cached")
# The frames that each measurement of the configuration gives.
MEASURES = {"schedules": ("schedules",), "loader": ("loader",), "joint": ("joint", "parameters")}
DIV2K_SIZE = (2040, 1356)  # of most of its images
IMAGES = 16  # that are made, and whose latents are cached
PREFETCH = 2  # batches that a worker of PyTorch's loader loads ahead
# Stage bottleneck does not use the UNet, so the smallest one stands in for it.
_SMALL_UNET = {
    "block_out_channels": [32],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
    "layers_per_block": 1,
}


def run_training_speed(config: TrainingSpeedConfig, output: Path, device: str | None = None) -> list[Table]:
    """Make the measurements of a configuration that are not there yet.

    Args:
        config: what is measured.
        output: folder of the benchmark; figures go to its subfolder training.
        device: of the networks; None takes a GPU if there is one.

    Returns:
        Tables to read of all that is there: training_schedules, training_loader, training_joint, training_parameters.

    Raises:
        TimingError: if the process that trains stage joint fails.
        ValueError: for images or a backbone that cannot be read, or a device that cannot be used.
    """
    accelerator = make_accelerator(device)
    with tempfile.TemporaryDirectory() as temporary:
        bench = SpeedBench(config, accelerator, Path(temporary))
        return run_part("training", config, output / "training", accelerator.device, MEASURES, bench.measure)


@dataclass
class SpeedBench:
    """What the measurements share.

    Attributes:
        config: what is measured.
        accelerator: where.
        folder: for images, latents and runs.
    """

    config: TrainingSpeedConfig
    accelerator: Accelerator
    folder: Path

    def measure(self, name: str) -> list[pd.DataFrame]:
        """The frames of a measurement, see MEASURES."""
        if name == "joint":
            return measure_joint(self.config, self.images()[0], self.folder / "joint", self.accelerator.device)
        try:
            return [measure_schedules(self) if name == "schedules" else measure_loader(self)]
        finally:
            self.accelerator.free_memory()  # it holds on to networks and optimisers, which the next one shall not

    @property
    def sync(self) -> Callable[[], None]:
        return synchroniser([self.accelerator.device])

    def images(self) -> list[Path]:
        """The images to load; made on the first call if the configuration names none."""
        if self.config.images is not None:
            return find_images(self.config.images)
        folder = self.folder / "images"
        if not folder.exists():
            folder.mkdir()
            make_images(folder, IMAGES)
        return find_images(folder)

    def latents(self) -> Path:
        """Latents of the first images, made on the first call."""
        from oscar.training.latent_cache import cache_latents

        folder, names = self.folder / "latents", self.folder / "first.txt"
        if not folder.exists():
            names.write_text("\n".join(str(path.absolute()) for path in self.images()[:IMAGES]) + "\n")
            device = "cpu" if self.accelerator.device.type == "cpu" else None
            data = DataConfig(train=[str(names)], crop=self.config.crop, batch_size=1, workers=0)
            backbone = _without_unet(self.config.backbone)
            cache = CacheLatentsConfig(output=str(folder), crops=1, backbone=backbone, data=data, device=device)
            cache_latents(cache, progress=False)
        return folder

    def train_config(self, schedule: str, workers: int) -> TrainConfig:
        """The run of stage bottleneck that a schedule is, at the paper's settings."""
        alone = {"rates_per_step": 1, "rate_order": "balanced"}  # each rate once in as many steps as there are rates
        data = DataConfig(
            train=[str(path) for path in self.images()],
            crop=self.config.crop,
            workers=workers,
            batch_size=self.config.batch_size,
        )
        if schedule == "cached":
            data.latents = str(self.latents())
        return TrainConfig(
            output=str(self.folder / schedule),
            backbone=_without_unet(self.config.backbone),
            bottleneck=self.config.bottleneck,
            data=data,
            stage=StageConfig(name="bottleneck", cosine=1.0, **(alone if schedule == "published" else {})),
            optimiser=OptimiserConfig(warmup_steps=0, grad_clip=None),
            trainer=TrainerConfig(resume=False),
            logger=LoggerConfig(tensorboard=False),
        )

    def trainers(self, schedules: tuple[str, ...], workers: int = 0) -> dict[str, Trainer]:
        """A trainer for each schedule, all of the same codec."""
        from oscar.training.build import build_stage
        from oscar.training.stages.bottleneck import BottleneckStage
        from oscar.training.trainer import Trainer

        configs = {schedule: self.train_config(schedule, workers) for schedule in schedules}
        codec = build_stage(next(iter(configs.values()))).codec
        stages = {name: BottleneckStage(codec, config) for name, config in configs.items()}
        return {name: Trainer(stage, configs[name], self.accelerator) for name, stage in stages.items()}


def make_images(folder: Path, count: int, size: tuple[int, int] = DIV2K_SIZE) -> None:
    """Write JPEG files as costly to decode as photographs of this size: scikit-image's, enlarged, with some noise."""
    sources = find_images()
    random = np.random.default_rng(0)
    for number in range(count):
        image = read_image(sources[number % len(sources)]).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image) + random.normal(0, 4, (size[1], size[0], 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.jpg", quality=95)


def _without_unet(backbone: BackboneConfig) -> BackboneConfig:
    if backbone.source is not None:
        return backbone
    channels = backbone.vae.get("latent_channels", 4)
    return replace(backbone, unet={**_SMALL_UNET, "in_channels": channels, "out_channels": channels})


def measure_schedules(bench: SpeedBench) -> pd.DataFrame:
    """Hyper-encoder steps per second of each schedule, measured in turns, on a batch in memory."""
    config = bench.config
    trainers = bench.trainers(tuple(SCHEDULES))
    rates = len(config.bottleneck.rates)
    steps = {name: rates if name == "published" else 1 for name in trainers}
    calls = {
        name: partial(advance, trainer, repeat(next(trainer._batches(0))), steps[name])
        for name, trainer in trainers.items()
    }
    with _bar("schedules", len(calls) * (config.warmup + config.repeats)) as bar:
        seconds = interleaved(calls, config.repeats, config.warmup, bench.sync, bar.update)
    rows = []
    for name, taken in seconds.items():
        median = float(np.median(taken))
        row = {"schedule": name, "description": SCHEDULES[name], "hyper_steps": rates}
        row |= {"vae_passes": 0 if name == "cached" else steps[name], "seconds": median}
        row |= {"steps_per_s": rates / median, "speedup": paired_ratio(seconds["published"], taken)}
        rows.append({**row, "repeats": config.repeats, "warmup": config.warmup})
    return pd.DataFrame(rows)


class Feed:
    """Passes batches on and adds up the seconds for which the device has nothing to do but wait for them, `waited`."""

    def __init__(self, batches: Iterator[dict], sync: Callable[[], None]) -> None:
        self.batches, self.sync, self.waited = batches, sync, 0.0

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> dict:
        self.sync()
        begin = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - begin
        return batch


def measure_loader(bench: SpeedBench) -> pd.DataFrame:
    """Share of the time that our schedules wait for their next batch, and what the loader gives by itself."""
    config, rows = bench.config, []
    sizes = [path.stat().st_size for path in bench.images()]
    ahead = PREFETCH * config.workers + 1  # batches that are there when the first step ends
    crops = config.batch_size * config.loader_steps
    with _bar("loader", len(OURS) * (ahead + config.loader_steps)) as bar:
        for name, trainer in bench.trainers(OURS, config.workers).items():
            batches = trainer._batches(0)
            for _ in range(ahead):
                next(batches)
            begin = time.perf_counter()
            for _ in range(config.loader_steps):
                next(batches)
            alone = crops / (time.perf_counter() - begin)
            del batches  # and with them their workers
            feed = Feed(trainer._batches(0), bench.sync)
            for step in range(ahead + config.loader_steps):
                if step == ahead:
                    bench.sync()
                    feed.waited, begin = 0.0, time.perf_counter()
                advance(trainer, feed)
                bar.update()
            bench.sync()
            seconds = time.perf_counter() - begin
            row = {"schedule": name, "workers": config.workers, "steps": config.loader_steps, "seconds": seconds}
            row |= {"waited_seconds": feed.waited, "waited_percent": 100 * feed.waited / seconds}
            row |= {"used_crops_per_s": crops / seconds, "alone_crops_per_s": alone}
            rows.append({**row, "images": len(sizes), "mean_file_kib": float(np.mean(sizes)) / 1024})
            del feed
    return pd.DataFrame(rows)


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"training: {what}", unit="call")
