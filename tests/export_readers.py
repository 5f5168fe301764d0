"""Reads exports back without the runtimes that they are for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def unpack_words(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Levels int64 `[rows, columns]` from compressed-tensors' words: the lowest bits first."""
    raw = packed.contiguous().view(torch.uint8).numpy()
    flat = np.unpackbits(raw, axis=1, bitorder="little")[:, : columns * bits]
    places = flat.reshape(len(raw), columns, bits).astype(np.int64) << np.arange(bits)
    return torch.from_numpy(places.sum(axis=2) - (1 << bits - 1))


def multiplied(node: Any, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix `[rows, columns]` of a `MatMulNBits` node, as its definition says."""
    values = {attribute.name: attribute.i for attribute in node.attribute}
    bits, block, columns, rows = (values[name] for name in ("bits", "block_size", "K", "N"))
    codes, steps = tensors[node.input[1]], tensors[node.input[2]].reshape(rows, -1)
    assert codes.shape == (rows, math.ceil(columns / block), block * bits // 8)
    flat = np.unpackbits(codes.reshape(rows, -1), axis=1, bitorder="little").reshape(rows, -1, bits)
    levels = (flat.astype(np.int64) << np.arange(bits)).sum(axis=2) - (1 << bits - 1)
    wide = steps.repeat(block, axis=1)
    found: np.ndarray = (levels * wide)[:, :columns].astype(np.float32)
    return found
