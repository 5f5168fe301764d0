"""The operations that a packed weight takes part in, behind one interface.

A weight is a matrix `[rows, columns]`: one row per output channel (or token), inputs along the
columns. It comes in two forms: `PackedWeight`, the bytes as the file holds them, and
`ExpandedWeight`, one small integer per weight. Every operation takes either.

`reference` is the readable implementation in PyTorch that runs wherever PyTorch runs; a faster one must
agree with it. `implementation()` says which one answers.
"""

from __future__ import annotations

from usmlite.kernels.reference import embedding, expand, linear, pattern_words, unpack, unpack_codes
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
    """The name of the implementation that runs the operations of this module."""
    return "reference"


__all__ = [
    "MAX_SCALE",
    "MIN_SCALE",
    "MOST_SCALE_CODE",
    "ExpandedWeight",
    "PackedWeight",
    "PatternLayout",
    "code_bytes",
    "embedding",
    "expand",
    "implementation",
    "linear",
    "pattern_columns",
    "pattern_ranks",
    "pattern_words",
    "row_blocks",
    "scale_codes",
    "scale_of",
    "unpack",
    "unpack_codes",
]
