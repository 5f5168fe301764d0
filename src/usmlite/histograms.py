"""How the values of every compressed weight are spread, in the dense model and in what ships."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from usmlite.student import compressed_layers, fake_quantized

# Odd, so that zeros have a bin of their own in the middle.
BINS = 61
# Standard deviations of the dense weight; what lies beyond counts in the outermost bins.
REACH = 4.5


@torch.no_grad()
def weight_histograms(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Counts the values of every compressed weight before and after.

    Args:
        student: made from this teacher.
        teacher: the dense model.

    Returns:
        Plain data for `json.dumps`: `bins` and `reach`, for equal bins from -reach to reach, in standard
        deviations of the dense weight; and for each of `weights` its `name`, `sigma` (that deviation), the
        counts `dense` and `packed`, and the share of packed values that are `zero` and that the mask
        has `pruned` (None where dense).
    """
    rows = []
    for name, layer in compressed_layers(student):
        dense = cast(Tensor, teacher.get_submodule(name).weight).float().cpu()
        packed = fake_quantized(layer).float().cpu()
        sigma = float(dense.std(correction=0)) or 1.0
        mask = layer.compression.mask
        rows.append({
            "name": name,
            "sigma": sigma,
            "dense": _counts(dense / sigma),
            "packed": _counts(packed / sigma),
            "zero": float((packed == 0).double().mean()),
            "pruned": None if mask is None else 1.0 - float(mask.double().mean()),
        })  # fmt: skip
    return {"bins": BINS, "reach": REACH, "weights": rows}


def _counts(values: Tensor) -> list[int]:
    counted = torch.histc(values.clamp(-REACH, REACH), BINS, -REACH, REACH)
    return [int(count) for count in counted.tolist()]
