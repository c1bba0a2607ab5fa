"""Have the codes of a checkpoint's rates in stages cost fewer bits, at some loss of quality.

    python scripts/constrain_codes.py photos --model runs/joint/final --strength 0.0625=0.2 0.0781=0.15 --out runs/codes

Codes are fitted anew to the images, and the encoder prefers those that are used often
(`oscar.bottlenecks.residual_vq`). The rates lose their context models: train these next, with
`stage=context init_from=runs/codes`.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from oscar.utils.errors import exit_code


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--model", required=True, help="name of a shipped model, a folder, or an id on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--strength",
        nargs="+",
        required=True,
        metavar="RATE=SHARE",
        help="worth of a bit at a rate, in shares of the mean squared distance of the codes; 0.1 to 0.3",
    )
    parser.add_argument("--limit", "--pictures", type=int, default=160, help="images that are looked at (default: 160)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (default: 0)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(args)
    return exit_code("constrain_codes", lambda: constrain(options))


def constrain(options: argparse.Namespace) -> None:
    strengths = dict(parse_strength(text) for text in options.strength)
    if options.limit < 1:
        raise ValueError(f"--limit is {options.limit}; allowed: at least 1")
    if options.out.exists():
        raise ValueError(f"--out is {options.out}, which exists; allowed: a folder that does not")

    from oscar import OscarCodec
    from oscar.data.folders import find_images
    from oscar.training.constraint import constrain_codes

    paths = find_images(options.images)
    random.Random(options.seed).shuffle(paths)
    codec = OscarCodec.from_pretrained(options.model).to(options.device).eval()
    constrain_codes(codec, paths[: options.limit], strengths, options.seed)
    codec.save_pretrained(options.out)


def parse_strength(text: str) -> tuple[float, float]:
    """RATE=SHARE as two numbers."""
    rate, _, share = text.partition("=")
    try:
        return float(rate), float(share)
    except ValueError:
        raise ValueError(f"--strength is {text!r}; allowed: RATE=SHARE, such as 0.0625=0.2") from None


if __name__ == "__main__":
    sys.exit(main())
