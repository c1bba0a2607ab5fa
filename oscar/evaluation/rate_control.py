"""Files of at most so many bytes (`oscar.rate_control`): whether they keep to it, and how much of it they use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from oscar.codec import OscarCodec
from oscar.data.images import read_image
from oscar.utils.tables import Table


def draw_pairs(images: int, count: int, seed: int) -> list[tuple[int, float]]:
    """Numbers of images, and how far between shortest and longest file the target lies, 0 to 1."""
    random = np.random.default_rng(seed)
    return list(zip(random.integers(images, size=count).tolist(), random.random(count).tolist(), strict=True))


def meet(codec: OscarCodec, path: Path, share: float) -> dict:
    """One image at a target: image, target, file_bytes, and use, the share of the target that the file takes.

    Args:
        codec: the codec.
        path: the image.
        share: where the target lies between the logarithms of the lengths that its files can have.
    """
    image = read_image(path)
    shortest = len(codec.compress_batch([image], codec.points[0], codec.bottleneck.max_effort)[0])
    longest = max(len(codec.compress_batch([image], point)[0]) for point in codec.points[-2:])
    target = round(shortest * (longest / shortest) ** share)
    size = len(codec.compress(image, max_bytes=target))
    return {"image": path.name, "target": target, "file_bytes": size, "use": size / target}


def targets_table(rows: pd.DataFrame) -> Table:
    """Pairs, how many files exceed their target, and the mean, median and smallest use in percent."""
    use = 100 * rows["use"]
    frame = pd.DataFrame(
        [
            {
                "pairs": len(rows),
                "exceeded": int((rows["file_bytes"] > rows["target"]).sum()),
                "mean": use.mean(),
                "median": use.median(),
                "smallest": use.min(),
            }
        ]
    )
    titles = {
        "pairs": "pairs",
        "exceeded": "exceeded",
        "mean": "mean use %",
        "median": "median use %",
        "smallest": "smallest use %",
    }
    formats = dict.fromkeys(("mean", "median", "smallest"), "{:.1f}".format)
    caption = "Files of at most so many bytes: random images and targets between their shortest and longest file."
    return Table("targets", caption, frame, titles, formats)
