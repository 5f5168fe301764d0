"""What the kernels compute with: packed and expanded weights as plain tensors and numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows are handled in blocks of about this many weights: temporaries stay small and in cache.
BLOCK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class PatternLayout:
    """How N:M patterns lie in words: `digits` ranks in base `patterns`, lowest group first.

    Attributes:
        n: weights kept of every `m` neighbours.
        m: neighbours in one group.
        word_bytes: bytes of one little-endian word.
        digits: groups described by one word.
    """

    n: int
    m: int
    word_bytes: int
    digits: int

    @property
    def patterns(self) -> int:
        """How many patterns a group can have."""
        return math.comb(self.m, self.n)


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[rows, columns]` as bytes (docs/format.md), every row on its own.

    Attributes:
        columns: inputs per row.
        bits: bits per code, or None where `codes` holds float16 values instead.
        offset: the code that stands for zero if `zero` is None; may lie between two codes.
        group: columns that share one scale, or None for one scale a row.
        layout: the N:M layout, or None if dense.
        codes: uint8 `[rows, bytes]`, or float16 `[rows, stored]` if `bits` is None.
        scale: float16 `[rows, groups]`, or None if `bits` is None.
        zero: uint8 `[rows, groups]`, the integer zero points of asymmetric codes, or None.
        column_scale: float16 `[columns]`, multiplies every row, or None.
        pattern: uint8 `[rows, words * word_bytes]`, or None if dense.
    """

    columns: int
    bits: int | None
    offset: float
    group: int | None
    layout: PatternLayout | None
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    pattern: Tensor | None
    column_scale: Tensor | None = None

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.codes.shape[0]

    @property
    def groups(self) -> int:
        """N:M groups per row; the last one may reach past the last column."""
        return 0 if self.layout is None else math.ceil(self.columns / self.layout.m)

    @property
    def stored(self) -> int:
        """Codes per row."""
        return self.columns if self.layout is None else self.groups * self.layout.n

    def select(self, rows: slice | Tensor) -> PackedWeight:
        """The same weight with only these rows (a slice, or int64 indices `[count]`)."""
        return replace(
            self,
            codes=self.codes[rows],
            scale=None if self.scale is None else self.scale[rows],
            zero=None if self.zero is None else self.zero[rows],
            pattern=None if self.pattern is None else self.pattern[rows],
        )


@dataclass(frozen=True)
class ExpandedWeight:
    """A weight as small whole multiples of a step: weight = level * step * column scale, pruned weights 0.

    Attributes:
        levels: int8 `[rows, columns]`; int16 where 8-bit codes are asymmetric or midrise, because
            their levels reach to 255; float16 values where `step` is None.
        step: float32 `[rows, groups]`, or None.
        group: columns that share one step, or None for one step a row.
        column_scale: float32 `[columns]`, or None.
    """

    levels: Tensor
    step: Tensor | None
    group: int | None
    column_scale: Tensor | None = None

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.levels.shape[0]

    @property
    def columns(self) -> int:
        """Inputs per row."""
        return self.levels.shape[1]

    def select(self, rows: slice | Tensor) -> ExpandedWeight:
        """The same weight with only these rows."""
        step = None if self.step is None else self.step[rows]
        return replace(self, levels=self.levels[rows], step=step)


def row_blocks(rows: int, columns: int, weights: int = BLOCK_WEIGHTS) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold about `weights` weights each, at least one row."""
    step = max(1, weights // max(columns, 1))
    for low in range(0, rows, step):
        yield low, min(low + step, rows)


def code_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return math.ceil(count * bits / 8)


@functools.lru_cache
def _binomials(m: int, n: int, device: torch.device) -> Tensor:
    """int64 `[m, n + 1]`: how many ways to choose k of j things."""
    table = [[math.comb(j, k) for k in range(n + 1)] for j in range(m)]
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int64, device=device)


def pattern_ranks(mask: Tensor, n: int) -> Tensor:
    """Patterns to their ranks in colexicographic order.

    The rank of kept places c_1 < c_2 < ... < c_N, counted from 0, is the sum of C(c_i, i) over i from
    1 to N (the combinatorial number system).

    Args:
        mask: bool `[..., m]` with exactly `n` True in the last axis.
        n: how many are kept.

    Returns:
        int64 `[...]`, 0 .. C(m, n) - 1.
    """
    m = mask.shape[-1]
    ways = _binomials(m, n, mask.device)
    ranks = torch.zeros(mask.shape[:-1], dtype=torch.int64, device=mask.device)
    seen = torch.zeros_like(ranks)
    for place in range(m):
        kept = mask[..., place]
        seen += kept
        ranks += ways[place][seen] * kept
    return ranks


def pattern_columns(ranks: Tensor, n: int, m: int) -> Tensor:
    """Ranks to kept places, the inverse of `pattern_ranks`.

    Args:
        ranks: int64 `[...]`, 0 .. C(m, n) - 1.
        n: how many are kept.
        m: of how many.

    Returns:
        int64 `[..., n]`, ascending.
    """
    ways = _binomials(m, n, ranks.device)
    rest = ranks.clone()
    places = torch.empty((*ranks.shape, n), dtype=torch.int64, device=ranks.device)
    for k in range(n, 0, -1):
        # The highest place whose count of smaller choices still fits.
        place = torch.searchsorted(ways[:, k].contiguous(), rest, right=True) - 1
        places[..., k - 1] = place
        rest -= ways[:, k][place]
    return places
