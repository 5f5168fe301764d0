"""A running average of the weights, which is judged and shipped in place of the last ones.

The average is kept in the optimizer's state, beside the moments of the gradients: so it is saved and comes
back with every checkpoint, and exists for what is trained only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_KEY = "average"


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # What never had a gradient has no state, and the optimizer would stumble over ours.
            if state := optimizer.state.get(parameter):
                yield parameter, state


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Takes the present weights into the average.

    Args:
        optimizer: whose parameters are averaged.
        decay: share of the old average that stays, below 1. In the beginning it is less, so that the start
            is forgotten: (1 + step) / (10 + step).
        step: optimizer steps taken before.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for parameter, state in _trained(optimizer):
        if _KEY in state:
            state[_KEY].lerp_(parameter, 1.0 - decay)
        else:
            state[_KEY] = parameter.detach().clone()


@torch.no_grad()
def take_average(optimizer: torch.optim.Optimizer) -> None:
    """Makes the average, if there is one, the weights."""
    for parameter, state in _trained(optimizer):
        if _KEY in state:
            parameter.copy_(state[_KEY])


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The average in place of the weights; afterwards they are as they were."""
    weights = [(parameter, parameter.detach().clone()) for parameter, _ in _trained(optimizer)]
    take_average(optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
