"""Baselines by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from oscar.baselines import external, pillow, zoo
from oscar.baselines.base import ImageCodec, check_whole
from oscar.baselines.downscaled import Downscaled
from oscar.registry import BASELINES

for codec_class in (
    *(pillow.JPEG, pillow.JPEG2000, pillow.WebP, pillow.AVIF, pillow.JPEGXL),
    *(external.BPG, external.VTM, external.VVenC),
):
    BASELINES.register(codec_class.name, codec_class)
for architecture in zoo.LABELS:
    BASELINES.register(architecture, partial(zoo.ZooCodec, architecture))


def make_baseline(
    name: str,
    *,
    points: Sequence[float] | None = None,
    downscale: int = 1,
    alias: str | None = None,
    label: str | None = None,
    **options: Any,
) -> ImageCodec:
    """A baseline, ready to run.

    Args:
        name: one of `BASELINES`.
        points: operating points, in any order; None leaves the baseline's own.
        downscale: factor by which images are shrunk before coding and enlarged after; 1 does neither.
        alias: its name in results, where one baseline stands there with several settings; file-name safe.
        label: its name in tables and plots.
        options: of the baseline, see its class.

    Raises:
        ValueError: for an unknown name, option, point or value, in one line with what is allowed.
        BaselineUnavailable: if what it needs is missing.
    """
    make = BASELINES.find(name)
    common = inspect.signature(make_baseline).parameters
    allowed = [*inspect.signature(make).parameters, *(option for option in common if option != "options")]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name}: option {option!r} does not exist; allowed: {', '.join(allowed)}")
    check_whole(name, "downscale", downscale, 1, 64)
    if alias is not None and not re.fullmatch(r"[\w.+-]+", alias):
        raise ValueError(f"{name}: alias {alias!r} is not allowed; allowed: letters, digits and . _ + -")
    codec = make(**options)
    if downscale > 1:
        codec = Downscaled(codec, downscale)
    if points is not None:
        if not points:
            raise ValueError(f"{name}: points are empty; allowed: one or more")
        descending = codec.grid[0] > codec.grid[-1]
        codec.points = tuple(sorted({codec.check_point(point) for point in points}, reverse=descending))
    codec.name, codec.label = alias or codec.name, label or codec.label
    return codec
