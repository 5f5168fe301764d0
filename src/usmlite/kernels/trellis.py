"""Codes that follow each other along a trellis: trellis-coded ("dependent") scalar quantization.

Rounding one weight at a time wastes up to a quarter of a bit, because the cells of errors are cubes. With
two quantizers of twice the step, of which the codes so far say which one comes next, whole columns are
rounded together, and cells come closer to balls (Marcellin and Fischer 1990, "Trellis coded quantization
of memoryless and Gauss-Markov sources"; as in VVC, ITU-T H.266, and ISO/IEC 15938-17, with their two
quantizers: the first has the even multiples of the step, the second the odd ones and zero).

A code c is uint8, and c - 128 steps are the weight, as with 8 bits. Which codes there may be depends on those
above it in its column. In a file each is a symbol of 7 bits instead, its place among those of its
quantizer. docs/format.md says the same for other readers.
"""

from __future__ import annotations

import functools

import numpy as np

from usmlite.kernels import native

ROWS = 4096
"""After so many rows every column begins anew, so that no more rows than these need be held at once."""
BITS = 7
SYMBOLS = 1 << BITS
ZERO = 128
REACH = 126
"""The largest weight in steps that both quantizers come near to."""

_ZERO_SYMBOL = SYMBOLS // 2
# Ungerboeck's codes for amplitudes (1982, "Channel coding with multilevel/phase signals", table I): their
# parity-check polynomials, in octal as he gives them.
_POLYNOMIALS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10)}
_FAR = 1 << 20
# What a symbol that was never seen gets of its neighbours' counts, and of all.
_SPREAD, _LEAST = 0.05, 1e-3 / SYMBOLS

STATES = tuple(_POLYNOMIALS)


@functools.cache
def transitions(states: int) -> np.ndarray:
    """The state after a state and a symbol's parity, uint8 `[states, 2]`.

    A state's lowest bit is its quantizer.
    """
    first, second = (polynomial >> 1 for polynomial in _POLYNOMIALS[states])
    state, parity = np.arange(states)[:, None], np.arange(2)
    out: np.ndarray = ((state >> 1) ^ (state & 1) * first ^ parity * second).astype(np.uint8)
    return out


@functools.cache
def values() -> np.ndarray:
    """What symbols stand for, in steps, int16 `[2, 128]`, by quantizer: 2 k, and 2 k - sign(k)."""
    index = np.arange(SYMBOLS, dtype=np.int16) - _ZERO_SYMBOL
    return np.stack([2 * index, 2 * index - np.sign(index)])


def split(codes: np.ndarray, states: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes to the symbols that are stored.

    Args:
        codes: uint8 `[rows, columns]`.
        states: one of `STATES`.

    Returns:
        The symbols, uint8 `[rows, columns]`, and their quantizers, 0 or 1, likewise.

    Raises:
        ValueError: codes that do not follow each other along the trellis.
    """
    step = codes.astype(np.int16) - ZERO
    following = transitions(states)
    symbols, quantizers = np.empty_like(codes), np.empty_like(codes)
    for row in range(len(codes)):
        if row % ROWS == 0:
            state = np.zeros(codes.shape[1], np.uint8)
        quantizer, value = state & 1, step[row]
        if bool((value & 1 != quantizer)[value != 0].any()):
            raise ValueError(
                f"codes of row {row} do not follow those above along a trellis of {states} states"
            )
        index = (value + quantizer * np.sign(value)) >> 1
        symbols[row], quantizers[row] = index + _ZERO_SYMBOL, quantizer
        state = following[state, index & 1]
    return symbols, quantizers


def count(symbols: np.ndarray, quantizers: np.ndarray, tables: np.ndarray, number: int) -> np.ndarray:
    """How often symbols occur, int64 `[number * 2, 128]`: the quantizers of a table follow each other."""
    places = ((tables.astype(np.int64) * 2 + quantizers) << BITS) + symbols
    return np.bincount(places.reshape(-1), minlength=number * 2 * SYMBOLS).reshape(-1, SYMBOLS)


def costs(counts: np.ndarray) -> np.ndarray:
    """What symbols cost, in bits, going by how often they occurred.

    Args:
        counts: as `count` gives them.

    Returns:
        float32, as `search` takes them.
    """
    near = np.pad(counts, ((0, 0), (1, 1)))
    smooth = counts + _SPREAD * (near[:, :-2] + near[:, 2:])
    smooth += _LEAST * (counts.sum(axis=1, keepdims=True) + 1)
    shares = smooth / smooth.sum(axis=1, keepdims=True)
    out: np.ndarray = (-np.log2(shares)).astype(np.float32).reshape(-1, 2, SYMBOLS)
    return out


def search(
    steps: np.ndarray, states: int, *, weight: np.ndarray, tables: np.ndarray, bits: np.ndarray
) -> np.ndarray:
    """The codes with the least sum of weighted squared errors and of bits, column by column (Viterbi).

    Args:
        steps: float32 `[columns, rows]`, weights in steps: transposed.
        states: one of `STATES`.
        weight: float32 `[columns]`, what the square of a step costs, in bits.
        tables: uint8 `[columns, rows]`, to which table of `bits` a weight belongs.
        bits: float32 `[tables, 2, 128]`, what symbols cost, by quantizer.

    Returns:
        uint8 `[columns, rows]`.
    """
    if native.chosen() is not None:
        return native.trellis_search(steps, states, weight, tables, bits)
    out = np.empty(steps.shape, np.uint8)
    for first in range(0, steps.shape[1], ROWS):
        part = slice(first, first + ROWS)
        out[:, part] = _searched(steps[:, part], states, weight, tables[:, part], bits)
    return out


def nearest(steps: np.ndarray, states: int) -> np.ndarray:
    """The codes along the trellis that are nearest to weights in steps, float32 `[rows, columns]`; uint8."""
    turned = np.ascontiguousarray(steps.T)
    found = search(
        turned, states, weight=np.ones(len(turned), np.float32),
        tables=np.zeros(turned.shape, np.uint8), bits=np.zeros((1, 2, SYMBOLS), np.float32),
    )  # fmt: skip
    return np.ascontiguousarray(found.T)


def _searched(
    steps: np.ndarray, states: int, weight: np.ndarray, tables: np.ndarray, bits: np.ndarray
) -> np.ndarray:
    columns, rows = steps.shape
    following = transitions(states).astype(np.int64)
    # The two ways into each state, as 2 * state + parity.
    ways = np.argsort(following.reshape(-1), kind="stable").reshape(states, 2)
    branch = 2 * (ways // 2 & 1) + (ways & 1)
    costs = np.full((states, columns), np.inf, np.float32)
    costs[0] = 0.0
    taken = np.empty((rows, states, columns), np.uint8)
    picked = np.empty((rows, 4, columns), np.int16)
    for row in range(rows):
        cost, picked[row] = _best(steps[:, row], weight, bits[tables[:, row]])
        through = costs[ways // 2] + cost[branch]  # [states, 2, columns]
        other = through[:, 1] < through[:, 0]
        taken[row] = np.where(other, ways[:, 1:], ways[:, :1])
        costs = np.where(other, through[:, 1], through[:, 0])
        costs -= costs.min(axis=0)
    state, every = costs.argmin(axis=0), np.arange(columns)
    out = np.empty((columns, rows), np.uint8)
    for row in range(rows - 1, -1, -1):
        way = taken[row, state, every].astype(np.int64)
        state = way // 2
        index = picked[row, 2 * (state & 1) + (way & 1), every]
        out[:, row] = values()[state & 1, index + _ZERO_SYMBOL] + ZERO
    return out


def _best(steps: np.ndarray, weight: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the four subsets (2 * quantizer + parity) the best cost, and its place, `[4, columns]`."""
    sign = np.where(steps < 0, -1, 1)
    # What is no number, or has no finite square, counts as very large.
    size = np.where(np.abs(steps) < _FAR, np.abs(steps), np.float32(_FAR))
    near = np.where(size < REACH, size, np.float32(REACH))
    even, odd, three, one = (((near + np.float32(add)).astype(np.int64)) // 4 for add in (0, 2, 1, 3))
    odd, one = odd - 1, one - 1
    # The neighbours on both sides, and one further in, which may be cheaper: zero where there is one.
    subsets = (
        (np.zeros_like(even), 2 * even, 2 * even + 2),
        (2 * odd - 1, 2 * odd + 1, 2 * odd + 3),
        (np.zeros_like(three), 2 * three, 2 * three + 2),
        (2 * one - 1, 2 * one + 1, 2 * one + 3),
    )
    every = np.arange(len(steps))
    costs = np.full((4, len(steps)), np.inf, np.float32)
    places = np.zeros((4, len(steps)), np.int16)
    for subset, indices in enumerate(subsets):
        quantizer, parity = subset >> 1, subset & 1
        for candidate in indices:
            index = candidate.clip(-1, _ZERO_SYMBOL - 2 + parity)
            error = size - values()[quantizer, index + _ZERO_SYMBOL].astype(np.float32)
            cost = weight * error * error + bits[every, quantizer, _ZERO_SYMBOL + sign * index]
            better = cost < costs[subset]
            costs[subset] = np.where(better, cost, costs[subset])
            places[subset] = np.where(better, sign * index, places[subset])
    return costs, places
