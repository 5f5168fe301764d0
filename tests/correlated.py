"""Inputs as layers of real models have them, and what a compressed weight makes of them."""

from __future__ import annotations

import torch
from torch import Tensor


def correlated(samples: int, columns: int, *, seed: int = 0) -> Tensor:
    """Inputs with a decaying spectrum and a few strong columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    spectrum = torch.linspace(0.0, -3.0, columns).exp()
    inputs = torch.randn(samples, columns, generator=generator) * spectrum @ mixing
    return inputs * (0.2 + 2.0 * torch.rand(columns, generator=generator))


def output_error(weight: Tensor, compressed: Tensor, inputs: Tensor) -> float:
    reference = inputs @ weight.T
    error = (inputs @ compressed.T - reference).square().sum() / reference.square().sum()
    return error.item()
