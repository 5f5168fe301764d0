"""The average is that of the steps, comes back from a checkpoint, and leaves the weights as they were."""

from __future__ import annotations

import torch
from torch import nn

from usmlite.average import averaged, take_average, update_average


def trained(steps: int, decay: float) -> tuple[nn.Linear, torch.optim.AdamW, list[torch.Tensor]]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    seen = []
    for step in range(steps):
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_average(optimizer, decay, step)
        seen.append(layer.weight.detach().clone())
    return layer, optimizer, seen


def test_it_is_the_running_mean_that_forgets_its_start() -> None:
    layer, optimizer, seen = trained(30, 0.5)
    expected = seen[0]
    for step, weight in enumerate(seen[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    last = layer.weight.detach().clone()
    with averaged(optimizer):
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight, last)
    take_average(optimizer)
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_what_had_no_gradient_is_left_alone() -> None:
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([*used.parameters(), *unused.parameters()], lr=0.1)
    used(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    update_average(optimizer, 0.9, 0)
    unused(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # which would fail if it found a state that it did not make
    update_average(optimizer, 0.9, 1)
    with averaged(optimizer):
        assert torch.isfinite(unused.weight).all()


def test_without_an_average_nothing_changes() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters())
    take_average(optimizer)
    with averaged(optimizer):
        assert torch.equal(layer.weight, before)
