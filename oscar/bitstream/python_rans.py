"""rANS in Python, where CompressAI's compiled coder is not installed: its interface as used here, and its bytes.

The state has 64 bits and is renormalised by words of 32; frequencies sum to 2**16 (J. Duda, arXiv 1311.2540). Symbols
that would take an escape are not written, and an escape that damaged bytes hold is decoded as a symbol, so that nothing
is read for it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

PRECISION = 16  # bits of frequencies
STATE_BYTES = 8  # the final state, first in a payload
WORD_BYTES = 4
SMALLEST_STATE, STATE_LIMIT = 2**31, 2**63
_PLACE = 2**PRECISION - 1
_WORD = 2 ** (8 * WORD_BYTES) - 1
_CHUNK = 1 << 16  # symbols that are Python's integers at once; bounds the memory

_Step = tuple[int, int, int, int]  # of a symbol: its frequency, the state from which a word goes out, and two summands


class BufferedRansEncoder:
    """Codes all symbols at the end, the last one first."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, list[_Step]]] = []
        self._cdfs: object = None  # the last tables, with the steps of all their symbols and where each table's begin
        self._steps: list[_Step] = []
        self._begins = np.empty(0, dtype=np.int64)

    def encode_with_indexes(
        self,
        symbols: Sequence[int],
        indexes: Sequence[int],
        cdfs: Sequence[Sequence[int]],
        sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        """Take symbols.

        Args:
            symbols: (n,).
            indexes: the table of each, (n,).
            cdfs: tables of cumulative frequencies, from 0 to 2**16; the last interval is the escape's.
            sizes: how many numbers of each table count.
            offsets: the first symbol of each table.

        Raises:
            ValueError: if a symbol is not in its table.
        """
        tables, lengths = np.asarray(indexes, dtype=np.int64), np.asarray(sizes, dtype=np.int64)
        if self._cdfs is not cdfs:
            self._cdfs, self._begins = cdfs, np.cumsum(lengths) - lengths
            self._steps = _steps([bound for cdf, size in zip(cdfs, sizes, strict=True) for bound in cdf[:size]])
        values = np.asarray(symbols, dtype=np.int64) - np.asarray(offsets, dtype=np.int64)[tables]
        wrong = np.flatnonzero((values < 0) | (values > lengths[tables] - 3))
        if wrong.size:
            raise ValueError(f"symbol {symbols[wrong[0]]} is not in table {indexes[wrong[0]]}")
        self._parts.append((self._begins[tables] + values, self._steps))

    def flush(self) -> bytes:
        """The payload of the symbols so far, which are then gone."""
        state, words = SMALLEST_STATE, []
        put = words.append
        while self._parts:
            places, steps = self._parts.pop()
            for stop in range(len(places), 0, -_CHUNK):
                for place in places[max(0, stop - _CHUNK) : stop][::-1].tolist():
                    frequency, limit, rest, start = steps[place]
                    if state >= limit:
                        put(state & _WORD)
                        state >>= 8 * WORD_BYTES
                    state += state // frequency * rest + start
        return state.to_bytes(STATE_BYTES, "little") + np.array(words[::-1], dtype="<u4").tobytes()


class RansDecoder:
    """Decodes the symbols of a payload one after another."""

    def __init__(self) -> None:
        self.set_stream(b"")

    def set_stream(self, payload: bytes) -> None:
        """Begin with a payload, whose last bytes are left if they are no whole word."""
        words = np.frombuffer(payload[: len(payload) // WORD_BYTES * WORD_BYTES], dtype="<u4").tolist()
        self._state = words[0] | words[1] << 8 * WORD_BYTES if len(words) > 1 else 0
        self._words = iter(words[2:])

    def decode_stream(
        self,
        indexes: Sequence[int],
        cdfs: Sequence[Sequence[int]],
        sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> list[int]:
        """The next symbols (n,), as `BufferedRansEncoder` took them; fewer if the payload ends before.

        A state that no encoder writes ends it too.
        """
        state, words, found = self._state, self._words, []
        put, find = found.append, bisect.bisect_right
        own = [cdf if len(cdf) == size else cdf[:size] for cdf, size in zip(cdfs, sizes, strict=True)]
        if not SMALLEST_STATE <= state < STATE_LIMIT:
            return found
        for table in indexes:
            cdf = own[table]
            place = state & _PLACE
            symbol = find(cdf, place)  # less one
            start = cdf[symbol - 1]
            state = (cdf[symbol] - start) * (state >> PRECISION) + place - start
            put(symbol - 1 + offsets[table])
            if state < SMALLEST_STATE:
                word = next(words, None)
                if word is None:
                    break
                state = state << 8 * WORD_BYTES | word
        self._state = state
        return found


def _steps(bounds: list[int]) -> list[_Step]:
    """Of the symbols of tables that stand one behind another, by the place of a symbol's lower bound."""
    return [
        (stop - start, (stop - start) << (63 - PRECISION), 2**PRECISION - (stop - start), start)
        for start, stop in itertools.pairwise(bounds)
    ]
