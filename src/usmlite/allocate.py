"""A budget of bytes becomes a spec: which weight gets how many bits and which N:M.

Two things are measured on calibration speech. How much each weight matters: one weight after the other is
rounded coarsely, and the rise of the model's loss (the KL divergence of its words from the dense model's)
is compared with the error of that layer's output. And how large that error is for every candidate, with
second-order pruning and rounding, on a sample of the rows. Their product predicts what a candidate costs;
effects of different weights are taken to add up. One candidate for each weight is then chosen so that the
sum is least within the budget: a multiple-choice knapsack, solved by dynamic programming over bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from usmlite import entropy
from usmlite import quantize as q
from usmlite.errors import SpecError
from usmlite.fisher import FISHER_BATCHES, output_fisher
from usmlite.kernels import trellis
from usmlite.moments import Moments, collect_moments
from usmlite.network import SEQUENCE_TO_SEQUENCE, Batch, Network
from usmlite.solve import DAMPING, Problem, corrected_bias, drafts, relative_error
from usmlite.spec import NM, TABLES, Int, LayerSpec, Rule
from usmlite.student import from_matrix, to_matrix

Progress = Callable[[str, int, int], None]

_BITS = (8, 6, 5, 4, 3, 2, 1)
_PATTERNS = (NM(3, 4), NM(2, 4), NM(1, 4))
# Bits a weight after entropy coding.
_RATES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 6.0)
# States of a trellis: more of them take longer to search and nothing else. Rates below have next to nothing
# but zeros, and those above would have columns clipped.
_STATES, _LEAST_TRELLIS, _MOST_TRELLIS = 32, 0.75, 4.5
# Finer: a quarter of a bit of a token embedding is more than whole layers.
_TABLE_RATES = (0.75, *(1 + step / 8 for step in range(21)), 4.0, 5.0)
# Above this, pruning never beat the same bytes in fewer bits, in any weight that was tried.
_MOST_PRUNED_BITS = 4
# Rows of a weight on which a candidate's error is measured.
_SAMPLE_ROWS = 96
# Coarse enough for the loss to rise well above the noise of bf16, not so coarse that the model breaks.
_PROBE = Int(3)
# Batches on which the rise of the loss is measured: a few hundred words.
_LOSS_BATCHES = 2
# One of so many batches judges the roundings that the others were for.
_HELD_PART = 4
# Steps of the budget that the solver tells apart; each candidate's bytes are rounded up to one.
_STEPS = 20_000
# Below this a probe's error says nothing.
_LEAST_ERROR = 1e-9


@dataclass(frozen=True)
class Candidate:
    """What one weight may become.

    Attributes:
        spec: its spec.
        bytes: what it takes in the packed file; with entropy coding, about, until it has been counted.
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
        counted: whether the bytes were counted in the packed file, or only predicted.
    """

    weights: tuple[WeightAllocation, ...]
    budget: int
    counted: bool = False

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
            "counted": self.counted,
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


def read_allocation(path: str | Path) -> Allocation:
    """An earlier allocation, from its JSON file.

    Args:
        path: written from `Allocation.to_dict`.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        weights = tuple(
            WeightAllocation(
                row["name"],
                row["kind"],
                tuple(row["shape"]),
                row["sensitivity"],
                tuple(_read_candidate(candidate) for candidate in row["candidates"]),
                row["chosen"],
            )
            for row in values["weights"]
        )
        return Allocation(weights, values["budget"], bool(values.get("counted", False)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SpecError("unreadable measurements", where=path, found=str(error)) from None


def read_weights(path: str | Path, kinds: Mapping[str, str]) -> list[WeightAllocation]:
    """What an earlier allocation measured of these weights, from its JSON file.

    Args:
        path: see `read_allocation`.
        kinds: as for `allocate`.

    Raises:
        SpecError: it cannot be read, or is of other weights.
    """
    found = {weight.name: weight for weight in read_allocation(path).weights}
    missing = [name for name, kind in kinds.items() if name not in found or found[name].kind != kind]
    if missing:
        raise SpecError(
            "these measurements are of another model, or of other weights",
            where=path,
            expected=missing[0],
            remedy="Leave spec.measured out to measure this one.",
        )
    return [found[name] for name in kinds]


def _read_candidate(values: Mapping[str, Any]) -> Candidate:
    rest = dict(values)
    size, error, loss = rest.pop("bytes"), rest.pop("error"), rest.pop("loss")
    return Candidate(LayerSpec.from_dict(rest), int(size), float(error), float(loss))


def integer_candidates(kind: str) -> tuple[LayerSpec, ...]:
    """1 to 8 bits, dense or with N:M; tables are never pruned."""
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


def rate_candidates(kind: str) -> tuple[LayerSpec, ...]:
    """0.5 to 6 bits a weight after entropy coding."""
    return tuple(LayerSpec.at_rate(rate) for rate in (_TABLE_RATES if kind in TABLES else _RATES))


def trellis_candidates(kind: str) -> tuple[LayerSpec, ...]:
    """The same, of tables of rows along a trellis: other weights gain too little (docs/decisions/0030).

    Not at rates at which each code by itself does as well.
    """
    if kind not in TABLES:
        return rate_candidates(kind)
    return tuple(
        LayerSpec.at_rate(spec.rate, _STATES) if spec.rate and _LEAST_TRELLIS <= spec.rate <= _MOST_TRELLIS
        else spec
        for spec in rate_candidates(kind)
    )  # fmt: skip


def default_candidates(kind: str) -> tuple[LayerSpec, ...]:
    """What weights of a kind may become where their codes are entropy-coded."""
    return (*integer_candidates(kind), *rate_candidates(kind))


CANDIDATES = {
    "all": default_candidates,
    "integer": integer_candidates,
    "rate": rate_candidates,
    "trellis": trellis_candidates,
}


def _grid(bits: int) -> Any:
    return "midrise" if bits <= 2 else "integer"


def allocate(
    model: nn.Module,
    kinds: Mapping[str, str],
    batches: Sequence[Batch],
    budget: int,
    *,
    network: Network = SEQUENCE_TO_SEQUENCE,
    candidates: Callable[[str], Sequence[LayerSpec]] = default_candidates,
    coded: bool = True,
    octaves: Mapping[str, Tensor] | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Measures every weight and chooses a spec for each.

    Args:
        model: the dense model, a Transformers class; its weights are exchanged one by one and put back.
        kinds: module name to kind, of the weights to choose for.
        batches: as for `calibrate`, with scored places.
        budget: bytes for these weights together, in the packed file.
        network: how the model is run.
        candidates: what weights of a kind may become.
        coded: count codes as entropy coding will store them, not with a fixed width.
        octaves: as for `make_student`.
        autocast: the dtype the model runs in, None for its own.
        progress: called with "moments", "gradients", "sensitivity" or "candidates", how many, of how many.

    Returns:
        The choice, with all that was measured.

    Raises:
        SpecError: the budget is below the smallest candidates; it names the least that can be reached.
        DataError: no batch.
        ModelError: the model's activations are not finite.
    """
    tell = progress or (lambda stage, done, total: None)
    # Errors on the very inputs that a rounding was fitted to flatter it, up to tenfold where words are few.
    held = len(batches) // _HELD_PART
    fitted = batches[: len(batches) - held]
    moments, _ = collect_moments(
        model, list(kinds), fitted, network=network, autocast=autocast,
        progress=lambda done, total: tell("moments", done, len(batches)),
    )  # fmt: skip
    judged = moments
    if held:
        judged, _ = collect_moments(
            model, list(kinds), batches[len(fitted) :], network=network, autocast=autocast,
            progress=lambda done, total: tell("moments", len(fitted) + done, len(batches)),
        )  # fmt: skip
    felt = [name for name, kind in kinds.items() if kind not in TABLES]
    rows = output_fisher(
        model, felt, batches[:FISHER_BATCHES], network=network, autocast=autocast,
        progress=lambda done, total: tell("gradients", done, total),
    )  # fmt: skip
    loss = _Loss(model, batches[:_LOSS_BATCHES], autocast, network)
    sensitivities = {}
    for name in kinds:
        sensitivities[name] = _sensitivity(model.get_submodule(name), judged[name], rows.get(name), loss)
        tell("sensitivity", len(sensitivities), len(kinds))
    weights = []
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        specs = candidates(kind)
        if kind in TABLES:
            coarser = (octaves or {}).get(f"{name}.weight")
            found = _measured_table(module, moments[name], specs, coarser, loss, coded)
        else:
            problem = _problem(module, moments[name], rows.get(name))
            cost = _problem(module, judged[name], rows.get(name)).cost
            found = _measured(problem, cost, specs, sensitivities[name], coded)
        shape = tuple(cast(Tensor, module.weight).shape)
        weights.append(WeightAllocation(name, kind, shape, sensitivities[name], _front(found), 0))
        tell("candidates", len(weights), len(kinds))
    return choose(weights, budget)


def choose(weights: Sequence[WeightAllocation], budget: int) -> Allocation:
    """The choice of one candidate for each weight with the least predicted loss within the budget.

    Exact but for the rounding of bytes up to a 20,000th of what the budget leaves above the smallest
    candidates.

    Raises:
        SpecError: the budget is below the smallest candidates.
    """
    smallest = [min(candidate.bytes for candidate in weight.candidates) for weight in weights]
    least = sum(smallest)
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
    for weight, base in zip(weights, smallest, strict=True):
        extra = [math.ceil((candidate.bytes - base) / unit) for candidate in weight.candidates]
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


def _front(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """From few bytes to many, without those that another one beats."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.bytes, candidate.loss)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return tuple(kept)


@torch.no_grad()
def _measured(
    problem: Problem, cost: Tensor, specs: Sequence[LayerSpec], sensitivity: float, coded: bool
) -> Iterator[Candidate]:
    """The candidates of one weight, from the errors of some of its rows, which cost what `cost` says."""
    matrix = problem.matrix
    sample = torch.linspace(0, len(matrix) - 1, min(len(matrix), _SAMPLE_ROWS)).round().long()
    counts = None if problem.rows is None else problem.rows[sample]
    scales = [_given_scales(problem, spec, None) for spec in specs]
    tries = [
        (spec, None if scale is None else scale[sample], columns)
        for spec, (scale, columns) in zip(specs, scales, strict=True)
    ]
    solutions = drafts(matrix[sample], problem.hessian, tries, damping=problem.damping)
    for spec, (scale, columns), solution in zip(specs, scales, solutions, strict=True):
        values = solution.values if columns is None else solution.values * columns
        error = relative_error(matrix[sample], values, cost, counts)
        size = spec.bytes(*matrix.shape)
        if coded and spec.quant is not None and solution.scale is not None:
            codes = q.quantize(solution.values, solution.scale, solution.zero, spec.quant, spec.group)
            if solution.mask is not None:
                codes = codes[solution.mask].reshape(len(sample), -1)
            ratio = len(matrix) / len(sample)
            if scale is not None:
                # All rows, rounded plainly: how they share tables of frequencies does not show in some
                # of them. Compensation spends more, drawing in spends less.
                plain = _plainly(_over(matrix[sample], columns), scale[sample], None, spec)
                more = _bits(codes, spec) / max(_bits(plain, spec), 1e-9)
                codes = _plainly(_over(matrix, columns), scale, None, spec)
                ratio = more
            size = _coded_bytes(codes, spec, *matrix.shape, ratio=ratio)
        yield Candidate(spec, size, error, sensitivity * error)


def _given_scales(
    problem: Problem, spec: LayerSpec, octaves: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Scales of the rows and of the columns, where they are not chosen as the weight is rounded."""
    if spec.quant is None:
        return None, None
    if spec.rate is not None:
        return problem.rate_scales(spec.quant, spec.rate, octaves, along_trellis=spec.trellis is not None)
    return None, q.column_scales(problem.matrix, spec.quant) if spec.column_scales else None


def _over(matrix: Tensor, columns: Tensor | None) -> Tensor:
    return matrix if columns is None else matrix / columns


def _plainly(matrix: Tensor, scale: Tensor, zero: Tensor | None, spec: LayerSpec) -> Tensor:
    """The codes nearest to a weight over its column scales, uint8 `[rows, columns]`."""
    assert spec.quant is not None
    if spec.trellis is None:
        return q.quantize(matrix, scale, zero, spec.quant, spec.group)
    return torch.from_numpy(trellis.nearest((matrix / scale).cpu().numpy(), spec.trellis)).to(matrix.device)


def _bits(codes: Tensor, spec: LayerSpec) -> float:
    """Entropy of the codes, bits a code."""
    assert spec.quant is not None
    array = codes.cpu().numpy()
    single = entropy.Contexts.single(*array.shape)
    return entropy.entropy_of(entropy.count_codes(array, spec.quant.bits, single, spec.trellis))


@torch.no_grad()
def _measured_table(
    module: nn.Module,
    moments: Moments,
    specs: Sequence[LayerSpec],
    octaves: Tensor | None,
    loss: _Loss,
    coded: bool,
) -> Iterator[Candidate]:
    """The candidates of a table of rows, each tried in the model.

    Rows count as often as their words occur, which an error of the whole matrix does not tell.
    """
    problem = _problem(module, moments, None)
    for spec in specs:
        quant = spec.quant
        assert quant is not None
        scale, columns = _given_scales(problem, spec, octaves)
        matrix, zero = _over(problem.matrix, columns), None
        if scale is None:
            scale, zero = q.min_error(matrix, None, quant, spec.group)
        codes = _plainly(matrix, scale, zero, spec)
        rounded = q.dequantize(codes, scale, zero, quant, spec.group)
        dense = rounded if columns is None else rounded * columns
        size = spec.bytes(*matrix.shape)
        if coded:
            size = _coded_bytes(codes, spec, *matrix.shape)
        error = relative_error(problem.matrix, dense, problem.cost)
        yield Candidate(spec, size, error, loss.rise(module, dense, moments))


def _coded_bytes(
    codes: Tensor,
    spec: LayerSpec,
    rows: int,
    columns: int,
    *,
    ratio: float = 1.0,
) -> int:
    """What a weight takes with entropy-coded codes, going by some of them, `[some rows, stored columns]`.

    Args:
        codes: uint8.
        spec: what the weight becomes.
        rows: of the weight.
        columns: of the weight.
        ratio: by how much the whole weight has more, or takes more for each.
    """
    assert spec.quant is not None
    parts, bits = spec.sizes(rows, columns), spec.quant.bits
    array = codes.cpu().numpy()
    contexts = entropy.best_contexts(array, bits, spec.trellis)
    side = parts["scale"] + parts.get("column_scale", 0) if spec.quant.scale_bits == 8 else 0
    levels = 0 if contexts.tables == 1 else rows + spec.stored_columns(columns)
    counts = entropy.count_codes(array, bits, contexts, spec.trellis)
    coded = math.ceil(ratio * entropy.coded_bytes(counts, side + levels))
    fixed = rows * math.ceil(spec.stored_columns(columns) * bits / 8)
    return sum(parts.values()) - parts["codes"] + min(fixed, coded - side)


def _problem(module: nn.Module, moments: Moments, rows: Tensor | None) -> Problem:
    return Problem.of(
        to_matrix(cast(Tensor, module.weight).detach()).float(),
        moments,
        biased=corrected_bias(module) is not None,
        damping=DAMPING,
        rows=rows,
    )


class _Loss:
    """How far the model's words are from the dense model's, on a few batches.

    The encoder's states are kept: weights of a decoder leave them as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        autocast: torch.dtype | None,
        network: Network = SEQUENCE_TO_SEQUENCE,
    ) -> None:
        self.model, self.batches, self.network, self.autocast = model, batches, network, autocast
        self.inside = {id(module) for module in network.encoder(model).modules()}
        self.states = [self._states(batch) for batch in batches]
        self.words: list[Tensor] = []
        self.entropies: list[Tensor] = []
        for batch, states in zip(batches, self.states, strict=True):
            logarithms = self._logits(batch, states).log_softmax(dim=-1)
            self.words.append(logarithms.exp())
            self.entropies.append(-(self.words[-1] * logarithms).sum(dim=-1))

    @torch.no_grad()
    def rise(self, module: nn.Module, matrix: Tensor, moments: Moments) -> float:
        """The mean KL divergence, nats per token, with another weight in this module."""
        total = 0.0
        with _exchanged(module, matrix, moments):
            for number, batch in enumerate(self.batches):
                states = self._states(batch) if id(module) in self.inside else self.states[number]
                logits = self._logits(batch, states)
                crossed = logits.logsumexp(dim=-1) - (self.words[number] * logits).sum(dim=-1)
                total += float((crossed - self.entropies[number]).mean())
        return max(0.0, total / len(self.batches))

    @torch.no_grad()
    def _states(self, batch: Batch) -> Tensor:
        with self._running(batch) as moved:
            return self.network.states(self.model, moved)

    @torch.no_grad()
    def _logits(self, batch: Batch, states: Tensor) -> Tensor:
        """At the scored places, float32 `[scored, vocabulary]`."""
        with self._running(batch) as moved:
            return self.network.logits(self.model, moved, states).float()

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[Batch]:
        device, was_training = next(self.model.parameters()).device, self.model.training
        self.model.eval()
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield {name: value.to(device) for name, value in batch.items()}
        self.model.train(was_training)


@torch.no_grad()
def _sensitivity(module: nn.Module, moments: Moments, rows: Tensor | None, loss: _Loss) -> float:
    """Rise of the loss with the weight rounded coarsely, over its relative output error."""
    problem = _problem(module, moments, rows)
    columns = q.column_scales(problem.matrix, _PROBE) if problem.is_table else None
    matrix = _over(problem.matrix, columns)
    scale, zero = q.min_error(matrix, None, _PROBE, None)
    rounded = q.fake_quantize(matrix, None, scale, zero, _PROBE, None)
    dense = rounded if columns is None else rounded * columns
    error = relative_error(problem.matrix, dense, problem.cost, problem.rows)
    return loss.rise(module, dense, moments) / max(error, _LEAST_ERROR)


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
