"""The readable implementation of the kernels: plain PyTorch, block by block.

Dense weights exist only for one block of rows at a time. Results are exact to the bit for
`unpack`, `expand` and `embedding`; `linear` sums in PyTorch's order.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from usmlite.kernels.weights import (
    ExpandedWeight,
    PackedWeight,
    PatternLayout,
    pattern_columns,
    row_blocks,
)

# Up to this many patterns their places are looked up; above, they are computed.
_TABLE_PATTERNS = 1 << 12


def linear(x: Tensor, weight: PackedWeight | ExpandedWeight, bias: Tensor | None = None) -> Tensor:
    """X times the transposed weight, plus bias.

    Args:
        x: float `[..., columns]`.
        weight: `[rows, columns]`.
        bias: `[rows]`, or None.

    Returns:
        `[..., rows]` in x's dtype.
    """
    out = x.new_empty((*x.shape[:-1], weight.rows))
    for low, high in row_blocks(weight.rows, weight.columns, 1 << 20):
        block = unpack(weight.select(slice(low, high))).to(x.dtype)
        part = None if bias is None else bias[low:high]
        out[..., low:high] = torch.nn.functional.linear(x, block, part)
    return out


def embedding(ids: Tensor, weight: PackedWeight | ExpandedWeight) -> Tensor:
    """Rows of the weight by number; only those rows are unpacked.

    Args:
        ids: int64 `[...]`.
        weight: `[rows, columns]`.

    Returns:
        float32 `[..., columns]`.
    """
    rows = weight.select(ids.reshape(-1))
    return unpack(rows).reshape(*ids.shape, weight.columns)


def unpack(weight: PackedWeight | ExpandedWeight) -> Tensor:
    """The weight in full, float32 `[rows, columns]`.

    (code - zero) * scale, times the column's scale if there is one; pruned weights are 0.0.
    """
    out = torch.empty(weight.rows, weight.columns, dtype=torch.float32, device=_device(weight))
    for low, high in row_blocks(weight.rows, weight.columns):
        block = weight.select(slice(low, high))
        if isinstance(block, ExpandedWeight):
            out[low:high] = _dequantize_levels(block)
        else:
            _unpack_rows(block, out[low:high])
        if weight.column_scale is not None:
            out[low:high] *= weight.column_scale
    return out


def expand(weight: PackedWeight) -> ExpandedWeight:
    """One small integer per weight instead of packed bits.

    A grid with its zero between two codes has levels in halves; they are doubled and the step halved,
    which changes no product, because halving a float is exact.
    """
    if weight.bits is None:
        values = torch.empty(weight.rows, weight.columns, dtype=torch.float16, device=weight.codes.device)
        for low, high in row_blocks(weight.rows, weight.columns):
            _unpack_rows(weight.select(slice(low, high)), values[low:high])
        return ExpandedWeight(values, None, None)
    assert weight.scale is not None
    doubled = weight.zero is None and weight.offset != int(weight.offset)
    wide = weight.bits == 8 and (doubled or weight.zero is not None)
    dtype = torch.int16 if wide else torch.int8
    levels = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.codes.device)
    for low, high in row_blocks(weight.rows, weight.columns):
        block = weight.select(slice(low, high))
        columns = _stored_columns(block)
        codes = unpack_codes(block.codes, weight.bits, weight.stored).to(torch.int16)
        if doubled:
            stored = codes.mul_(2).sub_(int(2 * weight.offset))
        elif block.zero is None:
            stored = codes.sub_(int(weight.offset))
        else:
            stored = codes.sub_(_per_column(block.zero, block, columns))
        _spread(stored.to(dtype), columns, block, levels[low:high])
    step = weight.scale.float()
    column_scale = None if weight.column_scale is None else weight.column_scale.float()
    return ExpandedWeight(levels, step.mul_(0.5) if doubled else step, weight.group, column_scale)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes of `bits` bits, least significant bit first, dense across bytes.

    Args:
        packed: uint8 `[rows, ceil(count * bits / 8)]`.
        bits: 1 to 8.
        count: codes per row.

    Returns:
        uint8 `[rows, count]`.
    """
    if bits == 8:
        return packed
    # The smallest run of whole bytes that holds whole codes.
    run_bytes = math.lcm(bits, 8) // 8
    run_codes = run_bytes * 8 // bits
    rows, runs = packed.shape[0], math.ceil(packed.shape[1] / run_bytes)
    padding = runs * run_bytes - packed.shape[1]
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    parts = packed.reshape(rows, runs, run_bytes)
    if run_bytes == 1:
        words = parts[..., 0]
    else:
        dtype = torch.int32 if run_bytes <= 3 else torch.int64
        words = parts[..., 0].to(dtype)
        for i in range(1, run_bytes):
            words |= parts[..., i].to(dtype) << (8 * i)
    codes = torch.empty(rows, runs, run_codes, dtype=torch.uint8, device=packed.device)
    for i in range(run_codes):
        codes[..., i] = (words >> (bits * i)) & ((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :count]


def pattern_words(pattern: Tensor, word_bytes: int) -> Tensor:
    """Pattern bytes to the words that they spell, lowest byte first.

    Args:
        pattern: uint8 `[rows, words * word_bytes]`.
        word_bytes: 1, 2, 4 or 8.

    Returns:
        `[rows, words]`, int16 for words of one byte, else int64; a word of 8 bytes whose highest bit is
        set (no valid word) comes out negative.
    """
    if word_bytes == 1:
        return pattern.to(torch.int16)
    parts = pattern.reshape(pattern.shape[0], -1, word_bytes)
    words = parts[..., 0].to(torch.int64)
    for i in range(1, word_bytes):
        words |= parts[..., i].to(torch.int64) << (8 * i)
    return words


def _device(weight: PackedWeight | ExpandedWeight) -> torch.device:
    return weight.codes.device if isinstance(weight, PackedWeight) else weight.levels.device


def _unpack_rows(weight: PackedWeight, out: Tensor) -> None:
    columns = _stored_columns(weight)
    if weight.bits is None:
        _spread(weight.codes.to(out.dtype), columns, weight, out)
        return
    assert weight.scale is not None
    codes = unpack_codes(weight.codes, weight.bits, weight.stored)
    values = codes.float()
    if weight.zero is None:
        values.sub_(weight.offset)
    else:
        values.sub_(_per_column(weight.zero.float(), weight, columns))
    values.mul_(_per_column(weight.scale.float(), weight, columns))
    _spread(values, columns, weight, out)


def _dequantize_levels(weight: ExpandedWeight) -> Tensor:
    values = weight.levels.float()
    if weight.step is None:
        return values
    if weight.step.shape[1] == 1:
        return values.mul_(weight.step)
    assert weight.group is not None
    return values.mul_(weight.step.repeat_interleave(weight.group, dim=1)[:, : weight.columns])


def _per_column(per_group: Tensor, weight: PackedWeight, columns: Tensor | None) -> Tensor:
    """Per-group values `[rows, groups]` to one per stored code, or a broadcastable `[rows, 1]`."""
    if per_group.shape[1] == 1:
        return per_group
    assert weight.group is not None
    if columns is None:
        return per_group.repeat_interleave(weight.group, dim=1)[:, : weight.columns]
    # Slots of virtual columns, past the last real one, are dropped later; any scale will do.
    return per_group.gather(1, columns.clamp(max=weight.columns - 1) // weight.group)


def _spread(stored: Tensor, columns: Tensor | None, weight: PackedWeight, out: Tensor) -> None:
    """Writes stored values `[rows, stored]` to their columns of `out`, zeros elsewhere."""
    if columns is None:
        out.copy_(stored)
        return
    assert weight.layout is not None
    width = weight.groups * weight.layout.m
    if width == weight.columns and out.is_contiguous() and out.dtype == stored.dtype:
        out.zero_().scatter_(1, columns, stored)
        return
    wide = torch.zeros(weight.rows, width, dtype=stored.dtype, device=stored.device)
    out.copy_(wide.scatter_(1, columns, stored)[:, : weight.columns])


@functools.lru_cache
def places_of(layout: PatternLayout, device: torch.device) -> Tensor:
    """int64 `[patterns, n]`: the kept places of every pattern."""
    # A table outlives the call: made in inference mode, it could not be used outside.
    with torch.inference_mode(False):
        return pattern_columns(torch.arange(layout.patterns, device=device), layout.n, layout.m)


@functools.lru_cache
def _byte_places(layout: PatternLayout, device: torch.device) -> Tensor:
    """int64 `[256, digits * n]`: the kept columns of all the groups that one byte describes."""
    with torch.inference_mode(False):
        words = torch.arange(256, device=device)
        places = []
        for digit in range(layout.digits):
            rank = words // layout.patterns**digit % layout.patterns
            places.append(places_of(layout, device)[rank] + digit * layout.m)
        return torch.cat(places, dim=1)


def _stored_columns(weight: PackedWeight) -> Tensor | None:
    """int64 `[rows, stored]`: the column of every stored code; None if dense."""
    layout = weight.layout
    if layout is None:
        return None
    assert weight.pattern is not None
    device, rows = weight.pattern.device, weight.rows
    if layout.word_bytes == 1:
        places = torch.nn.functional.embedding(weight.pattern.int(), _byte_places(layout, device))
        starts = torch.arange(places.shape[1], device=device) * (layout.digits * layout.m)
        return places.add_(starts[:, None]).reshape(rows, -1)[:, : weight.stored]
    words = pattern_words(weight.pattern, layout.word_bytes)
    ranks = torch.empty(*words.shape, layout.digits, dtype=torch.int64, device=device)
    for digit in range(layout.digits):
        ranks[..., digit] = words % layout.patterns
        words = words // layout.patterns
    ranks = ranks.reshape(rows, -1)[:, : weight.groups]
    if layout.patterns <= _TABLE_PATTERNS:
        places = places_of(layout, device)[ranks]
    else:
        places = pattern_columns(ranks.contiguous(), layout.n, layout.m)
    starts = torch.arange(weight.groups, device=device) * layout.m
    return places.add_(starts[:, None]).reshape(rows, -1)
