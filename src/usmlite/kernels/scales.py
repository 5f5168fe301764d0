"""Scales as they are stored: float16, or codes of 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Outside this range a float16 scale loses precision or overflows.
MIN_SCALE = 2.0**-14
MAX_SCALE = 65504.0
_CODES_PER_OCTAVE = 8
MOST_SCALE_CODE = 239  # 2^15.875; above that float16 ends


def scale_codes(scale: Tensor) -> Tensor:
    """Scales to the nearest codes of 8 bits; uint8, of the same shape."""
    octaves = (scale.double().clamp(MIN_SCALE, MAX_SCALE) / MIN_SCALE).log2()
    return (octaves * _CODES_PER_OCTAVE).round().clamp(0, MOST_SCALE_CODE).to(torch.uint8)


def scale_of(codes: Tensor) -> Tensor:
    """Codes of 8 bits to scales: 2^(code / 8 - 14), rounded to float16, of the same shape."""
    return torch.exp2(codes.double() / _CODES_PER_OCTAVE + math.log2(MIN_SCALE)).half()
