"""`oscar compress`: images to .oscar files."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oscar.cli import loading
from oscar.cli.engine import Engine
from oscar.cli.image_files import frames_note, list_images, parse_colour, read_image
from oscar.cli.jobs import OSCAR_SUFFIX, BatchSize, Overwrite, SkipExisting, Work, run
from oscar.cli.loading import Backbone, Compile, Device, Dtype, Memory, Model, Threads, check_point, network_options
from oscar.cli.messages import CommandError, print_note
from oscar.cli.processes import group
from oscar.rates import RATES, find_rate
from oscar.utils.files import STDIO, Direction, Job, plan_jobs

if TYPE_CHECKING:
    from PIL import Image


def compress(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Image of a kind that Pillow reads, folder of them, or - for stdin.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help=".oscar file, folder, or - for stdout.")],
    rate: Annotated[
        float | None,
        typer.Option(
            help=f"Nominal bpp, for models with rates: {', '.join(f'{point.bpp:.4f}' for point in RATES)}.",
            show_default=False,
        ),
    ] = None,
    effort: Annotated[
        int, typer.Option(min=0, max=9, help="Trade a little quality for smaller files: 0 (not at all) to 9.")
    ] = 0,
    bpp: Annotated[
        float | None, typer.Option(help="Actual bpp at most: the best rate and least effort that fit.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Bytes of each file at most, likewise.")] = None,
    quality: Annotated[
        float | None, typer.Option(help="0 to 1, for models with a hyperprior; by default 0.5.", show_default=False)
    ] = None,
    point: Annotated[
        float | None,
        typer.Option(
            help="Operating point of a model with a bottleneck of its own; of others rate or quality.",
            show_default=False,
        ),
    ] = None,
    model: Model = "nano",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    background: Annotated[
        str | None, typer.Option(metavar="#RRGGBB", help="Colour under transparent pixels; without it, refuse them.")
    ] = None,
    frame: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of animations and files of several pages, from 1; by default the first.", show_default=False
        ),
    ] = None,
    threads: Threads = None,
    dtype: Dtype = "auto",
    compile: Compile = "off",
    memory: Memory = "auto",
    engine: Engine = "auto",
    batch_size: BatchSize = 1,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Of a folder, threads that read images ahead.")] = 1,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Table to write: file, bytes, bpp, seconds of each.", show_default=False),
    ] = None,
    backbone: Backbone = None,
) -> None:
    """Compress an image to an .oscar file, or a folder of images (recursively) to a folder of them.

    Colour profiles are converted to sRGB. In folders, names that begin with a dot are passed over; a.jpg becomes
    a.oscar, but beside an a.png it becomes a.jpg.oscar. Processes that torchrun starts share a folder's files; with
    --device cuda each takes a GPU."""
    group()  # before anything is said, which all its processes would say
    points = {"rate": rate, "quality": quality, "point": point}
    target_bytes = _target(points, effort, bpp, max_bytes)
    if rate is not None:
        find_rate(rate)
    if quality is not None and not 0 <= quality <= 1:
        raise CommandError(f"--quality is {quality}; allowed: 0 to 1")
    colour = parse_colour(background)
    plan = plan_jobs(source, target, Direction(list_images, "images", OSCAR_SUFFIX, frozenset({OSCAR_SUFFIX})))
    options = network_options(dtype, compile, memory, engine, device, components="encoder", backbone=backbone)
    codec = functools.cache(lambda: check_point(loading.load_codec(model, device, threads, **options), points, effort))
    several: dict[Path, int] = {}  # files of more than one frame, and of how many

    def read(job: Job) -> Image.Image:
        image = read_image(job.source, colour, frame)
        if image.info["frames"] > 1:
            several[job.source] = image.info["frames"]
        return image

    def convert(jobs: list[Job], images: list[Image.Image]) -> list[tuple[bytes, str]]:
        if target_bytes is None:
            chosen = next((value for value in points.values() if value is not None), None)
            files = codec().compress_batch(images, chosen, effort)
        else:
            files = [codec().compress(image, max_bytes=target_bytes(image)) for image in images]
        return [
            (data, f"{len(data)} bytes, {8 * len(data) / (image.width * image.height):.4f} bpp (actual)")
            for image, data in zip(images, files, strict=True)
        ]

    def note_frames() -> None:
        if several and frame is None:
            print_note(frames_note(several))

    work = Work("compress", read, convert, prepare=codec, close=note_frames)
    table = None
    if manifest is not None:
        if target == STDIO:
            raise CommandError("--manifest and standard output exclude each other")
        table = manifest, target if target.is_dir() or plan.is_folder else target.parent
    run(plan, work, overwrite, skip_existing, batch_size, workers, table)


def _target(
    points: dict[str, float | None], effort: int, bpp: float | None, max_bytes: int | None
) -> Callable[[Image.Image], int] | None:
    """The most bytes that an image's file may have, None without a target."""
    options = {**{f"--{name}": value for name, value in points.items()}, "--bpp": bpp, "--max-bytes": max_bytes}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise CommandError(f"{' and '.join(given)} exclude each other")
    if bpp is None and max_bytes is None:
        return None
    if effort:
        raise CommandError(f"--effort and {given[0]} exclude each other, since the effort is chosen to fit")
    if not 0 < options[given[0]] < math.inf:
        raise CommandError(f"{given[0]} is {options[given[0]]}; allowed: above 0")
    if max_bytes is not None:
        return lambda image: max_bytes
    return lambda image: int(bpp * image.height * image.width / 8)
