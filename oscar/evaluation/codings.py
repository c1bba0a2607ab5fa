"""What coding and effort do to files: lengths by coding of the same indices, and bytes and quality by effort."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from oscar.bitstream.coding import INDEX_CODINGS, MAX_EFFORT, Coding
from oscar.bottlenecks.vq import need_rates
from oscar.codec import OscarCodec
from oscar.data.folders import find_images
from oscar.data.images import read_image
from oscar.data.tensors import to_pil, to_tensor
from oscar.evaluation.curves import metric_title
from oscar.inference.load import load
from oscar.metrics.image import MetricSet
from oscar.rates import RatePoint
from oscar.utils.files import atomic_write
from oscar.utils.tables import Table

METRICS = ("psnr", "ms_ssim")


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of scripts/compare_codings.py; None takes those of the process."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--model", default="nano-vq", help="with rates: a folder, or an id on the hub (default: nano-vq)"
    )
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
    return parser.parse_args(arguments)


def compare_folder(options: argparse.Namespace) -> str:
    """Compare codings on a folder's images, write rows.csv and the tables, and return these as Markdown.

    Raises:
        ValueError: for a model without rates, or a rate that it does not have.
    """
    paths = find_images(options.images)[: options.limit]
    codec = load(options.model, options.device)
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


@torch.inference_mode()
def compare(
    codec: OscarCodec, name: str, image: Image.Image, rate: RatePoint, efforts: Sequence[int], metrics: MetricSet
) -> Iterator[dict]:
    """Rows of one image at one rate, one per effort.

    Yields:
        image, width, height, rate, effort, nominal_bytes (indices at log2 K bits each), for each coding its file's
        length, as packed_bytes, and its payload's, as packed_payload; with metrics, those of the decoded image.
        A file of a coding is the shortest that this coding and older ones can make.
    """
    latent, (width, height) = codec.encode_latent(to_tensor(image), rate), image.size
    for effort in efforts:
        chosen = codec.quantise(latent, rate, effort)
        row = {
            "image": name,
            "width": width,
            "height": height,
            "rate": rate.bpp,
            "effort": effort,
            "nominal_bytes": rate.nominal_bits(height, width) / 8,
        }
        data = b""
        for coding in INDEX_CODINGS:
            (data,) = codec.write(chosen, rate, height, width, newest=coding)
            container, _, symbols = codec.read(data)
            if not torch.equal(symbols.indices, chosen.symbols.indices):
                raise RuntimeError(f"{name}: rate {rate.bpp:.4f}: coding {coding.name.lower()} lost indices")
            row |= {f"{coding.name.lower()}_bytes": len(data), f"{coding.name.lower()}_payload": len(container.payload)}
        if metrics.names:
            row |= metrics.score(image, to_pil(codec.decompress_tensor([data])[0]))
        yield row


def codings_table(rows: pd.DataFrame) -> Table:
    """Mean payloads by rate and coding at effort 0, and what is saved of the nominal length."""
    rows = rows[rows["effort"] == 0]
    lengths = ["nominal_bytes", *(f"{coding.name.lower()}_payload" for coding in INDEX_CODINGS)]
    means = rows.groupby("rate")[lengths].mean()
    for coding in (Coding.TABLE, Coding.CONTEXT):
        name = coding.name.lower()
        means[f"{name}_saving"] = 100 * (1 - means[f"{name}_payload"] / means["nominal_bytes"])
    worse = (rows["context_bytes"] - rows["table_bytes"]).groupby(rows["rate"]).max()
    frame = means.assign(worst=worse).reset_index()
    frame["rate"] = frame["rate"].map("{:.4f}".format)
    mean = {"rate": "mean", **frame[["table_saving", "context_saving"]].mean(), "worst": worse.max()}
    frame = pd.concat([frame, pd.DataFrame([mean])], ignore_index=True)
    titles = {"rate": "rate", "nominal_bytes": "nominal bytes", "packed_payload": "fixed length",
              "table_payload": "table", "context_payload": "context", "table_saving": "table saves %",
              "context_saving": "context saves %", "worst": "context, at worst, bytes beyond table"}  # fmt: skip
    formats = {
        **dict.fromkeys(lengths, "{:,.1f}".format),
        "worst": "{:+.0f}".format,
        **dict.fromkeys(("table_saving", "context_saving"), "{:.1f}".format),
    }
    caption = (
        "Indices in files, without headers: mean bytes of the payload by coding, each the shortest of those up "
        f"to it. Savings are of the nominal length; {rows['image'].nunique()} images."
    )
    return Table("codings", caption, frame, titles, formats)


def efforts_table(rows: pd.DataFrame) -> Table:
    """Mean file lengths and metrics by rate and effort, and what they are beside effort 0."""
    metrics = [name for name in METRICS if name in rows]
    frame = rows.groupby(["rate", "effort"])[["context_bytes", *metrics]].mean().reset_index()
    plain = frame[frame["effort"] == 0].set_index("rate").loc[frame["rate"]].reset_index()
    frame["saved"] = 100 * (1 - frame["context_bytes"] / plain["context_bytes"])
    for name in metrics:
        frame[f"{name}_change"] = frame[name] - plain[name]
    changes = {f"{name}_change": f"{metric_title(name)} change" for name in metrics}
    titles = {"rate": "rate", "effort": "effort", "context_bytes": "file bytes", "saved": "saved %", **changes}
    formats = {
        "rate": "{:.4f}".format,
        "effort": "{:.0f}".format,
        "context_bytes": "{:,.1f}".format,
        "saved": "{:.1f}".format,
        **dict.fromkeys(changes, "{:+.4f}".format),
    }
    count = rows["image"].nunique()
    caption = f"Whole files by effort, and metrics beside those at effort 0; means over {count} images."
    return Table("efforts", caption, frame, titles, formats)
