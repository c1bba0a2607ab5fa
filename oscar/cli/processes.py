"""The processes of one run, as `torchrun` starts them: each has a share of the files, and they end together."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from datetime import timedelta
from typing import Any

from oscar.utils.strict_json import dumps

_PATIENCE = timedelta(days=7)  # with the slowest one, at the end


class Group:
    """All processes of this run; by itself, unless the environment says otherwise.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = (_number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self._turn = 0
        if self.count > 1:
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
                if name not in os.environ:
                    raise ValueError(f"WORLD_SIZE is {self.count} and {name} is not set; allowed: what torchrun sets")
            from torch.distributed.rendezvous import rendezvous

            self._store, self.rank, self.count = next(rendezvous("env://"))
            self._store.set_timeout(_PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by their rank, once all have come here; what JSON can hold."""
        if self.count == 1:
            return [value]
        self._turn += 1
        key = f"oscar/{self._turn}"
        self._store.set(f"{key}/{self.rank}", dumps(value))
        values = [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.count)]
        if self._store.add(f"{key}/read", 1) == self.count:
            self._store.set(f"{key}/all", "")
        if self.rank == 0:  # which may hold the store: it must not leave before the others have read
            self._store.wait([f"{key}/all"])
        return values

    def add(self, number: int) -> int:
        """Add to a count that all have in common, and return it."""
        return number if self.count == 1 else self._store.add("oscar/done", number)

    def is_first_to_say(self, line: str) -> bool:
        """Whether no other process has asked the same of the same line."""
        digest = hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()
        return self.count == 1 or self._store.add(f"oscar/said/{digest}", 1) == 1


@functools.cache
def group() -> Group:
    """The processes that this one is among.

    Raises:
        ValueError: if the environment speaks of others, and does not say where they are.
    """
    return Group()


def own_device(device: str) -> str:
    """`cuda` as the GPU of this process; other devices, and all where no launcher counts processes, as they are."""
    local = os.environ.get("LOCAL_RANK")
    if device != "cuda" or local is None:
        return device
    import torch

    return f"cuda:{_number('LOCAL_RANK', 0) % max(torch.cuda.device_count(), 1)}"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} in the environment; allowed: what torchrun sets, or nothing")
    return int(text)
