from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite import kernels, packfile
from usmlite import quantize as q
from usmlite.kernels import PackedWeight, reference
from usmlite.sparsify import nm_mask
from usmlite.spec import NM, Int, LayerSpec


def packed(rows: int, columns: int, spec: LayerSpec, seed: int = 0) -> PackedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = None if spec.sparsity is None else nm_mask(weight.abs(), spec.sparsity)
    if spec.quant is None:
        parts = packfile.pack_rows(spec, weight.half(), mask=mask)
    else:
        scale, zero = q.min_max(weight, spec.quant, spec.group)
        codes = q.quantize(weight, scale, zero, spec.quant, spec.group)
        parts = packfile.pack_rows(spec, codes, mask=mask, scale=scale, zero=zero)
        if spec.column_scales:
            parts["column_scale"] = torch.linspace(0.25, 3.0, columns).half()
    return packfile.packed_weight(spec, (rows, columns), parts, where="test")


SPECS = [
    LayerSpec(Int(4), NM(2, 4)),
    LayerSpec(Int(3, symmetric=False), NM(1, 4), 12),
    LayerSpec(Int(2, grid="midrise"), NM(4, 8), 32),
    LayerSpec(Int(2, grid="ternary"), NM(2, 4), 16),
    LayerSpec(Int(8, symmetric=False), None, 16),
    LayerSpec(Int(8, grid="midrise"), NM(5, 7)),
    LayerSpec(None, NM(2, 4)),
    LayerSpec(Int(1)),
    LayerSpec(Int(3), column_scales=True),
    LayerSpec(Int(4), NM(2, 4), 8, column_scales=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("expand", [False, True])
def test_linear_multiplies_by_the_unpacked_weight(spec: LayerSpec, expand: bool) -> None:
    weight = packed(37, 50, spec)
    dense = reference.unpack(weight)
    x, bias = torch.randn(2, 3, 50), torch.randn(37)
    form = reference.expand(weight) if expand else weight
    expected = torch.nn.functional.linear(x, dense, bias)
    torch.testing.assert_close(reference.linear(x, form, bias), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(reference.linear(x, form), expected - bias, rtol=1e-6, atol=1e-5)


def test_linear_in_many_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(50, 24, SPECS[0])
    whole = reference.unpack(weight)
    x = torch.randn(4, 24)
    blocks = reference.row_blocks
    monkeypatch.setattr(
        reference, "row_blocks", lambda rows, columns, weights=0: blocks(rows, columns, 24 * 7)
    )
    assert torch.equal(reference.unpack(weight), whole)
    assert torch.equal(reference.unpack(reference.expand(weight)), whole)
    torch.testing.assert_close(reference.linear(x, weight), x @ whole.T, rtol=1e-6, atol=1e-5)


def test_linear_keeps_the_dtype_of_its_input() -> None:
    weight = packed(8, 16, SPECS[0])
    out = reference.linear(torch.randn(2, 16, dtype=torch.bfloat16), weight)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_embedding_unpacks_only_the_rows_asked_for(spec: LayerSpec) -> None:
    weight = packed(20, 33, spec)
    ids = torch.tensor([[3, 19], [0, 3]])
    for form in (weight, reference.expand(weight)):
        assert torch.equal(reference.embedding(ids, form), reference.unpack(weight)[ids])
    none = torch.zeros(0, dtype=torch.int64)
    assert reference.embedding(none, weight).shape == (0, 33)


def test_expanded_levels_are_one_byte_where_they_fit() -> None:
    assert reference.expand(packed(4, 16, LayerSpec(Int(8)))).levels.dtype == torch.int8
    assert reference.expand(packed(4, 16, LayerSpec(Int(7, symmetric=False)))).levels.dtype == torch.int8
    assert reference.expand(packed(4, 16, LayerSpec(Int(8, symmetric=False)))).levels.dtype == torch.int16


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (3, 7)])
def test_ranks_count_the_patterns_in_colexicographic_order(n: int, m: int) -> None:
    kept = sorted(itertools.combinations(range(m), n), key=lambda places: places[::-1])
    mask = torch.zeros(len(kept), m, dtype=torch.bool)
    for row, places in enumerate(kept):
        mask[row, list(places)] = True
    assert kernels.pattern_ranks(mask, n).tolist() == list(range(math.comb(m, n)))
    assert kernels.pattern_columns(torch.arange(len(kept)), n, m).tolist() == [
        list(places) for places in kept
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))), st.integers(0, 2**31)
)
def test_ranks_and_columns_are_inverse(nm: tuple[int, int], seed: int) -> None:
    n, m = nm
    mask = nm_mask(torch.rand(3, 5 * m, generator=torch.Generator().manual_seed(seed)), NM(n, m)).reshape(
        3, 5, m
    )
    ranks = kernels.pattern_ranks(mask, n)
    assert int(ranks.min()) >= 0
    assert int(ranks.max()) < math.comb(m, n)
    columns = kernels.pattern_columns(ranks, n, m)
    assert torch.equal(torch.zeros_like(mask).scatter(-1, columns, True), mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_codes_survive_packing(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, count), generator=generator, dtype=torch.uint8)
    stored = packfile.pack_codes(codes, bits)
    assert stored.shape == (3, math.ceil(count * bits / 8))
    assert torch.equal(reference.unpack_codes(stored, bits, count), codes)


def test_tables_made_in_inference_mode_work_outside_it() -> None:
    weight = packed(4, 16, LayerSpec(Int(4), NM(3, 5)))
    with torch.inference_mode():
        reference.unpack(weight)
    x = torch.randn(1, 16, requires_grad=True)
    torch.nn.functional.linear(x, reference.unpack(weight)).sum().backward()
    assert x.grad is not None
