"""Symbols <-> bytes: codebook indices by fixed-length packing, or by CompressAI's rANS with an integer frequency table.

Frequencies are integers, so that every machine decodes the same symbols. They sum to one less than rANS's 2**16 because
CompressAI's tables end in an escape symbol of at least one unit, which we never write. This module knows no torch.
"""

from __future__ import annotations

import math

import numpy as np

from oscar.bitstream.coding import Coding, bits_per_packed_index, packed_length
from oscar.bitstream.errors import PayloadError
from oscar.bitstream.rans import PRECISION, STATE_BYTES, check_payload, decoder, encode_symbols

FREQUENCY_TOTAL = 2**16 - 1
_CHUNK = 1 << 18  # symbols passed to C++ at once; bounds the memory of the Python lists it wants


def normalise_counts(counts: np.ndarray) -> np.ndarray:
    """Turn counts into a frequency table by integer arithmetic alone.

    Every symbol gets one unit, so that each can be coded; the rest is shared in proportion to the counts by largest
    remainder, ties going to the lower index. Counts that are all zero give the uniform table.

    Args:
        counts: (K,) integers >= 0, with 1 <= K <= 65535.

    Returns:
        (K,) int32 frequencies >= 1 that sum to 2**16 - 1.

    Raises:
        ValueError: if the counts are not integers, not of shape (K,), negative, or too many.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or not 1 <= counts.size <= FREQUENCY_TOTAL:
        raise ValueError(f"counts of shape {counts.shape} are not allowed; allowed: (K,) with K from 1 to 65535")
    if counts.dtype.kind not in "iu":
        raise ValueError(f"counts of type {counts.dtype} are not allowed; allowed: integers")
    if counts.min() < 0:
        raise ValueError(f"count {counts.min()} of symbol {counts.argmin()} is not allowed; allowed: from 0")
    weights = [int(count) for count in counts] if counts.any() else [1] * counts.size  # Python's integers: no overflow
    total, rest = sum(weights), FREQUENCY_TOTAL - counts.size
    shares = [divmod(weight * rest, total) for weight in weights]
    frequencies = np.array([1 + share for share, _ in shares], dtype=np.int32)
    by_remainder = sorted(range(counts.size), key=lambda symbol: (-shares[symbol][1], symbol))
    frequencies[by_remainder[: FREQUENCY_TOTAL - int(frequencies.sum())]] += 1
    return frequencies


def uniform_frequencies(codebook_size: int) -> np.ndarray:
    """The (K,) int32 table of equally likely symbols (the first ones get a unit more where K does not divide)."""
    return normalise_counts(np.zeros(codebook_size, dtype=np.int64))


def estimated_bits(indices: np.ndarray, frequencies: np.ndarray) -> float:
    """Bits that rANS needs for `indices` under `frequencies`, without its final state of 32 to 64 bits.

    Raises:
        ValueError: as `encode_indices`.
    """
    frequencies = check_frequencies(frequencies)
    indices = _check_indices(indices, len(frequencies))
    histogram = np.bincount(indices, minlength=len(frequencies))
    return float(histogram @ (PRECISION - np.log2(frequencies)))


def encode_indices(indices: np.ndarray, frequencies: np.ndarray) -> tuple[Coding, bytes]:
    """Code indices with their frequency table, or at fixed length where that is not longer.

    Args:
        indices: (n,) integers from 0 to K - 1; n may be 0.
        frequencies: (K,) table as `normalise_counts` makes it.

    Returns:
        The coding chosen and the payload, at most `packed_length(n, K)` bytes.

    Raises:
        ValueError: if the indices or the frequencies are not as above.
    """
    frequencies = check_frequencies(frequencies)
    indices = _check_indices(indices, len(frequencies))
    limit = packed_length(len(indices), len(frequencies))
    if limit > STATE_BYTES:  # rANS never takes less than its state
        payload = _rans_encode(indices, frequencies)
        if len(payload) < limit:
            return Coding.TABLE, payload
    return Coding.PACKED, pack_indices(indices, len(frequencies))


def decode_indices(payload: bytes, coding: Coding, count: int, frequencies: np.ndarray) -> np.ndarray:
    """Recover the indices of a payload.

    Only payloads that `encode_indices` can have written are accepted, whatever the bytes: lengths, unused bits and
    symbols are checked, and a rANS payload must come out again when its symbols are encoded anew. Time and memory grow
    with `count`, which cannot exceed what the payload's length has room for.

    Args:
        payload: the coded indices.
        coding: how they are coded.
        count: number of indices n >= 0.
        frequencies: (K,) table as given to the encoder.

    Returns:
        (n,) int32 indices from 0 to K - 1.

    Raises:
        PayloadError: if the payload does not decode to n indices under this table.
        ValueError: if the frequencies or the count are not as above, which is not the payload's fault.
    """
    frequencies = check_frequencies(frequencies)
    if count < 0:
        raise ValueError(f"count {count} is not allowed; allowed: from 0")
    if coding == Coding.PACKED:
        return _unpack(payload, count, len(frequencies))
    if coding != Coding.TABLE:
        raise PayloadError(f"payload has coding {coding}; allowed: 0 (packed) or 1 (table)")
    _check_rans_payload(payload, count, frequencies)
    indices = _rans_decode(payload, count, frequencies)
    if int(indices.max()) >= len(frequencies):
        raise PayloadError(f"payload holds symbol {indices.max()}; allowed: 0 to {len(frequencies) - 1}")
    if _rans_encode(indices, frequencies) != payload:
        raise PayloadError(f"payload of {len(payload)} bytes is not a coding of {count} indices with this table")
    return indices


def check_frequencies(frequencies: np.ndarray) -> np.ndarray:
    """The table as int32, or ValueError if it is none: integers from 1 on, summing to `FREQUENCY_TOTAL`."""
    frequencies = np.asarray(frequencies)
    if frequencies.ndim != 1 or frequencies.size == 0 or frequencies.dtype.kind not in "iu":
        raise ValueError(
            f"frequencies of shape {frequencies.shape} and type {frequencies.dtype} are not allowed; "
            "allowed: integers of shape (K,)"
        )
    total = int(frequencies.sum(dtype=np.int64))
    if frequencies.min() < 1 or total != FREQUENCY_TOTAL:
        raise ValueError(
            f"frequencies from {frequencies.min()} on that sum to {total} are not allowed; "
            f"allowed: from 1 on, summing to {FREQUENCY_TOTAL}"
        )
    return frequencies.astype(np.int32)


def _check_indices(indices: np.ndarray, codebook_size: int) -> np.ndarray:
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise ValueError(
            f"indices of shape {indices.shape} and type {indices.dtype} are not allowed; "
            "allowed: integers of shape (n,)"
        )
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < codebook_size:
        wrong = int(indices.min()) if indices.min() < 0 else int(indices.max())
        raise ValueError(f"index {wrong} is not allowed; allowed: 0 to {codebook_size - 1}")
    return indices.astype(np.int32)


def pack_indices(indices: np.ndarray, codebook_size: int) -> bytes:
    """Indices (n,) from 0 to K - 1 at fixed length."""
    bits = bits_per_packed_index(codebook_size)
    planes = np.empty((len(indices), bits), dtype=np.uint8)
    for bit in range(bits):
        planes[:, bit] = (indices >> (bits - 1 - bit)) & 1
    return np.packbits(planes).tobytes()


def _unpack(payload: bytes, count: int, codebook_size: int) -> np.ndarray:
    bits, length = bits_per_packed_index(codebook_size), packed_length(count, codebook_size)
    if len(payload) != length:
        raise PayloadError(f"payload has {len(payload)} bytes; {count} packed indices of {bits} bits take {length}")
    planes = np.unpackbits(np.frombuffer(payload, dtype=np.uint8))
    if planes[count * bits :].any():
        raise PayloadError("payload has bits set after its last index; allowed: zeros")
    planes = planes[: count * bits].reshape(count, bits)
    indices = np.zeros(count, dtype=np.int32)
    for bit in range(bits):
        indices |= planes[:, bit].astype(np.int32) << (bits - 1 - bit)
    if count and int(indices.max()) >= codebook_size:
        raise PayloadError(f"payload holds index {indices.max()}; allowed: 0 to {codebook_size - 1}")
    return indices


def _check_rans_payload(payload: bytes, count: int, frequencies: np.ndarray) -> None:
    """Refuse what the decoder must not see: a bad state (see `rans`), or a count without bytes for it."""
    check_payload(payload, STATE_BYTES, packed_length(count, len(frequencies)), f"{count} indices coded with a table")
    # The encoder's state starts at 2**31, and no symbol adds less than the most frequent one; 1% is for roundings.
    least_bits = 31 + 0.99 * count * (PRECISION - math.log2(int(frequencies.max())))
    if 8 * len(payload) < least_bits:
        raise PayloadError(
            f"payload has {len(payload)} bytes; {count} indices cannot be coded in fewer than "
            f"{math.ceil(least_bits / 8)}"
        )


def _rans_encode(indices: np.ndarray, frequencies: np.ndarray) -> bytes:
    cdf = [0, *np.cumsum(frequencies).tolist(), 2**PRECISION]  # the last unit is the escape's
    chunks = (indices[start : start + _CHUNK].tolist() for start in range(0, len(indices), _CHUNK))
    return encode_symbols(((symbols, [0] * len(symbols)) for symbols in chunks), [cdf], [len(cdf)], [0])


def _rans_decode(payload: bytes, count: int, frequencies: np.ndarray) -> np.ndarray:
    """Decode to (count,) int32 symbols from 0 to K, where K stands for CompressAI's escape.

    After an escape CompressAI's decoder reads as many bits as the payload says, far beyond its end; so the escape is
    given here as an ordinary symbol K, behind which an escape of no width is never met.
    """
    cdf = [0, *np.cumsum(frequencies).tolist(), 2**PRECISION, 2**PRECISION]
    stream = decoder(payload, count)
    indices = np.empty(count, dtype=np.int32)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        indices[start : start + size] = stream.decode_stream([0] * size, [cdf], [len(cdf)], [0])
    return indices
