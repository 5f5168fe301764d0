"""The solver agrees with the method written down plainly, and does nothing where nothing can be gained."""

from __future__ import annotations

import math
import os
from unittest import mock

import pytest
import torch
from torch import Tensor

from correlated import correlated, output_error
from usmlite import entropy
from usmlite import quantize as q
from usmlite.errors import SpecError
from usmlite.kernels import native, trellis
from usmlite.solve import Problem, _plan, _walk, drafts, relative_error, solve
from usmlite.sparsify import nm_mask
from usmlite.spec import NM, Int, LayerSpec


def naive(weight: Tensor, hessian: Tensor, order: list[int], quant: Int, scale: Tensor) -> Tensor:
    """GPTQ as the optimal brain surgeon writes it: one column at a time, the inverse shrunk each time."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    out = torch.zeros_like(weight)
    for column in order:
        rounded = q.fake_quantize(weight[:, [column]].float(), None, scale, None, quant, None).double()
        out[:, [column]] = rounded
        error = (weight[:, [column]] - rounded) / inverse[column, column]
        weight -= error * inverse[column]
        inverse = inverse - inverse[:, [column]] * inverse[column] / inverse[column, column]
    return out.float()


def test_blocks_agree_with_the_column_by_column_method() -> None:
    torch.manual_seed(3)
    weight, inputs = torch.randn(20, 300), correlated(900, 300)
    hessian = inputs.T @ inputs / len(inputs)
    quant = Int(4)
    plan, _, _ = _plan(hessian, LayerSpec(quant), 0.01, covering=False)
    walked = _walk(weight, plan)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(300)
    order = hessian.diagonal().argsort(descending=True).tolist()
    assert walked.scale is not None
    expected = naive(weight, damped, order, quant, walked.scale)
    # A weight halfway between two codes may fall either way, and its row then goes its own way.
    assert (walked.values == expected).all(dim=1).float().mean() > 0.7
    textbook = output_error(weight, expected, inputs)
    assert output_error(weight, walked.values, inputs) == pytest.approx(textbook, rel=0.02)
    solution = solve(weight, hessian, LayerSpec(quant), damping=0.01)
    assert output_error(weight, solution.values, inputs) < textbook


def test_uncorrelated_equal_inputs_leave_nothing_to_compensate() -> None:
    torch.manual_seed(4)
    weight, spec = torch.randn(16, 48), LayerSpec(Int(4), NM(2, 4))
    solution = solve(weight, torch.eye(48), spec)
    mask = nm_mask(weight.abs(), NM(2, 4))
    pruned = weight.masked_fill(~mask, 0.0)
    scale, _ = q.min_error(pruned, mask, Int(4), None)
    plain = q.fake_quantize(pruned, mask, scale, None, Int(4), None)
    assert solution.mask is not None
    assert torch.equal(solution.mask, mask)
    # Only the scales are fitted better than the search over fractions does.
    assert solution.scale is not None
    assert torch.allclose(solution.scale, scale, rtol=0.1)
    assert (solution.values - weight).square().sum() <= (plain - weight).square().sum()


def test_drafts_are_close_to_solutions() -> None:
    torch.manual_seed(5)
    weight, inputs = torch.randn(24, 160), correlated(600, 160)
    hessian = inputs.T @ inputs / len(inputs)
    quants = (Int(8), Int(4), Int(3), Int(2, grid="midrise"))
    specs = [
        LayerSpec(quant, nm, group) for quant in quants for nm in (None, NM(2, 4)) for group in (None, 32)
    ]
    specs.append(LayerSpec(None, NM(1, 4)))
    for spec, draft in zip(specs, drafts(weight, hessian, [(s, None, None) for s in specs]), strict=True):
        best = output_error(weight, solve(weight, hessian, spec).values, inputs)
        # A second walk moves masks too, as it has other scales.
        most = 1.25 if spec.sparsity is None else 1.5
        assert best <= output_error(weight, draft.values, inputs) * 1.001 <= most * best, str(spec)
        if spec.sparsity is not None:
            assert draft.mask is not None
            assert torch.equal(draft.mask, draft.values != 0) or spec.quant is not None
            groups = draft.mask.reshape(24, -1, spec.sparsity.m)
            assert (groups.sum(-1) == spec.sparsity.n).all()


@pytest.mark.parametrize("rate", [1.0, 1.75])
def test_rounding_inward_has_less_error_for_the_bits(rate: float) -> None:
    inputs = correlated(2000, 96)
    weight = torch.randn(256, 96, generator=torch.Generator().manual_seed(5))
    hessian, spec = inputs.T @ inputs / len(inputs), LayerSpec.at_rate(rate)
    steps = Problem(weight, hessian, 0.01)._column_steps
    assert spec.quant is not None

    def measured(inward: bool) -> tuple[float, float]:
        """Bits a weight, and the error of the output."""
        rows = torch.ones(256)
        scale, columns = q.rate_scales(weight, spec.quant, rate, rows, steps, inward=inward)
        found = solve(weight, hessian, spec, scale=scale, column_scale=columns, inward=inward)
        codes = q.quantize(found.values, scale, None, spec.quant, None)
        # What a student would round plainly is what was chosen here.
        assert torch.equal(codes, q.quantize(found.master, scale, None, spec.quant, None))
        share = torch.bincount(codes.flatten().long()) / codes.numel()
        bits = -float((share * share.clamp(min=1e-12).log2()).sum())
        return bits, output_error(weight, found.values * columns, inputs)

    bits, error = measured(inward=True)
    plain_bits, plain_error = measured(inward=False)
    # Each bit is worth a factor of four.
    assert error * 4**bits < 0.95 * plain_error * 4**plain_bits


def test_tables_are_not_rounded_inward() -> None:
    eye = torch.eye(4)
    assert Problem(torch.ones(3, 4), eye, 0.01).inward
    assert not Problem(torch.ones(3, 4), eye, 0.01, is_table=True).inward


def relative(rate: float, states: int | None, hessian: Tensor, weight: Tensor) -> tuple[float, float]:
    """Bits a weight, and the error, with codes one by one or along a trellis."""
    spec, problem = LayerSpec.at_rate(rate, states), Problem(weight, hessian, 0.01)
    assert spec.quant is not None
    scale, columns = problem.rate_scales(spec.quant, rate, None, along_trellis=states is not None)
    found = solve(weight, hessian, spec, scale=scale, column_scale=columns, inward=True)
    codes = q.quantize(found.values, scale, None, spec.quant, None)
    # What a student would round plainly is what was chosen here.
    assert torch.equal(codes, q.quantize(found.master, scale, None, spec.quant, None))
    contexts = entropy.Contexts.single(*codes.shape)
    bits = entropy.entropy_of(entropy.count_codes(codes.numpy(), 8, contexts, states))
    return bits, relative_error(weight, found.values * columns, hessian)


@pytest.mark.parametrize("rate", [1.25, 2.5])
def test_a_trellis_has_less_error_for_the_bits(rate: float) -> None:
    inputs = correlated(2000, 96)
    weight = torch.randn(768, 96, generator=torch.Generator().manual_seed(5))
    hessian = inputs.T @ inputs / len(inputs)
    bits, error = relative(rate, None, hessian, weight)
    other_bits, other_error = relative(rate, 8, hessian, weight)
    saved = (math.log2(error / other_error)) / 2 + bits - other_bits
    assert 0.06 < saved < 0.25


def test_a_trellis_is_the_same_with_and_without_the_native_library() -> None:
    inputs = correlated(500, 24)
    weight = torch.randn(70, 24, generator=torch.Generator().manual_seed(6))
    found = []
    for kernels in {"reference", *native.paths()[:1]}:
        with mock.patch.dict(os.environ, {native.VARIABLE: kernels}):
            found.append(relative(2.0, 4, inputs.T @ inputs, weight))
    assert all(each == found[0] for each in found)


def test_a_trellis_needs_scales() -> None:
    with pytest.raises(SpecError, match="a trellis without scales"):
        solve(torch.ones(3, 4), torch.eye(4), LayerSpec.at_rate(2.0, 8))


def test_rows_of_a_long_trellis_are_solved_in_parts() -> None:
    """More rows than a trellis is long: they begin anew, and the codes follow it in all parts."""
    weight = torch.randn(trellis.ROWS + 100, 4, generator=torch.Generator().manual_seed(7))
    bits, error = relative(2.5, 8, torch.eye(4) + 0.5, weight)
    assert 2.0 < bits < 3.0
    assert 0 < error < 0.1
