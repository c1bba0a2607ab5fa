"""Lengths of files by coding (fixed length, table, context), and bytes and quality by effort.

    python scripts/compare_codings.py ../shared/data/kodak --out runs/codings
    python scripts/compare_codings.py ../shared/data/kodak --out runs/efforts --efforts 0 1 3 5 9 --metrics

Every length is a file's, which is read again. Writes rows.csv and tables as CSV, Markdown and LaTeX.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from oscar.bottlenecks.rdo import MAX_EFFORT
from oscar.utils.errors import exit_code
from oscar.utils.files import atomic_write


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default="nano", help="nano, a model folder, or an id on the hub (default: nano)")
    parser.add_argument("--rates", nargs="+", type=float, metavar="BPP", help="nominal bpp (default: all)")
    parser.add_argument(
        "--efforts",
        nargs="+",
        type=int,
        default=[0],
        choices=range(MAX_EFFORT + 1),
        metavar="EFFORT",
        help=f"of 0 to {MAX_EFFORT} (default: 0)",
    )
    parser.add_argument("--metrics", action="store_true", help="decode too, for PSNR and MS-SSIM")
    parser.add_argument("--limit", type=int, help="only so many images")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(args)
    return exit_code("compare_codings", lambda: print(compare_all(options)))


def compare_all(options: argparse.Namespace) -> str:
    import pandas as pd
    from tqdm import tqdm

    import oscar
    from oscar.bottlenecks.vq import need_rates
    from oscar.data.folders import find_images
    from oscar.data.images import read_image
    from oscar.evaluation.codings import METRICS, codings_table, compare, efforts_table
    from oscar.metrics.image import MetricSet

    paths = find_images(options.images)[: options.limit]
    codec = oscar.load(options.model, options.device)
    need_rates(codec.bottleneck, "the comparison")
    rates = codec.bottleneck.rates if options.rates is None else [codec.bottleneck.parse(bpp) for bpp in options.rates]
    metrics = MetricSet(METRICS if options.metrics else (), options.device)
    efforts = sorted({0, *options.efforts})
    rows = []
    for path in tqdm(paths, disable=not sys.stderr.isatty()):
        image = read_image(path)
        for rate in rates:
            rows += compare(codec, path.name, image, rate, efforts, metrics)
    frame = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out / "rows.csv", frame.to_csv(index=False).encode())
    tables = [codings_table(frame), *([efforts_table(frame)] if len(efforts) > 1 else [])]
    for table in tables:
        table.write(options.out)
    return "\n".join(table.to_markdown() for table in tables)


if __name__ == "__main__":
    sys.exit(main())
