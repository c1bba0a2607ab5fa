from __future__ import annotations

from pathlib import Path

import pytest

from oscar.data.folders import find_images
from oscar.data.images import ImageError


def test_packaged_photographs_are_local() -> None:
    pytest.importorskip("skimage")
    images = find_images()
    assert len(images) >= 3 and all(path.is_file() for path in images)


def test_a_folder(photos: Path, tmp_path: Path) -> None:
    assert find_images(photos) == sorted(photos.iterdir())
    with pytest.raises(ImageError, match="no images in this folder"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match="no such folder"):
        find_images(tmp_path / "none")
