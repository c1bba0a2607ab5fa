"""The image data sets of the paper and of its field: what they are, and whether they lie where they should.

A data set called NAME lies in `ROOT/NAME`, as `scripts/prepare_data.py NAME ROOT` lays it out. This module alone knows
names, sources, terms and counts.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from oscar.data.images import list_images


@dataclass(frozen=True)
class Dataset:
    """One data set.

    Attributes:
        name: of its folder and on command lines.
        title: as papers call it.
        source: page where it is to be had.
        terms: under which, in a line.
        count: images.
        split: which part of the whole it is.
        role: "evaluation" or "training".
        member: what its images are called there. The group is the path that an image has here.
        files: addresses of archives, or of the images themselves, where they can be fetched without a form.
    """

    name: str
    title: str
    source: str
    terms: str
    count: int
    split: str
    role: str
    member: str
    files: tuple[str, ...] = ()

    def folder(self, root: str | Path) -> Path:
        """Where its images lie."""
        return Path(root) / self.name

    def target(self, name: str) -> Path | None:
        """Where a file of the data set belongs within `folder`, by its path there; None for what is no image of it."""
        found = re.search(self.member, name)
        return Path(found[1]) if found else None

    def check(self, root: str | Path, partial: bool = False) -> Path:
        """The folder, if the data set is there.

        Args:
            root: folder of data sets.
            partial: whether fewer images than all will do.

        Raises:
            ValueError: in one line, if it is missing or incomplete.
        """
        folder = self.folder(root)
        how = f"oscar prepare-data {self.name} {root}"
        if not folder.is_dir():
            raise ValueError(f"data set {self.name}: {folder} does not exist; to lay it out: {how}")
        count = len(list_images(folder))
        if count == 0 or (count != self.count and not partial):
            raise ValueError(
                f"data set {self.name}: {folder} holds {count} images; allowed: {self.count}; to lay it out: {how}"
            )
        return folder

    def digests(self) -> dict[str, str]:
        """SHA-256 of its files by name, where they are listed; else none."""
        path = Path(__file__).parents[1] / "assets" / f"{self.name}.sha256"
        if not path.is_file():
            return {}
        lines = path.read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}

    def check_digests(self, root: str | Path) -> int:
        """Compare all listed files, and say how many they are.

        Raises:
            ValueError: naming the first that is another, and how many are.
        """
        listed, folder = self.digests(), self.folder(root)
        wrong = [
            name
            for name, digest in listed.items()
            if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
        ]
        if wrong:
            raise ValueError(
                f"data set {self.name}: {folder / wrong[0]} is not the published image, by its SHA-256 "
                f"({len(wrong)} of {len(listed)}); allowed: those of oscar/assets/{self.name}.sha256"
            )
        return len(listed)


_ETH = "http://data.vision.ee.ethz.ch/cvl/DIV2K"

DATASETS = {
    entry.name: entry
    for entry in (
        Dataset(
            "kodak",
            "Kodak",
            "https://r0k.us/graphics/kodak/",
            "released by Eastman Kodak for unrestricted use",
            24,
            "all",
            "evaluation",
            r"(?:^|/)(kodim(?:0[1-9]|1\d|2[0-4])\.png)$",
            tuple(f"https://r0k.us/graphics/kodak/kodak/kodim{number:02d}.png" for number in range(1, 25)),
        ),
        Dataset(
            "div2k_valid",
            "DIV2K validation",
            "https://data.vision.ee.ethz.ch/cvl/DIV2K/",
            "for academic research only",
            100,
            "validation, HR",
            "evaluation",
            r"(?:^|/)(0(?:8(?!00)\d\d|900)\.png)$",
            (f"{_ETH}/DIV2K_valid_HR.zip",),
        ),
        Dataset(
            "clic2020_test",
            "CLIC 2020 test",
            "https://www.compression.cc/",
            "photographs of Unsplash and of volunteers; terms on the page",
            428,
            "test, professional (250) and mobile (178)",
            "evaluation",
            r"(?:^|/)([^/.][^/]*\.png)$",
        ),
        Dataset(
            "div2k",
            "DIV2K",
            "https://data.vision.ee.ethz.ch/cvl/DIV2K/",
            "for academic research only",
            800,
            "training, HR",
            "training",
            r"(?:^|/)(0(?:(?!000)[0-7]\d\d|800)\.png)$",
            (f"{_ETH}/DIV2K_train_HR.zip",),
        ),
        Dataset(
            "flickr2k",
            "Flickr2K",
            "https://github.com/limbee/NTIRE2017",
            "photographs of Flickr's users under their own licences; for research",
            2650,
            "HR",
            "training",
            r"(?:^|/)(00[0-2]\d{3}\.png)$",
        ),
        Dataset(
            "lsdir",
            "LSDIR",
            "https://ofsoundof.github.io/lsdir-data/",
            "for academic research only, after a form",
            84991,
            "training, HR",
            "training",
            r"(?:^|/)(\d{7}/\d{7}\.png)$",
        ),
        Dataset(
            "tecnick",
            "Tecnick TESTIMAGES",
            "https://testimages.org/",
            "CC BY-NC-SA 4.0",
            100,
            "sampling, RGB, original size 1200x1200",
            "evaluation",
            r"(?:^|/)(RGB_OR_1200x1200_\d{3}\.png)$",
        ),
    )
}


def find_dataset(name: str) -> Dataset:
    """The data set of a name (ValueError if there is none such)."""
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} does not exist; allowed: {', '.join(DATASETS)}")
    return DATASETS[name]
