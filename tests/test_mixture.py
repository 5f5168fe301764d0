"""Learned allocation: mixtures are what they say, the budget is met, and wrong measurements are put right."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from small_whisper import small_teacher
from usmlite import mixture
from usmlite.allocate import Allocation, Candidate, WeightAllocation, choose
from usmlite.errors import TrainingError
from usmlite.mixture import learn_allocation
from usmlite.moments import Moments
from usmlite.spec import NM, Int, LayerSpec

RATES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)


def batch(step: int, *, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 250, (2, length), generator=generator)
    heard = torch.randn(2, 8, 3000, generator=generator)
    labels = torch.where(torch.arange(length) < length - 3, ids, -100)
    return {"heard": heard, "taught": heard, "decoder_input_ids": ids, "labels": labels}


def louder() -> nn.Module:
    """A model in which the decoder's layer matters, but for its first attention, of which nothing is left."""
    model, _ = small_teacher()
    with torch.no_grad():
        layer = model.model.decoder.layers[0]
        for name in ("fc1", "fc2"):
            getattr(layer, name).weight.mul_(20)
        layer.self_attn.out_proj.weight.zero_()
    return model


def measured_of(model: nn.Module, names: list[str], share: float, *, loss: float = 1e-3) -> Allocation:
    """What measuring would say if all weights mattered alike; the budget is a share of the range."""
    weights = []
    for name in names:
        module = model.get_submodule(name)
        kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
        rows, columns = module.weight.shape
        specs = [LayerSpec.at_rate(rate) for rate in RATES]
        found = [Candidate(s, s.bytes(rows, columns), 0.0, loss * 4.0 ** -(s.rate or 0)) for s in specs]
        weights.append(WeightAllocation(name, kind, (rows, columns), 1.0, tuple(found), 0))
    low, high = (sum(w.candidates[end].bytes for w in weights) for end in (0, -1))
    return choose(weights, int(low + share * (high - low)))


DECODER = "model.decoder.layers.0."
MATTERS, DOES_NOT = (DECODER + "fc2", DECODER + "fc1"), (DECODER + "self_attn.v_proj",)


def bytes_of(found: Allocation, names: tuple[str, ...]) -> int:
    return sum(weight.choice.bytes for weight in found.weights if weight.name in names)


def test_what_does_not_matter_loses_its_bytes_to_what_does(tmp_path: Path) -> None:
    model = louder()
    before = copy.deepcopy(model.state_dict())
    measured = measured_of(model, [*MATTERS, *DOES_NOT], 0.4)
    told: list[tuple[int, int]] = []
    found = learn_allocation(
        model, measured, batch, steps=25, seed=0, state_file=tmp_path / "state.json",
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(step, 25) for step in range(1, 26)]
    assert found.bytes <= found.budget == measured.budget
    assert bytes_of(found, DOES_NOT) < bytes_of(measured, DOES_NOT)
    assert bytes_of(found, MATTERS) > bytes_of(measured, MATTERS)
    for old, new in zip(measured.weights, found.weights, strict=True):
        assert old.candidates == new.candidates
        assert abs(old.chosen - new.chosen) <= 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_call_that_was_cut_off_goes_on_to_the_same_end(tmp_path: Path) -> None:
    model = louder()
    names = [*MATTERS, *DOES_NOT, "model.decoder.embed_tokens"]
    measured = measured_of(model, names, 0.5)
    settings = {"steps": 5, "seed": 3}
    whole = learn_allocation(model, measured, batch, **settings, state_file=tmp_path / "whole.json")  # type: ignore[arg-type]

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            learn_allocation(
                model, measured, batch, **settings, state_file=tmp_path / "cut.json", progress=kill
            )  # type: ignore[arg-type]
    resumed = learn_allocation(model, measured, batch, **settings, state_file=tmp_path / "cut.json")  # type: ignore[arg-type]
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "cut.json").read_bytes()
    assert resumed == whole


def test_a_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, state = louder(), tmp_path / "state.json"
    learn_allocation(model, measured_of(model, [*MATTERS], 0.5), batch, steps=1, seed=0, state_file=state)
    with pytest.raises(TrainingError, match=r"unreadable state of the allocation.*other weights"):
        learn_allocation(
            model, measured_of(model, [MATTERS[0]], 0.5), batch, steps=1, seed=0, state_file=state
        )
    state.write_text("{}")
    with pytest.raises(TrainingError, match="unreadable state"):
        learn_allocation(model, measured_of(model, [*MATTERS], 0.5), batch, steps=1, seed=0, state_file=state)


def test_a_loss_that_is_no_number_is_told(tmp_path: Path) -> None:
    model = louder()

    def silent(step: int) -> dict[str, Tensor]:
        found = batch(step)
        return {**found, "heard": found["heard"] * float("nan")}

    with pytest.raises(TrainingError, match=r"step 1 of the learned allocation.*not finite"):
        learn_allocation(
            model, measured_of(model, [*MATTERS], 0.5), silent, steps=2, seed=0, state_file=tmp_path / "s"
        )


SPECS = [
    LayerSpec.at_rate(2.0),
    LayerSpec(Int(2, grid="midrise"), NM(2, 4)),
    LayerSpec(Int(4, symmetric=False), group=8),
    LayerSpec(Int(3)),
]


@pytest.fixture
def mixed() -> tuple[mixture._MixedWeight, nn.Linear, Moments]:
    torch.manual_seed(2)
    module, inputs = nn.Linear(20, 30), torch.randn(100, 20) + 1.0
    centred = inputs - inputs.mean(0)
    moments = Moments(centred.T @ centred, torch.zeros(20), inputs.mean(0), 100)
    candidates = tuple(Candidate(spec, 10 + i, 0.0, 1.0 - i / 9) for i, spec in enumerate(SPECS))
    weight = WeightAllocation("layer", "linear", (30, 20), 1.0, candidates, 1)
    return mixture._MixedWeight(weight, module, moments, None, None), module, moments


def test_a_share_of_one_is_that_candidate_with_its_bias_corrected(mixed) -> None:
    weight, module, moments = mixed
    for number, quantizer in enumerate(weight.quantizers):
        parts = weight.mixed(torch.eye(4)[number])
        alone = quantizer.rounded(module.weight.detach(), slice(None))
        assert torch.equal(parts["layer.weight"], alone)
        dense = module.weight @ moments.mean + module.bias
        assert torch.allclose(parts["layer.weight"] @ moments.mean + parts["layer.bias"], dense, atol=1e-5)


def test_the_gradient_of_a_share_is_that_of_the_plain_sum(mixed) -> None:
    weight, module, _ = mixed
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    alone = torch.stack([each.rounded(module.weight.detach(), slice(None)) for each in weight.quantizers])
    plain = torch.einsum("k,kij->ij", shares, alone)
    (wanted,) = torch.autograd.grad(plain.sin().sum(), shares)
    parts = weight.mixed(shares)
    (found,) = torch.autograd.grad(parts["layer.weight"].sin().sum(), shares)
    assert torch.allclose(parts["layer.weight"], plain, atol=1e-6)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_logits_begin_where_measuring_ended() -> None:
    model = louder()
    measured = measured_of(model, [*MATTERS, *DOES_NOT], 0.4)
    near = [mixture._nearest(weight) for weight in measured.weights]
    start = mixture._Measured.of(near, measured.budget)
    state = mixture._State.at_start(start)
    assert mixture._picked(measured, near, state.losses(start)) == measured
    logits = state.logits(start)
    assert (logits.max(dim=1).values == 0).all()
    # At either end of its candidates a weight has fewer neighbours.
    edge = replace(measured.weights[0], chosen=0)
    short = mixture._Measured.of([mixture._nearest(edge), near[1]], measured.budget)
    found = mixture._State.at_start(short).logits(short)
    assert found.isfinite().sum(dim=1).tolist() == [3, len(near[1].candidates)]
    expected = float((logits.softmax(1) * start.sizes).sum())
    assert expected == pytest.approx(measured.budget, rel=0.2)
