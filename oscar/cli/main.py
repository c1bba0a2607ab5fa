"""The `oscar` command: compress, decompress, info; convert, merge; doctor.

Anything wrong ends in one line on stderr and exit code 2. Help and `info` import no torch, and all that can be checked
without torch is checked before it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oscar import __version__
from oscar.rates import PAPER_RATES, RATES, find_rate
from oscar.utils.files import (
    STDIO,
    Direction,
    Job,
    Listing,
    Plan,
    check_stdin,
    drop_existing,
    list_folder,
    plan_jobs,
    read_source,
    write_whole,
)
from oscar.utils.strict_json import dumps

if TYPE_CHECKING:
    from PIL import Image

    from oscar.bitstream import Container
    from oscar.codec import OscarCodec

WRONG_INPUT = 2  # exit code, as of usage errors
INTERRUPTED = 130
# What a decoded picture may be stored as: Pillow's format and options. All are lossless: a lossy one such as JPEG would
# change the pixels once more, and a measurement on it would not be one of this codec.
PICTURE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".ppm": ("PPM", {}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_deflate"}),
    ".webp": ("WEBP", {"lossless": True}),
}
_DEFAULT_FORMAT = ".png"
_MAX_WEBP_SIDE = 16383
_MAX_FILE_BYTES = 2**32 - 1  # of BMP and TIFF, whose offsets have 32 bits
_HEADROOM = 2**24  # of TIFF's tables, and of what its compression may add to noise
OSCAR_SUFFIX = ".oscar"
_STDIN = "standard input"  # in messages
DTYPES = ("float32", "float16", "bfloat16")
_COMPILE = {"off": False, "on": True, "graphs": "graphs"}  # as the codec has them

# Typer has Click within it in some versions and beside it in others; this is the base of both's usage errors.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(name="oscar", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="OSCAR image codec: one model, many bit-rates, one denoising step.")  # fmt: skip


class CommandError(Exception):
    """A command that cannot go on, whichever file it is at; the message is the line that the user sees."""


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments without the program's name; None takes the process's.

    Returns:
        The exit code: 0, 2 for any wrong input, 130 after an interrupt.
    """
    args = sys.argv[1:] if args is None else args
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; stderr is for the one line
    with _warnings_as_lines():
        return _main(args)


def _main(args: list[str]) -> int:
    try:
        return app(args=args or ["--help"], prog_name="oscar", standalone_mode=False) or 0
    except _UsageError as error:
        command = getattr(error.ctx, "command_path", "oscar")
        _print_error(f"{error.format_message().rstrip('.')}; see {command} --help")
    except typer.Abort:
        return INTERRUPTED
    except (CommandError, ValueError, OSError) as error:  # ours derive from ValueError
        _print_error(_one_line(error))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        _print_error(_one_line(error))
    return WRONG_INPUT


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print what this package logs as a warning in one line."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _print_note(f"warning: {record.getMessage()}")

    handler, logger = Lines(logging.WARNING), logging.getLogger("oscar")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False  # once, also where logging is set up
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


_Model = Annotated[str, typer.Option(help="nano, a model folder, or an id on the hub.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
_Dtype = Annotated[
    str,
    typer.Option(help=f"Of the networks: {', '.join(('auto', *DTYPES))}; auto is float32 for models below 100 M "
                 "parameters, else what the device is fast in."),
]
_Compile = Annotated[
    str, typer.Option("--compile", help="torch.compile: off, on, graphs (CUDA graphs too). Pays in folders.")
]
_Memory = Annotated[
    str, typer.Option(help="For large pictures, beyond the model: auto (by what is free), a size such as 4GB, none.")
]
_Backbone = Annotated[
    str | None, typer.Option(help="Where the model's backbone is now, if it has moved.", show_default=False)
]
_BatchSize = Annotated[int, typer.Option(min=1, help="Of a folder, files that go through the networks together.")]
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads on the CPU; by default torch's choice.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
_SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave out what is done already (resume).")]


@app.command(short_help="Picture(s) to .oscar file(s).")
def compress(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Image of a kind that Pillow reads, folder of them, or - for stdin.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help=".oscar file, folder, or - for stdout.")],
    rate: Annotated[
        float | None,
        typer.Option(help=f"Nominal bpp: {', '.join(f'{point.bpp:.4f}' for point in PAPER_RATES)}. By default 0.0625."),
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
        typer.Option(help="Operating point of a model with a bottleneck of its own; of others rate or quality.",
                     show_default=False),
    ] = None,
    model: _Model = "nano",
    device: _Device = "cpu",
    overwrite: _Overwrite = False,
    skip_existing: _SkipExisting = False,
    background: Annotated[
        str | None, typer.Option(metavar="#RRGGBB", help="Colour under transparent pixels; without it, refuse them.")
    ] = None,
    frame: Annotated[
        int | None,
        typer.Option(min=1, help="Of animations and files of several pages, from 1; by default the first.",
                     show_default=False),
    ] = None,
    threads: _Threads = None,
    dtype: _Dtype = "auto",
    compile: _Compile = "off",
    memory: _Memory = "auto",
    batch_size: _BatchSize = 1,
    backbone: _Backbone = None,
) -> None:
    """Compress an image to an .oscar file, or a folder of images (recursively) to a folder of them.

    Colour profiles are converted to sRGB. In folders, names that begin with a dot are passed over; a.jpg becomes
    a.oscar, but beside an a.png it becomes a.jpg.oscar."""
    points = {"rate": rate, "quality": quality, "point": point}
    target_bytes = _target(points, effort, bpp, max_bytes)
    if rate is not None:
        find_rate(rate, RATES)
    if quality is not None and not 0 <= quality <= 1:
        raise CommandError(f"--quality is {quality}; allowed: 0 to 1")
    colour = _parse_colour(background)
    plan = plan_jobs(source, target, Direction(_list_images, "images", OSCAR_SUFFIX, frozenset({OSCAR_SUFFIX})))
    options = _network_options(dtype, compile, memory, components="encoder", backbone=backbone)
    codec = functools.cache(lambda: _check_point(_load_codec(model, device, threads, **options), points, effort))
    several: dict[Path, int] = {}  # files of more than one frame, and of how many

    def convert(batch: list[Job]) -> list[tuple[bytes, str]]:
        pictures = [_read_image(job.source, colour, frame) for job in batch]
        several.update(
            {job.source: picture.info["frames"]
             for job, picture in zip(batch, pictures, strict=True) if picture.info["frames"] > 1}
        )  # fmt: skip
        if target_bytes is None:
            chosen = next((value for value in points.values() if value is not None), None)
            files = codec().compress_batch(pictures, chosen, effort)
        else:
            files = [codec().compress(picture, max_bytes=target_bytes(picture)) for picture in pictures]
        return [
            (data, f"{len(data)} bytes, {8 * len(data) / (picture.width * picture.height):.4f} bpp (actual)")
            for picture, data in zip(pictures, files, strict=True)
        ]

    def note_frames() -> None:
        if several and frame is None:
            _print_note(_frames_note(several))

    _run(plan, convert, "compress", overwrite, skip_existing, batch_size, note_frames)


@app.command(short_help=".oscar file(s) to picture(s).")
def decompress(
    source: Annotated[Path, typer.Argument(metavar="IN", help=".oscar file, folder of them, or - for stdin.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Image (.png, .ppm, .bmp, .tif, .webp: lossless), folder, or - for stdout."),
    ],
    image_format: Annotated[
        str | None,
        typer.Option("--format", help="Of images in a folder and on stdout: png (default), ppm, bmp, tif, webp.",
                     show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="As for compress; by default the one in the package for such files.", show_default=False),
    ] = None,
    device: _Device = "cpu",
    overwrite: _Overwrite = False,
    skip_existing: _SkipExisting = False,
    threads: _Threads = None,
    dtype: _Dtype = "auto",
    compile: _Compile = "off",
    memory: _Memory = "auto",
    batch_size: _BatchSize = 1,
    backbone: _Backbone = None,
    tiny_vae: Annotated[
        str | None, typer.Option(help="Folder or hub id of a diffusers AutoencoderTiny, for quick previews.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Show what there is of files whose end is missing; damage is not noticed.")
    ] = False,
) -> None:
    """Decompress an .oscar file to an image, or a folder of them (recursively) to a folder of images.

    Images are in sRGB, and .png, .tif and .webp say so."""
    suffix = _image_suffix(image_format, target)
    plan = plan_jobs(source, target, Direction(_list_oscar, ".oscar files", suffix, frozenset(PICTURE_FORMATS)))
    options = _network_options(dtype, compile, memory, components="decoder", backbone=backbone, tiny_vae=tiny_vae)
    codec = functools.cache(lambda name: _load_codec(name, device, threads, **options))

    def convert(batch: list[Job]) -> list[tuple[bytes, str]]:
        from oscar.bitstream import Container

        files = [read_source(job.source) for job in batch]
        suffixes = [suffix if job.target == STDIO else job.target.suffix.lower() for job in batch]
        # What is damaged or too large is refused before a model is loaded.
        containers = [Container.unpack(data, whole=not partial) for data in files]
        for container, kind in zip(containers, suffixes, strict=True):
            _check_size(container.width, container.height, kind)
        models = [model or _shipped_model(container) for container in containers]
        if partial:
            previews = [codec(name).decompress_prefix(data) for name, data in zip(models, files, strict=True)]
            return [
                (_encode_image(image, kind), f"{image.width}x{image.height} pixels from {share:.0%} of the symbols")
                for kind, (image, share) in zip(suffixes, previews, strict=True)
            ]  # fmt: skip
        groups = {name: [data for of, data in zip(models, files, strict=True) if of == name] for name in models}
        images = {name: iter(codec(name).decompress_batch(group)) for name, group in groups.items()}
        return [
            (_encode_image(image, kind), f"{image.width}x{image.height} pixels")
            for kind, image in ((kind, next(images[name])) for kind, name in zip(suffixes, models, strict=True))
        ]

    _run(plan, convert, "decompress", overwrite, skip_existing, batch_size)


@app.command(short_help="What an .oscar file holds, or how a model was trained.")
def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help=".oscar file, folder of them, - for stdin, or model folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON; a list for a folder of files.")] = False,
) -> None:
    """Show what an .oscar file holds: size, rate, model tag, bits per pixel, bytes by part; or of a model folder (or
    the name of a model in the package) what it is and how it was trained."""
    from oscar.bitstream import Container
    from oscar.utils.provenance import as_text, read_model

    model = None if file == STDIO else read_model(file)
    if model is not None:
        typer.echo(dumps(model, indent=2) if as_json else as_text(model))
        return
    check_stdin(file)
    is_folder = file != STDIO and file.is_dir()
    listing = _list_oscar(file) if is_folder else Listing([file])
    if not listing.files:
        _print_note(f"{file}: no .oscar files in this folder")
    facts, failed = [], bool(listing.errors)
    for error in listing.errors:
        _print_error(_one_line(error))
    for path in listing.files:
        try:
            facts.append(_facts(path, Container.unpack(read_source(path))))
        except (ValueError, OSError) as error:
            failed = True
            _print_error(_one_line(error, path))
    if as_json and (facts or is_folder):
        typer.echo(dumps(facts if is_folder else facts[0], indent=2))
    elif facts:
        typer.echo("\n\n".join(_describe(entry) for entry in facts))
    if failed:
        raise typer.Exit(WRONG_INPUT)


@app.command(short_help="A published checkpoint to a model folder, and back.")
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="IN...", help="A published .pkl, or stage 1's, one per rate; with --back a model."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder; with --back a .pkl file.")],
    backbone: Annotated[
        str | None, typer.Option(help="Diffusers folder or hub id of the backbone that IN was trained on.")
    ] = None,
    bundle: Annotated[bool, typer.Option("--bundle", help="Store the backbone in OUT too.")] = False,
    dtype: Annotated[str, typer.Option(help=f"Of OUT's files: {', '.join(DTYPES)}.")] = DTYPES[0],
    timesteps: Annotated[
        str, typer.Option(help="Mapping of rates to pseudo-timesteps: table (the paper's), log, linear.")
    ] = "table",
    back: Annotated[bool, typer.Option("--back", help="Write a model of ours in the published layout.")] = False,
    overwrite: _Overwrite = False,
) -> None:
    """Convert a checkpoint of the published implementation (oscar.pkl) to a model folder, or with --back one of ours to
    a .pkl."""
    if os.path.lexists(target) and not overwrite:
        raise CommandError(f"{target}: exists already; allow it with --overwrite")
    if back:
        if len(sources) > 1 or backbone is not None or bundle:
            raise CommandError("--back takes one model, and neither --backbone nor --bundle")
        if not target.parent.is_dir():
            raise CommandError(f"{target}: folder {target.parent} does not exist")
        _export(sources[0], target)
        return
    if backbone is None:
        raise CommandError("--backbone is missing; allowed: a diffusers folder or hub id")
    if dtype not in DTYPES:
        raise CommandError(f"--dtype {dtype!r} does not exist; allowed: {', '.join(DTYPES)}")
    for source in sources:
        if not Path(source).is_file():
            raise CommandError(f"{source}: no such file")
    _import(sources, target, backbone, timesteps, bundle, dtype)


@app.command(short_help="Rates that were trained apart to one model.")
def merge(
    sources: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders or hub ids.")],
    target: Annotated[Path, typer.Option("--out", metavar="OUT", help="Model folder.")],
    overwrite: _Overwrite = False,
) -> None:
    """Put rates that were trained apart, on one backbone, into one model folder."""
    if os.path.lexists(target) and not overwrite:
        raise CommandError(f"{target}: exists already; allow it with --overwrite")
    from oscar.convert.merge import merge_rates

    codec = merge_rates(sources, target)
    typer.echo(f"{target}: rates {_rate_list(codec)}")


@app.command(short_help="What is here, what is missing, and how to get it.")
def doctor(
    backbone: Annotated[
        list[str] | None, typer.Option(help="A backbone to look at too: folder or hub id; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say which devices, backbones, weights of metrics, packages and programs are here, and how to get the others."""
    from oscar.cli.doctor import as_table, examine

    findings = examine(backbone or ())
    if as_json:
        typer.echo(dumps([vars(finding) for finding in findings], indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(as_table(findings))


def _target(
    points: dict[str, float | None], effort: int, bpp: float | None, max_bytes: int | None
) -> Callable[[Image.Image], int] | None:
    """The most bytes that a picture's file may have, None without a target."""
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
        return lambda picture: max_bytes
    return lambda picture: int(bpp * picture.height * picture.width / 8)


def _shipped_model(container: Container) -> str:
    """The model in the package whose kind of file this is (ValueError if there is none)."""
    from oscar.bitstream import Coding

    if container.coding == Coding.EXTERNAL:
        raise ValueError(f"was written by a model with {container.coding.model}; allowed: its --model")
    return "nano-hyperprior" if container.coding == Coding.HYPERPRIOR else "nano"


def _import(sources: list[str], target: Path, backbone: str, timesteps: str, bundle: bool, dtype: str) -> None:
    """Convert published files, and say what became of their tensors."""
    import torch

    from oscar.convert import published

    mapping = {"kind": timesteps}
    result = published.convert(sources, target, backbone, mapping, bundle, getattr(torch, dtype))
    lines = [f"{target}: rates {_rate_list(result.codec)}", f"{result.used:>6} tensors taken over"]
    lines += [f"{count:>6} not needed: {reason}" for reason, count in result.unused.items()]
    typer.echo("\n".join(lines))


def _export(source: str, target: Path) -> None:
    from oscar.convert.published import export

    codec = export(source, target)
    typer.echo(f"{target}: rates {_rate_list(codec)}; frequency tables and context models have no place in it")


def _rate_list(codec: OscarCodec) -> str:
    return ", ".join(map(codec.bottleneck.label, codec.bottleneck.points))


def _facts(path: Path, container: Container) -> dict[str, Any]:
    pixels = container.width * container.height
    parts = {name: len(part) for name, part in container.parts().items()}
    size = sum(parts.values())
    return {
        "file": str(path),
        "format_version": container.version,
        "width": container.width,
        "height": container.height,
        **container.point_facts(),
        "model_tag": f"{container.model_tag:04x}",
        "coding": container.coding.name.lower(),
        "actual_bpp": 8 * size / pixels,
        "bytes": size,
        "parts": parts,
    }


def _describe(facts: dict[str, Any]) -> str:
    if "quality" in facts:
        point = ("quality", f"{facts['quality']:.4f}")
    elif "rate" in facts:
        point = ("rate", f"{facts['rate']:.4f} (id {facts['rate_id']})")
    else:
        point = ("operating point", f"{facts['point_code']} (of a bottleneck of the model's own)")
    lines = [
        ("picture", f"{facts['width']} x {facts['height']} pixels"),
        point,
        ("model tag", facts["model_tag"]),
        ("coding", facts["coding"]),
        ("actual bpp", f"{facts['actual_bpp']:.4f} (the whole file)"),
        *([("nominal bpp", f"{facts['nominal_bpp']:.4f} (indices at fixed length, no header)")]
          if "nominal_bpp" in facts else []),
        ("bytes", f"{facts['bytes']}"),
        *((f"  {name}", f"{size}") for name, size in facts["parts"].items()),
    ]
    return "\n".join([facts["file"], *(f"  {name:<16} {value}" for name, value in lines)])


_Convert = Callable[[list[Job]], list[tuple[bytes, str]]]  # files to write, each with a remark on it


def _run(
    plan: Plan,
    convert: _Convert,
    verb: str,
    overwrite: bool,
    skip: bool,
    batch_size: int,
    close: Callable[[], None] = lambda: None,
) -> None:
    """Do the jobs, then `close`; in a folder, a file that fails costs one line and the rest is done."""
    todo = drop_existing(plan, overwrite, skip)
    if not plan.is_folder:
        for job in todo:
            remark = _do([job], convert)[0]
            if job.target == STDIO:
                _print_note(f"standard output: {remark}")
            else:
                typer.echo(f"{job.target}: {remark}")
        close()
        return
    for note in plan.notes:
        _print_note(note)
    for error in plan.errors:
        _print_error(_one_line(error))
    failed = _run_folder(todo, convert, verb, batch_size)
    close()
    total = len(plan.jobs)
    typer.echo(f"{verb}ed {len(todo) - failed} of {total} files"
               + (f", {total - len(todo)} existed" if len(todo) < total else "")
               + (f", {failed} failed" if failed else ""))  # fmt: skip
    if failed or plan.errors:
        raise typer.Exit(WRONG_INPUT)


def _run_folder(jobs: list[Job], convert: _Convert, verb: str, batch_size: int) -> int:
    """Do the jobs under a progress bar (on a terminal only); returns how many failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = failed = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=len(jobs))
        waiting = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        while waiting:
            batch = waiting.pop(0)
            try:
                for job in batch:
                    job.target.parent.mkdir(parents=True, exist_ok=True)
                _do(batch, convert)
            except KeyboardInterrupt:
                progress.stop()
                _print_error(f"interrupted after {done} of {len(jobs)} files; go on with --skip-existing")
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                if not isinstance(error, (ValueError, OSError)) and not _is_out_of_memory(error):
                    raise
                if len(batch) > 1:  # one by one, only what fails is lost
                    waiting[:0] = [[job] for job in batch]
                    continue
                failed += 1
                console.print(_error_line(_one_line(error, batch[0].source)), markup=False, highlight=False)
            done += len(batch)
            progress.advance(task, len(batch))
    return failed


def _do(batch: list[Job], convert: _Convert) -> list[str]:
    """Read, convert and write files; returns a remark on each result."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # which is for results
            results = convert(batch)
    except (ValueError, OSError) as error:
        raise ValueError(_one_line(error, batch[0].source)) from error
    for job, (data, _) in zip(batch, results, strict=True):
        _write(job.target, data)
    return [remark for _, remark in results]


def _network_options(dtype: str, compile: str, memory: str, **others: Any) -> dict[str, Any]:
    """Arguments of `oscar.load` but for the dtype, which is still a name; checked without torch."""
    for name, value, allowed in (("dtype", dtype, ("auto", *DTYPES)), ("compile", compile, tuple(_COMPILE))):
        if value not in allowed:
            raise CommandError(f"--{name} {value!r} does not exist; allowed: {', '.join(allowed)}")
    return {"dtype": dtype, "compile": _COMPILE[compile], "memory": None if memory == "none" else memory, **others}


def _check_point(codec: OscarCodec, points: dict[str, float | None], effort: int) -> OscarCodec:
    """Refuse, for every file, an operating point or an effort that the model does not have."""
    bottleneck = codec.bottleneck
    own = bottleneck.point_name if bottleneck.point_name in points else "point"
    few = len(bottleneck.points) == len(bottleneck.all_points)  # else they are too many to list
    allowed = f"--{own} {', '.join(map(bottleneck.label, bottleneck.points))}" if few else f"--{own}"
    for name, value in points.items():
        if value is None:
            continue
        if name not in (own, "point"):
            raise CommandError(f"--{name} is {value}, but this model has {bottleneck.point_words}; "
                               f"allowed: {allowed}")  # fmt: skip
        try:
            bottleneck.parse(value)
        except ValueError as error:
            raise CommandError(_one_line(error)) from error
    if effort > bottleneck.max_effort:
        raise CommandError(f"--effort is {effort}, but this model has {bottleneck.point_words}; "
                           f"allowed: {allowed}")  # fmt: skip
    return codec


def _load_codec(
    model: str, device: str, threads: int | None, dtype: str = "auto", **options: Any
) -> OscarCodec:
    """Load the model on its device; all that fails here fails for every file, hence CommandError."""
    import torch

    from oscar.inference.load import load

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {device} is not available here; allowed: cpu, or cuda, mps, ... where "
                           "torch finds one") from error  # fmt: skip
    try:
        precision = "auto" if dtype == "auto" else getattr(torch, dtype)
        return load(model, device, precision, **options)
    except (ValueError, OSError) as error:
        raise CommandError(_one_line(error)) from error


def _list_images(folder: Path) -> Listing:
    from oscar.data.images import scan_images

    return scan_images(folder)


def _list_oscar(folder: Path) -> Listing:
    return list_folder(folder, frozenset({OSCAR_SUFFIX}))


def _read_image(path: Path, background: tuple[int, int, int] | None, frame: int | None) -> Image.Image:
    from oscar.data.images import read_image

    if path == STDIO:
        return read_image(io.BytesIO(read_source(path)), background, frame, name=_STDIN)
    return read_image(path, background, frame)


def _frames_note(several: dict[Path, int]) -> str:
    path, frames = next(iter(several.items()))
    if len(several) > 1:
        return f"{len(several)} files have several frames, and the first is taken; --frame N takes another"
    return f"{_name(path)}: has {frames} frames, and the first is taken; --frame N takes another"


def _image_suffix(image_format: str | None, target: Path) -> str:
    """The suffix of --format, which must not contradict a file's."""
    if image_format is None:
        return _DEFAULT_FORMAT
    suffix = f".{image_format.lower()}"
    if suffix not in PICTURE_FORMATS:
        allowed = ", ".join(name[1:] for name in PICTURE_FORMATS)
        raise CommandError(f"--format {image_format!r} does not exist; allowed: {allowed}")
    other = PICTURE_FORMATS.get(target.suffix.lower())
    if other not in (None, PICTURE_FORMATS[suffix]) and not target.is_dir():
        raise CommandError(f"--format is {image_format}, but OUT is {target}; allowed: the same in both")
    return suffix


def _check_size(width: int, height: int, suffix: str) -> None:
    """Refuse what the format of an image file cannot hold."""
    kind, _ = PICTURE_FORMATS[suffix]
    row = {"BMP": -(-3 * width // 4) * 4, "TIFF": 3 * width}.get(kind, 0)
    limit = {"BMP": _MAX_FILE_BYTES - 54, "TIFF": _MAX_FILE_BYTES - _HEADROOM}.get(kind, 0)
    if kind == "WEBP" and max(width, height) > _MAX_WEBP_SIDE:
        allowed = f"up to {_MAX_WEBP_SIDE} a side"
    elif row * height > limit:
        allowed = f"up to {limit} bytes of pixels"
    else:
        return
    raise ValueError(f"{width}x{height} pixels do not fit into {suffix}; allowed: {allowed}, or .png")


def _encode_image(image: Image.Image, suffix: str) -> bytes:
    from oscar.data.images import srgb_mark

    kind, options = PICTURE_FORMATS[suffix]
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options, **srgb_mark(kind))
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    if path == STDIO:
        rest = memoryview(data)
        while rest:  # with PYTHONUNBUFFERED a call may write a part
            rest = rest[sys.stdout.buffer.write(rest) :]
        sys.stdout.buffer.flush()
    else:
        write_whole(path, data)


def _parse_colour(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text)
    if match is None:
        raise CommandError(f"--background {text!r} is not a colour; allowed: #rrggbb, such as '#ffffff'")
    red, green, blue = (int(part, 16) for part in match.groups())
    return red, green, blue


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower())


def _one_line(error: BaseException, path: Path | None = None) -> str:
    """The error's message in one line that begins with the path it is about."""
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif _is_out_of_memory(error):
        message = "not enough memory"
    else:
        message = " ".join(str(error).split()) or type(error).__name__
    return message if path is None or message.startswith(_name(path)) else f"{_name(path)}: {message}"


def _name(path: Path) -> str:
    return _STDIN if path == STDIO else str(path)


def _error_line(message: str) -> str:
    return "oscar: error: " + " ".join(message.splitlines())


def _print_error(message: str) -> None:
    typer.echo(_error_line(message), err=True)


def _print_note(message: str) -> None:
    typer.echo("oscar: " + " ".join(message.splitlines()), err=True)
