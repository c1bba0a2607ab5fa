"""Images as a codec shows them at several sizes, beside another at the same lengths: the strip of the README, and the
sheets of the model cards.

python scripts/image_strip.py --out strip.webp                   a cat, of scikit-image
python scripts/image_strip.py photo.png --bytes 1500 3000 6000 --out strip.png
python scripts/image_strip.py a.png b.png --baseline none --model nano-vq --points 0.0313 0.125 --out sheet.webp
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
NONE = "none"
Panel = tuple[Image.Image, str, str]  # image, what it is, how good


def panels(codec: OscarCodec, name: str, baseline: str, image: Image.Image, aims: list[dict]) -> list[list[Panel]]:
    """Rows of panels: of the codec, and of the baseline, if any, at the length of the codec's files.

    Args:
        codec: ours.
        name: what it is called.
        baseline: name of the other, "none" without one.
        image: what is coded.
        aims: for each column the arguments of `compress`: max_bytes, or point.
    """
    original = f"{image.width * image.height * 3:,} bytes uncompressed"
    ours: list[Panel] = [(image, "original", original)]
    theirs: list[Panel] = [(image, "original", original)]
    for aim in aims:
        data = codec.compress(image, **aim)
        decoded = codec.decompress(data)
        ours.append((decoded, f"{name}, {len(data):,} bytes", _scores(image, decoded)))
        if baseline == NONE:
            continue
        other = make_baseline(baseline)
        _, encoded = encode_to_size(other, image, len(data))
        shown = other.decode(encoded.data)
        title, fits = f"{other.label}, {len(encoded.data):,} bytes", len(encoded.data) <= len(data)
        theirs.append((shown, title if fits else f"{title}: its smallest", _scores(image, shown)))
    return [ours] if baseline == NONE else [ours, theirs]


def _scores(image: Image.Image, decoded: Image.Image) -> str:
    return f"MS-SSIM {ms_ssim(image, decoded):.3f}, {psnr(image, decoded):.1f} dB"


def draw(groups: list[list[list[Panel]]], width: int) -> Image.Image:
    """The panels of each image, each so wide; the original once, at the left."""
    font, columns = ImageFont.load_default(13 if width >= 200 else 11), len(groups[0][0])
    heights = [round(rows[0][0][0].height * width / rows[0][0][0].width) for rows in groups]
    cells = [height + 2 * LINE + GAP for height in heights]
    total = sum(len(rows) * cell for rows, cell in zip(groups, cells, strict=True))
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, total), PAPER)
    pen, start = ImageDraw.Draw(sheet), 0
    for rows, height, cell in zip(groups, heights, cells, strict=True):
        places = [(rows[0][0], 0, start + (len(rows) - 1) * cell // 2)]
        places += [
            (panel, column * (width + GAP), start + row * cell)
            for row, own in enumerate(rows)
            for column, panel in enumerate(own[1:], 1)
        ]
        for (image, title, note), left, top in places:
            sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
            pen.text((left, top + height + 2), title, INK, font)
            pen.text((left, top + height + LINE - 2), note, QUIET, font)
        start += len(rows) * cell
    return sheet


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "images", type=Path, nargs="*", help="images; by default chelsea, of scikit-image's packaged ones"
    )
    parser.add_argument("--model", default="nano", help="of ours (default: nano)")
    parser.add_argument("--baseline", default="avif", help=f"the other codec, or {NONE} (default: avif)")
    parser.add_argument("--bytes", type=int, nargs="+", default=[1500, 3000, 6000], help="sizes (1500 3000 6000)")
    parser.add_argument("--points", type=float, nargs="*", help="operating points in place of sizes; none are all")
    parser.add_argument("--width", type=int, default=240, help="of an image in the strip, pixels (default: 240)")
    parser.add_argument("--quality", type=int, default=90, help="of a .webp (default: 90)")
    parser.add_argument("--out", type=Path, required=True, help="image file to write")
    options = parser.parse_args(args)
    try:
        paths = options.images or [next(path for path in find_images(None) if path.stem == "chelsea")]
        import oscar

        codec = oscar.load(options.model)
        aims = [{"max_bytes": size} for size in options.bytes]
        if options.points is not None:
            aims = [{"point": codec.find_point(point)} for point in options.points or codec.points]
        groups = [panels(codec, options.model, options.baseline, read_image(path), aims) for path in paths]
        saved = {"quality": options.quality, "method": 6} if options.out.suffix == ".webp" else {}
        draw(groups, options.width).save(options.out, **saved)
    except (ValueError, OSError) as error:
        print(f"image_strip: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
