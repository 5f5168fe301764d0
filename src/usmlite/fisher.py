"""How much the loss feels each output of a layer: the diagonal of the Fisher information.

To second order, the KL divergence that an error e of a layer's outputs causes is e^T F e / 2, where F is the
mean of g g^T over the gradients g of log p at words that the model itself draws (Amari 1998; Martens, arXiv
1412.1193). Its diagonal says which rows of a weight may be rounded more coarsely than others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from usmlite.network import SEQUENCE_TO_SEQUENCE, Batch, Network

# Batches that gradients are taken of: twice as many, with four draws, gave no better model.
FISHER_BATCHES = 3
_SEED = 0


def output_fisher(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    network: Network = SEQUENCE_TO_SEQUENCE,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Mean squares of the gradients of log p with respect to layers' outputs.

    Args:
        model: run in evaluation mode, and left as it was.
        names: linear layers and 1-D convolutions.
        batches: as for `calibrate`, with scored places.
        network: how the model is run.
        autocast: the dtype the model runs in, None for its own.
        progress: called with the batches done, and of how many.

    Returns:
        Name to float32 `[rows]`, not normalised; only the proportions within a layer mean something.
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(_SEED)
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for name in names:
            hook = _recorder(name, sums)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        for number, batch in enumerate(batches, start=1):
            moved = {name: value.to(device) for name, value in batch.items()}
            with torch.enable_grad():
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    logits = network.logits(model, moved, network.states(model, moved))
                scored = logits.float().log_softmax(dim=-1)
                # Drawn on the CPU, so that every device draws alike.
                words = torch.multinomial(scored.detach().exp().cpu(), 1, generator=generator)
                scored.gather(1, words.to(device)).sum().backward()  # type: ignore[no-untyped-call]
            if progress is not None:
                progress(number, len(batches))
    return sums


def _recorder(name: str, sums: dict[str, Tensor]) -> Callable[..., None]:
    def record(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:  # the first layers: no parameter has a gradient
            output.requires_grad_()

        def add(gradient: Tensor) -> None:
            channels = 1 if isinstance(layer, nn.Conv1d) else -1
            squares = gradient.float().square().movedim(channels, 0).flatten(1).sum(dim=1)
            sums[name] = sums[name] + squares if name in sums else squares

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return record
