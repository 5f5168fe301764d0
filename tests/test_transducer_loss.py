"""The transducers' losses against all ways to lay labels on frames, one by one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from usmlite.transducer_loss import rnnt_loss, tdt_loss

STEPS = (0, 1, 2, 4)


def lattice(batch: int, frames: int, labels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(batch, frames, labels + 1, 5, generator=generator).mul(2).log_softmax(dim=-1)
    return words[..., 0].clone(), words[..., 1].clone()


def by_hand(blank: Tensor, label: Tensor, durations: Tensor | None = None) -> float:
    """Minus the logarithm of the sum over all ways, of one row."""
    frames, labels = blank.shape[0], blank.shape[1] - 1

    @cache
    def ways(frame: int, said: int) -> float:
        if frame == frames:
            return 1.0 if said == labels else 0.0
        if frame > frames:
            return 0.0
        total = 0.0
        for number, far in enumerate((0, 1) if durations is None else STEPS):
            chance = 1.0 if durations is None else float(durations[frame, said, number].exp())
            if far and (durations is not None or far == 1):
                total += chance * float(blank[frame, said].exp()) * ways(frame + far, said)
            if said < labels and frame + far < frames and (durations is not None or not far):
                total += chance * float(label[frame, said].exp()) * ways(frame + far, said + 1)
        return total

    return -float(torch.tensor(ways(0, 0)).log())


@pytest.mark.parametrize(("frames", "labels"), [(1, 0), (1, 3), (4, 0), (5, 3), (3, 6)])
def test_rnnt_is_the_sum_over_all_ways(frames: int, labels: int) -> None:
    blank, label = lattice(2, frames + 2, labels + 1)  # the rest pads
    counts = torch.tensor([frames, frames + 2]), torch.tensor([labels, labels + 1])
    found = rnnt_loss(blank, label, *counts)
    assert float(found[0]) == pytest.approx(
        by_hand(blank[0, :frames, : labels + 1], label[0, :frames, : labels + 1]), rel=1e-4
    )
    assert float(found[1]) == pytest.approx(by_hand(blank[1], label[1]), rel=1e-4)


def test_tdt_is_the_sum_over_all_ways() -> None:
    blank, label = lattice(2, 6, 3)
    generator = torch.Generator().manual_seed(1)
    durations = torch.randn(2, 6, 4, len(STEPS), generator=generator).log_softmax(dim=-1)
    counts = torch.tensor([4, 6]), torch.tensor([2, 3])
    found = tdt_loss(blank, label, *counts, durations, STEPS)
    one = by_hand(blank[0, :4, :3], label[0, :4, :3], durations[0, :4, :3])
    assert found.tolist() == pytest.approx([one, by_hand(blank[1], label[1], durations[1])], rel=1e-4)


def test_a_text_that_no_way_leads_to_is_infinitely_unlikely_and_has_no_gradient() -> None:
    blank, label = lattice(2, 4, 3)
    blank.requires_grad_()
    durations = torch.zeros(2, 4, 4, 1)  # every step goes on one frame, and the last one says nothing
    found = tdt_loss(blank, label, torch.tensor([3, 4]), torch.tensor([3, 3]), durations, (1,))
    assert found[0] == torch.inf
    only = label[1, range(3), range(3)].sum() + blank[1, 3, 3].detach()
    assert found[1].item() == pytest.approx(-only.item(), rel=1e-5)
    found[found.isfinite()].sum().backward()
    assert blank.grad is not None
    assert blank.grad.isfinite().all()
    assert float(blank.grad[0].abs().max()) == 0.0


def test_the_gradient_is_that_of_finite_differences_and_stays_within_the_row() -> None:
    blank, label = (each.double().requires_grad_() for each in lattice(2, 4, 3))
    counts = torch.tensor([3, 4]), torch.tensor([2, 3])
    assert torch.autograd.gradcheck(lambda b, n: rnnt_loss(b, n, *counts), (blank, label))
    rnnt_loss(blank, label, *counts).sum().backward()
    assert blank.grad is not None
    assert float(blank.grad[0, 3].abs().max()) == float(blank.grad[0, :, 3].abs().max()) == 0.0
    assert blank.grad[0, 2, 2] == -1.0  # every way ends there
