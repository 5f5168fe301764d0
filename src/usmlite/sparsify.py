"""Scores to N:M masks."""

from __future__ import annotations

import torch
from torch import Tensor

from usmlite.spec import NM

# Above this, ranking by pairs (m^2 / 2 passes) costs more than a sort.
_PAIRWISE_LIMIT = 8


def nm_mask(scores: Tensor, nm: NM) -> Tensor:
    """Keeps the N highest scores of every M neighbours along the last axis.

    Of equal scores the one with the lower index is kept, so that exactly N are kept in every full
    group. The last group of a row that M does not divide competes with padding that always loses.

    Args:
        scores: float `[rows, columns]`, no NaN.
        nm: the sparsity.

    Returns:
        bool `[rows, columns]`, True where the weight is kept.
    """
    rows, columns = scores.shape
    padding = -columns % nm.m
    if padding:
        scores = torch.nn.functional.pad(scores, (0, padding), value=float("-inf"))
    grouped = scores.reshape(rows, -1, nm.m)
    if nm.m <= _PAIRWISE_LIMIT:
        ranks = torch.zeros(grouped.shape, dtype=torch.int8, device=scores.device)
        for later in range(1, nm.m):
            for earlier in range(later):
                loses = grouped[..., earlier] >= grouped[..., later]
                ranks[..., later] += loses
                ranks[..., earlier] += ~loses
        mask = ranks < nm.n
    else:
        order = torch.argsort(grouped, dim=-1, descending=True, stable=True)
        mask = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
        mask.scatter_(-1, order[..., : nm.n], True)
    return mask.reshape(rows, -1)[:, :columns].contiguous()
