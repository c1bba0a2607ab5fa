"""The `oscar` command: compress, decompress, info; convert, merge; doctor.

Anything wrong ends in one line on stderr and exit code 2. Help and `info` import no torch, and all that can be checked
without torch is checked before it is imported.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
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
_Dtype = Annotated[
    str, typer.Option(help=f"Of the networks: {', '.join(('auto', *DTYPES))}; auto takes what the device is fast in.")
]
_Compile = Annotated[
    str, typer.Option("--compile", help="torch.compile: off, on, graphs (CUDA graphs too). Pays in folders.")
]
_Memory = Annotated[
    str, typer.Option(help="For large pictures, beyond the model: auto (by what is free), a size such as 4GB, none.")
]
_BatchSize = Annotated[int, typer.Option(min=1, help="Of a folder, files that go through the networks together.")]
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads on the CPU; by default torch's choice.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
_SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave out what is done already (resume).")]


@app.command(short_help="Picture(s) to .oscar file(s).")
def compress(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Picture, or folder of pictures.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help=".oscar file, or folder.")],
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
    model: _Model = "nano",
    device: _Device = "cpu",
    overwrite: _Overwrite = False,
    skip_existing: _SkipExisting = False,
    background: Annotated[
        str | None, typer.Option(metavar="#RRGGBB", help="Colour under transparent pixels; without it, refuse them.")
    ] = None,
    threads: _Threads = None,
    dtype: _Dtype = "auto",
    compile: _Compile = "off",
    memory: _Memory = "auto",
    batch_size: _BatchSize = 1,
) -> None:
    """Compress a picture to an .oscar file, or a folder of pictures (recursively) to a folder of them."""
    target_bytes = _target(rate, effort, bpp, max_bytes, quality)
    if rate is not None:
        find_rate(rate, RATES)
    if quality is not None and not 0 <= quality <= 1:
        raise CommandError(f"--quality is {quality}; allowed: 0 to 1")
    colour = _parse_colour(background)
    direction = Direction(_list_pictures, "picture files", OSCAR_SUFFIX, frozenset({OSCAR_SUFFIX}))
    jobs = plan_jobs(source, target, direction)
    options = _network_options(dtype, compile, memory, half="encoder")
    codec = functools.cache(lambda: _check_point(_load_codec(model, device, threads, **options), rate, quality, effort))

    def convert(batch: list[Job]) -> list[tuple[bytes, str]]:
        from oscar.images import read_image

        pictures = [read_image(job.source, colour) for job in batch]
        if target_bytes is None:
            point = next((value for value in (rate, quality) if value is not None), codec().default_point)
            files = codec().compress_batch(pictures, point, effort)
        else:
            files = [codec().compress(picture, max_bytes=target_bytes(picture)) for picture in pictures]
        return [
            (data, f"{len(data)} bytes, {8 * len(data) / (picture.width * picture.height):.4f} bpp (actual)")
            for picture, data in zip(pictures, files, strict=True)
        ]

    _run(jobs, convert, "compress", source.is_dir(), overwrite, skip_existing, batch_size)


@app.command(short_help=".oscar file(s) to picture(s).")
def decompress(
    source: Annotated[Path, typer.Argument(metavar="IN", help=".oscar file, or folder of them.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Picture (.png, .ppm, .bmp, .tif, .webp: all lossless), or folder.")
    ],
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
    tiny_vae: Annotated[
        str | None, typer.Option(help="Folder or hub id of a diffusers AutoencoderTiny, for quick previews.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Show what there is of files whose end is missing; damage is not noticed.")
    ] = False,
) -> None:
    """Decompress an .oscar file to a picture, or a folder of them (recursively) to a folder of PNG pictures."""
    jobs = plan_jobs(source, target, Direction(_list_oscar, ".oscar files", ".png", frozenset(PICTURE_FORMATS)))
    options = _network_options(dtype, compile, memory, half="decoder", tiny_vae=tiny_vae)
    codec = functools.cache(lambda name: _load_codec(name, device, threads, **options))

    def convert(batch: list[Job]) -> list[tuple[bytes, str]]:
        from oscar.bitstream import Container

        files = [job.source.read_bytes() for job in batch]
        # A damaged file is refused before a model is loaded.
        models = [model or _shipped_model(Container.unpack(data, whole=not partial)) for data in files]
        if partial:
            previews = [codec(name).decompress_prefix(data) for name, data in zip(models, files, strict=True)]
            return [
                (_encode_picture(image, job.target.suffix),
                 f"{image.width}x{image.height} pixels from {share:.0%} of the symbols")
                for job, (image, share) in zip(batch, previews, strict=True)
            ]  # fmt: skip
        groups = {name: [data for of, data in zip(models, files, strict=True) if of == name] for name in models}
        images = {name: iter(codec(name).decompress_batch(group)) for name, group in groups.items()}
        return [
            (_encode_picture(image, job.target.suffix), f"{image.width}x{image.height} pixels")
            for job, image in ((job, next(images[name])) for job, name in zip(batch, models, strict=True))
        ]

    _run(jobs, convert, "decompress", source.is_dir(), overwrite, skip_existing, batch_size)


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
    from oscar.merge import merge_rates

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
    from oscar.doctor import as_table, examine

    findings = examine(backbone or ())
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(as_table(findings))


def _target(
    rate: float | None, effort: int, bpp: float | None, max_bytes: int | None, quality: float | None
) -> Callable[[Image.Image], int] | None:
    """The most bytes that a picture's file may have, None without a target."""
    options = {"--rate": rate, "--quality": quality, "--bpp": bpp, "--max-bytes": max_bytes}
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
    """The model in the package whose kind of file this is."""
    return "nano" if container.quality is None else "nano-hyperprior"


def _import(sources: list[str], target: Path, backbone: str, timesteps: str, bundle: bool, dtype: str) -> None:
    """Convert published files, and say what became of their tensors."""
    import torch

    from oscar import convert

    mapping = {"kind": timesteps}
    result = convert.convert(sources, target, backbone, mapping, bundle, getattr(torch, dtype))
    lines = [f"{target}: rates {_rate_list(result.codec)}", f"{result.used:>6} tensors taken over"]
    lines += [f"{count:>6} not needed: {reason}" for reason, count in result.unused.items()]
    typer.echo("\n".join(lines))


def _export(source: str, target: Path) -> None:
    from oscar.convert import export

    codec = export(source, target)
    typer.echo(f"{target}: rates {_rate_list(codec)}; frequency tables and context models have no place in it")


def _rate_list(codec: OscarCodec) -> str:
    return ", ".join(f"{rate.bpp:.4f}" for rate in codec.rates)


def _facts(path: Path, container: Container) -> dict[str, Any]:
    pixels = container.width * container.height
    parts = {name: len(part) for name, part in container.parts().items()}
    size = sum(parts.values())
    return {
        "file": str(path),
        "format_version": container.version,
        "width": container.width,
        "height": container.height,
        **_point_facts(container),
        "model_tag": f"{container.model_tag:04x}",
        "coding": container.coding.name.lower(),
        "actual_bpp": 8 * size / pixels,
        "bytes": size,
        "parts": parts,
    }


def _point_facts(container: Container) -> dict[str, Any]:
    if container.quality is not None:
        from oscar.bitstream import MAX_QUALITY

        return {"quality": container.quality / MAX_QUALITY, "quality_code": container.quality}
    rate = container.rate
    nominal = rate.nominal_bits(container.height, container.width) / (container.width * container.height)
    return {"rate": rate.bpp, "rate_id": container.rate_id, "nominal_bpp": nominal}


def _describe(facts: dict[str, Any]) -> str:
    continuous = "quality" in facts
    lines = [
        ("picture", f"{facts['width']} x {facts['height']} pixels"),
        ("quality", f"{facts['quality']:.4f}") if continuous else
        ("rate", f"{facts['rate']:.4f} (id {facts['rate_id']})"),
        ("model tag", facts["model_tag"]),
        ("coding", facts["coding"]),
        ("actual bpp", f"{facts['actual_bpp']:.4f} (the whole file)"),
        *(() if continuous else
          [("nominal bpp", f"{facts['nominal_bpp']:.4f} (indices at fixed length, no header)")]),
        ("bytes", f"{facts['bytes']}"),
        *((f"  {name}", f"{size}") for name, size in facts["parts"].items()),
    ]
    return "\n".join([facts["file"], *(f"  {name:<16} {value}" for name, value in lines)])


_Convert = Callable[[list[Job]], list[tuple[bytes, str]]]  # files to write, each with a remark on it


def _run(
    jobs: list[Job], convert: _Convert, verb: str, folder: bool, overwrite: bool, skip: bool, batch_size: int
) -> None:
    """Do the jobs; in a folder, a file that fails costs one line and the rest is done."""
    todo = drop_existing(jobs, overwrite, skip)
    if not folder:
        for job in todo:
            typer.echo(f"{job.target}: {_do([job], convert)[0]}")
        return
    failed = _run_folder(todo, convert, verb, batch_size)
    typer.echo(f"{verb}ed {len(todo) - failed} of {len(jobs)} files"
               + (f", {len(jobs) - len(todo)} existed" if len(todo) < len(jobs) else "")
               + (f", {failed} failed" if failed else ""))  # fmt: skip
    if failed:
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
        results = convert(batch)
    except (ValueError, OSError) as error:
        raise ValueError(_one_line(error, batch[0].source)) from error
    for job, (data, _) in zip(batch, results, strict=True):
        write_whole(job.target, data)
    return [remark for _, remark in results]


def _network_options(dtype: str, compile: str, memory: str, **others: Any) -> dict[str, Any]:
    """Arguments of `OscarCodec.from_pretrained` but for the dtype, which is still a name; checked without torch."""
    for name, value, allowed in (("dtype", dtype, ("auto", *DTYPES)), ("compile", compile, tuple(_COMPILE))):
        if value not in allowed:
            raise CommandError(f"--{name} {value!r} does not exist; allowed: {', '.join(allowed)}")
    return {"dtype": dtype, "compile": _COMPILE[compile], "memory": None if memory == "none" else memory, **others}


def _check_point(codec: OscarCodec, rate: float | None, quality: float | None, effort: int) -> OscarCodec:
    """Refuse, for every file, a rate or quality that the model does not have, and an effort without rates."""
    if codec.rates:
        if quality is not None:
            raise CommandError(f"--quality is {quality}, but this model has rates; allowed: --rate {_rate_list(codec)}")
        if rate is not None:
            try:
                find_rate(rate, codec.rates)
            except ValueError as error:
                raise CommandError(_one_line(error)) from error
    elif rate is not None or effort:
        name, value = ("--rate", rate) if rate is not None else ("--effort", effort)
        raise CommandError(f"{name} is {value}, but this model has a hyperprior; allowed: --quality")
    return codec


def _load_codec(
    model: str, device: str, threads: int | None, dtype: str = "auto", **options: Any
) -> OscarCodec:
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
        precision = "auto" if dtype == "auto" else getattr(torch, dtype)
        return OscarCodec.from_pretrained(model, device, precision, **options)
    except (ValueError, OSError) as error:
        raise CommandError(_one_line(error)) from error


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
