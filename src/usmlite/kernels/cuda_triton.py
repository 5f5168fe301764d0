"""The kernels of `cuda`, in Triton.

Not tuned: what this was written on had no GPU. tests/kernels/test_cuda.py checks every format against the
reference, in Triton's interpreter where there is no GPU (`make test-triton`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from usmlite.kernels.reference import places_of
from usmlite.kernels.weights import ExpandedWeight, PackedWeight

_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 64
_LEAST_BLOCK = 16  # of `tl.dot`


def multiply(x: Tensor, weight: PackedWeight | ExpandedWeight, out: Tensor) -> None:
    """X times the transposed weight, without its column scales, into `out`.

    Args:
        x: float32 `[count, columns]`, contiguous, at least one row and not many.
        weight: `[rows, columns]`, of those that there is a kernel for.
        out: float32 `[count, rows]`, contiguous.
    """
    if isinstance(weight, ExpandedWeight):
        _levels(x, weight, out)
    elif weight.layout is None:
        _dense(x, weight, out)
    else:
        _sparse(x, weight, out)


def _levels(x: Tensor, weight: ExpandedWeight, out: Tensor) -> None:
    assert weight.step is not None
    levels, step = weight.levels.contiguous(), weight.step.contiguous()
    _launch(
        _multiply_dense, x, levels, step, step, out, levels.shape[1], weight.group, 0.0,
        BITS=0, HAS_ZERO=False,
    )  # fmt: skip


def _dense(x: Tensor, weight: PackedWeight, out: Tensor) -> None:
    assert weight.scale is not None
    codes, scale = weight.codes.contiguous(), weight.scale.contiguous()
    zero = scale if weight.zero is None else weight.zero.contiguous()
    _launch(
        _multiply_dense, x, codes, scale, zero, out, codes.shape[1], weight.group, weight.offset,
        BITS=weight.bits, HAS_ZERO=weight.zero is not None,
    )  # fmt: skip


def _launch(
    kernel: Any, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor, row_codes: int,
    group: int | None, offset: float, **choices: Any,
) -> None:  # fmt: skip
    count, rows = out.shape
    columns = x.shape[1]
    kernel[(triton.cdiv(rows, _BLOCK_ROWS),)](
        x, codes, scale, zero, out, count, rows, columns, row_codes, scale.shape[1], group or columns, offset,
        BLOCK_X=max(_LEAST_BLOCK, triton.next_power_of_2(count)), BLOCK_R=_BLOCK_ROWS,
        BLOCK_K=_BLOCK_COLUMNS, **choices,
    )  # fmt: skip


def _sparse(x: Tensor, weight: PackedWeight, out: Tensor) -> None:
    assert weight.layout is not None
    assert weight.pattern is not None
    assert weight.scale is not None
    layout, codes, pattern = weight.layout, weight.codes.contiguous(), weight.pattern.contiguous()
    scale = weight.scale.contiguous()
    zero = scale if weight.zero is None else weight.zero.contiguous()
    places = places_of(layout, x.device).int()
    (count, rows), columns = out.shape, x.shape[1]
    _multiply_sparse[(triton.cdiv(rows, _BLOCK_ROWS), count)](
        x, codes, pattern, places, _powers(layout, x.device), scale, zero, out,
        rows, columns, codes.shape[1], pattern.shape[1], weight.stored, scale.shape[1],
        weight.group or columns, weight.offset,
        BITS=weight.bits, N=layout.n, M=layout.m, PATTERNS=layout.patterns, DIGITS=layout.digits,
        WORD_BYTES=layout.word_bytes, HAS_ZERO=weight.zero is not None,
        BLOCK_R=_BLOCK_ROWS, BLOCK_K=_BLOCK_COLUMNS,
    )  # fmt: skip


@lru_cache
def _powers(layout: Any, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        powers = [layout.patterns**digit for digit in range(layout.digits)]
        return torch.tensor(powers, dtype=torch.int64, device=device)


@triton.jit  # type: ignore[untyped-decorator]
def _read_codes(codes, row, row_bytes, k, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Codes number k of rows, int32 `[rows, k]`."""
    bit = k * BITS
    byte = bit >> 3
    address = codes + row[:, None] * row_bytes + byte[None, :]
    word = tl.load(address, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may reach into the next byte
        more = inside & (byte[None, :] + 1 < row_bytes)
        word |= tl.load(address + 1, mask=more, other=0).to(tl.int32) << 8
    return (word >> (bit & 7)[None, :]) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_dense(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, out, count, rows, columns, row_codes, groups, group, offset,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr,  # noqa: N803
    BLOCK_X: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    line = tl.arange(0, BLOCK_X)
    total = tl.zeros((BLOCK_X, BLOCK_R), tl.float32)
    for first in range(0, columns, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < rows) & (k[None, :] < columns)
        if BITS == 0:  # levels, one by one
            level = tl.load(codes + row[:, None] * row_codes + k[None, :], mask=inside, other=0).to(
                tl.float32
            )
        else:
            level = _read_codes(codes, row, row_codes, k, inside, BITS).to(tl.float32)
        place = row[:, None] * groups + tl.minimum(k // group, groups - 1)[None, :]
        if HAS_ZERO:
            level -= tl.load(zero + place, mask=inside, other=0).to(tl.float32)
        else:
            level -= offset
        level *= tl.load(scale + place, mask=inside, other=0).to(tl.float32)
        here = (line[:, None] < count) & (k[None, :] < columns)
        values = tl.load(x + line[:, None] * columns + k[None, :], mask=here, other=0)
        total += tl.dot(values, tl.trans(level), input_precision="ieee")
    there = (line[:, None] < count) & (row[None, :] < rows)
    tl.store(out + line[:, None] * rows + row[None, :], total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_sparse(  # type: ignore[no-untyped-def]
    x, codes, pattern, places, powers, scale, zero, out, rows, columns, row_codes, row_pattern, stored,
    groups, group, offset,
    BITS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, PATTERNS: tl.constexpr,  # noqa: N803
    DIGITS: tl.constexpr, WORD_BYTES: tl.constexpr, HAS_ZERO: tl.constexpr,  # noqa: N803
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    line = tl.program_id(1)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, stored, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < rows) & (k[None, :] < stored)
        neighbours = k // N
        word = tl.zeros((BLOCK_R, BLOCK_K), tl.int64)
        for byte in tl.static_range(WORD_BYTES):
            address = (
                pattern + row[:, None] * row_pattern + (neighbours // DIGITS * WORD_BYTES + byte)[None, :]
            )
            word |= tl.load(address, mask=inside, other=0).to(tl.int64) << (8 * byte)
        rank = (word // tl.load(powers + neighbours % DIGITS)[None, :]) % PATTERNS
        kept = tl.load(places + rank * N + (k % N)[None, :], mask=inside, other=0)
        column = neighbours[None, :] * M + kept
        # The last group may reach past the last column.
        inside &= column < columns
        level = _read_codes(codes, row, row_codes, k, inside, BITS).to(tl.float32)
        place = row[:, None] * groups + tl.minimum(column // group, groups - 1)
        if HAS_ZERO:
            level -= tl.load(zero + place, mask=inside, other=0).to(tl.float32)
        else:
            level -= offset
        level *= tl.load(scale + place, mask=inside, other=0).to(tl.float32)
        values = tl.load(x + line * columns + column, mask=inside, other=0)
        total += tl.sum(values * level, axis=1)
    tl.store(out + line * rows + row, total, mask=row < rows)
