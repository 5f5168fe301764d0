"""A budget of bytes becomes a spec: which weight gets how many bits and which N:M.

Two things are measured on calibration speech. How much each weight matters: one weight after the other is
rounded coarsely, and the rise of the model's loss (the KL divergence of its words from the dense model's)
is compared with the error of that layer's output. And how large that error is for every candidate, with
second-order pruning and rounding, on a sample of the rows. Their product predicts what a candidate costs;
effects of different weights are taken to add up. One candidate for each weight is then chosen so that the
sum is least within the budget: a multiple-choice knapsack, solved by dynamic programming over bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from usmlite import entropy
from usmlite import quantize as q
from usmlite.errors import SpecError
from usmlite.models import IGNORED
from usmlite.moments import Moments, collect_moments
from usmlite.solve import DAMPING, Problem, Solution, corrected_bias, drafts, relative_error
from usmlite.spec import NM, Int, LayerSpec, Rule
from usmlite.student import from_matrix, to_matrix

Progress = Callable[[str, int, int], None]

_BITS = (8, 6, 5, 4, 3, 2, 1)
_PATTERNS = (NM(3, 4), NM(2, 4), NM(1, 4))
# Above this, pruning never beat the same bytes in fewer bits, in any weight that was tried.
_MOST_PRUNED_BITS = 4
# Rows of a weight on which a candidate's error is measured.
_SAMPLE_ROWS = 96
# Training moves weights and scales, and with them the frequencies of codes.
_CODED_MARGIN = 1.02
# Coarse enough for the loss to rise well above the noise of bf16, not so coarse that the model breaks.
_PROBE = Int(3)
# Batches on which the rise of the loss is measured: a few hundred words.
_LOSS_BATCHES = 2
# Steps of the budget that the solver tells apart; each candidate's bytes are rounded up to one.
_STEPS = 20_000
# Below this a probe's error says nothing.
_LEAST_ERROR = 1e-9
TABLES = ("embedding", "positions")


@dataclass(frozen=True)
class Candidate:
    """What one weight may become.

    Attributes:
        spec: its spec.
        bytes: what it takes in the packed file; with entropy coding, about.
        error: expected ||(W - What) X||^2 / ||W X||^2.
        loss: predicted rise of the loss, nats per token.
    """

    spec: LayerSpec
    bytes: int
    error: float
    loss: float


@dataclass(frozen=True)
class WeightAllocation:
    """One weight, what it may become, and what it becomes.

    Attributes:
        name: its module.
        kind: as the adapter names it.
        shape: the weight's shape.
        sensitivity: rise of the loss, nats per token, per unit of relative output error.
        candidates: from few bytes to many; none that another beats in both bytes and loss.
        chosen: index of the chosen candidate.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sensitivity: float
    candidates: tuple[Candidate, ...]
    chosen: int

    @property
    def choice(self) -> Candidate:
        """The chosen candidate."""
        return self.candidates[self.chosen]


@dataclass(frozen=True)
class Allocation:
    """The spec that fits a budget best.

    Attributes:
        weights: every allocated weight.
        budget: bytes for them.
    """

    weights: tuple[WeightAllocation, ...]
    budget: int

    @property
    def bytes(self) -> int:
        """What the allocated weights take."""
        return sum(weight.choice.bytes for weight in self.weights)

    @property
    def loss(self) -> float:
        """Predicted rise of the loss, nats per token, before any fine-tuning."""
        return sum(weight.choice.loss for weight in self.weights)

    def rules(self) -> tuple[Rule, ...]:
        """One rule for each weight."""
        return tuple(Rule(weight.name, weight.choice.spec) for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "budget": self.budget,
            "bytes": self.bytes,
            "loss": self.loss,
            "weights": [
                {
                    "name": weight.name,
                    "kind": weight.kind,
                    "shape": list(weight.shape),
                    "sensitivity": weight.sensitivity,
                    "chosen": weight.chosen,
                    "candidates": [
                        {**c.spec.to_dict(), "bytes": c.bytes, "error": c.error, "loss": c.loss}
                        for c in weight.candidates
                    ],
                }
                for weight in self.weights
            ],
        }


def default_candidates(kind: str) -> tuple[LayerSpec, ...]:
    """What weights of a kind may become: 1 to 8 bits, dense or with N:M; tables are never pruned."""
    if kind in TABLES:
        return tuple(LayerSpec(Int(bits, grid=_grid(bits)), column_scales=True) for bits in _BITS)
    dense = [LayerSpec(Int(bits, grid=_grid(bits))) for bits in _BITS]
    # Of pruned weights the kept ones need no level at zero, so that few bits are better midrise.
    sparse = [
        LayerSpec(Int(bits, grid=_grid(bits)), nm)
        for nm in _PATTERNS
        for bits in _BITS
        if bits <= _MOST_PRUNED_BITS
    ]
    return (*dense, *sparse)


def _grid(bits: int) -> Any:
    return "midrise" if bits <= 2 else "integer"


def allocate(
    model: nn.Module,
    kinds: Mapping[str, str],
    batches: Sequence[Mapping[str, Tensor]],
    budget: int,
    *,
    candidates: Callable[[str], Sequence[LayerSpec]] = default_candidates,
    coded: bool = True,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Measures every weight and chooses a spec for each.

    Args:
        model: the dense model, a Transformers class; its weights are exchanged one by one and put back.
        kinds: module name to kind, of the weights to choose for.
        batches: as for `calibrate`, with "labels" (the scored positions).
        budget: bytes for these weights together, in the packed file.
        candidates: what weights of a kind may become.
        coded: count codes as entropy coding will store them, not with a fixed width.
        autocast: the dtype the model runs in, None for its own.
        progress: called with "moments", "sensitivity" or "candidates", how many, of how many.

    Returns:
        The choice, with all that was measured.

    Raises:
        SpecError: the budget is below the smallest candidates; it names the least that can be reached.
        DataError: no batch.
        ModelError: the model's activations are not finite.
    """
    tell = progress or (lambda stage, done, total: None)
    moments, _ = collect_moments(
        model, list(kinds), batches, autocast=autocast,
        progress=lambda done, total: tell("moments", done, total or done),
    )  # fmt: skip
    sensitivities = _sensitivities(model, kinds, moments, batches[:_LOSS_BATCHES], autocast, tell)
    weights = []
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        found = _measured(module, moments[name], candidates(kind), sensitivities[name], coded)
        shape = tuple(cast(Tensor, module.weight).shape)
        weights.append(WeightAllocation(name, kind, shape, sensitivities[name], found, 0))
        tell("candidates", len(weights), len(kinds))
    return choose(weights, budget)


def choose(weights: Sequence[WeightAllocation], budget: int) -> Allocation:
    """The choice of one candidate for each weight with the least predicted loss within the budget.

    Exact but for the rounding of bytes up to a 20,000th of what the budget leaves above the smallest
    candidates.

    Raises:
        SpecError: the budget is below the smallest candidates.
    """
    least = sum(weight.candidates[0].bytes for weight in weights)
    if budget < least:
        raise SpecError(
            "the budget cannot be reached",
            where="target size",
            expected=f"at least {least:,} bytes for the {len(weights)} weights to choose for",
            found=f"{budget:,}",
            remedy="Allow more bytes, or candidates with fewer bits.",
        )
    unit = max(1.0, (budget - least) / _STEPS)
    room = int((budget - least) / unit)
    # best[b]: the least loss of the weights so far within b units above their smallest candidates.
    best = np.zeros(room + 1)
    picks = []
    for weight in weights:
        extra = [math.ceil((c.bytes - weight.candidates[0].bytes) / unit) for c in weight.candidates]
        totals = np.full((len(extra), room + 1), np.inf)
        for index, (cost, candidate) in enumerate(zip(extra, weight.candidates, strict=True)):
            if cost <= room:
                totals[index, cost:] = best[: room + 1 - cost] + candidate.loss
        pick = totals.argmin(axis=0)
        best = totals[pick, np.arange(room + 1)]
        picks.append((pick, extra))
    left, chosen = room, []
    for pick, extra in reversed(picks):
        chosen.append(int(pick[left]))
        left -= extra[chosen[-1]]
    done = [
        WeightAllocation(w.name, w.kind, w.shape, w.sensitivity, w.candidates, index)
        for w, index in zip(weights, reversed(chosen), strict=True)
    ]
    return Allocation(tuple(done), budget)


@torch.no_grad()
def _measured(
    module: nn.Module, moments: Moments, specs: Sequence[LayerSpec], sensitivity: float, coded: bool
) -> tuple[Candidate, ...]:
    """The candidates of one weight, from few bytes to many, without those that another one beats."""
    problems = {flag: _problem(module, moments, column_scales=flag) for flag in (False, True)}
    rows, columns = problems[False].matrix.shape
    sample = torch.linspace(0, rows - 1, min(rows, _SAMPLE_ROWS)).round().long()
    found = []
    for flag, problem in problems.items():
        mine = [spec for spec in specs if spec.column_scales == flag]
        matrix = problem.matrix[sample]
        solutions = drafts(matrix, problem.hessian, mine, damping=problem.damping)
        for spec, solution in zip(mine, solutions, strict=True):
            error = relative_error(matrix, solution.values, problem.cost)
            size = _coded_bytes(solution, spec, rows, columns) if coded else spec.bytes(rows, columns)
            found.append(Candidate(spec, size, error, sensitivity * error))
    found.sort(key=lambda candidate: (candidate.bytes, candidate.loss))
    kept: list[Candidate] = []
    for candidate in found:
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return tuple(kept)


def _coded_bytes(solution: Solution, spec: LayerSpec, rows: int, columns: int) -> int:
    """What a weight will take with entropy-coded codes, from the frequencies in a sample of its rows."""
    quant, whole = spec.quant, spec.bytes(rows, columns)
    if quant is None or solution.scale is None:
        return whole
    codes = q.quantize(solution.values, solution.scale, solution.zero, quant, spec.group)
    kept = codes.flatten() if solution.mask is None else codes[solution.mask]
    shares = torch.bincount(kept.long(), minlength=1 << quant.bits).double() / kept.numel()
    bits = float(-torch.special.xlogy(shares, shares).sum()) / math.log(2.0)
    count, fixed = rows * spec.stored_columns(columns), spec.sizes(rows, columns)["codes"]
    return whole - fixed + min(fixed, math.ceil(_CODED_MARGIN * entropy.coded_bytes(count, quant.bits, bits)))


def _problem(module: nn.Module, moments: Moments, *, column_scales: bool) -> Problem:
    return Problem.of(
        to_matrix(cast(Tensor, module.weight).detach()).float(),
        moments,
        biased=corrected_bias(module) is not None,
        column_scales=column_scales,
        damping=DAMPING,
    )


@torch.no_grad()
def _sensitivities(
    model: nn.Module,
    kinds: Mapping[str, str],
    moments: Mapping[str, Moments],
    batches: Sequence[Mapping[str, Tensor]],
    autocast: torch.dtype | None,
    tell: Progress,
) -> dict[str, float]:
    """Rise of the loss for each weight that is rounded coarsely, over its relative output error."""
    was_training = model.training
    model.eval()
    reference = [_log_probabilities(model, batch, autocast) for batch in batches]
    out = {}
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        problem = _problem(module, moments[name], column_scales=kind in TABLES)
        scale, zero = q.min_error(problem.matrix, None, _PROBE, None)
        rounded = q.fake_quantize(problem.matrix, None, scale, zero, _PROBE, None)
        error = relative_error(problem.matrix, rounded, problem.cost)
        dense = rounded if problem.column_scale is None else rounded * problem.column_scale
        with _exchanged(module, dense, moments[name]):
            losses = [_divergence(model, *pair, autocast) for pair in zip(batches, reference, strict=True)]
        out[name] = sum(losses) / len(losses) / max(error, _LEAST_ERROR)
        tell("sensitivity", len(out), len(kinds))
    model.train(was_training)
    return out


def _log_probabilities(model: nn.Module, batch: Mapping[str, Tensor], autocast: torch.dtype | None) -> Tensor:
    """Of the words at the scored positions, float32 `[positions, vocabulary]`."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    scored = inputs.pop("labels") != IGNORED
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        logits = cast(Tensor, model(**inputs, use_cache=False).logits)[scored]
    return logits.float().log_softmax(dim=-1)


def _divergence(
    model: nn.Module, batch: Mapping[str, Tensor], reference: Tensor, autocast: torch.dtype | None
) -> float:
    """The mean KL divergence from the dense model's words, nats per token."""
    found = _log_probabilities(model, batch, autocast)
    return float((reference.exp() * (reference - found)).sum(dim=-1).mean())


@contextmanager
def _exchanged(module: nn.Module, matrix: Tensor, moments: Moments) -> Iterator[None]:
    """The module with another weight, its bias corrected for it; afterwards as it was."""
    weight, bias = cast(Tensor, module.weight), corrected_bias(module)
    kept = weight.detach().clone(), None if bias is None else bias.detach().clone()
    try:
        if bias is not None:
            bias += (to_matrix(weight).float() - matrix) @ moments.mean.to(weight.device)
        weight.copy_(from_matrix(matrix, weight.shape))
        yield
    finally:
        weight.copy_(kept[0])
        if bias is not None and kept[1] is not None:
            bias.copy_(kept[1])
