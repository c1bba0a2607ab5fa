"""What one sees of the codec: a CSV of results, a page with originals and reconstructions, and a contact sheet.

A result is one image at one rate. The page is plain HTML with relative links to the images, and needs no network.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from oscar.metrics.pixels import MS_SSIM_UNAVAILABLE

_PAGE = Template((Path(__file__).parent / "sheet.html").read_text(encoding="utf-8"))
_THUMB_WIDTH, _CAPTION_HEIGHT, _GAP, _HEADER_HEIGHT = 256, 40, 12, 36  # pixels of the contact sheet


@dataclass(frozen=True)
class Result:
    """One image at one rate, measured on a real file.

    Attributes:
        image: the image's name.
        rate: the rate point's nominal bpp, its name.
        width: of the image, in pixels.
        height: likewise.
        file_bytes: length of the whole .oscar file.
        psnr: dB on RGB.
        ms_ssim: on RGB, None where the image is too small for it.
        encode_seconds: image in memory to bytes.
        decode_seconds: bytes to image in memory.
        original: path of the original as shown on the page.
        reconstruction: path of the decoded image.
    """

    image: str
    rate: float
    width: int
    height: int
    file_bytes: int
    psnr: float
    ms_ssim: float | None
    encode_seconds: float
    decode_seconds: float
    original: Path
    reconstruction: Path

    @property
    def actual_bpp(self) -> float:
        """Bits of the whole file per pixel."""
        return 8 * self.file_bytes / (self.width * self.height)


@dataclass(frozen=True)
class RateMeans:
    """Means over the images of one rate; MS-SSIM over those that have one, None if none has."""

    rate: float
    images: int
    file_bytes: float
    actual_bpp: float
    psnr: float
    ms_ssim: float | None
    encode_seconds: float
    decode_seconds: float


def means_per_rate(results: Sequence[Result]) -> list[RateMeans]:
    """Means over images for each rate, lowest rate first."""
    means = []
    for rate in sorted({result.rate for result in results}):
        group = [result for result in results if result.rate == rate]
        similarities = [result.ms_ssim for result in group if result.ms_ssim is not None]
        means.append(
            RateMeans(
                rate=rate,
                images=len(group),
                file_bytes=fmean(result.file_bytes for result in group),
                actual_bpp=fmean(result.actual_bpp for result in group),
                psnr=fmean(result.psnr for result in group),
                ms_ssim=fmean(similarities) if similarities else None,
                encode_seconds=fmean(result.encode_seconds for result in group),
                decode_seconds=fmean(result.decode_seconds for result in group),
            )
        )
    return means


def write_csv(results: Sequence[Result], path: Path) -> None:
    """One row per image and rate; MS-SSIM is empty where it is unavailable."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "image",
                "width",
                "height",
                "rate",
                "file_bytes",
                "actual_bpp",
                "psnr",
                "ms_ssim",
                "encode_seconds",
                "decode_seconds",
            ]
        )
        for r in results:
            writer.writerow(
                [
                    r.image,
                    r.width,
                    r.height,
                    r.rate,
                    r.file_bytes,
                    f"{r.actual_bpp:.6f}",
                    f"{r.psnr:.4f}",
                    "" if r.ms_ssim is None else f"{r.ms_ssim:.6f}",
                    f"{r.encode_seconds:.4f}",
                    f"{r.decode_seconds:.4f}",
                ]
            )


def format_ms_ssim(value: float | None) -> str:
    """Four decimals, or a dash where the image is too small for MS-SSIM."""
    return "–" if value is None else f"{value:.4f}"


def format_psnr(value: float) -> str:
    """Two decimals, in dB."""
    return f"{value:.2f}"


def write_html(results: Sequence[Result], path: Path, title: str, note: str) -> None:
    """Write the page: a table of means, then per image the original beside its reconstructions, lowest rate first.

    Args:
        results: of any number of images and rates; the images they name lie in or below the page's folder.
        path: of the page.
        title: its heading.
        note: a sentence under it: model, machine, protocol.
    """
    sections = "\n".join(_section(group, path.parent) for group in _by_image(results))
    if any(result.ms_ssim is None for result in results):
        note += f" MS-SSIM – = {MS_SSIM_UNAVAILABLE}."
    text = _PAGE.substitute(title=escape(title), note=escape(note), means=_means_rows(results), sections=sections)
    path.write_text(text, encoding="utf-8")


def _by_image(results: Sequence[Result]) -> list[list[Result]]:
    names = dict.fromkeys(result.image for result in results)
    return [sorted((r for r in results if r.image == name), key=lambda r: r.rate) for name in names]


def _means_rows(results: Sequence[Result]) -> str:
    return "\n".join(
        f"<tr><td>{m.rate:.4f}</td><td>{m.file_bytes:,.0f}</td><td>{m.actual_bpp:.4f}</td><td>{format_psnr(m.psnr)}</td>"
        f"<td>{format_ms_ssim(m.ms_ssim)}</td><td>{m.encode_seconds:.2f}</td><td>{m.decode_seconds:.2f}</td></tr>"
        for m in means_per_rate(results)
    )


def _section(group: list[Result], folder: Path) -> str:
    """One image: its heading and a tile per rate, each of which knows its original for the side-by-side view."""
    first = group[0]
    original = _link(first.original, folder)
    raw = 3 * first.width * first.height
    tiles = [_tile(original, original, "original", f"{first.width} × {first.height} px · {raw:,} bytes raw", first)]
    tiles += [
        _tile(
            _link(result.reconstruction, folder),
            original,
            f"rate {result.rate:.4f}",
            f"{result.file_bytes:,} bytes · {result.actual_bpp:.4f} bpp · 1 : {raw / result.file_bytes:,.0f}<br>"
            f"{format_psnr(result.psnr)} dB · MS-SSIM {format_ms_ssim(result.ms_ssim)}",
            result,
        )
        for result in group
    ]
    return f'<section><h2>{escape(first.image)}</h2><div class="tiles">{"".join(tiles)}</div></section>'


def _tile(source: str, original: str, label: str, caption: str, result: Result) -> str:
    name = f"{escape(result.image)}, {label}"
    return (
        f'<figure><button type="button" data-original="{original}" aria-label="compare {name}">'
        f'<img src="{source}" width="{result.width}" height="{result.height}" loading="lazy" alt="{name}"></button>'
        f"<figcaption><b>{label}</b><br>{caption}</figcaption></figure>"
    )


def _link(path: Path, folder: Path) -> str:
    return quote(path.relative_to(folder).as_posix())


def write_contact_sheet(results: Sequence[Result], path: Path, most_images: int = 24) -> None:
    """Write one PNG: a row per image, the original on the left and then the rates, lowest first, captioned.

    Args:
        results: of any number of images and rates.
        path: of the PNG.
        most_images: rows at most, since a sheet of hundreds can be neither seen nor stored; the first ones are taken.
    """
    groups = _by_image(results)[:most_images]
    heights = [round(_THUMB_WIDTH * group[0].height / group[0].width) for group in groups]
    heights = [min(max(height, 1), 2 * _THUMB_WIDTH) for height in heights]
    columns = 1 + max(len(group) for group in groups)
    width = _GAP + columns * (_THUMB_WIDTH + _GAP)
    height = _HEADER_HEIGHT + sum(row + _CAPTION_HEIGHT + _GAP for row in heights)
    sheet = Image.new("RGB", (width, height), (244, 244, 244))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_GAP, 10), "original, and reconstructions by rate (nominal bpp)", (30, 30, 30), font)
    top = _HEADER_HEIGHT
    for group, row in zip(groups, heights, strict=True):
        first = group[0]
        cells = [(first.original, first.image, f"{first.width} x {first.height}")]
        cells += [
            (r.reconstruction, f"rate {r.rate:.4f}", f"{r.file_bytes:,} bytes, {r.actual_bpp:.4f} bpp, {r.psnr:.1f} dB")
            for r in group
        ]
        for column, (image_path, *caption) in enumerate(cells):
            left = _GAP + column * (_THUMB_WIDTH + _GAP)
            with Image.open(image_path) as image:
                thumb = image.convert("RGB")
            thumb.thumbnail((_THUMB_WIDTH, row), Image.Resampling.LANCZOS)
            sheet.paste(thumb, (left, top))
            for line, text in enumerate(caption):
                text = _fit(text, font)
                draw.text((left, top + row + 4 + 16 * line), text, (30, 30, 30) if line == 0 else (96, 96, 96), font)
        top += row + _CAPTION_HEIGHT + _GAP
    sheet.save(path)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a caption to its column's width."""
    if font.getlength(text) <= _THUMB_WIDTH:
        return text
    while text and font.getlength(text + "...") > _THUMB_WIDTH:
        text = text[:-1]
    return text + "..."
