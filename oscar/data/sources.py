"""Where training images come from: folders, text lists, WebDataset shards and Hugging Face data sets.

Every kind gives random access, so that an epoch is a permutation of all images, whatever they lie in. They are
numbered root by root, in this order:

    folder                  by path, searched recursively
    text list (.txt, .lst)  by line
    WebDataset shard        as they lie in the tar; the shards of a pattern in the order of its braces, then by path
    Hugging Face data set   by row

This module does without torch: the configuration is checked with it.
"""

from __future__ import annotations

import io
import itertools
import logging
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from oscar.data.images import ImageError, image_suffixes, list_images, read_image
from oscar.utils.errors import first_line
from oscar.utils.extras import how_to_install
from oscar.utils.patterns import HUB, expand

if TYPE_CHECKING:
    import datasets
    from PIL import Image

logger = logging.getLogger(__name__)

LIST_SUFFIXES = (".txt", ".lst")


@dataclass(frozen=True)
class ShardImage:
    """An image within an uncompressed tar; `str` names shard and member."""

    shard: Path
    name: str
    offset: int
    size: int

    def open(self) -> BinaryIO:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"


@dataclass(frozen=True)
class RowImage:
    """An image in a row of a Hugging Face data set; `str` names data set, row and, where there is one, the file."""

    root: str
    table: datasets.Dataset
    row: int
    path: str | None
    """of the file, or its name within the data set"""

    def open(self) -> BinaryIO:
        (cell,) = self.table[self.row].values()
        if cell is None:
            raise ImageError("empty row")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).open("rb")

    def __str__(self) -> str:
        return f"{self.root} row {self.row}" + (f" ({self.path})" if self.path else "")


ImageSource = Path | ShardImage | RowImage


def open_source(image: ImageSource) -> Image.Image:
    """The image as 8-bit RGB, upright.

    Raises:
        ImageError: in one line that names it, if it is not a whole and readable image or has transparent pixels.
    """
    if isinstance(image, Path):
        return read_image(image)
    try:
        stream = image.open()
    except Exception as error:  # of the shard, of the table, or of a file that a row names
        raise ImageError(f"{image}: cannot be read as an image: {first_line(error)}") from error
    with stream:
        return read_image(stream, name=str(image))


def find_images(root: str | Path) -> list[ImageSource]:
    """The images of one root; of which kind it is follows from its name.

    Raises:
        ValueError: if the root, or something that it names, does not exist, or there is no image.
    """
    if str(root).startswith(HUB):
        found = _read_hub(str(root))
    else:
        paths = expand(root)
        shards = [path for path in paths if path.suffix.lower() == ".tar"]
        with ThreadPoolExecutor(8) as pool:  # many small reads: on a network drive they are waited for
            of_shard = dict(zip(shards, pool.map(_read_shard, shards), strict=True))
        found = list(
            itertools.chain.from_iterable(of_shard[path] if path in of_shard else _read_path(path) for path in paths)
        )
    if not found:
        raise ValueError(f"{root} holds no image")
    return found


def _read_path(path: Path) -> list[Path]:
    if path.is_dir():
        return list_images(path)
    if path.suffix.lower() in LIST_SUFFIXES:
        return _read_list(path)
    return [path]


def _read_list(path: Path) -> list[Path]:
    images = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name = line.strip()
        if name and not name.startswith("#"):
            images.append(path.parent / name)
            if not images[-1].is_file():
                raise ValueError(f"{path} line {number}: no image {name}")
    return images


def _read_shard(path: Path) -> list[ShardImage]:
    """The members with an image's extension; what follows a damaged place is logged and left out."""
    images, suffixes = [], image_suffixes()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = Path(member.name)
                if member.isreg() and name.suffix.lower() in suffixes and not name.name.startswith("."):
                    images.append(ShardImage(path, member.name, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        after = f"the rest of it, after {len(images)} images," if images else "shard"
        logger.warning("%s left out: %s: not a whole uncompressed tar: %s", after, path, first_line(error))
    return images


def _read_hub(root: str) -> list[RowImage]:
    """The rows of hf:DATASET[#SPLIT], a hub id or a folder of images or Parquet files; without a split, of train."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{root} needs the package datasets: {how_to_install('datasets')}") from None
    source, _, split = root.removeprefix(HUB).partition("#")
    try:
        table = datasets.load_dataset(source, split=split or "train")
        column = _image_column(table)
        table = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
        # of the table itself, so that no image is read for the names
        paths = [path for chunk in table.data.column(column).chunks for path in chunk.field("path").to_pylist()]
    except Exception as error:  # the library and its builders raise many kinds
        raise ValueError(f"{root} cannot be read as a Hugging Face data set: {first_line(error)}") from None
    return [RowImage(root, table, row, path) for row, path in enumerate(paths)]


def _image_column(table: datasets.Dataset) -> str:
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            return name
    if "image" in table.features:  # Parquet files from elsewhere, with bytes or paths
        return "image"
    raise ValueError(f"no column of images among {', '.join(table.column_names)}")
