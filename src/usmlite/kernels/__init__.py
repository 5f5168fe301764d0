"""The operations that a packed weight takes part in, behind one interface.

A weight is a matrix `[rows, columns]`: one row per output channel (or token), inputs along the
columns. It comes in two forms: `PackedWeight`, the bytes as the file holds them, and
`ExpandedWeight`, one small integer per weight. Every operation takes either.

`reference` is the readable implementation in PyTorch that runs wherever PyTorch runs. `native` calls the
library in csrc/, which agrees with it (tests/kernels/test_native.py says how closely); it takes weights
that were prepared for it once. `cuda` multiplies few rows of activations on a GPU. The functions here take
all, and choose.
"""

from __future__ import annotations

from torch import Tensor

from usmlite.kernels import cuda, native, reference
from usmlite.kernels.native import Activations, NativeWeight, obstacle, prepare, warn_if_missing
from usmlite.kernels.reference import pattern_words, unpack_codes
from usmlite.kernels.scales import MAX_SCALE, MIN_SCALE, MOST_SCALE_CODE, scale_codes, scale_of
from usmlite.kernels.weights import (
    ExpandedWeight,
    PackedWeight,
    PatternLayout,
    code_bytes,
    pattern_columns,
    pattern_ranks,
    row_blocks,
)


def implementation() -> str:
    """What runs the operations of this module: "reference", or "native (...)" with the instruction set."""
    path = native.chosen()
    return "reference" if path is None else f"native ({path})"


def linear(
    x: Tensor, weight: PackedWeight | ExpandedWeight | NativeWeight, bias: Tensor | None = None
) -> Tensor:
    """X times the transposed weight, plus bias.

    Args:
        x: float `[..., columns]`.
        weight: `[rows, columns]`.
        bias: `[rows]`, or None.

    Returns:
        `[..., rows]` in x's dtype.
    """
    if isinstance(weight, NativeWeight):
        if native.suits(x):
            return native.linear(x, weight, bias)
        weight = weight.weight
    if cuda.takes(x, weight):
        return cuda.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def embedding(ids: Tensor, weight: PackedWeight | ExpandedWeight | NativeWeight) -> Tensor:
    """Rows of the weight by number; only those rows are unpacked.

    Args:
        ids: int64 `[...]`.
        weight: `[rows, columns]`.

    Returns:
        float32 `[..., columns]`.
    """
    if isinstance(weight, NativeWeight):
        if ids.device.type == "cpu":
            return native.embedding(ids, weight)
        weight = weight.weight
    return reference.embedding(ids, weight)


def convolve(
    x: Tensor, weight: NativeWeight, bias: Tensor | None, stride: int, padding: int
) -> Tensor | None:
    """A 1-D convolution along the last axis, see `native.convolve`; None where the native library cannot."""
    return native.convolve(x, weight, bias, stride, padding) if native.suits(x) else None


def unpack(weight: PackedWeight | ExpandedWeight) -> Tensor:
    """The weight in full, float32 `[rows, columns]`.

    (code - zero) * scale, times the column's scale if there is one; pruned weights are 0.0.
    """
    prepared = prepare(weight, "float32")
    return reference.unpack(weight) if prepared is None else native.unpack(prepared)


def expand(weight: PackedWeight) -> ExpandedWeight:
    """One small integer per weight instead of packed bits, see `reference.expand`."""
    prepared = prepare(weight, "float32")
    return reference.expand(weight) if prepared is None else native.expand(prepared)


__all__ = [
    "MAX_SCALE",
    "MIN_SCALE",
    "MOST_SCALE_CODE",
    "Activations",
    "ExpandedWeight",
    "NativeWeight",
    "PackedWeight",
    "PatternLayout",
    "code_bytes",
    "convolve",
    "embedding",
    "expand",
    "implementation",
    "linear",
    "obstacle",
    "pattern_columns",
    "pattern_ranks",
    "pattern_words",
    "prepare",
    "row_blocks",
    "scale_codes",
    "scale_of",
    "unpack",
    "unpack_codes",
    "warn_if_missing",
]
