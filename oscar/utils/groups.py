"""Things that go together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def group(keys: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """Positions by key, in the order of the keys' first positions."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups
