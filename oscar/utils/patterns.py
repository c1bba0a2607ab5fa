"""Names of places where training images are, and the paths that a pattern stands for."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

HUB = "hf:"
ALLOWED = f"folders or text lists (.txt, .lst), images, .tar shards, patterns of these, {HUB}DATASET[#SPLIT]"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(root: str | Path) -> list[Path]:
    """The existing paths that a root names: itself, or those of a pattern with {000..099}, {a,b}, *, ? and [...].

    Raises:
        ValueError: if one of them does not exist, or the pattern matches nothing.
    """
    if Path(root).exists():
        return [Path(root)]
    found: list[Path] = []
    for name in _expand_braces(str(root)):
        matches = [name] if Path(name).exists() else sorted(glob(name, recursive=True))
        if not matches:
            raise ValueError(f"{name} does not exist; allowed: {ALLOWED}")
        found += map(Path, matches)
    return found


def _expand_braces(pattern: str) -> list[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    numbers = _RANGE.fullmatch(braces[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        width = len(numbers[1])
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        parts = braces[1].split(",")
    head, tail = pattern[: braces.start()], _expand_braces(pattern[braces.end() :])
    return [head + part + rest for part in parts for rest in tail]
