"""Codes to fewer bytes and back, exactly: range asymmetric numeral systems (rANS), many lanes side by side.

Codes of trained weights are far from equally frequent; an entropy coder spends about as many bits on each
as its frequency is worth (Duda, arXiv 1311.2540). Lanes take turns, one code each, and share one stream of
words, so that a step of all lanes is a few operations on arrays. The layout is in docs/format.md.
"""

from __future__ import annotations

import math

import numpy as np

_BITS = 12  # frequencies add up to 2^12
_TOTAL = 1 << _BITS
_CHUNK = 1 << 20
_LOWEST = 1 << 16  # states lie in 2^16 .. 2^32 - 1 between steps; words have 16 bits


def lanes_for(count: int) -> int:
    """How many lanes `count` codes are dealt to: more of them are faster and cost four bytes each."""
    return max(1, min(count, 128 + count // 16_384))


def coded_bytes(count: int, bits: int, entropy: float) -> int:
    """About what `encode` makes of `count` codes of `bits` bits with this entropy, in bits a code."""
    return math.ceil(count * entropy / 8) + 2 * (1 << bits) + 4 * lanes_for(count)


def encode(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes to bytes.

    Args:
        codes: uint8, any shape, below 2^bits, at least one.
        bits: 1 to 8.

    Returns:
        uint8 `[bytes]`.
    """
    flat = codes.reshape(-1)
    counts = np.zeros(1 << bits, np.int64)
    for low in range(0, flat.size, _CHUNK):  # numpy would widen all of them to 64 bits at once
        counts += np.bincount(flat[low : low + _CHUNK], minlength=1 << bits)
    frequencies = _frequencies(counts)
    frequency = frequencies.astype(np.uint64)
    start = (np.cumsum(frequencies) - frequencies).astype(np.uint64)
    count, lanes = flat.size, lanes_for(flat.size)
    states = np.full(lanes, _LOWEST, np.uint64)
    words = []
    # Backwards, so that they can be read forwards.
    for first in range((count - 1) // lanes * lanes, -1, -lanes):
        step = flat[first : first + lanes]
        f, s = frequency[step], start[step]
        x = states[: len(f)]
        full = x >= f << np.uint64(32 - _BITS)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(f)] = (x // f << np.uint64(_BITS)) + x % f + s
    parts = [frequencies.astype("<u2"), states.astype("<u4"), *words[::-1]]
    return np.concatenate([part.view(np.uint8) for part in parts])


def decode(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Bytes to codes, the inverse of `encode`.

    Args:
        data: uint8 `[bytes]`.
        bits: 1 to 8.
        count: how many codes.

    Returns:
        uint8 `[count]`.

    Raises:
        ValueError: the bytes are not what `encode` makes for so many codes of so many bits.
    """
    lanes, symbols = lanes_for(count), 1 << bits
    head = 2 * symbols + 4 * lanes
    if len(data) < head or (len(data) - head) % 2:
        raise ValueError(f"{len(data)} bytes cannot hold {count} codes")
    data = np.ascontiguousarray(data)
    frequencies = data[: 2 * symbols].view("<u2").astype(np.int64)
    if frequencies.sum() != _TOTAL:
        raise ValueError(f"frequencies add up to {frequencies.sum()} instead of {_TOTAL}")
    states = data[2 * symbols : head].view("<u4").astype(np.uint64)
    words = data[head:].view("<u2")
    symbol = np.repeat(np.arange(symbols, dtype=np.uint8), frequencies)
    # By slot: the symbol's frequency, and the slot's place in its range.
    frequency = frequencies.astype(np.uint64)[symbol]
    offset = (
        np.arange(_TOTAL, dtype=np.uint64) - (np.cumsum(frequencies) - frequencies).astype(np.uint64)[symbol]
    )
    out = np.empty(count, np.uint8)
    position = 0
    for first in range(0, count, lanes):
        x = states[: min(lanes, count - first)]
        slot = (x & np.uint64(_TOTAL - 1)).astype(np.int64)
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
    present = counts > 0
    frequencies = np.where(present, np.maximum(1, np.round(counts / counts.sum() * _TOTAL)), 0).astype(
        np.int64
    )
    # The most frequent codes feel a change least.
    while (excess := int(frequencies.sum()) - _TOTAL) != 0:
        largest = int(frequencies.argmax())
        frequencies[largest] -= excess if frequencies[largest] > excess else frequencies[largest] - 1
    return frequencies
