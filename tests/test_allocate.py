"""Allocation: the choice is the best within the budget, and the model is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch

from correlated import correlated
from small_whisper import small_teacher
from usmlite import entropy, kernels
from usmlite import quantize as q
from usmlite.allocate import (
    Allocation,
    Candidate,
    WeightAllocation,
    _coded_bytes,
    _Loss,
    _measured,
    allocate,
    choose,
    read_weights,
)
from usmlite.atomic import write_json
from usmlite.errors import SpecError
from usmlite.moments import Moments
from usmlite.packfile import PackedLayer
from usmlite.solve import DAMPING, Problem, relative_error, solve
from usmlite.spec import NM, Int, LayerSpec


def weight(name: str, *pairs: tuple[int, float]) -> WeightAllocation:
    found = tuple(Candidate(LayerSpec(Int(8 - i)), size, loss, loss) for i, (size, loss) in enumerate(pairs))
    return WeightAllocation(name, "linear", (1, 1), 1.0, found, 0)


def brute_force(weights: list[WeightAllocation], budget: int) -> float:
    return min(
        sum(c.loss for c in chosen)
        for chosen in itertools.product(*(w.candidates for w in weights))
        if sum(c.bytes for c in chosen) <= budget
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_within_the_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for number in range(5):
        sizes = torch.randint(10, 900, (4,), generator=generator).sort().values.tolist()
        losses = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
        weights.append(weight(str(number), *zip(sizes, losses, strict=True)))
    least = sum(w.candidates[0].bytes for w in weights)
    most = sum(w.candidates[-1].bytes for w in weights)
    for budget in (least, (least + most) // 2, most, 10 * most):
        found = choose(weights, budget)
        assert found.bytes <= budget
        assert found.loss == pytest.approx(brute_force(weights, budget))


def test_a_budget_beyond_reach_names_the_least() -> None:
    with pytest.raises(SpecError, match=r"at least 12 bytes for the 2 weights.*found 11"):
        choose([weight("a", (5, 1.0), (9, 0.1)), weight("b", (7, 2.0))], 11)


def batch_of_two() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 250, (2, 12), generator=generator)
    return {
        "input_features": torch.randn(2, 8, 3000, generator=generator),
        "decoder_input_ids": ids,
        "labels": torch.where(torch.arange(12) < 9, ids, -100),
    }


@pytest.mark.parametrize("name", ["model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.q_proj"])
def test_the_loss_rises_by_the_divergence_of_the_whole_model(name: str) -> None:
    model, _ = small_teacher()
    batch = batch_of_two()
    module = model.get_submodule(name)
    changed = module.weight.detach() + 3.0 * torch.randn(module.weight.shape)
    moments = Moments(torch.zeros(0), torch.zeros(module.in_features), None, 1)
    found = _Loss(model, [batch], None).rise(module, changed, moments)

    def words(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits[batch["labels"] != -100].log_softmax(-1)

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(name).weight.copy_(changed)
    one, two = words(model), words(other)
    expected = (one.exp() * (one - two)).sum(-1).mean().item()
    assert expected > 1e-6
    assert found == pytest.approx(expected, rel=0.05)


@pytest.fixture(scope="module")
def measured() -> tuple[Allocation, torch.nn.Module, dict[str, torch.Tensor]]:
    model, adapter = small_teacher()
    before = copy.deepcopy(model.state_dict())
    batch = batch_of_two()
    kinds = {name.removesuffix(".weight"): kind for name, kind in adapter.compressible(model).items()}
    told: list[str] = []
    found = allocate(model, kinds, [batch], 60_000, progress=lambda stage, done, total: told.append(stage))
    assert list(dict.fromkeys(told)) == ["moments", "gradients", "sensitivity", "candidates"]
    assert {w.name: w.kind for w in found.weights} == kinds
    return found, model, before


def test_every_weight_gets_a_spec_and_the_budget_is_kept(measured) -> None:
    found, _, _ = measured
    assert found.bytes <= 60_000
    assert [rule.match for rule in found.rules()] == [w.name for w in found.weights]
    for each in found.weights:
        sizes = [c.bytes for c in each.candidates]
        losses = [c.loss for c in each.candidates]
        assert sizes == sorted(sizes)
        assert losses == sorted(losses, reverse=True)
        if each.kind == "embedding":
            assert all(c.spec.sparsity is None and c.spec.column_scales for c in each.candidates)
    assert any(w.sensitivity > 0 for w in found.weights)
    assert len({str(w.choice.spec) for w in found.weights}) > 1
    assert found.to_dict()["bytes"] == found.bytes


def test_coded_bytes_are_close_to_those_that_coding_takes() -> None:
    torch.manual_seed(6)
    weight, hessian = torch.randn(512, 256), torch.eye(256)
    for spec in (LayerSpec(Int(4)), LayerSpec(Int(3), column_scales=True), LayerSpec(Int(4), NM(2, 4))):
        solution = solve(weight, hessian, spec)
        assert solution.scale is not None
        codes = q.quantize(solution.values, solution.scale, solution.zero, spec.quant, spec.group)
        kept = codes if solution.mask is None else codes[solution.mask].reshape(512, -1)
        contexts = entropy.best_contexts(kept.numpy(), spec.quant.bits)
        coded = len(entropy.encode(kept.numpy(), spec.quant.bits, contexts))
        expected = spec.bytes(512, 256) - spec.sizes(512, 256)["codes"] + coded
        assert _coded_bytes(kept, spec, 512, 256) == pytest.approx(expected, rel=0.01)


def test_the_bytes_of_a_rate_are_those_of_its_file() -> None:
    torch.manual_seed(8)
    layer = torch.nn.Linear(384, 384)
    inputs = correlated(2000, 384)
    moments = Moments(inputs.T @ inputs, inputs.sum(0), torch.zeros(384), 2000)
    rows = torch.rand(384) * 4
    for rate in (1.5, 3.0):
        spec = LayerSpec.at_rate(rate)
        problem = Problem.of(layer.weight.detach(), moments, biased=True, damping=DAMPING, rows=rows)
        (found,) = _measured(problem, problem.cost, [spec], 1.0, True)
        scale, columns = problem.rate_scales(Int(8, scale_bits=8), rate, None)
        solution = solve(
            problem.matrix, problem.hessian, spec, scale=scale, column_scale=columns, inward=problem.inward
        )
        codes = q.quantize(solution.values, scale, None, Int(8), None)
        parts = {
            "codes": codes,
            "scale": kernels.scale_codes(scale),
            "column_scale": kernels.scale_codes(columns),
        }
        stored, _ = PackedLayer((384, 384), dataclasses.replace(spec, rate=None)).encoded(parts, codes)
        assert found.bytes == pytest.approx(stored.coded, rel=0.03)
        values = solution.values * columns
        error = relative_error(problem.matrix, values, problem.cost, problem.rows)
        assert found.error == pytest.approx(error, rel=0.1)


def test_steps_that_cost_alike_err_less_at_the_same_rate() -> None:
    """Against one step for all, where inputs are correlated and outputs count differently."""
    torch.manual_seed(9)
    weight, inputs = torch.randn(256, 256), correlated(4000, 256) * torch.linspace(0.2, 3, 256)
    moments = Moments(inputs.T @ inputs, inputs.sum(0), torch.zeros(256), 4000)
    rows = torch.exp2(4 * torch.rand(256))
    problem = Problem.of(weight, moments, biased=True, damping=DAMPING, rows=rows)
    plain = q.rate_scales(weight, Int(8), 2.5, torch.ones(256), torch.ones(256))
    spec, errors, bits = LayerSpec.at_rate(2.5), [], []
    for scale, columns in (plain, problem.rate_scales(Int(8), 2.5, None)):
        found = solve(weight, problem.hessian, spec, scale=scale, column_scale=columns)
        errors.append(relative_error(weight, found.values * columns, problem.hessian, problem.rows))
        codes = q.quantize(found.values, scale, None, Int(8), None).numpy()
        counts = entropy.count_codes(codes, 8, entropy.Contexts.of(codes))
        bits.append(entropy.entropy_of(counts))
    assert bits[1] < bits[0] + 0.05
    assert errors[1] < 0.75 * errors[0]


def test_at_equal_bytes_a_rate_errs_less_than_bits() -> None:
    torch.manual_seed(7)
    layer, values = torch.nn.Linear(384, 384), torch.randn(384, 384)
    with torch.no_grad():
        layer.weight.copy_(values * values.abs())  # large weights are rare, but there are some, as in models
    inputs = correlated(2000, 384)
    moments = Moments(inputs.T @ inputs, inputs.sum(0), torch.zeros(384), 2000)
    bits, rates = (Int(2, grid="midrise"), Int(4)), (1.25, 2.25)
    specs = [*map(LayerSpec, bits), *map(LayerSpec.at_rate, rates)]
    problem = Problem.of(layer.weight.detach(), moments, biased=True, damping=DAMPING)
    two, four, low, high = _measured(problem, problem.cost, specs, 1.0, True)
    assert low.bytes < two.bytes
    assert low.error < 0.7 * two.error
    assert high.bytes < four.bytes
    assert high.error < four.error


def test_the_model_is_left_as_it_was(measured) -> None:
    _, model, before = measured
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_rounding_is_judged_on_inputs_that_it_was_not_fitted_to() -> None:
    model, _ = small_teacher()
    kinds = {"model.decoder.layers.0.fc2": "linear"}
    one = batch_of_two()
    other = {**one, "decoder_input_ids": one["decoder_input_ids"].flip(1)}

    def error(batches: list[dict[str, torch.Tensor]]) -> float:
        found = allocate(model, kinds, batches, 10**6, candidates=lambda kind: [LayerSpec.at_rate(2.0)])
        return found.weights[0].choice.error

    known, unknown = error([one] * 4), error([one] * 3 + [other])
    assert unknown > 1.5 * known
    assert error([one] * 3) == pytest.approx(known, rel=1e-3)  # too few to hold any back


def test_more_bytes_predict_less_loss(measured) -> None:
    found, _, _ = measured
    losses = [choose(found.weights, budget).loss for budget in (40_000, 60_000, 90_000)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[2]


def test_a_choice_can_be_made_again_from_its_file(measured, tmp_path) -> None:
    found, _, _ = measured
    path = tmp_path / "allocation.json"
    write_json(path, found.to_dict())
    kinds = {each.name: each.kind for each in found.weights}
    assert read_weights(path, kinds) == list(found.weights)
    assert choose(read_weights(path, kinds), 90_000).loss <= found.loss
    with pytest.raises(SpecError, match="another model"):
        read_weights(path, {**kinds, "model.decoder.layers.9.fc1": "linear"})
    path.write_text("{}")
    with pytest.raises(SpecError, match="unreadable"):
        read_weights(path, kinds)
