"""Every path of the native library that this processor has agrees with the reference."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import itertools
import math
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packed_weights import SPECS, packed
from usmlite import kernels, packfile
from usmlite.kernels import ExpandedWeight, NativeWeight, PackedWeight, native, reference
from usmlite.spec import NM, Grid, Int, LayerSpec

PATHS = native.paths()
needs_native = pytest.mark.skipif(not PATHS, reason="installed without the native library")

# Odd sizes, one row, one column, around the blocks of 32 outputs, 12 rows of activations and 64 columns.
SHAPES = [(1, 1), (37, 50), (1, 130), (33, 1), (64, 64), (31, 3), (70, 259)]
COUNTS = [0, 1, 3, 4, 11, 12, 13, 49, 61]


def forms(weight: PackedWeight) -> Iterator[PackedWeight | ExpandedWeight]:
    yield weight
    yield reference.expand(weight)


def prepared(
    weight: PackedWeight | ExpandedWeight, activations: kernels.Activations, path: str
) -> NativeWeight:
    found = native.prepare(weight, activations, path=path)
    assert found is not None
    return found


def rounding_bound(x: Tensor, weight: PackedWeight | ExpandedWeight) -> Tensor:
    """How far off `[count, rows]` may be where each row of activations is rounded to 256 steps."""
    x, dense = x.double(), reference.unpack(weight).double()
    scale = torch.ones(x.shape[1]) if weight.column_scale is None else weight.column_scale
    x, levels = x * scale.double(), dense / scale.double()
    step = (x.clamp(min=0).amax(dim=1) - x.clamp(max=0).amin(dim=1)) / 255
    rounding = step[:, None] / 2 * levels.abs().sum(dim=1)
    return rounding * 1.001 + 1e-5 * (x.abs() @ levels.abs().T) + 1e-6


def check(x: Tensor, weight: PackedWeight | ExpandedWeight, bias: Tensor | None) -> None:
    """Both ways of multiplying, on every path."""
    exact = x.double() @ reference.unpack(weight).double().T
    exact = exact if bias is None else exact + bias.double()
    whole = []
    for path in PATHS:
        out = native.linear(x, prepared(weight, "float32", path), bias)
        torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)
        whole.append(native.linear(x, prepared(weight, "int8", path), bias))
        assert bool(((whole[-1].double() - exact).abs() <= rounding_bound(x, weight)).all()), path
    # Sums of whole numbers do not depend on their order.
    assert all(torch.equal(whole[0], other) for other in whole[1:])


@needs_native
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear_agrees_with_the_reference(spec: LayerSpec) -> None:
    for (rows, columns), count in itertools.product(SHAPES, COUNTS):
        x, bias = torch.randn(count, columns), torch.randn(rows)
        for weight in forms(packed(rows, columns, spec)):
            check(x, weight, bias if count % 2 else None)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 300),
    count=st.integers(0, 70),
    bits=st.integers(1, 8),
    kind=st.sampled_from(["symmetric", "asymmetric", "midrise"]),
    group=st.none() | st.integers(1, 300),
    nm=st.none() | st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    scales=st.tuples(st.sampled_from([8, 16]), st.booleans()),
    seed=st.integers(0, 2**31),
)
@needs_native
def test_linear_agrees_for_any_format(
    rows: int, columns: int, count: int, bits: int, kind: str, group: int | None, nm: tuple[int, int] | None,
    scales: tuple[int, bool], seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    grid: Grid = "midrise" if kind == "midrise" else "integer"
    quant = Int(bits, symmetric=kind != "asymmetric", grid=grid, scale_bits=scales[0])
    spec = LayerSpec(quant, None if nm is None else NM(*nm), group, scales[1])
    weight = packed(rows, columns, spec, seed)
    if native.prepare(weight) is None:
        assert bits == 8
        assert kind != "symmetric"
        return
    x = torch.randn(count, columns) * 10 ** torch.randint(-3, 4, (count, 1)) + torch.randn(())
    dense = reference.unpack(weight)
    for path in PATHS:
        assert torch.equal(native.unpack(prepared(weight, "int8", path)), dense)
        out = native.linear(x, prepared(weight, "float32", path))
        exact = (x.double() @ dense.double().T).float()
        limit = 1e-5 * (x.abs() @ dense.abs().T) + 1e-6
        assert bool(((out - exact).abs() <= limit).all())
        out = native.linear(x, prepared(weight, "int8", path))
        assert bool(((out - exact).abs() <= rounding_bound(x, weight)).all())


@needs_native
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_unpacking_is_exact(spec: LayerSpec, path: str) -> None:
    for rows, columns in SHAPES:
        weight = packed(rows, columns, spec)
        dense = reference.unpack(weight)
        ids = torch.tensor([[0, rows - 1], [rows // 2, 0]])
        for form in forms(weight):
            handle = prepared(form, "int8", path)
            assert torch.equal(native.unpack(handle), dense)
            assert torch.equal(native.embedding(ids, handle), dense[ids])
            assert native.embedding(ids[:0], handle).shape == (0, 2, columns)
            expanded, expected = native.expand(handle), reference.expand(weight)
            assert torch.equal(expanded.levels, expected.levels)
            assert expected.step is not None
            assert expanded.step is not None
            assert torch.equal(expanded.step, expected.step)
            assert expanded.group == expected.group


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    weight, before = packed(700, 300, LayerSpec(Int(4), NM(2, 4))), torch.get_num_threads()
    x = torch.randn(100, 300)
    expected = [native.linear(x[:count], prepared(weight, "int8", PATHS[-1])) for count in (1, 100)]
    try:
        torch.set_num_threads(threads)
        for path in PATHS:
            for count, out in zip((1, 100), expected, strict=True):
                assert torch.equal(native.linear(x[:count], prepared(weight, "int8", path)), out)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_long_rows_do_not_overflow(path: str) -> None:
    """255 times 128 times 70,000 is more than 2^31."""
    levels = torch.full((33, 70_000), -128, dtype=torch.int8)
    weight = ExpandedWeight(levels, torch.full((33, 1), 2.0**-20), None)
    x = torch.ones(13, 70_000)
    x[:, 0] = -1e-3
    for count in (1, 13):
        out = native.linear(x[:count], prepared(weight, "int8", path))
        torch.testing.assert_close(out, reference.linear(x[:count], weight), rtol=3e-3, atol=0)


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("column_scales", [False, True])
def test_adversarial_activations(path: str, column_scales: bool) -> None:
    weight = packed(40, 70, LayerSpec(Int(8), column_scales=column_scales))
    bias = torch.randn(40)
    x = torch.randn(16, 70)
    x[0], x[1], x[2] = 0.0, 1e-42, 3.4e38 / 3
    x[3], x[4] = -5.0, 5.0
    x[5, 3], x[6, 69], x[7, 0] = float("nan"), float("inf"), float("-inf")
    x[8] = 1e-30
    x[9] *= 1e30
    for count in (1, 16):
        for first in range(0, 16, count):
            rows = x[first : first + count]
            out = native.linear(rows, prepared(weight, "int8", path), bias)
            finite = rows.isfinite().all(dim=1)
            assert bool(out[~finite].isnan().all())
            sure = finite & (rows.abs().amax(dim=1) < 1e35)
            exact = rows[sure].double() @ reference.unpack(weight).double().T + bias.double()
            assert bool(((out[sure] - exact).abs() <= rounding_bound(rows[sure], weight)).all())
            assert not bool(out[sure].isnan().any())
    torch.testing.assert_close(native.linear(x[:1], prepared(weight, "int8", path), bias)[0], bias)


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("stride", "padding", "frames"), [(1, 1, 30), (2, 1, 31), (3, 0, 3), (1, 2, 1)])
def test_convolution(path: str, stride: int, padding: int, frames: int) -> None:
    torch.manual_seed(0)
    weight, bias = packed(20, 3 * 6, LayerSpec(Int(8))), torch.randn(20)
    x = torch.randn(2, 6, frames)
    dense = packfile.to_weight(reference.unpack(weight), (20, 6, 3))
    expected = torch.nn.functional.conv1d(x, dense, bias, stride, padding)
    for activations, tolerance in (("float32", 1e-4), ("int8", 0.1)):
        out = native.convolve(x, prepared(weight, activations, path), bias, stride, padding)  # type: ignore[arg-type]
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="no window"):
        native.convolve(x[:, :5], prepared(weight, "int8", path), bias, stride, padding)


@needs_native
@pytest.mark.parametrize(
    "spec", [LayerSpec(Int(8), column_scales=True), LayerSpec(Int(4), NM(2, 4), 8)], ids=str
)
def test_two_terms_are_nearly_exact(spec: LayerSpec) -> None:
    torch.manual_seed(0)
    for (rows, columns), count in itertools.product(SHAPES, COUNTS):
        x, weight, bias = (
            torch.randn(count, columns) * 3 + 0.5,
            packed(rows, columns, spec),
            torch.randn(rows),
        )
        dense = reference.unpack(weight).double()
        exact = x.double() @ dense.T + bias.double()
        found = [
            native.linear(x, prepared(weight, "int8", path), bias, activations="int16") for path in PATHS
        ]
        # What the first rounding leaves lies within one of its steps, and is rounded to 255 of its own.
        bound = rounding_bound(x, weight) / 255 + 2e-5 * (x.double().abs() @ dense.abs().T) + 1e-5
        assert bool(((found[0].double() - exact).abs() <= bound).all())
        assert all(torch.equal(found[0], other) for other in found[1:])
    x[0, 0] = float("nan")
    out = native.linear(x, prepared(weight, "int8", PATHS[0]), activations="int16")
    assert bool(out[0].isnan().all())
    assert bool(out[1:].isfinite().all())


@needs_native
def test_memory_lives_as_long_as_the_library_reads_it() -> None:
    x, weight = torch.randn(3, 1000), packed(700, 1000, LayerSpec(Int(4), NM(2, 4)))
    expected = native.linear(x, prepared(weight, "int8", PATHS[0]))
    handle = prepared(packed(700, 1000, LayerSpec(Int(4), NM(2, 4))), "int8", PATHS[0]).handle
    del weight
    gc.collect()
    filled = [torch.full((700, 250), 255, dtype=torch.uint8) for _ in range(20)]  # where it was, if it went
    out = torch.empty(3, 700)
    handle.linear((x.data_ptr(), x.nbytes), 3, 1000, (0, 0), (out.data_ptr(), out.nbytes), 1, 0, 1, 0)
    assert torch.equal(out, expected)
    assert len(filled) == 20


@needs_native
def test_any_layout_and_dtype_of_activations() -> None:
    weight = packed(37, 50, LayerSpec(Int(8)))
    handle = prepared(weight, "float32", PATHS[0])
    x = torch.randn(3, 4, 50)
    expected = reference.linear(x, weight)
    for same in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.double(), x[None]):
        out = native.linear(same, handle)
        assert out.dtype == same.dtype
        torch.testing.assert_close(out.float().reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
    half = native.linear(x.half(), handle)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=2e-2)
    bias = torch.randn(74)[::2]
    torch.testing.assert_close(native.linear(x, handle, bias), expected + bias, rtol=1e-4, atol=1e-4)


@needs_native
def test_wrong_shapes_are_refused() -> None:
    weight = packed(8, 16, LayerSpec(Int(4)))
    handle = prepared(weight, "int8", PATHS[0])
    for x in (torch.randn(2, 15), torch.randn(()), torch.randn(16, 0)):
        with pytest.raises(ValueError, match="expected"):
            native.linear(x, handle)
    with pytest.raises(ValueError, match="bias of 8"):
        native.linear(torch.randn(2, 16), handle, torch.randn(7))
    for ids in ([8], [-1], [0, 2**62]):
        with pytest.raises(IndexError):
            native.embedding(torch.tensor(ids), handle)
    with pytest.raises(ValueError, match="no path 'abacus'"):
        native.prepare(weight, path="abacus")


def altered(weight: PackedWeight) -> Iterator[PackedWeight]:
    """The weight with one thing that does not fit the rest."""
    for name in ("codes", "scale", "zero", "pattern", "column_scale"):
        tensor = getattr(weight, name)
        if tensor is not None:
            yield _replaced(weight, name, tensor[..., :-1].contiguous())
    for name, value in (("columns", weight.columns + 40), ("bits", 9), ("offset", 1000.0)):
        yield _replaced(weight, name, value)


def _replaced(weight: PackedWeight, name: str, value: object) -> PackedWeight:
    values = {field: getattr(weight, field) for field in weight.__dataclass_fields__}
    return PackedWeight(**{**values, name: value})  # type: ignore[arg-type]


@needs_native
@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(Int(4), NM(2, 4), 8, column_scales=True),
        LayerSpec(Int(4, symmetric=False), None, 8),
        LayerSpec(Int(8)),
    ],
    ids=str,
)
def test_the_library_compares_all_sizes(spec: LayerSpec) -> None:
    weight = packed(6, 40, spec)
    for wrong in altered(weight):
        if wrong.zero is not None and wrong.offset == 1000.0:
            continue  # zero points stand in for it
        with contextlib.suppress(ValueError):
            assert native.prepare(wrong) is None, "neither refused nor left to the reference"


@needs_native
def test_impossible_patterns_stay_within_memory() -> None:
    """The loader refuses them; should they come by, they read as some pattern."""
    weight = packed(6, 40, LayerSpec(Int(4), NM(2, 4)))
    assert weight.pattern is not None
    for layout in (weight.layout, kernels.PatternLayout(8, 16, 2, 1), kernels.PatternLayout(16, 32, 4, 1)):
        assert layout is not None
        groups = math.ceil(40 / layout.m)
        size = layout.word_bytes * math.ceil(groups / layout.digits)
        codes = torch.zeros(6, kernels.code_bytes(groups * layout.n, 4), dtype=torch.uint8)
        wrong = _replaced(weight, "pattern", torch.full((6, size), 255, dtype=torch.uint8))
        wrong = _replaced(_replaced(wrong, "layout", layout), "codes", codes)
        for path in PATHS:
            assert native.unpack(prepared(wrong, "int8", path)).shape == (6, 40)


def test_what_the_library_does_not_take_runs_through_the_reference() -> None:
    for spec, reason in (
        (LayerSpec(None, NM(2, 4)), "float16 values"),
        (LayerSpec(Int(8, symmetric=False)), "levels of more than a byte"),
        (LayerSpec(Int(8, grid="midrise")), "levels of more than a byte"),
    ):
        weight = packed(9, 20, spec)
        assert native.prepare(weight) is None
        assert kernels.obstacle(weight) == reason
        assert kernels.obstacle(reference.expand(weight)) == reason
        assert torch.equal(kernels.unpack(weight), reference.unpack(weight))
        assert torch.equal(kernels.expand(weight).levels, reference.expand(weight).levels)


@needs_native
def test_gradients_go_through_the_reference() -> None:
    weight = prepared(packed(9, 20, LayerSpec(Int(8))), "int8", PATHS[0])
    x = torch.randn(3, 20, requires_grad=True)
    kernels.linear(x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], kernels.unpack(weight.weight).sum(dim=0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(kernels.linear(x.detach(), weight), native.linear(x.detach(), weight))


# Whether it is there


def test_it_was_built_where_there_is_a_compiler() -> None:
    try:
        importlib.metadata.distribution("usmlite")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that was not installed")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        pytest.skip("no compiler")
    assert PATHS, "installed without the native library although there is a compiler: see pip install -v ."
    assert PATHS[-1] == "portable"


@needs_native
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(3, 8, LayerSpec(Int(8)))
    for path in PATHS:
        monkeypatch.setenv(native.VARIABLE, path)
        assert kernels.implementation() == f"native ({path})"
        found = native.prepare(weight)
        assert found is not None
        assert PATHS[found.path] == path
    monkeypatch.setenv(native.VARIABLE, "reference")
    assert kernels.implementation() == "reference"
    assert native.prepare(weight) is None
    monkeypatch.setenv(native.VARIABLE, "abacus")
    with pytest.raises(ValueError, match=r"'abacus'.*portable, reference"):
        kernels.implementation()
    monkeypatch.delenv(native.VARIABLE)
    assert kernels.implementation() == f"native ({PATHS[0]})"


def test_without_the_library_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.paths.cache_clear()
    native.warn_if_missing.cache_clear()
    try:
        assert kernels.implementation() == "reference"
        weight = packed(3, 8, LayerSpec(Int(8)))
        assert native.prepare(weight) is None
        with pytest.warns(RuntimeWarning, match="without its native library"):
            native.warn_if_missing()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            native.warn_if_missing()
    finally:
        native.paths.cache_clear()
        native.warn_if_missing.cache_clear()
