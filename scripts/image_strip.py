"""One image as several codecs show it at equal sizes: the strip of the README.

python scripts/image_strip.py --out strip.webp                   a cat, of scikit-image
python scripts/image_strip.py photo.png --bytes 1500 3000 6000 --out strip.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from oscar.baselines import encode_to_size, make_baseline
from oscar.data.folders import find_images
from oscar.data.images import read_image
from oscar.metrics.image import ms_ssim, psnr

if TYPE_CHECKING:
    from oscar import OscarCodec

GAP, LINE = 8, 20  # pixels between images, and of a line of text
INK, QUIET, PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"
Panel = tuple[Image.Image, str, str]  # image, what it is, how good


def panels(codec: OscarCodec, name: str, baseline: str, image: Image.Image, sizes: list[int]) -> list[list[Panel]]:
    """Rows of panels: of the codec, and of the baseline at the length of the codec's files."""
    original = f"{image.width * image.height * 3:,} bytes uncompressed"
    ours: list[Panel] = [(image, "original", original)]
    theirs: list[Panel] = [(image, "original", original)]
    for size in sizes:
        data = codec.compress(image, max_bytes=size)
        decoded = codec.decompress(data)
        ours.append((decoded, f"{name}, {len(data):,} bytes", _scores(image, decoded)))
        other = make_baseline(baseline)
        _, encoded = encode_to_size(other, image, len(data))
        shown = other.decode(encoded.data)
        title, fits = f"{other.label}, {len(encoded.data):,} bytes", len(encoded.data) <= len(data)
        theirs.append((shown, title if fits else f"{title}: its smallest", _scores(image, shown)))
    return [ours, theirs]


def _scores(image: Image.Image, decoded: Image.Image) -> str:
    return f"MS-SSIM {ms_ssim(image, decoded):.3f}, {psnr(image, decoded):.1f} dB"


def draw(rows: list[list[Panel]], width: int) -> Image.Image:
    """The panels, each so wide; the original once, at the left."""
    (original, title, note), scale = rows[0][0], width / rows[0][0][0].width
    height = round(original.height * scale)
    font, cell = ImageFont.load_default(13), height + 2 * LINE + GAP
    columns = len(rows[0])
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * cell), PAPER)
    pen = ImageDraw.Draw(sheet)

    def place(panel: Panel, left: int, top: int) -> None:
        image, title, note = panel
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + height + 2), title, INK, font)
        pen.text((left, top + height + LINE - 2), note, QUIET, font)

    place((original, title, note), 0, (len(rows) - 1) * cell // 2)
    for row, own in enumerate(rows):
        for column, panel in enumerate(own[1:], 1):
            place(panel, column * (width + GAP), row * cell)
    return sheet


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "image", type=Path, nargs="?", help="image; by default chelsea, of scikit-image's packaged ones"
    )
    parser.add_argument("--model", default="nano", help="of ours (default: nano)")
    parser.add_argument("--baseline", default="avif", help="the other codec (default: avif)")
    parser.add_argument("--bytes", type=int, nargs="+", default=[1500, 3000, 6000], help="sizes (1500 3000 6000)")
    parser.add_argument("--width", type=int, default=240, help="of an image in the strip, pixels (default: 240)")
    parser.add_argument("--out", type=Path, required=True, help="image file to write")
    options = parser.parse_args(args)
    try:
        path = options.image or next(path for path in find_images(None) if path.stem == "chelsea")
        import oscar

        rows = panels(oscar.load(options.model), options.model, options.baseline, read_image(path), options.bytes)
        draw(rows, options.width).save(options.out, **({"quality": 90} if options.out.suffix == ".webp" else {}))
    except (ValueError, OSError) as error:
        print(f"image_strip: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
