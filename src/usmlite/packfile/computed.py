"""Tables that are computed from their shape instead of stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from usmlite.errors import PackedModelError
from usmlite.packfile.directory import COPY_AGAIN

_MAX_COMPUTED = 1 << 26


def _sinusoids(length: int, channels: int) -> Tensor:
    """Whisper's encoder positions, in float32 as openai/whisper `model.py` computes them."""
    increment = math.log(10000) / (channels // 2 - 1)
    rates = torch.exp(-increment * torch.arange(channels // 2))
    angles = torch.arange(length)[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


COMPUTED: dict[str, Callable[[int, int], Tensor]] = {
    "sinusoids": _sinusoids,
    # Checkpoints that were once stored in float16 have the rounded table.
    "sinusoids-float16": lambda length, channels: _sinusoids(length, channels).half().float(),
}


def compute(rule: str, shape: Sequence[int]) -> Tensor:
    """A tensor that is computed instead of stored, float32.

    Args:
        rule: a name in `COMPUTED`.
        shape: `[length, channels]`.

    Raises:
        PackedModelError: such a table cannot have this shape.
    """
    if len(shape) != 2 or shape[1] < 4 or shape[1] % 2 or math.prod(shape) > _MAX_COMPUTED:
        raise PackedModelError(
            "cannot be computed", where=rule,
            expected=f"[length, an even number of channels], at most {_MAX_COMPUTED} numbers",
            found=list(shape), remedy=COPY_AGAIN,
        )  # fmt: skip
    return COMPUTED[rule](*shape)


def computed_rule(table: Tensor, *, tolerance: float = 1e-3) -> str | None:
    """The rule that computes this table most closely; None if none comes within the tolerance."""
    if table.dim() != 2 or not table.numel() or table.shape[1] < 4 or table.shape[1] % 2:
        return None
    # Row 0 is sin(0) and cos(0): a look at it spares the whole table for other tensors.
    row = torch.cat([torch.zeros(table.shape[1] // 2), torch.ones(table.shape[1] // 2)])
    if not bool(((table[0].float().cpu() - row).abs() <= tolerance).all()):
        return None
    differences = {
        rule: float((make(*table.shape).to(table.device) - table.float()).abs().max())
        for rule, make in COMPUTED.items()
    }
    best = min(differences, key=differences.__getitem__)
    return best if differences[best] <= tolerance else None
