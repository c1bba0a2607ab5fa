"""The `oscar` command: compress, decompress, info.

Anything wrong ends in one line on stderr and exit code 2. Help and `info` import no torch, and all that can be checked
without torch is checked before it is imported.
"""

from __future__ import annotations

import functools
import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oscar import __version__
from oscar.jobs import Direction, Job, drop_existing, plan_jobs, write_whole
from oscar.rates import PAPER_RATES, RATES, find_rate

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
OSCAR_SUFFIX = ".oscar"

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
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads on the CPU; by default torch's choice.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
_SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave out what is done already (resume).")]


@app.command(short_help="Picture(s) to .oscar file(s).")
def compress(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Picture, or folder of pictures.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help=".oscar file, or folder.")],
    rate: Annotated[
        float, typer.Option(help=f"Nominal bpp: {', '.join(f'{point.bpp:.4f}' for point in PAPER_RATES)}.")
    ] = 0.0625,
    model: _Model = "nano",
    device: _Device = "cpu",
    overwrite: _Overwrite = False,
    skip_existing: _SkipExisting = False,
    background: Annotated[
        str | None, typer.Option(metavar="#RRGGBB", help="Colour under transparent pixels; without it, refuse them.")
    ] = None,
    threads: _Threads = None,
) -> None:
    """Compress a picture to an .oscar file, or a folder of pictures (recursively) to a folder of them."""
    find_rate(rate, RATES)
    colour = _parse_colour(background)
    direction = Direction(_list_pictures, "picture files", OSCAR_SUFFIX, frozenset({OSCAR_SUFFIX}))
    jobs = plan_jobs(source, target, direction)
    codec = functools.cache(lambda: _load_codec(model, device, threads, rate))

    def convert(job: Job) -> tuple[bytes, str]:
        from oscar.images import read_image

        image = read_image(job.source, colour)
        data = codec().compress(image, rate=rate)
        return data, f"{len(data)} bytes, {8 * len(data) / (image.width * image.height):.4f} bpp (actual)"

    _run(jobs, convert, "compress", source.is_dir(), overwrite, skip_existing)


@app.command(short_help=".oscar file(s) to picture(s).")
def decompress(
    source: Annotated[Path, typer.Argument(metavar="IN", help=".oscar file, or folder of them.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Picture (.png, .ppm, .bmp, .tif, .webp: all lossless), or folder.")
    ],
    model: _Model = "nano",
    device: _Device = "cpu",
    overwrite: _Overwrite = False,
    skip_existing: _SkipExisting = False,
    threads: _Threads = None,
) -> None:
    """Decompress an .oscar file to a picture, or a folder of them (recursively) to a folder of PNG pictures."""
    jobs = plan_jobs(source, target, Direction(_list_oscar, ".oscar files", ".png", frozenset(PICTURE_FORMATS)))
    codec = functools.cache(lambda: _load_codec(model, device, threads))

    def convert(job: Job) -> tuple[bytes, str]:
        from oscar.bitstream import Container

        data = job.source.read_bytes()
        Container.unpack(data)  # a damaged file is refused before the model is loaded
        image = codec().decompress(data)
        return _encode_picture(image, job.target.suffix), f"{image.width}x{image.height} pixels"

    _run(jobs, convert, "decompress", source.is_dir(), overwrite, skip_existing)


@app.command(short_help="What an .oscar file holds.")
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".oscar file, or folder of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON; a list for a folder.")] = False,
) -> None:
    """Show what an .oscar file holds: size, rate, model tag, bits per pixel, bytes by part."""
    from oscar.bitstream import Container

    files = _list_oscar(file) if file.is_dir() else [file]
    if not files:
        raise CommandError(f"{file}: no .oscar files in this folder")
    facts, failed = [], False
    for path in files:
        try:
            facts.append(_facts(path, Container.unpack(path.read_bytes())))
        except (ValueError, OSError) as error:
            failed = True
            _print_error(_one_line(error, path))
    if as_json and facts:
        typer.echo(json.dumps(facts if file.is_dir() else facts[0], indent=2))
    elif facts:
        typer.echo("\n\n".join(_describe(entry) for entry in facts))
    if failed:
        raise typer.Exit(WRONG_INPUT)


def _facts(path: Path, container: Container) -> dict[str, Any]:
    pixels = container.width * container.height
    parts = {name: len(part) for name, part in container.parts().items()}
    size = sum(parts.values())
    return {
        "file": str(path),
        "format_version": container.version,
        "width": container.width,
        "height": container.height,
        "rate": container.rate.bpp,
        "rate_id": container.rate_id,
        "model_tag": f"{container.model_tag:04x}",
        "coding": container.coding.name.lower(),
        "actual_bpp": 8 * size / pixels,
        "nominal_bpp": container.rate.nominal_bits(container.height, container.width) / pixels,
        "bytes": size,
        "parts": parts,
    }


def _describe(facts: dict[str, Any]) -> str:
    lines = [
        ("picture", f"{facts['width']} x {facts['height']} pixels"),
        ("rate", f"{facts['rate']:.4f} (id {facts['rate_id']})"),
        ("model tag", facts["model_tag"]),
        ("coding", facts["coding"]),
        ("actual bpp", f"{facts['actual_bpp']:.4f} (the whole file)"),
        ("nominal bpp", f"{facts['nominal_bpp']:.4f} (indices at fixed length, no header)"),
        ("bytes", f"{facts['bytes']}"),
        *((f"  {name}", f"{size}") for name, size in facts["parts"].items()),
    ]
    return "\n".join([facts["file"], *(f"  {name:<16} {value}" for name, value in lines)])


def _run(
    jobs: list[Job], convert: Callable[[Job], tuple[bytes, str]], verb: str, folder: bool, overwrite: bool, skip: bool
) -> None:
    """Do the jobs; in a folder, a file that fails costs one line and the rest is done."""
    todo = drop_existing(jobs, overwrite, skip)
    if not folder:
        for job in todo:
            typer.echo(f"{job.target}: {_do(job, convert)}")
        return
    failed = _run_folder(todo, convert, verb)
    typer.echo(f"{verb}ed {len(todo) - failed} of {len(jobs)} files"
               + (f", {len(jobs) - len(todo)} existed" if len(todo) < len(jobs) else "")
               + (f", {failed} failed" if failed else ""))  # fmt: skip
    if failed:
        raise typer.Exit(WRONG_INPUT)


def _run_folder(jobs: list[Job], convert: Callable[[Job], tuple[bytes, str]], verb: str) -> int:
    """Do the jobs under a progress bar (on a terminal only); returns how many failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=len(jobs))
        for done, job in enumerate(jobs):
            try:
                job.target.parent.mkdir(parents=True, exist_ok=True)
                _do(job, convert)
            except KeyboardInterrupt:
                progress.stop()
                _print_error(f"interrupted after {done} of {len(jobs)} files; go on with --skip-existing")
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                if not isinstance(error, (ValueError, OSError)) and not _is_out_of_memory(error):
                    raise
                failed += 1
                console.print(_error_line(_one_line(error, job.source)), markup=False, highlight=False)
            progress.advance(task)
    return failed


def _do(job: Job, convert: Callable[[Job], tuple[bytes, str]]) -> str:
    """Read, convert and write one file; returns a remark on the result."""
    try:
        data, remark = convert(job)
    except (ValueError, OSError) as error:
        raise ValueError(_one_line(error, job.source)) from error
    write_whole(job.target, data)
    return remark


def _load_codec(model: str, device: str, threads: int | None, rate: float | None = None) -> OscarCodec:
    """Load the model on its device; all that fails here fails for every file, hence CommandError."""
    import torch

    from oscar import OscarCodec

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {device} is not available here; allowed: cpu, or cuda, mps, ... where "
                           "torch finds one") from error  # fmt: skip
    try:
        codec = OscarCodec.from_pretrained(model, device=device)
        if rate is not None:
            find_rate(rate, codec.rates)
    except (ValueError, OSError) as error:
        raise CommandError(_one_line(error)) from error
    return codec


def _list_pictures(folder: Path) -> list[Path]:
    from oscar.images import list_images

    return list_images(folder)


def _list_oscar(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == OSCAR_SUFFIX and path.is_file())


def _encode_picture(image: Image.Image, suffix: str) -> bytes:
    kind, options = PICTURE_FORMATS[suffix.lower()]
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


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
    return message if path is None or message.startswith(str(path)) else f"{path}: {message}"


def _error_line(message: str) -> str:
    return "oscar: error: " + " ".join(message.splitlines())


def _print_error(message: str) -> None:
    typer.echo(_error_line(message), err=True)
