"""How unlikely a text is to a transducer: the sum over all ways to lay its labels on the frames.

A place of the lattice is a frame and how many labels were said before. Both losses take two log probabilities
of every place, of the blank and of the label that comes next there, not the whole vocabulary: Transformers'
losses would make three more copies of the largest tensor of a training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_LEAST_REST = 1e-9


def rnnt_loss(blank: Tensor, label: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """Sequence transduction (Graves 2012, arXiv 1211.3711), nats, float32 `[batch]`.

    Transformers' own needs torchaudio. Frame by frame: what is said within one is a running sum, what came
    from the one before is added by a cumulative log-sum-exp.

    Args:
        blank: log probability of going on to the next frame, float32 `[batch, frames, labels + 1]`.
        label: of saying the next label, of the same shape; the last place's value does not matter.
        frames: of each row, int64 `[batch]`.
        labels: of each row, int64 `[batch]`.
    """
    said = pad(label[:, :, :-1].cumsum(dim=2), (1, 0))
    alpha = [said[:, 0]]
    for frame in range(1, blank.shape[1]):
        came = alpha[-1] + blank[:, frame - 1]
        alpha.append(said[:, frame] + torch.logcumsumexp(came - said[:, frame], dim=1))
    rows, last = torch.arange(len(frames), device=frames.device), frames - 1
    return -(torch.stack(alpha)[last, rows, labels] + blank[rows, last, labels])


def tdt_loss(
    blank: Tensor, label: Tensor, frames: Tensor, labels: Tensor, durations: Tensor, steps: Sequence[int]
) -> Tensor:
    """Token-and-duration transducer (arXiv 2304.06795), nats, float32 `[batch]`: Transformers' own.

    It is told of three words: the blank, the next label, and everything else.

    Args:
        blank: as for `rnnt_loss`.
        label: the same.
        frames: the same.
        labels: the same.
        durations: log probabilities of how far to go on, float32 `[batch, frames, labels + 1, durations]`.
        steps: these durations, in frames.
    """
    from transformers.loss.loss_tdt import tdt_loss as loss

    rest = (1.0 - blank.exp() - label.exp()).clamp(min=_LEAST_REST).log()
    next_labels = torch.ones(blank.shape[0], blank.shape[2] - 1, dtype=torch.int64, device=blank.device)
    found: Tensor = loss(
        torch.stack((blank, label, rest), dim=-1), durations, next_labels, frames, labels,
        blank_token_id=0, durations=list(steps), reduction="none",
    )  # fmt: skip
    return found
