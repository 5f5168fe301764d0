"""A new head learns what a pre-trained encoder says, before the encoder learns anything.

The encoder hears the speech once, and its states are kept. On them, each brought to mean 0 and variance 1, a
linear layer learns CTC in a minute or two; both are then one layer. A head that begins at random would need
hundreds of steps of the whole model until it says anything but the blank, and send noise into the encoder
meanwhile (docs/decisions/0032).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from usmlite.models import Adapter, TimedText
from usmlite.network import FrameNetwork


class Speech(Protocol):
    """Recordings with their texts."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int) -> tuple[Tensor, list[TimedText]]:
        """Samples, float32 `[samples]`, and texts."""


_BATCH, _LEARNING_RATE = 16, 1e-2
_LEAST_SPREAD = 1e-4


def teach_head(
    model: nn.Module,
    adapter: Adapter,
    speech: Speech,
    *,
    head: str,
    steps: int,
    seed: int,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Trains the head of a CTC model alone.

    Args:
        model: with a linear layer for a head; changed in nothing but that. Run in evaluation mode.
        adapter: of the model; its network is a `FrameNetwork`.
        speech: samples, float32 `[samples]`, and their texts. The states of an hour take 140 MB where they
            are 384 wide.
        head: the module's name.
        steps: of 16 windows.
        seed: of what is drawn.
        autocast: the dtype that the encoder runs in, None for its own.
        progress: called with what was heard and learned, of how much.

    Returns:
        The loss of every step, nats a label.
    """
    network, layer = adapter.network, model.get_submodule(head)
    assert isinstance(network, FrameNetwork)
    assert isinstance(layer, nn.Linear)
    tell = progress or (lambda done, total: None)
    total = len(speech) + steps
    heard = []
    for each in _hear(model, adapter, speech, autocast):
        heard.append(each)
        tell(len(heard), total)
    mean, spread = _statistics([states for states, _ in heard])
    learned = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        learned.weight.zero_()
        learned.bias.zero_()
    optimizer = torch.optim.AdamW(learned.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(heard), (min(_BATCH, len(heard)),), generator=generator).tolist()
        states = pad_sequence([(heard[i][0].float() - mean) / spread for i in chosen], batch_first=True)
        labels = pad_sequence([heard[i][1] for i in chosen], batch_first=True, padding_value=-100)
        frames = torch.tensor([len(heard[i][0]) for i in chosen])
        loss = network.loss_of_frames(learned(states), labels, frames)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        tell(len(heard) + step + 1, total)
    with torch.no_grad():
        weight = learned.weight / spread
        layer.weight.copy_(weight)
        layer.bias.copy_(learned.bias - weight @ mean)
    return losses


@torch.no_grad()
def _hear(
    model: nn.Module,
    adapter: Adapter,
    speech: Speech,
    autocast: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each window the encoder's states, float16 `[frames, d]`, and its labels."""
    model.eval()
    device = next(model.parameters()).device
    for index in range(len(speech)):
        samples, texts = speech[index]
        end = max((text.end for text in texts), default=0.0)
        batch = {name: value.to(device) for name, value in adapter.hear(samples[None], [end]).items()}
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            states = adapter.network.states(model, batch)[0]
        labels = adapter.teach([texts], timestamps=[False], language=None)["labels"][0]
        yield states.half().cpu(), labels[labels >= 0]


def _statistics(heard: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, float32 `[d]`."""
    total = sum(len(states) for states in heard)
    mean = torch.stack([states.double().sum(dim=0) for states in heard]).sum(dim=0) / total
    square = torch.stack([states.double().square().sum(dim=0) for states in heard]).sum(dim=0) / total
    spread = (square - mean.square()).clamp(min=_LEAST_SPREAD**2).sqrt()
    return mean.float(), spread.float()
