"""How unlikely a text is to a transducer: the sum over all ways to lay its labels on the frames.

A place of the lattice is a frame and how many labels were said before. The losses take two log probabilities
of every place, of the blank and of the label that comes next there, not the whole vocabulary, which is by far
the largest tensor of a training step. Why not those of Transformers: docs/decisions/0031.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

# Logarithm of what cannot be; unlike minus infinity it has a gradient.
_NEVER = -1e30


def rnnt_loss(blank: Tensor, label: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """Sequence transduction (Graves 2012, arXiv 1211.3711), nats, float32 `[batch]`.

    Args:
        blank: log probability of going on to the next frame, float32 `[batch, frames, labels + 1]`.
        label: of saying the next label, of the same shape; the last place's value does not matter.
        frames: of each row, int64 `[batch]`.
        labels: of each row, int64 `[batch]`.
    """
    return _loss({1: blank}, {0: label}, frames, labels)


def tdt_loss(
    blank: Tensor, label: Tensor, frames: Tensor, labels: Tensor, durations: Tensor, steps: Sequence[int]
) -> Tensor:
    """Token-and-duration transducer (arXiv 2304.06795), nats, float32 `[batch]`; infinite if there is no way.

    Args:
        blank: as for `rnnt_loss`.
        label: the same.
        frames: the same.
        labels: the same.
        durations: log probabilities of how far to go on, float32 `[batch, frames, labels + 1, durations]`.
        steps: these durations, in frames; a blank always goes on.
    """
    blanks = {far: blank + durations[..., i] for i, far in enumerate(steps) if far}
    return _loss(blanks, {far: label + durations[..., i] for i, far in enumerate(steps)}, frames, labels)


def _loss(blanks: Mapping[int, Tensor], said: Mapping[int, Tensor], frames: Tensor, labels: Tensor) -> Tensor:
    """Minus the log of the sum over all ways, frame by frame.

    Args:
        blanks: frames to go on (at least 1) to the log probability of a blank that does.
        said: frames to go on (from 0) to the log probability of the next label.
        frames: of each row.
        labels: of each row.
    """
    shape = next(iter(blanks.values())).shape
    never = torch.full_like(next(iter(blanks.values()))[:, 0], _NEVER)
    start = never.index_fill(1, torch.zeros(1, dtype=torch.int64, device=never.device), 0.0)
    alpha: list[Tensor] = []
    for frame in range(shape[1]):
        ways = [alpha[frame - far] + chance[:, frame - far] for far, chance in blanks.items() if far <= frame]
        for far, chance in said.items():
            if 0 < far <= frame:
                before = alpha[frame - far] + chance[:, frame - far]
                ways.append(pad(before[:, :-1], (1, 0), value=_NEVER))
        came = torch.logsumexp(torch.stack([start if not frame else never, *ways]), dim=0)
        if 0 in said:  # labels within a frame: a running sum, to which what came joins at any label
            within = pad(said[0][:, frame, :-1].cumsum(dim=1), (1, 0))
            came = within + torch.logcumsumexp(came - within, dim=1)
        alpha.append(came)
    rows, reached = torch.arange(len(frames), device=frames.device), torch.stack(alpha)
    ends = []
    for far, chance in blanks.items():
        last = (frames - far).clamp(min=0)
        end = reached[last, rows, labels] + chance[rows, last, labels]
        ends.append(torch.where(frames >= far, end, _NEVER))
    total = torch.logsumexp(torch.stack(ends), dim=0)
    return torch.where(total > _NEVER / 2, -total, torch.inf)
