"""The native library: whether it is there, and checked calls into it.

It is built from csrc/ when usmlite is installed. Where it is missing (no compiler then, or a processor's path
that this one has not) everything runs through `reference`, slowly. The environment variable
`USMLITE_KERNELS` chooses: "reference", or one of the paths that `paths()` names; by default the best
one.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from usmlite.kernels.weights import ExpandedWeight, PackedWeight

if TYPE_CHECKING:
    import usmlite.kernels._native as _native

    BlockParts: TypeAlias = tuple[
        tuple[tuple[int, int], tuple[int, int], float], list[tuple[_native.Weight, tuple[int, int]]]
    ]


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("usmlite.kernels._native")
    except ImportError:  # installed without a compiler, or run from a checkout that was never installed
        return None


Activations = Literal["int8", "float32"]
KINDS = ("float32", "int8", "int16")  # in the order of csrc/linear.hpp
VARIABLE = "USMLITE_KERNELS"
_library = _load()
_NOTHING = (0, 0)
# Each weight takes a byte in registers; codes whose distance from zero takes more have the reference only.
_BYTE = range(-128, 128)


@functools.cache
def paths() -> tuple[str, ...]:
    """The instruction sets that the library can use on this processor, best first; empty without it."""
    return () if _library is None else tuple(_library.paths())


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
    if _library is None and os.environ.get(VARIABLE, "") != "reference":
        warnings.warn(
            "usmlite was installed without its native library (for which it needs a C++17 compiler then): "
            f"packed models load and run several times slower. {VARIABLE}=reference silences this.",
            RuntimeWarning,
            stacklevel=3,
        )


def number(path: str | None) -> int:
    """The number that the library knows an instruction set by; None is the chosen one.

    Raises:
        ValueError: it is not there.
    """
    path = path or chosen()
    if path not in paths():
        raise ValueError(f"no path {path!r} here, only {', '.join(paths())}")
    return paths().index(path)


def library() -> ModuleType:
    """The binding of csrc/; RuntimeError where it is missing."""
    if _library is None:
        raise RuntimeError("the native library is not there")
    return _library


def decode_stream(
    stream: np.ndarray,
    frequencies: np.ndarray,
    bits: int,
    levels: tuple[np.ndarray, np.ndarray],
    lowest: int,
    states: int = 0,
) -> np.ndarray:
    """The codes of an entropy-coded stream, see `entropy`.

    Args:
        stream: uint8 `[bytes]`, states and words.
        frequencies: `[tables, 2^bits]`, 0 to 4096; with a trellis there are two such for each table.
        bits: 1 to 8.
        levels: of rows and of columns, uint8 `[rows]` and `[columns]`.
        lowest: the sum of levels of the first table, 0 to 255.
        states: of the trellis that codes follow, 0 without one.

    Returns:
        uint8 `[rows, columns]`.

    Raises:
        ValueError: the bytes are not what encoding makes for so many codes.
    """
    # All of these are kept in names until the call is over.
    stream, rows, columns = (_checked(array, np.uint8) for array in (stream, *levels))
    if frequencies.ndim != 2 or frequencies.min(initial=0) < 0 or frequencies.max(initial=0) > 0xFFFF:
        raise ValueError("impossible frequencies")
    table = _checked(frequencies.astype(np.uint16), np.uint16)
    out = np.empty((len(rows), len(columns)), np.uint8)
    tables = len(table) // 2 if states else len(table)
    library().rans_decode(
        _array(stream), bits, lowest, _array(rows), _array(columns), tables, states, _array(table),
        _array(out),
    )  # fmt: skip
    return out


def trellis_search(
    steps: np.ndarray, states: int, weight: np.ndarray, tables: np.ndarray, bits: np.ndarray
) -> np.ndarray:
    """The codes that `trellis.search` looks for, which says what these are."""
    steps, weight, bits = (_checked(array, np.float32) for array in (steps, weight, bits))
    tables = _checked(tables, np.uint8)
    if weight.shape != steps.shape[:1] or tables.shape != steps.shape or bits.shape[1:] != (2, 128):
        raise ValueError("the parts of a search do not fit together")
    out = np.empty(steps.shape, np.uint8)
    library().trellis_search(
        states, *steps.shape, _array(steps), _array(weight), _array(tables), _array(bits), len(bits),
        _array(out),
    )  # fmt: skip
    return out


def _checked(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    if array.dtype != dtype:
        raise ValueError(f"expected {dtype.__name__}, got {array.dtype}")
    return np.ascontiguousarray(array)


def _array(array: np.ndarray) -> tuple[int, int]:
    """Address and bytes of a contiguous array."""
    return array.ctypes.data, array.nbytes


Weight: TypeAlias = PackedWeight | ExpandedWeight


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A weight that the native library computes with.

    Its bytes stay where they are, in the tensors of `weight`, which live as long as `handle` does; scales are
    copied.

    Attributes:
        weight: the same weight for the reference operations.
        activations: "int8" rounds each row of activations to 256 steps between its smallest and its largest
            number (or zero) and multiplies in whole numbers; "float32" leaves them as they are.
        handle: the library's own description.
        path: the number of the instruction set in `paths()`.
    """

    weight: Weight
    activations: Activations
    handle: _native.Weight
    path: int

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.weight.rows

    @property
    def columns(self) -> int:
        """Inputs per row."""
        return self.weight.columns


def prepare(
    weight: Weight, activations: Activations = "int8", *, path: str | None = None
) -> NativeWeight | None:
    """The weight as the native library wants it; None where the reference has to do.

    `obstacle` says why. That is so without the library, on a GPU, for float16 values, and for 8-bit codes
    whose distances from zero take more than a byte (asymmetric ones, or zero between two codes).

    Args:
        weight: packed, or expanded; its tensors must not be changed afterwards.
        activations: how to multiply.
        path: the instruction set, one of `paths()`; None for the chosen one.

    Raises:
        ValueError: there is no such path, or the tensors do not fit together.
    """
    path = path or chosen()
    if path is None or obstacle(weight) is not None:
        return None
    if path not in paths():
        raise ValueError(f"no path {path!r} here, only {', '.join(paths())}")
    layout, zero, pattern, column_scale = (0, 0, 0, 0), _NOTHING, _NOTHING, _NOTHING
    offset = bits = 0
    if isinstance(weight, ExpandedWeight):
        codes, scale = weight.levels, weight.step
    else:
        codes, scale = weight.codes, weight.scale
        bits, offset = weight.bits or 0, int(2 * weight.offset)
        if weight.zero is not None:
            zero = _memory(weight.zero, torch.uint8)
        if weight.layout is not None and weight.pattern is not None:
            found = weight.layout
            layout = (found.n, found.m, found.word_bytes, found.digits)
            pattern = _memory(weight.pattern, torch.uint8)
    assert scale is not None
    # These are copied, and need to live for the call only.
    scales = scale.to(torch.float32).contiguous()
    columns = None if weight.column_scale is None else weight.column_scale.to(torch.float32).contiguous()
    if columns is not None:
        column_scale = _memory(columns, torch.float32)
    handle = library().Weight(
        weight.rows,
        weight.columns,
        min(weight.group or 0, weight.columns),
        bits,
        offset,
        layout,
        _memory(codes, codes.dtype),
        _memory(scales, torch.float32),
        zero,
        pattern,
        column_scale,
        weight,
    )
    return NativeWeight(weight, activations, handle, paths().index(path))


def obstacle(weight: Weight) -> str | None:
    """Why the library, where it is there, cannot compute with a weight; None if it can."""
    if isinstance(weight, ExpandedWeight):
        tensors = [weight.levels, weight.step, weight.column_scale]
        if weight.step is None:
            return "float16 values"
        fits = weight.levels.dtype == torch.int8
    else:
        tensors = [weight.codes, weight.scale, weight.zero, weight.pattern, weight.column_scale]
        if weight.bits is None:
            return "float16 values"
        if weight.zero is not None:
            fits = weight.bits < 8
        else:
            factor = 1 if weight.offset == int(weight.offset) else 2
            highest = (1 << weight.bits) - 1
            fits = all(int((code - weight.offset) * factor) in _BYTE for code in (0, highest))
    if not fits:
        return "levels of more than a byte"
    if any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors):
        return "not on the CPU"
    if any(tensor is not None and not tensor.is_contiguous() for tensor in tensors):
        return "not contiguous in memory"
    return None if weight.columns > 0 else "no columns"


def _memory(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Address and bytes of a tensor, which the library compares with the sizes that it expects."""
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected contiguous {dtype} in memory, got {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr(), tensor.nbytes


def memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of float32 numbers, one after the other in memory.

    Raises:
        ValueError: it is another dtype, elsewhere, or not contiguous.
    """
    return _memory(tensor, torch.float32)


def suits(x: Tensor) -> bool:
    """Whether the library may compute with these activations: in memory, real, and nobody wants gradients."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.is_floating_point()
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def linear(
    x: Tensor, weight: NativeWeight, bias: Tensor | None = None, *, activations: str | None = None
) -> Tensor:
    """X times the transposed weight, plus bias.

    Args:
        x: float `[..., columns]`, in memory.
        weight: `[rows, columns]`.
        bias: `[rows]`, or None.
        activations: one of `KINDS` in place of the weight's own. "int16" rounds as "int8" does, and what that
            rounded away once more: twice the arithmetic for the same reading of the weight.

    Returns:
        `[..., rows]` in x's dtype; computed in float32, or in whole numbers (see `NativeWeight`).

    Raises:
        ValueError: shapes do not fit.
    """
    columns = weight.columns
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"expected [..., {columns}], got {list(x.shape)}")
    dtype = x.dtype
    if dtype is not torch.float32:
        x = x.to(torch.float32)
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], weight.rows))
    _multiply(x, weight, bias, x.numel() // columns, columns, out, activations)
    return out if dtype is torch.float32 else out.to(dtype)


def convolve(x: Tensor, weight: NativeWeight, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """A 1-D convolution: `linear` for every window of the frames.

    With the channels of a frame next to each other, so are the numbers of a window, and windows overlap in
    memory.

    Args:
        x: float `[batch, channels, frames]`, in memory.
        weight: `[out, width * channels]`, the channels of one place next to each other.
        bias: `[out]`, or None.
        stride: frames from one window to the next, at least 1.
        padding: frames of zeros on both sides.

    Returns:
        `[batch, out, windows]` in x's dtype.

    Raises:
        ValueError: shapes do not fit, or the frames hold no window.
    """
    return convolve_frames(x.transpose(1, 2), weight, bias, stride, padding).transpose(1, 2).to(x.dtype)


def convolve_frames(
    x: Tensor,
    weight: NativeWeight,
    bias: Tensor | None,
    stride: int,
    padding: int,
    *,
    gelu: bool = False,
    activations: str | None = None,
) -> Tensor:
    """`convolve` with the channels of a frame next to each other.

    Args:
        x: float `[batch, frames, channels]`, in memory.
        weight: `[out, width * channels]`, the channels of one place next to each other.
        bias: `[out]`, or None.
        stride: frames from one window to the next, at least 1.
        padding: frames of zeros on both sides.
        gelu: whether the Gaussian error linear unit follows.
        activations: one of `KINDS` in place of the weight's own.

    Returns:
        float32 `[batch, windows, out]`.

    Raises:
        ValueError: shapes do not fit, or the frames hold no window.
    """
    batch, frames, channels = x.shape
    width, rest = divmod(weight.columns, channels)
    windows = (frames + 2 * padding - width) // stride + 1
    if rest or width < 1 or stride < 1 or padding < 0 or windows < 1:
        raise ValueError(
            f"no window of {weight.columns} numbers in {[batch, channels, frames]} with padding {padding}"
        )
    rows = torch.zeros(batch, frames + 2 * padding, channels)
    rows[:, padding : padding + frames] = x
    out = torch.empty(batch, windows, weight.rows)
    for one, result in zip(rows, out, strict=True):
        _multiply(one, weight, bias, windows, stride * channels, result, activations, gelu)
    return out


def _multiply(
    x: Tensor,
    weight: NativeWeight,
    bias: Tensor | None,
    count: int,
    stride: int,
    out: Tensor,
    activations: str | None = None,
    gelu: bool = False,
) -> None:
    added = _NOTHING
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()  # kept in this name until the call is over
        added = _memory(bias, torch.float32)
        if added[1] != 4 * weight.rows:
            raise ValueError(f"expected a bias of {weight.rows} numbers, got {list(bias.shape)}")
    weight.handle.linear(
        (x.data_ptr(), x.nbytes),
        count,
        stride,
        added,
        (out.data_ptr(), out.nbytes),
        KINDS.index(activations or weight.activations),
        weight.path,
        torch.get_num_threads(),
        int(gelu),
    )


def embedding(ids: Tensor, weight: NativeWeight) -> Tensor:
    """Rows of the weight by number; only those are unpacked.

    Args:
        ids: whole numbers `[...]`, in memory.
        weight: `[rows, columns]`.

    Returns:
        float32 `[..., columns]`, the same to the last bit as the reference's.

    Raises:
        IndexError: there is no such row.
    """
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty(flat.numel(), weight.columns)
    weight.handle.gather(
        _memory(flat, torch.int64),
        flat.numel(),
        (out.data_ptr(), out.nbytes),
        weight.path,
        torch.get_num_threads(),
    )
    return out.reshape(*ids.shape, weight.columns)


def unpack(weight: NativeWeight) -> Tensor:
    """The weight in full, float32 `[rows, columns]`, the same to the last bit as the reference's."""
    return embedding(torch.arange(weight.rows), weight)


def expand(weight: NativeWeight) -> ExpandedWeight:
    """One small integer per weight, as the reference does it."""
    packed = weight.weight
    if isinstance(packed, ExpandedWeight):
        return packed
    assert packed.scale is not None
    levels = torch.empty(weight.rows, weight.columns, dtype=torch.int8)
    weight.handle.expand((levels.data_ptr(), levels.nbytes), weight.path, torch.get_num_threads())
    step = packed.scale.float()
    if packed.zero is None and packed.offset != int(packed.offset):
        step = step * 0.5  # levels are doubled there, see the reference
    column_scale = None if packed.column_scale is None else packed.column_scale.float()
    return ExpandedWeight(levels, step, packed.group, column_scale)
