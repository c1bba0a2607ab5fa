"""Lay out a data set of the paper for training or evaluation, and check it.

    oscar prepare-data kodak data --download
    oscar prepare-data lsdir data --source ~/LSDIR --shards 1000
    oscar prepare-data div2k data                    # says where it comes from; checks what is there

Images come to ROOT/DATASET. Folders and archives (zip, tar) that you have are given by --source; --download fetches
what can be fetched without a form.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from oscar.data.datasets import DATASETS, Dataset, find_dataset
from oscar.data.prepare import download, lay_out, write_shards
from oscar.utils.errors import exit_code


def prepare(name: str, root: Path, source: Sequence[Path], fetch: bool, shards: int | None) -> None:
    """Say what the data set is, lay out what was given, check, and print the setting that uses it.

    Raises:
        ValueError, OSError: in one line.
    """
    dataset = find_dataset(name)
    if shards is not None and shards < 1:
        raise ValueError(f"--shards is {shards}; allowed: at least 1 image a shard")
    print(f"{dataset.title} ({dataset.split}): {dataset.count} images for {dataset.role}")
    print(f"from {dataset.source}; terms: {dataset.terms}")
    sources = [*source, *(download(dataset, root) if fetch else [])]
    if sources:
        print(f"{lay_out(dataset, root, sources)} new in {dataset.folder(root)}")
    folder = dataset.check(root)
    checked = dataset.check_digests(root)
    hashes = f"SHA-256 of {checked} as listed" if checked else "no list of SHA-256 to compare with"
    print(f"{folder}: {dataset.count} images, {hashes}")
    for line in settings(dataset, root, write_shards(dataset, root, shards) if shards else None):
        print(line)


def settings(dataset: Dataset, root: Path, shards: str | None) -> list[str]:
    """What to give to which command."""
    if dataset.role == "training":
        return [f"train: 'data.train=[\"{shards or dataset.folder(root)}\"]'"]
    lines = [f"evaluate, benchmark: data.images={dataset.folder(root)}", f"reproduce: data.root={root}"]
    return lines + ([f"train: 'data.train=[\"{shards}\"]'"] if shards else [])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help=", ".join(DATASETS))
    parser.add_argument("root", type=Path, help="folder of data sets")
    parser.add_argument("--source", type=Path, action="append", default=[], help="folder or archive; may be repeated")
    parser.add_argument("--download", action="store_true", help="fetch it, where that needs no form")
    parser.add_argument("--shards", type=int, metavar="N", help="also pack N images each into tars, for clusters")
    options = parser.parse_args(arguments)
    return exit_code(
        "prepare_data",
        lambda: prepare(options.dataset, options.root, options.source, options.download, options.shards),
    )
