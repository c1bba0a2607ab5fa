"""Evaluation of one codec: one row per image and operating point, over several processes, resumed where it stopped.

What its folder holds is in `results` (the tables) and `rows` (what is done so far).

Every row is on disk before the next image is touched, and a pair of image and point that has one is never scored
again. Tables are merged from the rows by the main process when all are done, whoever scored them and in which order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from tqdm import tqdm

from oscar.data.folders import find_images
from oscar.data.images import list_images
from oscar.evaluation.results import EvaluationError, load_results, means_per_point, missing_notes
from oscar.evaluation.rows import Run
from oscar.metrics.image import metrics_of
from oscar.utils.environment import describe_environment
from oscar.utils.errors import first_line

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oscar.baselines.base import ImageCodec
    from oscar.config import AblateDenoiserConfig, AblateTimestepsConfig, EvaluateConfig
    from oscar.metrics.image import MetricSet


def evaluate_config(config: EvaluateConfig) -> pd.DataFrame:
    """Run the evaluation of a configuration, with progress, and print the means per point; returns the rows.

    Raises:
        ValueError: for an unknown codec, metric, point or device, or a folder without images.
        BaselineUnavailable: if the codec cannot run here.
    """
    import torch

    from oscar.evaluation.codecs import make_codec
    from oscar.metrics.image import MetricSet

    folder = Path(config.data.images)
    images = list_images(folder)[: config.data.limit]
    if not images:
        raise EvaluationError(f"data.images: {folder} holds no image")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config.device)
    device = config.device or accelerator.device
    options = config.options
    if config.codec == "oscar":
        options = {"model": config.model, "device": device, "dtype": config.dtype, "protocol": config.protocol}
    with accelerator.main_process_first():  # it downloads what is to be downloaded
        codec = make_codec(config.codec, **options)
        names = metrics_of(config.protocol, config.metrics.names)
        metrics = MetricSet(names, device, files=config.metrics.files, download=config.metrics.download)
    if accelerator.is_main_process:
        print(f"{codec.label} on {len(images)} images of {folder}, {accelerator.num_processes} process(es)")
        for name, reason in metrics.unavailable.items():
            print(f"metric {name} is unavailable: {reason}", file=sys.stderr)
    output = Path(config.output)
    frame = evaluate(
        codec,
        images,
        metrics,
        output,
        config.points,
        config.save_images,
        accelerator,
        root=folder,
        config=asdict(config),
    )
    if accelerator.is_main_process:
        print(means_per_point(frame).to_string(float_format="{:.4f}".format))
        record = load_results(output)[1]
        if record["failed"]:
            print(
                f"left out of these means: {len(record['failed'])} failure(s), listed in results.json", file=sys.stderr
            )
        for note in missing_notes(frame, metrics.names):
            print(note, file=sys.stderr)
        print(f"rows: {output / 'results.csv'}")
    return frame


def prepare_ablation(config: AblateDenoiserConfig | AblateTimestepsConfig) -> tuple[MetricSet, list[Path]]:
    """The metrics and images of an ablation, whose threads are set.

    Raises:
        ValueError: for a metric that is unknown or has no value per image, or a folder without images.
    """
    import torch

    from oscar.metrics.image import METRICS, MetricSet

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    names = config.metrics.names
    sets = [name for name in names if name in METRICS and METRICS[name].kind == "set"]
    if sets:
        raise EvaluationError(f"metrics.names has {sets[0]}, which has no value per image; allowed: those that do")
    metrics = MetricSet(names, config.device, files=config.metrics.files, download=config.metrics.download)
    return metrics, find_images(config.data.images)[: config.data.limit]


def make_accelerator(device: str | None = None) -> Accelerator:
    """The processes of this run, which wait for each other for as long as it takes.

    Processes share the images whether or not there are GPUs: Accelerate itself takes processes without a GPU for
    unrelated ones unless it is told to use the CPU.

    Raises:
        EvaluationError: for a device that does not exist here.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            raise EvaluationError(f"device {device!r} cannot be used: {first_line(error)}") from None
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    on_cpu = device is not None and torch.device(device).type == "cpu"
    cpu = on_cpu or (several and not torch.cuda.is_available())
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])


def evaluate(
    codec: ImageCodec,
    images: Sequence[Path],
    metrics: MetricSet,
    output: Path,
    points: Sequence[float] | None = None,
    save_images: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    root: Path | None = None,
    config: dict | None = None,
) -> pd.DataFrame:
    """Score a codec on images at some points and write the results; goes on where an earlier run stopped.

    An image that cannot be read, or at which the codec fails, costs one line on stderr and is listed under `failed`
    in results.json; it is tried again when the run is repeated. Points may be added to finished results.

    Args:
        codec: the codec.
        images: image files; a row names each by its path below `root`.
        metrics: what is scored.
        output: folder of the results.
        points: operating points, None for the codec's own.
        save_images: keep decoded images and files; see `saved_image` and `saved_file`.
        accelerator: the processes among which images are divided; None for this one alone.
        progress: show a progress bar.
        root: folder of the images, None for the one that they share.
        config: what results.json records as the resolved configuration.

    Returns:
        The rows, sorted by image and point: image, width, height, codec, point, protocol, nominal_bpp, estimated_bpp,
        actual_bpp (8 * file_bytes over the image's pixels), file_bytes, bytes_<part> ..., <metric> ...,
        encode_seconds, decode_seconds, scored_width, scored_height. What does not exist is NaN.

    Raises:
        EvaluationError: if `output` holds results of another codec, or of other metrics or images, or if no image
            could be scored.
        ValueError: for a point that the codec does not have.
    """
    points = sorted({codec.check_point(point) for point in (codec.points if points is None else points)})
    run = Run(codec, metrics, Path(output), save_images, _names(images, root))
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    def wait() -> None:
        if accelerator is not None:
            accelerator.wait_for_everyone()

    record = run.open_record()
    done = {(row["image"], row["point"]) for row in run.read_rows() if "error" not in row}
    todo = {name: [point for point in points if (name, point) not in done] for name in run.images}
    todo = {name: missing for name, missing in todo.items() if missing}
    wait()  # nobody writes before all have read, so that all divide the same images
    if todo and rank == 0:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record["sessions"].append({"date": date, "processes": processes, **describe_environment()})
        run.write_json(run.record_path, record)
    mine = dict(list(todo.items())[rank::processes])
    total = sum(map(len, mine.values()))
    every = 0.1 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    with tqdm(total=total, desc=codec.name, mininterval=every, disable=rank > 0 or not progress or not total) as bar:
        run.score(mine, rank, bar)
    wait()
    if rank == 0:
        run.merge(record, config)
    wait()
    return load_results(output)[0]


def check_results(
    codec: ImageCodec, images: Sequence[Path], metrics: MetricSet, output: Path, root: Path | None = None
) -> None:
    """Refuse results that `evaluate` with these arguments would not go on with.

    Raises:
        EvaluationError: if `output` holds results of another codec, or of other metrics or images.
    """
    Run(codec, metrics, Path(output), False, _names(images, root)).open_record()


def _names(images: Sequence[Path], root: Path | None) -> dict[str, Path]:
    """Images by their path below `root`, sorted."""
    if not images:
        raise EvaluationError("no images; allowed: one or more")
    paths = [Path(os.path.abspath(path)) for path in images]
    root = Path(os.path.abspath(root)) if root is not None else Path(os.path.commonpath([p.parent for p in paths]))
    return {name: path for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths)}
