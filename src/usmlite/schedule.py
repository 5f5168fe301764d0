"""When rates, masks and bits change during a run. Plain functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rate(step: int, total: int, *, warmup: float, final: float) -> float:
    """The learning rate at a step as a share of its peak: linear warm-up, then cosine decay.

    Args:
        step: steps already taken, 0 .. total.
        total: steps of the run.
        warmup: share of the steps in which the rate rises.
        final: the share of the peak at the end.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, total - rising))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def moving_steps(total: int, *, freeze: float) -> int:
    """After how many of the steps masks stop moving: after the share `freeze` of the run."""
    return math.ceil(freeze * total)


def temperature(progress: float) -> float:
    """The temperature at which learned masks are drawn, from 1 to 0.05: first a search, then a choice.

    Args:
        progress: the share of the steps in which masks move that is over.
    """
    return float(0.05**progress)


def kept_of(step: int, moving: int, n: int, m: int) -> int:
    """How many of every M neighbours gradual masks keep: M, M - 1 and so on down to N, in equal parts.

    Args:
        step: steps already taken.
        moving: steps in which masks move; afterwards it is N.
        n: how many are kept in the end.
        m: of how many.
    """
    if step >= moving:
        return n
    return m - step * (m - n + 1) // moving


def precision_of(step: int, moving: int, own: float, before: Sequence[int]) -> float:
    """How many bits a weight has whose bits descend in steps, in equal parts, its own in the last.

    Args:
        step: steps already taken.
        moving: steps in which bits descend; afterwards they are its own.
        own: the weight's own bits.
        before: the bits of the schedule, descending; those that are not more than its own are skipped.
    """
    stages = [*(bits for bits in before if bits > own), own]
    return own if step >= moving else stages[step * len(stages) // moving]
