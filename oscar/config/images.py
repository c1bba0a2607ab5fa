"""Schemas of images, and of the metrics that they are scored by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from oscar.config.checks import ConfigError, at_least, choose


@dataclass
class ImagesConfig:
    """Images to evaluate on."""

    images: str | None = None
    """folder, searched recursively"""
    limit: int | None = None
    """only so many, the first in the order of their paths"""

    def check(self) -> None:
        if self.images is None:
            raise ConfigError("data.images is unset; allowed: a folder of images")
        at_least("data.limit", self.limit, 1)


@dataclass
class PackagedImagesConfig(ImagesConfig):
    """Images to measure; without a folder scikit-image's packaged photographs."""

    def check(self) -> None:
        at_least("data.limit", self.limit, 1)


@dataclass
class BenchmarkImagesConfig(ImagesConfig):
    """Images of a benchmark; without a folder scikit-image's packaged photographs."""

    dataset: str | None = None
    """whose published curves are drawn beside ours: kodak, div2k_val, clic2020; None goes by the folder's name"""

    def check(self) -> None:
        choose("data.dataset", self.dataset, (None, "kodak", "div2k_val", "clic2020"))
        at_least("data.limit", self.limit, 1)


@dataclass
class MetricsConfig:
    """Which metrics are scored (`oscar.metrics.image.METRICS`), and where their weights come from."""

    names: list[str] = field(default_factory=lambda: ["psnr", "ms_ssim"])
    files: dict[str, str] = field(default_factory=dict)
    """local weight files by name, used in place of downloads"""
    download: bool = False
    """fetch weights that are not there; without it such a metric is reported as unavailable"""

    def check(self) -> None:
        if not self.names:
            raise ConfigError("metrics.names is empty; allowed: one or more metrics")
        for name, path in self.files.items():
            if not Path(path).exists():
                raise ConfigError(f"metrics.files.{name} is {path!r}, which does not exist; allowed: a weight file")
