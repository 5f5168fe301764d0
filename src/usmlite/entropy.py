"""Codes to fewer bytes and back, exactly: range asymmetric numeral systems (rANS), many lanes side by side.

Codes of trained weights are far from equally frequent; an entropy coder spends about as many bits on each
as its frequency is worth (Duda, arXiv 1311.2540). How frequent a code is depends on how large the weights of
its row and of its column are in steps: both get a level, and codes with the same sum of levels share a table
of frequencies. Lanes take turns, one code each, and share one stream of words, so that a step of all lanes is
a few operations on arrays. The layout is in docs/format.md.

Codes that follow a trellis are coded as symbols (`trellis.split`), with two tables in the place of one: which
of them depends on the quantizer, and that on the codes above.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from usmlite.kernels import native
from usmlite.kernels import trellis as paths

_BITS = 12  # frequencies add up to 2^12
_TOTAL = 1 << _BITS
_CHUNK = 1 << 18
MOST_TABLES = 64
_LOWEST = 1 << 16  # states lie in 2^16 .. 2^32 - 1 between steps; words have 16 bits
# Levels in an octave of the size of a row or a column: finer ones do not pay for more tables.
_LEVELS_PER_OCTAVE = 2
# Fewer codes than this do not pay for a table of their own.
_LEAST_CODES = 1024
# What counts as no size at all, as a share of the mean square.
_LEAST_SQUARE = 1e-3


@dataclass(frozen=True)
class Contexts:
    """Which table of frequencies each code of a matrix belongs to.

    That of a code is the sum of its row's and its column's level less `lowest`, at least 0 and at most
    `tables` - 1.

    Attributes:
        rows: uint8 `[rows]`.
        columns: uint8 `[columns]`.
        lowest: the sum of levels of the first table.
        tables: how many tables, 1 to `MOST_TABLES`.
    """

    rows: np.ndarray
    columns: np.ndarray
    lowest: int = 0
    tables: int = 1

    @classmethod
    def single(cls, rows: int, columns: int) -> Contexts:
        """One table for all."""
        return cls(np.zeros(rows, np.uint8), np.zeros(columns, np.uint8))

    @classmethod
    def of(cls, values: np.ndarray) -> Contexts:
        """Tables for a matrix by how large its rows and columns are.

        Args:
            values: `[rows, columns]`, codes, or the weights themselves; their mean counts as zero.
        """
        mean = float(values.mean(dtype=np.float64))
        uniform = np.ones(values.shape[1], np.float32)
        rows, _ = _sizes(values, mean, uniform, np.ones(len(values), np.float32))
        least = _LEAST_SQUARE * float(rows.mean()) or 1.0
        _, columns = _sizes(values, mean, uniform, rows + least)
        columns += _LEAST_SQUARE
        rows, _ = _sizes(values, mean, columns, rows + least)
        rows += least
        levels = [
            np.round(_LEVELS_PER_OCTAVE / 2 * np.log2(sizes)).astype(np.int64) for sizes in (rows, columns)
        ]
        first, second = ((level - level.min()).clip(max=255) for level in levels)
        # Of all sums: from which on, and up to which, there are codes enough for a table.
        sums = np.convolve(np.bincount(first), np.bincount(second))
        lowest = int(np.searchsorted(np.cumsum(sums), _LEAST_CODES))
        highest = len(sums) - 1 - int(np.searchsorted(np.cumsum(sums[::-1]), _LEAST_CODES))
        tables = min(MOST_TABLES, max(1, highest - lowest + 1))
        if tables == 1:
            return cls.single(*values.shape)
        return cls(first.astype(np.uint8), second.astype(np.uint8), min(lowest, 255), tables)

    def select(self, low: int, high: int) -> np.ndarray:
        """The tables of the codes in some rows, int64 `[high - low, columns]`."""
        sums = self.rows[low:high, None].astype(np.int64) + self.columns
        found: np.ndarray = np.clip(sums - self.lowest, 0, self.tables - 1)
        return found


def _sizes(
    values: np.ndarray, mean: float, columns: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squares of rows about the mean, over those of columns; and of columns, over those of rows."""
    of_rows, of_columns = np.empty(len(values), np.float32), np.zeros(values.shape[1], np.float32)
    step = max(1, _CHUNK // values.shape[1])
    for low in range(0, len(values), step):
        squares = np.square(values[low : low + step] - np.float32(mean), dtype=np.float32)
        of_rows[low : low + step] = squares @ (1.0 / columns) / len(columns)
        of_columns += (1.0 / rows[low : low + step]) @ squares / len(rows)
    return of_rows, of_columns


def lanes_for(count: int) -> int:
    """How many lanes `count` codes are dealt to: more of them are faster and cost four bytes each."""
    return max(1, min(count, 32 + count // 16_384))


def coded_bytes(counts: np.ndarray, side: int) -> int:
    """About what `encode` makes of codes that are so frequent.

    Args:
        counts: as `count_codes` gives them.
        side: how many numbers go with them: levels of rows and columns, and whatever else. They take
            about half a byte each.
    """
    count = int(counts.sum())
    spread = int((counts > 0).sum())
    return math.ceil(
        count * entropy_of(counts) / 8 + 2 * (spread + len(counts)) + 4 * lanes_for(count) + side / 2
    )


def count_codes(codes: np.ndarray, bits: int, contexts: Contexts, trellis: int | None = None) -> np.ndarray:
    """How often each code, uint8 `[rows, columns]`, occurs in each table, int64 `[tables, 2^bits]`.

    With a trellis, how often each symbol does in the two tables in the place of each: `[2 * tables, 128]`.

    Raises:
        ValueError: codes that do not follow the trellis.
    """
    quantizers = None
    if trellis is not None:
        (codes, quantizers), bits = paths.split(codes, trellis), paths.BITS
    return _counted(codes, quantizers, bits, contexts)


def _counted(codes: np.ndarray, quantizers: np.ndarray | None, bits: int, contexts: Contexts) -> np.ndarray:
    """`count_codes`, of symbols where there are quantizers."""
    tables = contexts.tables * (1 if quantizers is None else 2)
    counts = np.zeros(tables << bits, np.int64)
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    for low in range(0, len(codes), step):  # numpy would widen all of them to 64 bits at once
        part = codes[low : low + step]
        places = part.astype(np.int64)
        if contexts.tables > 1:
            places += contexts.select(low, low + step) << (bits if quantizers is None else bits + 1)
        if quantizers is not None:
            places += quantizers[low : low + step].astype(np.int64) << bits
        counts += np.bincount(places.reshape(-1), minlength=len(counts))
    return counts.reshape(tables, 1 << bits)


def entropy_of(counts: np.ndarray) -> float:
    """Bits a code, each table of `count_codes` for its own codes."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    logarithms = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return max(0.0, float(-(counts * logarithms).sum() / max(1, totals.sum())))


def best_contexts(codes: np.ndarray, bits: int, trellis: int | None = None) -> Contexts:
    """With which tables `encode` makes least of the codes: those by size, or a single one."""
    single, several = Contexts.single(*codes.shape), Contexts.of(codes)
    beside, quantizers = sum(codes.shape), None
    if trellis is not None:
        (codes, quantizers), bits = paths.split(codes, trellis), paths.BITS
    sizes = [
        coded_bytes(_counted(codes, quantizers, bits, contexts), 0 if contexts.tables == 1 else beside)
        for contexts in (single, several)
    ]
    return several if sizes[1] < sizes[0] else single


def encode(
    codes: np.ndarray,
    bits: int,
    contexts: Contexts,
    beside: np.ndarray | None = None,
    *,
    trellis: int | None = None,
) -> np.ndarray:
    """Codes to bytes.

    Args:
        codes: uint8 `[rows, columns]`, below 2^bits, at least one.
        bits: 1 to 8.
        contexts: which tables they belong to.
        beside: uint8 `[count]`, other numbers that shall go with them, compressed as well.
        trellis: how many states the trellis has that codes of 8 bits follow; None without one.

    Returns:
        uint8 `[bytes]`.

    Raises:
        ValueError: codes that do not follow the trellis.
    """
    counts = count_codes(codes, bits, contexts, trellis)
    frequencies = np.stack([_frequencies(of_table) for of_table in counts])
    head = [np.array([contexts.lowest], np.uint8), contexts.rows, contexts.columns]
    side = np.frombuffer(
        zlib.compress(np.concatenate(head if beside is None else [*head, beside]).tobytes(), 9), np.uint8
    )
    tables = []
    for table in frequencies:
        first, last = np.flatnonzero(table)[[0, -1]]
        tables.append(np.array([first, last - first], np.uint8))
        tables.append(table[first : last + 1].astype("<u2"))
    quantizers = None
    if trellis is not None:
        (codes, quantizers), bits = paths.split(codes, trellis), paths.BITS
    states, words = _encoded(codes, frequencies, bits, contexts, quantizers)
    parts = [np.array([len(side)], "<u4"), side, *tables, states.astype("<u4"), *words]
    return np.concatenate([part.view(np.uint8) for part in parts])


def _encoded(
    codes: np.ndarray, frequencies: np.ndarray, bits: int, contexts: Contexts, quantizers: np.ndarray | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    flat, columns = codes.reshape(-1), codes.shape[1]
    second = None if quantizers is None else quantizers.reshape(-1)
    frequency = frequencies.astype(np.uint64).reshape(-1)
    start = (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint64).reshape(-1)
    count, lanes = flat.size, lanes_for(flat.size)
    states = np.full(lanes, _LOWEST, np.uint64)
    words: list[np.ndarray] = []
    # Backwards, so that they can be read forwards.
    for first in range((count - 1) // lanes * lanes, -1, -lanes):
        place = flat[first : first + lanes].astype(np.int64)
        tables = _tables(contexts, first, len(place), columns)
        if second is not None:
            tables = 2 * tables + second[first : first + lanes]
        place += tables << bits
        f, s = frequency[place], start[place]
        x = states[: len(f)]
        full = x >= f << np.uint64(32 - _BITS)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(f)] = (x // f << np.uint64(_BITS)) + x % f + s
    return states, words[::-1]


def _tables(contexts: Contexts, first: int, count: int, columns: int) -> np.ndarray:
    """The tables of `count` codes from the code `first` on, in the order of rows, int64 `[count]`."""
    if contexts.tables == 1:
        return np.zeros(count, np.int64)
    places = np.arange(first, first + count)
    sums = contexts.rows[places // columns].astype(np.int64) + contexts.columns[places % columns]
    found: np.ndarray = np.clip(sums - contexts.lowest, 0, contexts.tables - 1)
    return found


def decode(
    data: np.ndarray,
    bits: int,
    shape: tuple[int, int],
    tables: int = 1,
    beside: int = 0,
    *,
    trellis: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to codes, the inverse of `encode`.

    Args:
        data: uint8 `[bytes]`.
        bits: 1 to 8.
        shape: rows and columns of the codes.
        tables: how many tables there are.
        beside: how many other numbers go with them.
        trellis: as for `encode`.

    Returns:
        The codes, uint8 `[rows, columns]`, and the other numbers, uint8 `[beside]`.

    Raises:
        ValueError: the bytes are not what `encode` makes for so many codes of so many bits.
    """
    data = np.ascontiguousarray(data)
    side, rest = _side(data, 1 + shape[0] + shape[1] + beside)
    levels = np.split(side[1:], [shape[0], shape[0] + shape[1]])
    contexts = Contexts(levels[0], levels[1], int(side[0]), tables)
    if trellis is not None:
        bits = paths.BITS
    frequencies, rest = _read_frequencies(rest, bits, tables if trellis is None else 2 * tables)
    lanes = lanes_for(shape[0] * shape[1])
    if len(rest) < 4 * lanes or len(rest) % 2:
        raise ValueError(f"{len(data)} bytes cannot hold {shape[0] * shape[1]} codes")
    if native.chosen() is not None:
        codes = native.decode_stream(
            rest, frequencies, bits, (contexts.rows, contexts.columns), contexts.lowest, trellis or 0
        )
    else:
        # Copies, because nothing says that they lie at even addresses.
        states = np.frombuffer(rest[: 4 * lanes].tobytes(), "<u4").astype(np.uint64)
        words = np.frombuffer(rest[4 * lanes :].tobytes(), "<u2")
        codes = _decoded(states, words, frequencies, contexts, trellis).reshape(shape)
    return codes, levels[2]


def _side(data: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers beside the codes, uint8 `[count]`, and what follows them."""
    if len(data) < 4:
        raise ValueError(f"{len(data)} bytes cannot hold any codes")
    size = int(data[:4].view("<u4")[0])
    if size > len(data) - 4:
        raise ValueError(f"levels of {size} bytes in {len(data)} bytes")
    reader = zlib.decompressobj()
    try:
        # One more than there should be, and no more, whatever the bytes say.
        found = reader.decompress(data[4 : 4 + size].tobytes(), count + 1)
    except zlib.error as error:
        raise ValueError(f"unreadable levels: {error}") from None
    if len(found) != count or not reader.eof or reader.unused_data:
        raise ValueError(f"the levels are not {count} numbers")
    return np.frombuffer(found, np.uint8), data[4 + size :]


def _read_frequencies(data: np.ndarray, bits: int, tables: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, int64 `[tables, 2^bits]`, and what follows them."""
    frequencies = np.zeros((tables, 1 << bits), np.int64)
    for table in frequencies:
        if len(data) < 2:
            raise ValueError("the frequencies end early")
        first, count = int(data[0]), int(data[1]) + 1
        if first + count > 1 << bits or len(data) < 2 + 2 * count:
            raise ValueError(f"frequencies of the codes {first} to {first + count - 1} of {bits} bits")
        table[first : first + count] = np.frombuffer(data[2 : 2 + 2 * count].tobytes(), "<u2")
        if table.sum() != _TOTAL:
            raise ValueError(f"frequencies add up to {table.sum()} instead of {_TOTAL}")
        data = data[2 + 2 * count :]
    return frequencies, data


def _decoded(
    states: np.ndarray, words: np.ndarray, frequencies: np.ndarray, contexts: Contexts, trellis: int | None
) -> np.ndarray:
    columns = len(contexts.columns)
    tables, symbols = frequencies.shape
    symbol = np.repeat(np.tile(np.arange(symbols, dtype=np.uint8), tables), frequencies.reshape(-1))
    # By table and slot: the symbol's frequency, and the slot's place in its range.
    starts = np.cumsum(frequencies, axis=1) - frequencies
    frequency = np.repeat(frequencies.reshape(-1), frequencies.reshape(-1)).astype(np.uint64)
    places = np.tile(np.arange(_TOTAL), tables) - np.repeat(starts.reshape(-1), frequencies.reshape(-1))
    offset = places.astype(np.uint64)
    count, lanes = len(contexts.rows) * columns, len(states)
    out = np.empty(count, np.uint8)
    follower = None if trellis is None else _Follower(trellis, columns)
    position = 0
    for first, last in _runs(count, lanes, None if follower is None else columns):
        lane = first % lanes
        x = states[lane : lane + last - first]
        slot = (x & np.uint64(_TOTAL - 1)).astype(np.int64)
        of_codes = _tables(contexts, first, len(x), columns)
        if follower is not None:
            of_codes = 2 * of_codes + follower.quantizers(first, len(x))
        slot += of_codes << _BITS
        out[first:last] = symbol[slot]
        if follower is not None:
            out[first:last] = follower.codes(first, out[first:last])
        x = frequency[slot] * (x >> np.uint64(_BITS)) + offset[slot]
        empty = np.flatnonzero(x < _LOWEST)
        following = words[position : position + len(empty)].astype(np.uint64)
        if len(following) < len(empty):
            raise ValueError("the stream ends early")
        position += len(empty)
        x[empty] = x[empty] << np.uint64(16) | following
        states[lane : lane + len(x)] = x
    # What encoding started from; anything else was altered.
    if position != len(words) or (states != _LOWEST).any():
        raise ValueError("the stream does not end where its codes do")
    return out


def _runs(count: int, lanes: int, columns: int | None) -> Iterator[tuple[int, int]]:
    """First and last code (exclusive) of what is decoded at once: a step; with `columns`, one row of it."""
    for first in range(0, count, lanes):
        last = min(first + lanes, count)
        while columns is not None and first // columns != (last - 1) // columns:
            end = (first // columns + 1) * columns
            yield first, end
            first = end
        yield first, last


class _Follower:
    """Where every column is in its trellis, while codes are decoded row by row."""

    def __init__(self, trellis: int, columns: int) -> None:
        self._following, self._values = paths.transitions(trellis), paths.values()
        self._states = np.zeros(columns, np.uint8)

    def _place(self, first: int, count: int) -> slice:
        row, column = divmod(first, len(self._states))
        if column == 0 and row % paths.ROWS == 0:
            self._states[:] = 0
        return slice(column, column + count)

    def quantizers(self, first: int, count: int) -> np.ndarray:
        """Those of `count` codes from the code `first` on, which are in one row."""
        return self._states[self._place(first, count)] & 1

    def codes(self, first: int, symbols: np.ndarray) -> np.ndarray:
        """What these symbols from there on are; the columns move on."""
        column = first % len(self._states)
        place = slice(column, column + len(symbols))
        state = self._states[place]
        found: np.ndarray = (self._values[state & 1, symbols] + paths.ZERO).astype(np.uint8)
        self._states[place] = self._following[state, symbols & 1]
        return found


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts to whole frequencies with the sum 2^12, at least 1 for every code that occurs."""
    if not counts.any():  # a table without codes
        counts = np.zeros_like(counts)
        counts[0] = 1
    present = counts > 0
    frequencies = np.where(present, np.maximum(1, np.round(counts / counts.sum() * _TOTAL)), 0).astype(
        np.int64
    )
    # The most frequent codes feel a change least.
    while (excess := int(frequencies.sum()) - _TOTAL) != 0:
        largest = int(frequencies.argmax())
        frequencies[largest] -= excess if frequencies[largest] > excess else frequencies[largest] - 1
    return frequencies
