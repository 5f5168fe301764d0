"""A packed weight of every format, for what multiplies by them."""

from __future__ import annotations

import torch

from usmlite import kernels, packfile
from usmlite import quantize as q
from usmlite.kernels import PackedWeight
from usmlite.sparsify import nm_mask
from usmlite.spec import NM, Int, LayerSpec

SPECS = [
    LayerSpec(Int(8)),
    LayerSpec(Int(8), column_scales=True),
    LayerSpec(Int(8, scale_bits=8), column_scales=True),
    LayerSpec(Int(8), NM(1, 3), 5),
    LayerSpec(Int(7, symmetric=False), None, 16),
    LayerSpec(Int(7, grid="midrise")),
    LayerSpec(Int(6), NM(5, 7)),
    LayerSpec(Int(5, symmetric=False), NM(2, 4), 12),
    LayerSpec(Int(4)),
    LayerSpec(Int(4), NM(2, 4)),
    LayerSpec(Int(4), NM(2, 4), 8, column_scales=True),
    LayerSpec(Int(4, scale_bits=8), NM(2, 4), column_scales=True),
    LayerSpec(Int(4, grid="midrise"), NM(2, 4)),
    LayerSpec(Int(4), NM(8, 16)),
    LayerSpec(Int(4), NM(11, 29)),
    LayerSpec(Int(3), None, 7, column_scales=True),
    LayerSpec(Int(3, symmetric=False), NM(1, 4), 12),
    LayerSpec(Int(2, grid="midrise"), NM(4, 8), 32),
    LayerSpec(Int(2, grid="ternary"), NM(2, 4), 16),
    LayerSpec(Int(2, grid="midrise", scale_bits=8), None, 24),
    LayerSpec(Int(5, symmetric=False, scale_bits=8), NM(1, 4), 20, column_scales=True),
    LayerSpec(Int(1)),
    LayerSpec(Int(1), NM(1, 2)),
]


def packed(rows: int, columns: int, spec: LayerSpec, seed: int = 0) -> PackedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = None if spec.sparsity is None else nm_mask(weight.abs(), spec.sparsity)
    if spec.quant is None:
        parts = packfile.pack_rows(spec, weight.half(), mask=mask)
    else:
        scale, zero = q.min_max(weight, spec.quant, spec.group)
        if spec.quant.scale_bits == 8:
            scale = kernels.scale_of(kernels.scale_codes(scale)).float()
        codes = q.quantize(weight, scale, zero, spec.quant, spec.group)
        parts = packfile.pack_rows(spec, codes, mask=mask, scale=scale, zero=zero)
        if spec.column_scales:
            columns_scale = kernels.scale_of(kernels.scale_codes(torch.linspace(0.25, 3.0, columns))).float()
            parts["column_scale"] = packfile.stored_scales(columns_scale, spec.quant)
    return packfile.packed_weight(spec, (rows, columns), parts, where="test")
