"""Calibration: the chosen weights are exactly the student's, and they are better than the plain start."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from usmlite import quantize as q
from usmlite.calibrate import METHODS, calibrate, input_rows, solve
from usmlite.errors import DataError, ModelError, SpecError
from usmlite.sparsify import nm_mask
from usmlite.spec import NM, CompressionSpec, Int, LayerSpec, Rule
from usmlite.student import (
    SCALE_RULES,
    StudentOptions,
    compressed_layers,
    fake_quantized,
    make_student,
    to_matrix,
    update_masks,
)

SPECS = [
    LayerSpec(Int(4), NM(2, 4)),
    LayerSpec(Int(4)),
    LayerSpec(Int(3), None, 16),
    LayerSpec(Int(2, grid="midrise"), NM(2, 4), 32),
    LayerSpec(Int(2), NM(1, 4)),
    LayerSpec(Int(1)),
    LayerSpec(Int(1, symmetric=False), NM(1, 2)),
    LayerSpec(Int(4, symmetric=False), NM(2, 4), 8),
    LayerSpec(Int(3, symmetric=False), NM(3, 7), 5),
    LayerSpec(Int(5), NM(4, 32), 6),
    LayerSpec(Int(8)),
    LayerSpec(None, NM(2, 4)),
]


def correlated(samples: int, columns: int, *, seed: int = 0) -> Tensor:
    """Inputs with a decaying spectrum and a few strong columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    spectrum = torch.linspace(0.0, -3.0, columns).exp()
    inputs = torch.randn(samples, columns, generator=generator) * spectrum @ mixing
    return inputs * (0.2 + 2.0 * torch.rand(columns, generator=generator))


def output_error(weight: Tensor, compressed: Tensor, inputs: Tensor) -> float:
    reference = inputs @ weight.T
    return float((inputs @ compressed.T - reference).square().sum() / reference.square().sum())


class Wrapped(nn.Module):
    """A model of one layer, called by keyword as the real ones are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


def student_of(teacher: nn.Module, spec: LayerSpec, kind: str = "linear", **options: str) -> nn.Module:
    return make_student(
        teacher, {"layer.weight": kind}, CompressionSpec((Rule("*", spec),)), StudentOptions(**options)
    )


@pytest.mark.parametrize("scales", SCALE_RULES)
@pytest.mark.parametrize("columns", [64, 45])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_student_computes_with_exactly_the_solution(spec: LayerSpec, columns: int, scales: str) -> None:
    torch.manual_seed(1)
    teacher = Wrapped(nn.Linear(columns, 33))
    inputs = correlated(300, columns)
    student = student_of(teacher, spec, scales=scales)
    report = calibrate(student, teacher, [{"inputs": inputs}], method="hessian")
    ((_, layer),) = compressed_layers(student)
    solution = solve(
        teacher.layer.weight.detach(),
        inputs.T @ inputs / len(inputs),
        spec,
        importance=layer.compression.importance,
        covering=scales == "min-max",
    )
    assert torch.equal(fake_quantized(layer), solution.values)
    mask = layer.compression.mask
    if spec.sparsity is not None:
        assert mask is not None
        kept = nn.functional.pad(mask, (0, -columns % spec.sparsity.m)).reshape(33, -1, spec.sparsity.m).sum(-1)
        assert (kept[:, :-1] == spec.sparsity.n).all()
        assert (solution.values[~mask] == 0).all()
        before = mask.clone()
        assert update_masks(student) == 0
        assert torch.equal(before, mask)
        assert (layer.weight[mask] != 0).all()
    assert report.layers[0].error_after == pytest.approx(
        output_error(teacher.layer.weight, solution.values, inputs), rel=1e-3
    )
