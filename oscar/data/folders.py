"""Which images an evaluation looks at: a folder's, or the photographs that scikit-image brings along."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from oscar.data.images import ImageError, list_images

# Colour photographs inside scikit-image's wheel; its other images are downloaded on first use.
PACKAGED = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def find_images(folder: str | Path | None = None) -> list[Path]:
    """The images of a folder, searched recursively, or scikit-image's packaged photographs.

    Raises:
        ImageError: if there are none.
    """
    if folder is not None:
        images = list_images(folder)
        if not images:
            raise ImageError(f"{folder}: no images in this folder")
        return images
    spec = importlib.util.find_spec("skimage")
    data = Path(spec.origin).parent / "data" if spec else Path()
    images = [data / name for name in PACKAGED if spec and (data / name).is_file()]
    if not images:
        raise ImageError("scikit-image's photographs are not installed; allowed: a folder with your own")
    return images
