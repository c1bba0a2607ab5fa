"""How well files of at most so many bytes use what they may: random images and targets.

    python scripts/evaluate_targets.py photos --model nano --out runs/targets

Targets are drawn evenly on a logarithmic scale between the lengths that an image's files can have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from oscar.utils.errors import exit_code


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default="nano", help="name of a shipped model, a folder, or an id on the hub")
    parser.add_argument("--pairs", type=int, default=200, help="images with targets (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch", help="that codes (default: torch)")
    options = parser.parse_args(args)
    return exit_code("evaluate_targets", lambda: print(evaluate(options)))


def load(options: argparse.Namespace) -> Any:
    if options.engine == "onnx":
        from oscar.runtime import Codec

        return Codec(options.model, options.device)
    import oscar

    return oscar.load(options.model, options.device)


def evaluate(options: argparse.Namespace) -> str:
    import pandas as pd
    from tqdm import tqdm

    from oscar.data.folders import find_images
    from oscar.evaluation.rate_control import draw_pairs, meet, targets_table
    from oscar.utils.files import atomic_write

    if options.pairs < 1:
        raise ValueError(f"--pairs is {options.pairs}; allowed: at least 1")
    paths = find_images(options.images)
    codec = load(options)
    pairs = draw_pairs(len(paths), options.pairs, options.seed)
    rows = [meet(codec, paths[number], share) for number, share in tqdm(pairs, disable=not sys.stderr.isatty())]
    frame = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out / "rows.csv", frame.to_csv(index=False).encode())
    table = targets_table(frame)
    table.write(options.out)
    return table.to_markdown()


if __name__ == "__main__":
    sys.exit(main())
