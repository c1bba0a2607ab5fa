"""The codec on real photographs: every rate, real files on disk, a table, a page and a contact sheet.

Each image is compressed to a file, and the reconstruction is decoded from what is read back from it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from oscar.benchmark.report.sheet import (
    Result,
    format_ms_ssim,
    format_psnr,
    means_per_rate,
    write_contact_sheet,
    write_csv,
    write_html,
)
from oscar.data.folders import find_images
from oscar.data.images import ImageError, read_image
from oscar.metrics.pixels import MS_SSIM_UNAVAILABLE, ms_ssim, psnr

if TYPE_CHECKING:
    from PIL import Image

    from oscar import OscarCodec


def name_images(paths: list[Path]) -> list[str]:
    """File names without suffix; those that occur more than once get a number."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


def some_points(codec: OscarCodec) -> tuple[float, ...]:
    """The rates of a model, or nine of its qualities."""
    return codec.points[:: max(1, len(codec.points) // 8)]


def measure(codec: OscarCodec, name: str, image: Image.Image, out: Path) -> Iterator[Result]:
    """Compress one image at each rate to a file, decode what the file holds, and measure it."""
    original = out / "images" / f"{name}.png"
    image.save(original)
    for point in some_points(codec):
        file = out / "files" / f"{name}_{point:.4f}.oscar"
        begin = time.perf_counter()
        (data,) = codec.compress_batch([image], point)
        encoded = time.perf_counter()
        file.write_bytes(data)
        data = file.read_bytes()
        read = time.perf_counter()
        decoded = codec.decompress(data)
        done = time.perf_counter()
        reconstruction = out / "images" / f"{name}_{point:.4f}.png"
        decoded.save(reconstruction)
        yield Result(
            image=name,
            rate=point,
            width=image.width,
            height=image.height,
            file_bytes=file.stat().st_size,
            psnr=psnr(image, decoded),
            ms_ssim=ms_ssim(image, decoded),
            encode_seconds=encoded - begin,
            decode_seconds=done - read,
            original=original,
            reconstruction=reconstruction,
        )


def run(codec: OscarCodec, images: list[Path], out: Path, console: Console) -> list[Result]:
    """Measure all images at all rates; one that cannot be read costs a line and is left out."""
    for folder in ("files", "images"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: list[Result] = []
    warm = False
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compress and decompress", total=len(images) * len(some_points(codec)))
        for path, name in zip(images, name_images(images), strict=True):
            try:
                image = read_image(path)
            except ImageError as error:
                console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
                progress.advance(task, len(some_points(codec)))
                continue
            if not warm:  # the first call sets up memory and threads: not to be counted as the codec's time
                codec.decompress(codec.compress(image))
                warm = True
            for result in measure(codec, name, image, out):
                results.append(result)
                progress.update(task, advance=1, description=f"{name} at {result.rate:.4f}")
            if not console.is_terminal:
                console.print(f"{name} done", markup=False, highlight=False)
    return results


def print_tables(results: list[Result], console: Console, point: str) -> None:
    """Print one row per image and rate (or quality, as `point` says), then the means per rate."""
    numbers = ("file bytes", "actual bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s")
    rows = Table("image", point, *numbers, title="Images")
    means = Table(point, *numbers, title=f"Means per {point}")
    for table in (rows, means):
        for column in table.columns[table is rows :]:
            column.justify = "right"
            column.no_wrap = True
    previous = None
    for r in results:
        if previous not in (None, r.image):
            rows.add_section()
        rows.add_row(
            r.image,
            f"{r.rate:.4f}",
            f"{r.file_bytes:,}",
            f"{r.actual_bpp:.4f}",
            format_psnr(r.psnr),
            format_ms_ssim(r.ms_ssim),
            f"{r.encode_seconds:.2f}",
            f"{r.decode_seconds:.2f}",
        )
        previous = r.image
    for m in means_per_rate(results):
        means.add_row(
            f"{m.rate:.4f}",
            f"{m.file_bytes:,.0f}",
            f"{m.actual_bpp:.4f}",
            format_psnr(m.psnr),
            format_ms_ssim(m.ms_ssim),
            f"{m.encode_seconds:.2f}",
            f"{m.decode_seconds:.2f}",
        )
    console.print(rows, means)
    if any(result.ms_ssim is None for result in results):
        console.print(f"MS-SSIM –: {MS_SSIM_UNAVAILABLE}")


def parse_args(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of images; by default scikit-image's packaged ones")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder (default: demo)")
    parser.add_argument("--model", default="nano", help="nano, a model folder, or an id on the hub (default: nano)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    options = parse_args(args)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries: they would break up the progress bar
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a table in a log must not be cut to 80 columns
    try:
        images = find_images(options.images)
        console.print(f"{len(images)} images; loading {options.model} on {options.device}", highlight=False)
        import oscar

        codec = oscar.load(options.model, options.device)
        results = run(codec, images, options.out, console)
        if not results:
            raise ImageError("none of the images can be read")
    except (ValueError, OSError) as error:
        print(f"demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_tables(results, console, codec.bottleneck.point_name)
    write_csv(results, options.out / "results.csv")
    write_contact_sheet(results, options.out / "sheet.png")
    note = (
        f"Model {options.model} on {options.device}. Rate is the length of the whole file; every reconstruction was "
        "decoded from its file in one denoising step. PSNR and MS-SSIM on 8-bit RGB."
    )
    write_html(results, options.out / "index.html", "OSCAR demo", note)
    console.print(
        f"page: {options.out / 'index.html'}\nsheet: {options.out / 'sheet.png'}\n"
        f"rows: {options.out / 'results.csv'}\nfiles: {options.out / 'files'}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
