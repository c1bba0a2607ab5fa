"""Check the images that nano is trained on, and write the lists that its recipe reads.

    python scripts/nano_images.py ~/images --out runs/nano

`oscar/assets/images.csv` names every image with source, author, licence and SHA-256. `train.txt` holds each large image
several times, since one crop of it is a smaller share; `held_out.txt` has those that no step trains on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import oscar
from oscar.utils.errors import exit_code
from oscar.utils.files import atomic_write

MANIFEST = Path(oscar.__file__).parent / "assets" / "images.csv"
REPEATS = {"Flickr": 1, "CID22 training set": 2, "wallpapers": 6}  # by source; their sides are 299, 512 and 1280 pixels
SPLITS = {"train": "train.txt", "held_out": "held_out.txt"}


def find_images(folder: Path) -> dict[str, list[Path]]:
    """The images of each split, in the manifest's order.

    Raises:
        ValueError: naming the first image that is missing or another one, and how many there are.
    """
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    wrong = []
    for row in csv.DictReader(MANIFEST.read_text(encoding="utf-8").splitlines()):
        path = folder / row["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
            wrong.append(path)
        repeats = REPEATS[row["source"]] if row["split"] == "train" else 1
        found[row["split"]] += [path.absolute()] * repeats
    if wrong:
        reason = "is another image" if wrong[0].is_file() else "does not exist"
        raise ValueError(f"{wrong[0]} {reason} ({len(wrong)} such in all); allowed: the images of {MANIFEST.name}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the folders of the manifest are")
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder of the lists")
    options = parser.parse_args(arguments)

    def write() -> None:
        found = find_images(options.folder)
        options.out.mkdir(parents=True, exist_ok=True)
        for split, paths in found.items():
            atomic_write(options.out / SPLITS[split], "".join(f"{path}\n" for path in paths).encode())
            print(f"{options.out / SPLITS[split]}: {len(set(paths))} images, {len(paths)} lines")

    return exit_code("nano_images", write)


if __name__ == "__main__":
    sys.exit(main())
