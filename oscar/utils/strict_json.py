"""JSON as its standard has it: a number that is not finite becomes null, where Python would write NaN or Infinity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from oscar.utils.files import atomic_write


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` without NaN and Infinity, which other readers refuse.

    Args:
        value: of dicts, lists, tuples and plain values.
        **options: of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a value as an indented file that ends in a newline, whole or not at all."""
    atomic_write(path, (dumps(value, **{"indent": 2, **options}) + "\n").encode())


def as_read(value: Any) -> Any:
    """A value as it is read back: tuples are lists, keys are text."""
    return json.loads(dumps(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
