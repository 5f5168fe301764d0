"""Products on a GPU agree with the reference; without one, in Triton's interpreter (`make test-triton`)."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which nothing here does before usmlite.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from packed_weights import SPECS, packed
from usmlite.kernels import ExpandedWeight, PackedWeight, cuda, reference
from usmlite.spec import NM, Int, LayerSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (37, 50), (33, 1), (70, 131)]


def moved(weight: PackedWeight) -> PackedWeight:
    tensors = {
        name: value.to(DEVICE) for name, value in vars(weight).items() if isinstance(value, torch.Tensor)
    }
    return PackedWeight(**{**vars(weight), **tensors})


def check(weight: PackedWeight | ExpandedWeight, count: int, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, weight.columns, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(weight.rows, generator=generator).to(DEVICE)
    expected = x.double() @ reference.unpack(weight).double().T + bias
    size = x.double().abs() @ reference.unpack(weight).double().abs().T + bias.abs()
    found = cuda.linear(x, weight, bias)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-5 * size).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_format(spec: LayerSpec, shape: tuple[int, int]) -> None:
    weight = moved(packed(*shape, spec))
    if not cuda.has_kernel(weight):
        assert spec.sparsity == NM(11, 29)
        return
    check(weight, 3)


@pytest.mark.parametrize(
    "spec", [LayerSpec(Int(4)), LayerSpec(Int(8, symmetric=False), None, 16), LayerSpec(Int(2), NM(2, 4))]
)
def test_whole_levels(spec: LayerSpec) -> None:
    check(reference.expand(moved(packed(40, 48, spec))), 5)


@pytest.mark.parametrize("count", [0, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_and_dtypes(count: int, dtype: torch.dtype) -> None:
    for spec in (LayerSpec(Int(4)), LayerSpec(Int(4), NM(2, 4))):
        check(moved(packed(34, 20, spec)), count, dtype)


def test_only_few_rows_on_a_gpu_are_taken() -> None:
    weight = moved(packed(8, 8, LayerSpec(Int(4))))
    assert not cuda.takes(torch.zeros(1, 8), weight)
    if DEVICE == "cuda":
        assert cuda.takes(torch.zeros(16, 8, device=DEVICE), weight)
        assert not cuda.takes(torch.zeros(17, 8, device=DEVICE), weight)
