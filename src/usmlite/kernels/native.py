"""The native library: whether it is there, and checked calls into it.

It is built from csrc/ when usmlite is installed. Where it is missing (no compiler then, or a processor's path
that this one has not) everything runs through `reference`, slowly. The environment variable
`USMLITE_KERNELS` chooses: "reference", or one of the paths that `paths()` names; by default the best
one.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from usmlite.kernels.weights import ExpandedWeight, PackedWeight

try:
    from usmlite.kernels import _native
except ImportError:  # installed without a compiler, or run from a checkout that was never installed
    _native = None  # type: ignore[assignment, unused-ignore]

Activations = Literal["int8", "float32"]
VARIABLE = "USMLITE_KERNELS"
_NOTHING = (0, 0)
# Each weight takes a byte in registers; codes whose distance from zero takes more have the reference only.
_BYTE = range(-128, 128)


def paths() -> tuple[str, ...]:
    """The instruction sets that the library can use on this processor, best first; empty without it."""
    return () if _native is None else tuple(_native.paths())


@functools.cache
def _path_numbers() -> dict[str, int]:
    return {name: number for number, name in enumerate(paths())}


def chosen() -> str | None:
    """The path that runs, None for the reference operations.

    Raises:
        ValueError: `USMLITE_KERNELS` names one that is not there.
    """
    name = os.environ.get(VARIABLE, "")
    available = paths()
    if name == "reference" or (not name and not available):
        return None
    if name and name not in available:
        names = ", ".join([*available, "reference"])
        raise ValueError(f"{VARIABLE} is {name!r}, which is not among those of this installation: {names}")
    return name or available[0]


@functools.cache
def warn_if_missing() -> None:
    """Says once that the library is missing, and what that means."""
    if _native is None and os.environ.get(VARIABLE, "") != "reference":
        warnings.warn(
            "usmlite was installed without its native library (it needs a C++17 compiler when it is installed): "
            f"packed models load and run several times slower. {VARIABLE}=reference silences this.",
            RuntimeWarning,
            stacklevel=3,
        )


def decode_codes(data: np.ndarray, bits: int, count: int, tables: int) -> np.ndarray:
    """`entropy.decode`, with its arguments, result and errors."""
    out = np.empty(count, np.uint8)
    data = np.ascontiguousarray(data)
    if data.dtype != np.uint8:
        raise ValueError(f"coded bytes must be uint8, got {data.dtype}")
    _native.rans_decode((data.ctypes.data, data.nbytes), bits, tables, (out.ctypes.data, out.nbytes))
    return out


Weight: TypeAlias = PackedWeight | ExpandedWeight


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A weight that the native library computes with.

    Its bytes stay where they are, in the tensors of `weight`; scales are copied.

    Attributes:
        weight: the same weight for the reference operations.
        activations: "int8" rounds each row of activations to 256 steps between its smallest and its largest
            number (or zero) and multiplies in whole numbers; "float32" leaves them as they are.
        handle: the library's own description.
    """

    weight: Weight
    activations: Activations
    handle: Any

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.weight.rows

    @property
    def columns(self) -> int:
        """Inputs per row."""
        return self.weight.columns


def prepare(weight: Weight, activations: Activations = "int8") -> NativeWeight | Weight:
    """The weight as the native library wants it, or itself where that cannot be.

    That is so without the library, on a GPU, for float16 values, and for 8-bit codes whose distances from zero
    take more than a byte (asymmetric ones, or zero between two codes).
    """
    if _native is None or not _supported(weight):
        return weight
    scale, zero, pattern = _NOTHING, _NOTHING, _NOTHING
    layout = (0, 0, 0, 0)
    offset = bits = 0
    if isinstance(weight, ExpandedWeight):
        codes, steps = weight.levels, weight.step
    else:
        codes, steps = weight.codes, weight.scale
        bits, offset = weight.bits or 0, int(2 * weight.offset)
        if weight.zero is not None:
            zero = _memory(weight.zero, torch.uint8, (weight.rows, *weight.zero.shape[1:]))
        if weight.layout is not None and weight.pattern is not None:
            found = weight.layout
            layout = (found.n, found.m, found.word_bytes, found.digits)
            pattern = _memory(weight.pattern, torch.uint8, (weight.rows, *weight.pattern.shape[1:]))
    assert steps is not None
    # Copied by the library: these need to live for the call only.
    floats = steps.to(torch.float32).contiguous()
    columns = None if weight.column_scale is None else weight.column_scale.to(torch.float32).contiguous()
    scale = _memory(floats, torch.float32, (weight.rows, *steps.shape[1:]))
    handle = _native.Weight(
        weight.rows,
        weight.columns,
        min(weight.group or 0, weight.columns),
        bits,
        offset,
        layout,
        _memory(codes, codes.dtype, (weight.rows, *codes.shape[1:])),
        scale,
        zero,
        pattern,
        _NOTHING if columns is None else _memory(columns, torch.float32, (weight.columns,)),
    )
    return NativeWeight(weight, activations, handle)


def _supported(weight: Weight) -> bool:
    if isinstance(weight, ExpandedWeight):
        tensors = [weight.levels, weight.step, weight.column_scale]
        fits = weight.levels.dtype == torch.int8 and weight.step is not None
    else:
        tensors = [weight.codes, weight.scale, weight.zero, weight.pattern, weight.column_scale]
        fits = weight.bits is not None and weight.codes.dtype == torch.uint8
        if weight.bits is not None and weight.zero is not None:
            fits = fits and weight.bits < 8
        elif weight.bits is not None:
            factor = 1 if weight.offset == int(weight.offset) else 2
            highest = (1 << weight.bits) - 1
            fits = fits and all(int((code - weight.offset) * factor) in _BYTE for code in (0, highest))
    return fits and all(
        tensor is None or (tensor.device.type == "cpu" and tensor.is_contiguous()) for tensor in tensors
    )


def _memory(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int]:
    """Address and bytes of a tensor that is what the library will take it for."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"expected contiguous {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"expected a tensor in memory, got one on {tensor.device}")
    return tensor.data_ptr(), tensor.nbytes


def suits(x: Tensor) -> bool:
    """Whether the native library may compute with these activations: in memory, and nobody wants gradients."""
    return (
        x.device.type == "cpu"
        and x.is_floating_point()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def linear(x: Tensor, weight: NativeWeight, bias: Tensor | None = None, *, path: str | None = None) -> Tensor:
    """X times the transposed weight, plus bias.

    Args:
        x: float `[..., columns]`, in memory.
        weight: `[rows, columns]`.
        bias: `[rows]`, or None.
        path: the instruction set, one of `paths()`; None for the chosen one.

    Returns:
        `[..., rows]` in x's dtype; computed in float32, or in whole numbers (see `NativeWeight`).

    Raises:
        ValueError: shapes do not fit, or there is no such path.
    """
    if x.dim() == 0 or x.shape[-1] != weight.columns:
        raise ValueError(f"expected [..., {weight.columns}], got {list(x.shape)}")
    flat = x.detach().to(torch.float32).reshape(-1, weight.columns).contiguous()
    return strided_linear(flat, weight, bias, path=path).reshape(*x.shape[:-1], weight.rows).to(x.dtype)


def strided_linear(
    x: Tensor, weight: NativeWeight, bias: Tensor | None = None, *, path: str | None = None
) -> Tensor:
    """`linear` for rows that may overlap, as the windows of a convolution do.

    Args:
        x: float32 `[count, columns]`, in memory, the numbers of a row next to each other.
        weight: `[rows, columns]`.
        bias: `[rows]`, or None.
        path: as for `linear`.

    Returns:
        float32 `[count, rows]`.
    """
    count, columns = x.shape
    stride = x.stride(0)
    if x.dtype != torch.float32 or columns != weight.columns or x.device.type != "cpu" or stride < 0:
        raise ValueError(f"expected float32 [count, {weight.columns}] in memory, got {x.dtype} {list(x.shape)}")
    if columns > 1 and x.stride(1) != 1:
        raise ValueError("the numbers of a row must lie next to each other")
    out = torch.empty(count, weight.rows)
    if not count:
        return out
    added = _NOTHING
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
        added = _memory(bias, torch.float32, (weight.rows,))
    size = 4 * ((count - 1) * stride + columns)
    weight.handle.linear(
        (x.data_ptr(), size),
        count,
        stride,
        added,
        (out.data_ptr(), out.nbytes),
        weight.activations == "int8",
        _number(path),
        torch.get_num_threads(),
    )
    return out


def embedding(ids: Tensor, weight: NativeWeight, *, path: str | None = None) -> Tensor:
    """Rows of the weight by number; only those are unpacked.

    Args:
        ids: whole numbers `[...]`, in memory.
        weight: `[rows, columns]`.
        path: as for `linear`.

    Returns:
        float32 `[..., columns]`, the same to the last bit as the reference's.

    Raises:
        IndexError: there is no such row.
    """
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty(flat.numel(), weight.columns)
    weight.handle.gather(
        _memory(flat, torch.int64, (flat.numel(),)),
        flat.numel(),
        (out.data_ptr(), out.nbytes),
        _number(path),
        torch.get_num_threads(),
    )
    return out.reshape(*ids.shape, weight.columns)


def _number(path: str | None) -> int:
    name = path or chosen() or paths()[-1]
    if name not in _path_numbers():
        raise ValueError(f"no path {name!r} here, only {', '.join(paths())}")
    return _path_numbers()[name]
