"""Weights as the integers and scales that other formats have: taken over as they are, or rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from usmlite.kernels import ExpandedWeight


def bits_of(levels: Tensor, choices: Sequence[int]) -> int | None:
    """The fewest bits, of these, in which signed integers hold all levels; None if none do."""
    low, high = (int(bound) for bound in levels.aminmax())
    return next((bits for bits in sorted(choices) if -(1 << bits - 1) <= low and high < 1 << bits - 1), None)


def block_steps(weight: ExpandedWeight, block: int) -> Tensor | None:
    """The steps for blocks of so many columns, float32 `[rows, ceil(columns / block)]`.

    None where a block would need two of them.
    """
    assert weight.step is not None
    blocks = math.ceil(weight.columns / block)
    if weight.group is None or weight.step.shape[1] == 1:
        return weight.step[:, :1].expand(-1, blocks)
    if weight.group % block:
        return None
    return weight.step.repeat_interleave(weight.group // block, dim=1)[:, :blocks]


def round_to_blocks(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Rounds to signed integers, the nearest ones, with one step for each block of columns.

    Args:
        weight: float32 `[rows, columns]`.
        bits: 2 to 8.
        block: columns that share a step; the last block of a row may be shorter.

    Returns:
        int8 `[rows, columns]` and float32 steps `[rows, ceil(columns / block)]`, negative ones too: the
        largest weight of a block gets the lowest level, of which there is one more than above zero.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block)).reshape(rows, -1, block)
    lowest = 1 << bits - 1
    if bits == 8:
        step = padded.abs().amax(dim=2) / (lowest - 1)
    else:
        farthest = padded.abs().argmax(dim=2, keepdim=True)
        step = padded.gather(2, farthest).squeeze(2) / -lowest
    step = torch.where(step == 0, torch.ones_like(step), step)
    levels = (padded / step[..., None]).round_().clamp_(-lowest, lowest - 1).to(torch.int8)
    return levels.reshape(rows, -1)[:, :columns].contiguous(), step


def fits_rows(weight: ExpandedWeight) -> bool:
    """Whether 8-bit integers with one scale a row hold a weight as it is."""
    assert weight.step is not None
    return (
        weight.step.shape[1] == 1 and weight.column_scale is None and bits_of(weight.levels, (8,)) is not None
    )
