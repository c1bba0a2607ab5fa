"""`oscar decompress`: .oscar files to images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oscar.cli import loading
from oscar.cli.engine import Engine
from oscar.cli.image_files import IMAGE_FORMATS, check_size, encode_image, image_suffix
from oscar.cli.jobs import BatchSize, Overwrite, SkipExisting, Work, list_oscar, run
from oscar.cli.loading import Backbone, Compile, Device, Dtype, Memory, Threads, network_options
from oscar.cli.processes import group
from oscar.utils.files import STDIO, Direction, Job, plan_jobs, read_source

if TYPE_CHECKING:
    from oscar.bitstream import Container


def decompress(
    source: Annotated[Path, typer.Argument(metavar="IN", help=".oscar file, folder of them, or - for stdin.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Image (.png, .ppm, .bmp, .tif, .webp: lossless), folder, or - for stdout."),
    ],
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of images in a folder and on stdout: png (default), ppm, bmp, tif, webp.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="As for compress; by default the one in the package for such files.", show_default=False),
    ] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    threads: Threads = None,
    dtype: Dtype = "auto",
    compile: Compile = "off",
    memory: Memory = "auto",
    engine: Engine = "auto",
    batch_size: BatchSize = 1,
    backbone: Backbone = None,
    tiny_vae: Annotated[
        str | None, typer.Option(help="Folder or hub id of a diffusers AutoencoderTiny, for quick previews.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Show what there is of files whose end is missing; damage is not noticed.")
    ] = False,
) -> None:
    """Decompress an .oscar file to an image, or a folder of them (recursively) to a folder of images.

    Images are in sRGB, and .png, .tif and .webp say so."""
    group()  # before anything is said, which all its processes would say
    suffix = image_suffix(image_format, target)
    plan = plan_jobs(source, target, Direction(list_oscar, ".oscar files", suffix, frozenset(IMAGE_FORMATS)))
    options = network_options(
        dtype, compile, memory, engine, device, components="decoder", backbone=backbone, tiny_vae=tiny_vae
    )
    codec = functools.cache(lambda name: loading.load_codec(name, device, threads, **options))

    def convert(jobs: list[Job], files: list[bytes]) -> list[tuple[bytes, str]]:
        from oscar.bitstream import Container

        suffixes = [suffix if job.target == STDIO else job.target.suffix.lower() for job in jobs]
        # What is damaged or too large is refused before a model is loaded.
        containers = [Container.unpack(data, whole=not partial) for data in files]
        for container, kind in zip(containers, suffixes, strict=True):
            check_size(container.width, container.height, kind)
        models = [model or _shipped_model(container) for container in containers]
        if partial:
            previews = [codec(name).decompress_prefix(data) for name, data in zip(models, files, strict=True)]
            return [
                (encode_image(image, kind), f"{image.width}x{image.height} pixels from {share:.0%} of the symbols")
                for kind, (image, share) in zip(suffixes, previews, strict=True)
            ]
        groups = {name: [data for of, data in zip(models, files, strict=True) if of == name] for name in models}
        images = {name: iter(codec(name).decompress_batch(group)) for name, group in groups.items()}
        return [
            (encode_image(image, kind), f"{image.width}x{image.height} pixels")
            for kind, image in ((kind, next(images[name])) for kind, name in zip(suffixes, models, strict=True))
        ]

    work = Work("decompress", lambda job: read_source(job.source), convert)
    run(plan, work, overwrite, skip_existing, batch_size)


def _shipped_model(container: Container) -> str:
    """The model in the package whose kind of file this is (ValueError if there is none)."""
    from oscar.bitstream import Coding

    if container.coding == Coding.EXTERNAL:
        raise ValueError(f"was written by a model with {container.coding.model}; allowed: its --model")
    return loading.SHIPPED["quality" if container.coding == Coding.HYPERPRIOR else "rate"]
