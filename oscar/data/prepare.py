"""Laying out data sets (`oscar.data.datasets`): from what the user has, folders and archives, into ROOT/NAME.

Everything can be interrupted and begun again: files appear whole, and those that are there are not made anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tarfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from oscar.data.datasets import Dataset
from oscar.data.images import list_images
from oscar.utils.errors import first_line


def lay_out(dataset: Dataset, root: str | Path, sources: Sequence[str | Path]) -> int:
    """Put the images of folders and archives (zip, tar) where they belong; returns how many are new.

    Those of folders are linked (hard links), or copied where the file system has none.

    Raises:
        ValueError: for a source that is neither, holds no image of the data set, or one that is another than is there.
    """
    folder, new = dataset.folder(root), 0
    for source in map(Path, sources):
        found = 0
        for name, size, link, stream in _members(source):
            target = dataset.target(name)
            if target is None:
                continue
            found += 1
            new += _place(folder / target, size, link, stream, f"{source}: {name}")
        if not found:
            raise ValueError(f"{source} holds no image of data set {dataset.name}; allowed: {dataset.source}")
    return new


def download(dataset: Dataset, root: str | Path) -> list[Path]:
    """Fetch the data set's files, those that are not there, into ROOT/downloads; returns their paths.

    Raises:
        ValueError: if it cannot be fetched without its page.
        OSError: naming the address that failed.
    """
    from torch.hub import download_url_to_file

    if not dataset.files:
        raise ValueError(
            f"data set {dataset.name} has no address that we know; allowed: --source with what is at {dataset.source}"
        )
    folder = Path(root) / "downloads" / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for url in dataset.files:
        path = folder / url.rpartition("/")[2]
        if not path.exists():
            try:
                download_url_to_file(url, str(path), progress=sys.stderr.isatty())
            except OSError as error:  # of urllib too
                raise OSError(f"{url}: {first_line(error)}") from None
        paths.append(path)
    return paths if all(_is_archive(path) for path in paths) else [folder]


def write_shards(dataset: Dataset, root: str | Path, images_per_shard: int) -> str:
    """Pack the images into uncompressed tars, ROOT/NAME_shards/00000.tar and on; returns the pattern of their names.

    Raises:
        ValueError: if there are no images, or shards of another size.
    """
    folder = dataset.folder(root)
    images, shards = list_images(folder), folder.with_name(f"{dataset.name}_shards")
    groups = [images[first : first + images_per_shard] for first in range(0, len(images), images_per_shard)]
    names = [shards / f"{number:05d}.tar" for number in range(len(groups))]
    others = sorted(set(shards.glob("*.tar")) - set(names))
    if others:
        raise ValueError(f"{others[0]} is there, but {len(names)} shards are to be made; allowed: an empty {shards}")
    shards.mkdir(parents=True, exist_ok=True)
    for path, group in zip(tqdm(names, desc="shards", disable=not sys.stderr.isatty()), groups, strict=True):
        members = {image.relative_to(folder).as_posix(): image for image in group}
        if not _holds(path, members):
            with _whole(path) as beside, tarfile.open(beside, "w") as tar:
                for name, image in members.items():
                    entry = tarfile.TarInfo(name)  # without dates and owners, so that the same images make the same tar
                    entry.size = image.stat().st_size
                    with image.open("rb") as file:
                        tar.addfile(entry, file)
    return f"{shards}/{{00000..{len(names) - 1:05d}}}.tar"


def _holds(path: Path, members: dict[str, Path]) -> bool:
    if not path.is_file():
        return False
    with tarfile.open(path) as tar:
        there = {entry.name: entry.size for entry in tar}
    return there == {name: image.stat().st_size for name, image in members.items()}


def _is_archive(path: Path) -> bool:
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def _members(source: Path) -> Iterator[tuple[str, int, Path | None, IO[bytes] | None]]:
    """Files of a folder or an archive: name, size, and the file itself or a stream of its bytes."""
    if source.is_dir():
        for path in tqdm(list_images(source), desc=source.name, disable=not sys.stderr.isatty()):
            yield path.relative_to(source).as_posix(), path.stat().st_size, path, None
    elif _is_archive(source) and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for entry in tqdm(archive.infolist(), desc=source.name, disable=not sys.stderr.isatty()):
                if not entry.is_dir():
                    with archive.open(entry) as stream:
                        yield entry.filename, entry.file_size, None, stream
    elif _is_archive(source):
        with tarfile.open(source) as archive:
            for member in tqdm(archive, desc=source.name, disable=not sys.stderr.isatty()):
                if member.isfile():
                    yield member.name, member.size, None, archive.extractfile(member)
    else:
        raise ValueError(f"{source} is no folder, zip or tar; allowed: what the data set's page gives")


def _place(target: Path, size: int, link: Path | None, stream: IO[bytes] | None, name: str) -> bool:
    """Put a file to its place, unless it is there; returns whether it is new."""
    if target.exists():
        if target.stat().st_size != size:
            raise ValueError(f"{name} is another image than {target}; allowed: one version of the data set")
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with _whole(target) as beside:
        if link is None:
            with beside.open("wb") as file:
                shutil.copyfileobj(stream, file)
        else:
            try:
                os.link(link.resolve(), beside)
            except OSError:
                shutil.copyfile(link, beside)
    return True


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path beside a file, which becomes the file when all went well."""
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
