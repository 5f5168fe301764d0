"""Codes to fewer bytes and back, exactly: range asymmetric numeral systems (rANS), many lanes side by side.

Codes of trained weights are far from equally frequent; an entropy coder spends about as many bits on each
as its frequency is worth (Duda, arXiv 1311.2540). Lanes take turns, one code each, and share one stream of
words, so that a step of all lanes is a few operations on arrays. The layout is in docs/format.md.
"""

from __future__ import annotations

import math

import numpy as np

from usmlite.kernels import native

_BITS = 12  # frequencies add up to 2^12
_TOTAL = 1 << _BITS
_CHUNK = 1 << 20
# Enough for the rows of a token embedding, which lie by how frequent their words are.
MOST_TABLES = 64
_LOWEST = 1 << 16  # states lie in 2^16 .. 2^32 - 1 between steps; words have 16 bits


def lanes_for(count: int) -> int:
    """How many lanes `count` codes are dealt to: more of them are faster and cost four bytes each."""
    return max(1, min(count, 128 + count // 16_384))


def coded_bytes(count: int, bits: int, entropy: float, tables: int = 1) -> int:
    """About what `encode` makes of `count` codes of `bits` bits with this entropy, in bits a code."""
    return math.ceil(count * entropy / 8) + 2 * tables * (1 << bits) + 4 * lanes_for(count)


def count_codes(codes: np.ndarray, bits: int, tables: int) -> np.ndarray:
    """How often each code occurs in each of `tables` equal runs of the codes, int64 `[tables, 2^bits]`."""
    flat = codes.reshape(-1)
    run = -(-flat.size // tables)
    counts = np.zeros((tables, 1 << bits), np.int64)
    for table in range(tables):
        part = flat[table * run : (table + 1) * run]
        for low in range(0, part.size, _CHUNK):  # numpy would widen all of them to 64 bits at once
            counts[table] += np.bincount(part[low : low + _CHUNK], minlength=1 << bits)
    return counts


def entropy_of(counts: np.ndarray) -> float:
    """Bits a code, each table of `count_codes` for its own codes."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    logarithms = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return max(0.0, float(-(counts * logarithms).sum() / max(1, totals.sum())))


def best_tables(codes: np.ndarray, bits: int) -> int:
    """With how many tables `encode` makes least of the codes: one, or `MOST_TABLES`."""
    sizes = {
        tables: coded_bytes(codes.size, bits, entropy_of(count_codes(codes, bits, tables)), tables)
        for tables in (1, MOST_TABLES)
    }
    return min(sizes, key=lambda tables: (sizes[tables], tables))


def encode(codes: np.ndarray, bits: int, tables: int = 1) -> np.ndarray:
    """Codes to bytes.

    Args:
        codes: uint8, any shape, below 2^bits, at least one.
        bits: 1 to 8.
        tables: into how many equal runs they are cut, each with frequencies of its own; 1 to `MOST_TABLES`.

    Returns:
        uint8 `[bytes]`.
    """
    flat = codes.reshape(-1)
    frequencies = np.stack([_frequencies(counts) for counts in count_codes(flat, bits, tables)])
    frequency = frequencies.astype(np.uint64).reshape(-1)
    start = (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint64).reshape(-1)
    count, lanes, run = flat.size, lanes_for(flat.size), -(-flat.size // tables)
    states = np.full(lanes, _LOWEST, np.uint64)
    words: list[np.ndarray] = []
    # Backwards, so that they can be read forwards.
    for first in range((count - 1) // lanes * lanes, -1, -lanes):
        place = flat[first : first + lanes].astype(np.int64)
        place += np.arange(first, first + len(place)) // run << bits
        f, s = frequency[place], start[place]
        x = states[: len(f)]
        full = x >= f << np.uint64(32 - _BITS)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(f)] = (x // f << np.uint64(_BITS)) + x % f + s
    parts = [frequencies.astype("<u2").reshape(-1), states.astype("<u4"), *words[::-1]]
    return np.concatenate([part.view(np.uint8) for part in parts])


def decode(data: np.ndarray, bits: int, count: int, tables: int = 1) -> np.ndarray:
    """Bytes to codes, the inverse of `encode`.

    Args:
        data: uint8 `[bytes]`.
        bits: 1 to 8.
        count: how many codes.
        tables: as for `encode`.

    Returns:
        uint8 `[count]`.

    Raises:
        ValueError: the bytes are not what `encode` makes for so many codes of so many bits.
    """
    if native.chosen() is not None:
        return native.decode_codes(data, bits, count, tables)
    return reference_decode(data, bits, count, tables)


def reference_decode(data: np.ndarray, bits: int, count: int, tables: int = 1) -> np.ndarray:
    """`decode` in NumPy, a step of all lanes at a time."""
    lanes, symbols, run = lanes_for(count), 1 << bits, -(-count // tables)
    head = 2 * tables * symbols
    if len(data) < head + 4 * lanes or (len(data) - head) % 2:
        raise ValueError(f"{len(data)} bytes cannot hold {count} codes")
    data = np.ascontiguousarray(data)
    frequencies = data[:head].view("<u2").astype(np.int64).reshape(tables, symbols)
    if (wrong := frequencies.sum(axis=1) != _TOTAL).any():
        raise ValueError(f"frequencies add up to {frequencies[wrong][0].sum()} instead of {_TOTAL}")
    states = data[head : head + 4 * lanes].view("<u4").astype(np.uint64)
    words = data[head + 4 * lanes :].view("<u2")
    symbol = np.repeat(np.tile(np.arange(symbols, dtype=np.uint8), tables), frequencies.reshape(-1))
    # By table and slot: the symbol's frequency, and the slot's place in its range.
    starts = np.cumsum(frequencies, axis=1) - frequencies
    frequency = np.repeat(frequencies.reshape(-1), frequencies.reshape(-1)).astype(np.uint64)
    places = np.tile(np.arange(_TOTAL), tables) - np.repeat(starts.reshape(-1), frequencies.reshape(-1))
    offset = places.astype(np.uint64)
    out = np.empty(count, np.uint8)
    position = 0
    for first in range(0, count, lanes):
        x = states[: min(lanes, count - first)]
        slot = (x & np.uint64(_TOTAL - 1)).astype(np.int64)
        if tables > 1:
            slot += np.arange(first, first + len(x)) // run << _BITS
        out[first : first + len(x)] = symbol[slot]
        x = frequency[slot] * (x >> np.uint64(_BITS)) + offset[slot]
        empty = np.flatnonzero(x < _LOWEST)
        following = words[position : position + len(empty)].astype(np.uint64)
        if len(following) < len(empty):
            raise ValueError("the stream ends early")
        position += len(empty)
        x[empty] = x[empty] << np.uint64(16) | following
        states[: len(x)] = x
    # What encoding started from; anything else was altered.
    if position != len(words) or (states != _LOWEST).any():
        raise ValueError("the stream does not end where its codes do")
    return out


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts to whole frequencies with the sum 2^12, at least 1 for every code that occurs."""
    if not counts.any():  # a run beyond the last code
        counts = np.ones_like(counts)
    present = counts > 0
    frequencies = np.where(present, np.maximum(1, np.round(counts / counts.sum() * _TOTAL)), 0).astype(
        np.int64
    )
    # The most frequent codes feel a change least.
    while (excess := int(frequencies.sum()) - _TOTAL) != 0:
        largest = int(frequencies.argmax())
        frequencies[largest] -= excess if frequencies[largest] > excess else frequencies[largest] - 1
    return frequencies
