"""CompressAI's rANS coder, whose decoder checks nothing: what must be checked before it sees a payload.

Where it is not installed, `oscar.bitstream.python_rans` takes its place, with the same bytes. `PrefixDecoder` reads
payloads from their first bytes alone, for previews.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from oscar.bitstream import python_rans
from oscar.bitstream.errors import PayloadError
from oscar.bitstream.python_rans import PRECISION, SMALLEST_STATE, STATE_BYTES, STATE_LIMIT, WORD_BYTES

MEAN_STATE_BITS = 48  # of the final state beyond what the symbols need: 32 to 64, as it falls to whole words
FEWEST_SYMBOLS = 4  # that CompressAI's encoder has room for: 16 bits each at most, and 64 of the state
_CERTAIN = [0, 2**PRECISION - 1, 2**PRECISION]  # a table of one symbol and the escape


@functools.cache
def ans() -> ModuleType:
    """CompressAI's compiled coder without its package, whose import takes seconds and brings torch; or else our own."""
    name = "compressai.ans"
    if name not in sys.modules:
        package = importlib.util.find_spec("compressai")
        paths = package.submodule_search_locations if package else None
        spec = importlib.machinery.PathFinder.find_spec(name, paths) if paths else None
        if spec is None or spec.loader is None:
            return python_rans
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module  # a later import of the package must not load the extension a second time
    return sys.modules[name]


def encode_symbols(
    parts: Iterable[tuple[Sequence[int], Sequence[int]]],
    cdfs: Sequence[Sequence[int]],
    sizes: Sequence[int],
    offsets: Sequence[int],
) -> bytes:
    """The payload of symbols in parts, each with its symbols and the tables that they are coded by.

    CompressAI's encoder takes a word of memory per symbol, but one or two symbols can fill three: it would write before
    its buffer. So a few are followed by more, almost without cost, which no decoder asks for.
    """
    encoder, count = ans().BufferedRansEncoder(), 0
    for symbols, tables in parts:
        encoder.encode_with_indexes(symbols, tables, cdfs, sizes, offsets)
        count += len(symbols)
    if spare := max(0, FEWEST_SYMBOLS - count):
        encoder.encode_with_indexes([0] * spare, [0] * spare, [_CERTAIN], [len(_CERTAIN)], [0])
    return encoder.flush()


def whole_words(length: int) -> int:
    """The length in bytes of the longest payload that is no longer, or of the shortest that there is."""
    return max(STATE_BYTES, length // WORD_BYTES * WORD_BYTES)


def longest_payload(symbols: int) -> int:
    """Bytes that so many symbols take at most.

    From a state of at least 2**31 each symbol takes at most 16 bits, hence a word of 32 bits at most at every second.
    """
    return STATE_BYTES + WORD_BYTES * ((symbols + 1) // 2)


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
    if not SMALLEST_STATE <= state < STATE_LIMIT:
        raise PayloadError(f"payload begins with coder state {state}; allowed: 2**31 to 2**63 - 1")


def decoder(payload: bytes, symbols: int):
    """A decoder of a payload of at most so many symbols that never reads beyond its buffer, whatever the payload.

    Zeros behind the payload, up to the longest there is, keep all reads inside. The tables must give the escape no
    width.
    """
    result = ans().RansDecoder()
    result.set_stream(payload.ljust(longest_payload(symbols), b"\0"))
    return result


class PrefixDecoder:
    """Decodes the symbols that the first bytes of a payload hold, and has the most probable ones follow.

    Attributes:
        asked: symbols that it was asked for.
        known: how many of them came from the bytes, the first ones.
    """

    def __init__(self, prefix: bytes):
        self._stream = python_rans.RansDecoder()
        self._stream.set_stream(prefix)
        self.asked = self.known = 0

    def decode_stream(
        self,
        indexes: Sequence[int],
        cdfs: Sequence[Sequence[int]],
        sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> list[int]:
        """The next symbols; arguments as CompressAI's decoder takes them."""
        probable = functools.cache(lambda table: _most_probable(cdfs[table][: sizes[table]]) + offsets[table])
        symbols = self._stream.decode_stream(indexes, cdfs, sizes, offsets)
        self.asked += len(indexes)
        self.known += len(symbols)
        return symbols + [probable(table) for table in indexes[len(symbols) :]]


def _most_probable(cdf: Sequence[int]) -> int:
    widths = [after - before for before, after in zip(cdf, cdf[1:], strict=False)]
    return widths.index(max(widths))
