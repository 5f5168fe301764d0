"""Contract 1: `unpack(pack(w))` equals the student's fake-quantized weight, bit for bit, for every spec."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from usmlite import kernels, packfile
from usmlite.pack import pack_layer
from usmlite.patterns import MAX_PATTERNS
from usmlite.spec import NM, Int, LayerSpec, matrix_shape
from usmlite.student import (
    MASK_RULES,
    SCALE_RULES,
    CompressedConv1d,
    CompressedLayer,
    CompressedLinear,
    StudentOptions,
    WeightCompression,
    fake_quantized,
)


@st.composite
def ints(draw: st.DrawFn) -> Int:
    bits, scale_bits = draw(st.integers(1, 8)), draw(st.sampled_from([16, 8]))
    kind = draw(st.sampled_from(["symmetric", "asymmetric", "midrise", "ternary"]))
    if kind == "ternary":
        return Int(2, grid="ternary", scale_bits=scale_bits)
    grid = "midrise" if kind == "midrise" else "integer"
    return Int(bits, symmetric=kind != "asymmetric", grid=grid, scale_bits=scale_bits)


@st.composite
def patterns(draw: st.DrawFn) -> NM:
    m = draw(st.sampled_from([2, 4, 8, 16, 32]) | st.integers(2, 32))
    return NM(draw(st.integers(1, m - 1)), m)


@st.composite
def specs(draw: st.DrawFn) -> LayerSpec:
    quant = draw(st.none() | ints())
    sparsity = draw(patterns() if quant is None else st.none() | patterns())
    group = None if quant is None else draw(st.none() | st.integers(1, 40))
    return LayerSpec(quant, sparsity, group, column_scales=quant is not None and draw(st.booleans()))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = draw(
        st.tuples(st.integers(1, 5), st.integers(1, 80))
        | st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 3))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(shape, generator=generator)
    # Each row on its own scale: all zero, subnormal, tiny, usual, huge.
    for row in range(shape[0]):
        weight[row] *= draw(st.sampled_from([0.0, 1e-40, 1e-6, 0.02, 1.0, 1.0, 1e4, 1e30]))
    if draw(st.booleans()):
        # Ties and exact zeros, of both signs.
        weight = (weight * 2).round() / 2
    return weight


def layer_of(weight: Tensor, spec: LayerSpec, options: StudentOptions) -> CompressedLayer:
    compression = WeightCompression(weight, spec, options)
    if weight.dim() == 2:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight)
        return CompressedLinear.wrap(linear, compression)
    conv = nn.Conv1d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False)
    conv.weight = nn.Parameter(weight)
    return CompressedConv1d.wrap(conv, compression)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float32
    # As integers, so that 0.0 and -0.0 differ.
    assert torch.equal(found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


@settings(max_examples=400, deadline=None)
@given(weights(), specs(), st.sampled_from(SCALE_RULES), st.sampled_from(MASK_RULES), st.booleans())
def test_unpacked_equals_fake_quantized(
    weight: Tensor, spec: LayerSpec, scales: str, masks: str, moved: bool
) -> None:
    if masks == "gumbel" and spec.sparsity is not None and spec.sparsity.patterns > MAX_PATTERNS:
        masks = "fixed"
    layer = layer_of(weight, spec, StudentOptions(scales=scales, masks=masks))  # type: ignore[arg-type]
    if moved:
        # The weights have moved since masks and scales were chosen, as in training.
        with torch.no_grad():
            layer.weight.mul_(1.37).add_(0.01)
            if layer.compression.log_scale is not None:
                layer.compression.log_scale.add_(0.05)
            if layer.compression.patterns is not None:
                layer.compression.patterns.logits.normal_()
                layer.compression.update_mask(layer.weight)

    parts = pack_layer("layer", layer)

    shape = tuple(weight.shape)
    sizes = {name: part.numel() * part.element_size() for name, part in parts.items()}
    assert sizes == spec.sizes(*matrix_shape(shape))
    packed = packfile.packed_weight(spec, shape, parts, where="layer")
    expected = fake_quantized(layer)
    assert_same_bits(packfile.to_weight(kernels.unpack(packed), shape), expected)
    expanded = kernels.expand(packed)
    assert_same_bits(packfile.to_weight(kernels.unpack(expanded), shape), expected)


@settings(max_examples=60, deadline=None)
@given(weights(), specs())
def test_every_row_is_packed_on_its_own(weight: Tensor, spec: LayerSpec) -> None:
    layer = layer_of(weight, spec, StudentOptions())
    parts = pack_layer("layer", layer)
    packed = packfile.packed_weight(spec, tuple(weight.shape), parts, where="layer")
    whole = kernels.unpack(packed)
    rows = torch.tensor([weight.shape[0] - 1, 0, 0])
    assert_same_bits(kernels.embedding(rows, packed), whole[rows])
    assert_same_bits(kernels.embedding(rows, kernels.expand(packed)), whole[rows])
