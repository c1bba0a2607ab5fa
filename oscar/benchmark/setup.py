"""What a benchmark compares: its images, codecs and metrics, and what its parts find out about them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from oscar.baselines.base import BaselineUnavailable, ImageCodec
from oscar.benchmark import tables
from oscar.data.folders import find_images
from oscar.evaluation.codecs import OscarImageCodec, make_codec
from oscar.evaluation.curves import DATASETS, bd_table, dataset_of
from oscar.evaluation.evaluate import make_accelerator
from oscar.evaluation.results import EvaluationError
from oscar.metrics.image import METRICS, MetricSet, metrics_of
from oscar.metrics.protocol import PROTOCOLS
from oscar.utils.errors import first_line
from oscar.utils.tables import Table

if TYPE_CHECKING:
    from oscar.benchmark.speed.timing import TimingResult
    from oscar.config import BenchmarkConfig


@dataclass
class Benchmark:
    """What the parts of a benchmark share, and what they have found so far.

    Attributes:
        config: the whole configuration.
        images: files by name in the rows.
        root: folder below which they are named.
        ours: OSCAR models, one per protocol.
        baselines: the others.
        metrics: what is scored.
        unavailable: codecs and metrics that could not be had, with the reason.
        failed: images at which something failed, with the reason, by codec and image.
        rows: of all codecs, as `evaluate` gives them, and label.
        set_scores: codec, point and set metrics.
        matched: rows of `match_bytes`.
        timing: result of the timing part.
    """

    config: BenchmarkConfig
    images: dict[str, Path]
    root: Path
    ours: list[OscarImageCodec]
    baselines: list[ImageCodec]
    metrics: MetricSet
    unavailable: dict[str, str]
    failed: dict[str, str] = field(default_factory=dict)
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    set_scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    matched: pd.DataFrame = field(default_factory=pd.DataFrame)
    timing: TimingResult | None = None

    @property
    def codecs(self) -> list[ImageCodec]:
        return [*self.ours, *self.baselines]

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def dataset(self) -> str | None:
        """The data set whose published curves belong beside ours."""
        return self.config.data.dataset or dataset_of(self.config.data.images)

    # What follows from the rows; for use when all parts are done.

    @cached_property
    def means(self) -> pd.DataFrame:
        return tables.means_frame(self.rows, self.set_scores, self.metrics.names)

    @property
    def protocols(self) -> list[str]:
        """Those that there are rows of; rows of different ones never stand in one table, plot or BD-rate."""
        return [protocol for protocol in PROTOCOLS if (self.rows["protocol"] == protocol).any()]

    @cached_property
    def matched_means(self) -> pd.DataFrame:
        return tables.matched_frame(self.matched, self.rows, self.metrics.names)

    @cached_property
    def bd(self) -> pd.DataFrame:
        """OSCAR's models against all other codecs of their protocol; without a model, all against each other."""
        codecs = list(dict.fromkeys(self.rows["codec"]))
        ours = [codec.name for codec in self.ours if codec.name in codecs]
        directions = {name: METRICS[name].higher_is_better for name in self.metrics.names if name in self.rows}
        return bd_table(self.rows, directions, ours or codecs, codecs, self.config.bd_method)

    @property
    def timing_table(self) -> Table:
        result = self.timing
        frame = tables.timing_frame(result.latency, result.stages, result.throughput, result.memory, result.macs)
        first = result.latency.iloc[0]
        return tables.timing_table(frame, f"{first['width']}x{first['height']} pixels", int(first["repeats"]))

    @property
    def title(self) -> str:
        """The data set and its size in words."""
        folder = self.config.data.images
        known = DATASETS.get(dataset_of(folder) or "")
        where = known or (Path(folder).absolute().name if folder else "packaged photographs")
        return f"{where}, {len(self.images)} image{'s' * (len(self.images) != 1)}"


def prepare(config: BenchmarkConfig) -> Benchmark:
    """Find the images and build codecs and metrics."""
    accelerator = make_accelerator(config.device)
    device = config.device or accelerator.device
    images, root = _find_images(config)
    unavailable: dict[str, str] = {}
    ours, baselines = _make_codecs(config, device, unavailable)
    for name in config.metrics.names:
        if name not in METRICS:
            unavailable[name] = f"there is no metric of this name; allowed: {', '.join(METRICS)}"
    names = [name for name in config.metrics.names if name in METRICS]
    names = [name for protocol in _protocols([*ours, *baselines]) for name in metrics_of(protocol, names)]
    if not names:
        raise EvaluationError(
            f"none of the metrics {', '.join(config.metrics.names)} exists; allowed: {', '.join(METRICS)}"
        )
    metrics = MetricSet(names, device, files=config.metrics.files, download=config.metrics.download)
    unavailable |= metrics.unavailable
    for name, reason in unavailable.items():
        print(f"{name} is unavailable: {reason}", file=sys.stderr)
    bench = Benchmark(config, images, root, ours, baselines, metrics, unavailable)
    _check_timing(bench)
    print(f"{bench.title}: {', '.join(codec.label for codec in bench.codecs)}", flush=True)
    return bench


def _find_images(config: BenchmarkConfig) -> tuple[dict[str, Path], Path]:
    """Image files by their path below their folder, and the folder."""
    folder = Path(config.data.images).expanduser() if config.data.images else None
    paths = find_images(folder)
    root = folder or paths[0].parent
    return {path.relative_to(root).as_posix(): path for path in paths[: config.data.limit]}, root


def _make_codecs(
    config: BenchmarkConfig, device: object, unavailable: dict[str, str]
) -> tuple[list[OscarImageCodec], list[ImageCodec]]:
    ours, baselines = [], []
    for name, model in config.models.items():
        for protocol in config.protocols:
            codec = make_codec("oscar", model=model, device=device, dtype=config.dtype, protocol=protocol)
            # Checkpoint folders of several runs may share their last name; the configuration's is unique.
            codec.name = codec.name.replace(f"oscar-{codec.model}", f"oscar-{name}", 1)
            codec.label = codec.label.replace(f"OSCAR {codec.model}", f"OSCAR {name}", 1)
            if config.rates is not None and codec.point_name == "rate":
                codec.points = tuple(sorted({codec.check_point(rate) for rate in config.rates}))
            ours.append(codec)
    for key, options in config.baselines.items():
        try:
            baselines.append(make_codec(**options))
        except (BaselineUnavailable, ValueError, TypeError, OSError) as error:
            unavailable[key] = first_line(error)
    names = [codec.name for codec in (*ours, *baselines)]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"{names.count(name)} codecs are called {name}; allowed: one each, by alias=NAME")
    if not names:
        raise EvaluationError(f"no codec is left: {'; '.join(f'{k}: {v}' for k, v in unavailable.items())}")
    return ours, baselines


def _check_timing(bench: Benchmark) -> None:
    """Refuse points that no codec has before anything runs."""
    codecs = {codec.name: codec for codec in bench.codecs}
    for name, points in bench.config.timing.points.items():
        if name not in codecs and name not in bench.unavailable:
            raise EvaluationError(f"timing.points.{name}: no such codec here; allowed: {', '.join(codecs)}")
        for point in points if name in codecs else ():
            codecs[name].check_point(point)


def protocol_of(codec: ImageCodec) -> str:
    return getattr(codec, "protocol", "bitstream")


def _protocols(codecs: Sequence[ImageCodec]) -> list[str]:
    return [protocol for protocol in PROTOCOLS if protocol in map(protocol_of, codecs)]
