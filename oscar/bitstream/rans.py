"""CompressAI's rANS coder, whose decoder checks nothing: what must be checked before it sees a payload."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

from oscar.bitstream.errors import PayloadError

PRECISION = 16  # bits of CompressAI's frequencies
STATE_BYTES = 8  # the final state, first in a payload
WORD_BYTES = 4
_SMALLEST_STATE, _STATE_LIMIT = 2**31, 2**63


@functools.cache
def ans() -> ModuleType:
    """CompressAI's compiled coder, loaded without its package, whose import takes seconds and brings torch."""
    name = "compressai.ans"
    if name not in sys.modules:
        package = importlib.util.find_spec("compressai")
        paths = package.submodule_search_locations if package else None
        spec = importlib.machinery.PathFinder.find_spec(name, paths) if paths else None
        if spec is None or spec.loader is None:
            raise ImportError("compressai is not installed; it holds the entropy coder")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module  # a later import of the package must not load the extension a second time
    return sys.modules[name]


def check_payload(payload: bytes, smallest: int, limit: int, what: str) -> None:
    """Refuse a payload whose length or first state no encoder writes.

    Args:
        payload: the coded symbols.
        smallest, limit: its length in bytes is at least the first and below the second.
        what: is coded, for the message.

    Raises:
        PayloadError: if it is not as above, or its length is no multiple of 4.
    """
    if len(payload) % WORD_BYTES or not smallest <= len(payload) < limit:
        raise PayloadError(
            f"payload has {len(payload)} bytes; {what} take a multiple of 4 from {smallest} to {limit - 1}"
        )
    state = int.from_bytes(payload[:STATE_BYTES], "little")
    if not _SMALLEST_STATE <= state < _STATE_LIMIT:
        raise PayloadError(f"payload begins with coder state {state}; allowed: 2**31 to 2**63 - 1")


def decoder(payload: bytes, symbols: int):
    """A decoder of a payload of at most so many symbols that never reads beyond its buffer, whatever the payload.

    From a state of at least 2**31 each symbol takes at most 16 bits, hence a word of 32 bits at most at every second
    symbol: that many zeros behind the payload keep all reads inside. The tables must give the escape no width.
    """
    result = ans().RansDecoder()
    result.set_stream(payload.ljust(STATE_BYTES + WORD_BYTES * ((symbols + 1) // 2), b"\0"))
    return result
