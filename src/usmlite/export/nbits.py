"""Weights for ONNX Runtime's `MatMulNBits`: 2, 4 or 8 bits, in blocks of columns with a scale each.

The layout is that of the operator's definition (onnxruntime `docs/ContribOperators.md`, domain
"com.microsoft"): codes are levels plus 2^(bits-1), the lowest bits first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from usmlite.export.integers import bits_of, block_steps, round_to_blocks
from usmlite.export.source import Source, Stored, as_float

AUTO = "auto"
FORMS = (AUTO, "int8", "int4", "float16", "float32")
# Large ones first: they take less for scales (docs/decisions/0025).
BLOCKS = (128, 64, 32, 16)
ROUNDED_BLOCK = 32


@dataclass(frozen=True)
class NBits:
    """A weight `[rows, columns]` as the operator takes it.

    Attributes:
        levels: int8 `[rows, columns]`.
        steps: float32 `[rows, blocks]`.
        block: columns that share a step.
        bits: 2, 4 or 8.
        column_scale: float32 `[columns]`, which the inputs are multiplied by first; None where all are 1.
        exact: whether these are the numbers of the packed model.
    """

    levels: Tensor
    steps: Tensor
    block: int
    bits: int
    column_scale: Tensor | None
    exact: bool

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.levels.shape[0]

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.levels.shape[1]

    @property
    def bytes(self) -> int:
        """Codes, steps and column scales."""
        blocks = math.ceil(self.columns / self.block)
        codes = self.rows * blocks * self.block * self.bits // 8
        columns = 0 if self.column_scale is None else 4 * self.columns
        return codes + 4 * self.rows * blocks + columns

    def __str__(self) -> str:
        scales = "" if self.column_scale is None else ", column scales"
        return f"int{self.bits}, blocks of {self.block}{scales}"

    def codes(self) -> np.ndarray:
        """uint8 `[rows, blocks, block * bits / 8]`."""
        blocks = math.ceil(self.columns / self.block)
        shifted = self.levels.to(torch.int16) + (1 << self.bits - 1)
        padding = blocks * self.block - self.columns
        codes = torch.nn.functional.pad(shifted, (0, padding)).to(torch.uint8).numpy()
        each = 8 // self.bits
        parts = codes.reshape(self.rows, blocks, -1, each)
        packed = np.zeros(parts.shape[:3], dtype=np.uint8)
        for index in range(each):
            packed |= parts[..., index] << (self.bits * index)
        return packed


def resolve(source: Source, form: str) -> str:
    """What is meant: of a dense model "auto" means the floats that it has."""
    return "float32" if form == AUTO and source.recognizer.kind != "packed" else form


def pack(source: Source, stored: Stored, form: str, widths: Sequence[int] = (2, 4, 8)) -> NBits | None:
    """A matrix in the fewest bits that hold it as it is, or rounded to what was asked for; None for floats.

    Args:
        source: the model.
        stored: the tensor.
        form: one of `FORMS`; "int8" and "int4" round what does not fit into so many bits.
        widths: bits that the runtime has the operator for.
    """
    if stored.kind not in ("linear", "embedding") or form.startswith("float"):
        return None
    most = {AUTO: 8, "int8": 8, "int4": 4}[form]
    weight = source.levels(stored.name)
    if weight is not None:
        bits = bits_of(weight.levels, [bits for bits in widths if bits <= most])
        steps = {block: block_steps(weight, block) for block in BLOCKS} if bits is not None else {}
        block = next((block for block, found in steps.items() if found is not None), None)
        if bits is not None and block is not None:
            found = steps[block]
            assert found is not None
            return NBits(
                weight.levels.to("cpu", torch.int8), found.cpu(), block, bits,
                None if weight.column_scale is None else weight.column_scale.cpu(), True,
            )  # fmt: skip
    if form == AUTO:
        return None
    levels, steps_ = round_to_blocks(as_float(source.tensor(stored.name)), most, ROUNDED_BLOCK)
    return NBits(levels, steps_, ROUNDED_BLOCK, most, None, False)


def float_form(source: Source, stored: Stored, form: str) -> str:
    """In which floats a tensor is stored that is not quantized: "float16" or "float32"."""
    if form.startswith("float"):
        return form
    return "float32" if source.recognizer.kind != "packed" else "float16"
