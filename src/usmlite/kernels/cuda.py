"""Products with a few rows of activations on a GPU, from the bytes as they lie in memory.

Decoding multiplies one row of activations, or some, by every weight: what takes time is reading weights, so
reading fewer bytes is faster. Many rows, as an encoder has, are compute: for them the weight is put back into
floats and multiplied by cuBLAS (`reference.linear`).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor

from usmlite.kernels.weights import ExpandedWeight, PackedWeight

MOST_ROWS = 16
"""Rows of activations up to which reading the weight is what takes time."""
_MOST_PATTERNS = 1 << 16  # whose places are looked up


def takes(x: Tensor, weight: PackedWeight | ExpandedWeight) -> bool:
    """Whether `linear` is for this product: on a GPU, of few rows, with codes and not with floats."""
    if not x.is_cuda or x.numel() > MOST_ROWS * weight.columns:
        return False
    return _has_triton() and has_kernel(weight)


def has_kernel(weight: PackedWeight | ExpandedWeight) -> bool:
    """Whether there is a kernel for weights of this form."""
    if isinstance(weight, ExpandedWeight):
        return weight.step is not None
    patterns = 0 if weight.layout is None else weight.layout.patterns
    return weight.bits is not None and patterns <= _MOST_PATTERNS


@lru_cache
def _has_triton() -> bool:
    # PyTorch's builds for CUDA on Linux bring it along.
    return find_spec("triton") is not None


def linear(x: Tensor, weight: PackedWeight | ExpandedWeight, bias: Tensor | None = None) -> Tensor:
    """X times the transposed weight, plus bias; sums in float32.

    Args:
        x: float `[..., columns]`, at most `MOST_ROWS` rows, on the weight's device.
        weight: `[rows, columns]`, of those that `takes` takes.
        bias: `[rows]`, or None.

    Returns:
        `[..., rows]` in x's dtype.
    """
    # Where nobody computes on a GPU, nobody waits for Triton.
    from usmlite.kernels import cuda_triton

    flat = x.reshape(-1, weight.columns).float()
    if weight.column_scale is not None:
        flat = flat * weight.column_scale
    out = flat.new_empty(len(flat), weight.rows)
    if out.numel():
        cuda_triton.multiply(flat.contiguous(), weight, out)
    if bias is not None:
        out += bias
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.rows)
