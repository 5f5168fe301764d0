import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite import quantize as q
from usmlite.spec import Int


def weights(rows: int = 5, columns: int = 37, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@st.composite
def quants(draw: st.DrawFn) -> Int:
    bits = draw(st.integers(1, 8))
    symmetric = draw(st.booleans())
    grids = ["integer", "midrise", "ternary"] if bits == 2 else ["integer", "midrise"]
    grid = draw(st.sampled_from(grids)) if symmetric else "integer"
    return Int(bits, symmetric=symmetric, grid=grid)


@given(quants(), st.sampled_from([None, 1, 5, 16, 37, 100]), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_min_max_rounds_within_half_a_step_and_zero_stays_near_zero(quant: Int, group: int | None, seed: int):
    w = weights(seed=seed)
    scale, zero = q.min_max(w, quant, group)
    out = q.fake_quantize(w, None, scale, zero, quant, group)
    step = q.spread(scale, w.shape[1], group)
    # float16 rounding of the scale may cut the largest weights by a thousandth of their size.
    assert ((out - w).abs() <= step / 2 + w.abs() * 2e-3 + (step if not quant.symmetric else 0)).all()
    if quant.grid == "integer" and quant.bits > 1:
        zeros = q.fake_quantize(torch.zeros_like(w), None, scale, zero, quant, group)
        assert (zeros == 0).all()


def test_two_bit_integer_min_max_never_uses_its_lowest_code():
    # The design's remark: with scale = max |w|, two bits are ternary.
    w = weights(8, 400)
    quant = Int(2)
    scale, zero = q.min_max(w, quant, None)
    codes = q.quantize(w, scale, zero, quant, None)
    assert codes.min() == 1
    assert q.dequantize(codes, scale, zero, quant, None).unique(dim=None).numel() <= 3 * 8


def test_two_bit_midrise_has_four_levels_around_zero():
    scale = torch.ones(1, 1)
    values = torch.tensor([[-9.0, -0.6, 0.4, 2.0]])
    quant = Int(2, grid="midrise")
    assert q.fake_quantize(values, None, scale, None, quant, None).tolist() == [[-1.5, -0.5, 0.5, 1.5]]


@pytest.mark.parametrize(
    "quant",
    [Int(2), Int(3), Int(4), Int(2, grid="midrise"), Int(2, grid="ternary"), Int(4, symmetric=False)],
)
@pytest.mark.parametrize("group", [None, 16])
def test_min_error_is_never_worse_than_min_max(quant: Int, group: int | None):
    w = weights(16, 96)
    mask = weights(16, 96, seed=1) > 0
    pruned = torch.where(mask, w, torch.zeros_like(w))

    def error(scales: tuple[torch.Tensor, torch.Tensor | None]) -> float:
        return float((q.fake_quantize(pruned, mask, *scales, quant, group) - pruned).square().sum())

    assert error(q.min_error(pruned, mask, quant, group)) <= error(q.min_max(pruned, quant, group))
    if quant.bits < 4 and quant.symmetric:
        assert error(q.min_error(pruned, mask, quant, group)) < 0.9 * error(q.min_max(pruned, quant, group))


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("important", [False, True])
def test_one_bit_is_sign_times_mean_magnitude(group: int | None, important: bool):
    w, mask = weights(6, 64), weights(6, 64, seed=1) > 0
    w[0, 0] = 40.0  # far above the others
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    pruned = torch.where(mask, w, torch.zeros_like(w))
    scale, _ = q.min_error(pruned, mask, Int(1), group, importance=importance if important else None)
    share = mask * (importance if important else torch.ones(64))
    sums, counts = ((x * share).reshape(6, -1, group or 64).sum(-1) for x in (w.abs(), torch.ones(64)))
    levels = q.fake_quantize(pruned, mask, scale, None, Int(1), group)
    expected = torch.where(mask, w.sign(), torch.zeros_like(w)) * q.spread(sums / counts, 64, group)
    assert torch.allclose(levels, expected, rtol=1e-3)


@pytest.mark.parametrize("grid", ["ternary", "midrise"])
def test_two_bits_find_the_best_scale(grid: str):
    w = weights(8, 300)
    w[:, 0] = 10.0  # the largest weight says nothing about the others
    quant = Int(2, grid=grid)  # type: ignore[arg-type]

    def errors(scale: torch.Tensor) -> torch.Tensor:
        return (q.fake_quantize(w, None, scale, None, quant, None) - w).square().sum(-1)

    found = errors(q.min_error(w, None, quant, None)[0])
    every = torch.linspace(0.01, 40.0, 4000).half().float()
    best = torch.stack([errors(value.expand(8, 1)) for value in every]).amin(dim=0)
    assert (found <= 1.01 * best).all()


def test_ternary_has_three_levels():
    values = torch.tensor([[-9.0, -0.6, 0.4, 0.6, 2.0]])
    quant = Int(2, grid="ternary")
    assert q.quantize(values, torch.ones(1, 1), None, quant, None).tolist() == [[0, 0, 1, 2, 2]]
    assert q.fake_quantize(values, None, torch.ones(1, 1), None, quant, None).tolist() == [[-1, -1, 0, 1, 1]]


def test_min_error_follows_importance():
    w = torch.tensor([[1.0, 0.39, 0.4, 0.41]])
    important = torch.tensor([1e-6, 1.0, 1.0, 1.0])
    scale, _ = q.min_error(w, None, Int(2), None, importance=important)
    plain, _ = q.min_error(w, None, Int(2), None)
    assert scale < plain


def test_round_scale_stays_in_float16s_normal_range():
    scale = q.round_scale(torch.tensor([0.0, 1e-30, 1e30, 0.1]))
    assert scale.tolist()[:3] == [2.0**-14, 2.0**-14, 65504.0]
    assert torch.equal(scale, scale.half().float())


def test_pruned_weights_are_positive_zero():
    w = -torch.rand(3, 8)
    scale, zero = q.min_max(w, Int(4), None)
    out = q.fake_quantize(w, torch.zeros(3, 8, dtype=torch.bool), scale, zero, Int(4), None)
    assert (out.view(torch.int32) == 0).all()


@pytest.mark.parametrize("quant", [Int(1), Int(2), Int(4), Int(4, symmetric=False)])
@pytest.mark.parametrize("group", [None, 8])
def test_autograd_function_computes_fake_quantize(quant: Int, group: int | None):
    w = weights(700, 300)  # more than one block of rows
    mask = weights(700, 300, seed=3) > 0
    scale, zero = q.min_max(torch.where(mask, w, torch.zeros_like(w)), quant, group)
    out = q.FakeQuantize.apply(w, None, scale, mask, zero, quant, group, torch.float32)
    assert torch.equal(out, q.fake_quantize(w, mask, scale, zero, quant, group))


def test_gradient_passes_straight_through_except_where_clipped():
    w = torch.tensor([[0.1, 5.0, -5.0, 0.2]], requires_grad=True)
    mask = torch.tensor([[True, True, False, True]])
    log_scale = torch.tensor([[math.log(0.25)]], requires_grad=True)
    out = q.FakeQuantize.apply(w, log_scale, None, mask, None, Int(4), None, torch.float32)
    out.backward(torch.ones_like(out))
    # Clipped at 5.0; the pruned -5.0 still learns, or masks could never move.
    assert w.grad is not None
    assert w.grad.tolist() == [[1.0, 0.0, 1.0, 1.0]]


def test_scale_gradient_is_lsqs():
    w = torch.tensor([[0.3, -0.9, 9.0]])
    scale = 0.25
    log_scale = torch.tensor([[math.log(scale)]], requires_grad=True)
    out = q.FakeQuantize.apply(w, log_scale, None, None, None, Int(4), None, torch.float32)
    upstream = torch.tensor([[1.0, 2.0, 3.0]])
    out.backward(upstream)
    slope = [round(0.3 / scale) - 0.3 / scale, round(-0.9 / scale) + 0.9 / scale, 7.0]
    expected = sum(g * s for g, s in zip([1.0, 2.0, 3.0], slope, strict=True)) * scale / math.sqrt(3 * 15)
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "quant", [Int(1), Int(2, grid="ternary"), Int(2, grid="midrise"), Int(3), Int(2, symmetric=False)]
)
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_finer_scales_are_nearly_as_good_as_searched_ones(quant: Int, shift: float):
    w = torch.randn(20, 400, generator=torch.Generator().manual_seed(1)) + (0 if quant.symmetric else shift)

    def error(scale: torch.Tensor, zero: torch.Tensor | None, codes: Int) -> float:
        return (q.fake_quantize(w, None, scale, zero, codes, None) - w).square().mean().item()

    scale, zero = q.min_error(w, None, quant, None)
    for bits in (4, 5, 6, 8):
        finer = quant.with_bits(bits)
        assert finer.bits == bits
        assert finer.symmetric == quant.symmetric
        derived = q.finer_scales(scale, zero, quant, finer)
        assert torch.equal(derived[0], q.round_scale(derived[0]))
        best = error(*q.min_error(w, None, finer, None), finer)
        assert error(*derived, finer) < (1.2 if quant.symmetric and bits < 6 else 4.0) * best
        assert error(*derived, finer) < 0.4 * error(scale, zero, quant)


def test_a_higher_rate_halves_the_step_until_the_largest_weight_is_reached():
    w = torch.randn(10, 300, generator=torch.Generator().manual_seed(1))
    octaves = torch.arange(10) / 5
    quant, (scale, _) = Int(8), q.rate_scales(w, Int(8), 2.0, torch.exp2(octaves), torch.ones(w.shape[1]))
    assert torch.allclose(q.finer_rate_scales(scale, w, quant, 1.0), scale / 2, rtol=1e-3)
    finest = q.finer_rate_scales(scale, w, quant, 20.0)
    assert torch.allclose(finest, w.abs().amax(dim=1, keepdim=True) / 127, rtol=1e-3)
    wide = 100 * w  # a weight that is clipped already is clipped no more
    assert torch.equal(q.finer_rate_scales(scale, wide, quant, 3.0), scale)


@pytest.mark.parametrize(("rate", "gain"), [(1.25, 0.8), (1.75, 0.9), (2.5, 0.97)])
def test_weights_drawn_in_have_less_error_for_the_bits(rate, gain):
    """Against plain rounding with the step that spends as many bits: Gish and Pierce against ECSQ."""
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))

    def codes_at(step, drawn):
        steps = w / step
        return (q.drawn_in(steps, q.row_squares(steps)) if drawn else steps).round()

    def bits(codes):
        share = torch.unique(codes, return_counts=True)[1] / codes.numel()
        return -float((share * share.log2()).sum())

    def error_at_rate(drawn):
        low, high = 0.1, 8.0
        for _ in range(30):
            step = (low + high) / 2
            low, high = (step, high) if bits(codes_at(step, drawn)) > rate else (low, step)
        return float((codes_at(high, drawn) * high - w).square().mean())

    assert error_at_rate(drawn=True) < gain * error_at_rate(drawn=False)


def test_how_far_weights_are_drawn_in_goes_by_their_row_and_column():
    sizes = torch.tensor([[0.01, 1.0, 100.0]]) * torch.tensor([[1.0], [10.0]])
    w = torch.randn(2, 3, 4000, generator=torch.Generator().manual_seed(1)) * sizes.sqrt().unsqueeze(2)
    matrix = w.permute(0, 2, 1).reshape(8000, 3)
    kept = (q.drawn_in(matrix, q.row_squares(matrix)) / matrix).reshape(2, 4000, 3).mean(dim=1)
    assert torch.all(kept[:, 1:] > kept[:, :-1])
    assert torch.all(kept[1] > kept[0])
    assert torch.all((kept > 0) & (kept < 1))
    assert float(kept[1, 2]) > 0.99
    few = q.drawn_in(matrix, q.row_squares(matrix), 0.5) / matrix
    assert torch.all(few >= (q.drawn_in(matrix, q.row_squares(matrix)) / matrix))


def test_zeros_can_be_drawn_in():
    steps = torch.zeros(3, 4)
    steps[0, 0] = 2.0
    drawn = q.drawn_in(steps, q.row_squares(steps))
    assert torch.equal(drawn[1:], torch.zeros(2, 4))
    assert torch.equal(drawn[0, 1:], torch.zeros(3))
    assert 0 < float(drawn[0, 0]) < 2
