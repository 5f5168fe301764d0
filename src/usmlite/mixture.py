"""Learned allocation: a mixture of candidates for each weight, all mixtures trained together.

A measured allocation (`allocate`) tries one weight at a time and takes effects to add up. Here, from there
on, every weight is the weighted mean of its dense weight rounded as each of a few candidates says, the
chosen one and its neighbours. The shares are drawn by Gumbel-softmax (arXiv 2501.03643), the logit of a
candidate being what it is thought to lose and the price of its bytes. The distillation loss trains what
candidates are thought to lose, the price follows the budget. Then one candidate for each weight is picked
again, those that are now thought to lose least together within the budget.

The weights themselves are fixed. They would learn to suit mixtures, which never ship, and calibration starts
from the dense ones anyway; and so what is learned says the same as what was measured: how much a candidate
costs, before any fine-tuning.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from usmlite import kernels
from usmlite import quantize as q
from usmlite.allocate import Allocation, WeightAllocation, choose
from usmlite.atomic import write_json
from usmlite.distill import Distillation, LossWeights
from usmlite.errors import TrainingError
from usmlite.fisher import FISHER_BATCHES, output_fisher
from usmlite.moments import Moments, collect_moments
from usmlite.network import SEQUENCE_TO_SEQUENCE, Batch, Network
from usmlite.schedule import temperature
from usmlite.solve import DAMPING, Problem, corrected_bias, importance_of
from usmlite.sparsify import nm_mask
from usmlite.spec import TABLES, LayerSpec
from usmlite.student import from_matrix, let_recurrent_learn, to_matrix

# Candidates on either side of the chosen one that are mixed with it.
_NEIGHBOURS = 2
# Batches that the mean inputs are taken from, by which biases are corrected.
_MOMENT_BATCHES = 4
# No candidate begins further below the likeliest one, so that all of them are drawn now and then.
_LEAST_LOGIT = -4.0
# What a logit moves in a step where its gradient is as large as the mean one, and the most it moves.
_RATE, _MOST = 0.1, 0.5
_MOMENTUM = 0.9
# How fast the logarithm of the price follows the share by which expected bytes exceed the budget.
_PRICE_RATE = 5.0
_MOST_EXCESS = 0.05
_LEAST_SIZE = 1e-30
# The part of `schedule.temperature` that draws go through, 0.47 to 0.11. When it is warm shares are even,
# and errors of candidates cancel in a mean that never ships; when it is cold gradients are mostly noise.
_WARMEST, _COLDEST = 0.25, 0.75
_LEAST = 1e-10
# The loss that allocations are measured by.
_LOSS = LossWeights(kl=1.0, ce=0.0, states=0.0)


@dataclass
class _Quantizer:
    """How one candidate rounds a weight.

    Attributes:
        spec: the candidate.
        scale: float32 `[rows, groups]`.
        zero: float32 `[rows, groups]`, or None.
        mask: bool `[rows, columns]`, or None.
        column_scale: float32 `[columns]`, or None.
    """

    spec: LayerSpec
    scale: Tensor
    zero: Tensor | None
    mask: Tensor | None
    column_scale: Tensor | None = None

    @classmethod
    def of(cls, problem: Problem, spec: LayerSpec, octaves: Tensor | None) -> _Quantizer:
        """The candidate's masks by magnitude and input, its scales by rate or by least error."""
        quant, matrix, mask = spec.quant, problem.matrix, None
        assert quant is not None, "candidates are quantized"
        if spec.rate is not None:
            scale, steps = problem.rate_scales(quant, spec.rate, octaves)
            return cls(spec, scale, None, None, steps)
        importance = importance_of(problem.hessian.diagonal())
        columns: Tensor | None = None
        if spec.column_scales:
            columns = q.column_scales(matrix, quant)
            matrix, importance = matrix / columns, importance * columns.square()
        if spec.sparsity is not None:
            mask = nm_mask(matrix.abs() * importance.sqrt(), spec.sparsity)
            matrix = matrix.masked_fill(~mask, 0.0)
        scale, zero = q.min_error(matrix, mask, quant, spec.group, importance=importance)
        return cls(spec, scale, zero, mask, columns)

    def rounded(self, block: Tensor, rows: slice) -> Tensor:
        """These rows of the weight, rounded."""
        assert self.spec.quant is not None
        zero, mask = (None if part is None else part[rows] for part in (self.zero, self.mask))
        columns = self.column_scale
        over = block if columns is None else block / columns
        out = q.fake_quantize(over, mask, self.scale[rows], zero, self.spec.quant, self.spec.group)
        return out if columns is None else out * columns


class _Mix(torch.autograd.Function):
    """The mean of a weight's candidates, each times its share.

    Candidates are rounded anew in both passes, a block of rows at a time, so that none is ever kept whole.
    """

    @staticmethod
    def forward(ctx: Any, shares: Tensor, matrix: Tensor, quantizers: Sequence[_Quantizer]) -> Tensor:
        """`shares` float32 `[candidates]` and `matrix` `[rows, columns]` to `[rows, columns]`."""
        out = torch.empty_like(matrix)
        for low, high in kernels.row_blocks(*matrix.shape):
            rows = slice(low, high)
            block, total = matrix[rows], out[rows].zero_()
            for share, quantizer in zip(shares.tolist(), quantizers, strict=True):
                if share:
                    total.add_(quantizer.rounded(block, rows), alpha=share)
        ctx.matrix, ctx.quantizers = matrix, quantizers
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each share: the product of the candidate with the gradient of the mean."""
        (grad,) = grads
        sums = torch.zeros(len(ctx.quantizers), device=grad.device)
        for low, high in kernels.row_blocks(*ctx.matrix.shape):
            rows = slice(low, high)
            for number, quantizer in enumerate(ctx.quantizers):
                sums[number] += (quantizer.rounded(ctx.matrix[rows], rows) * grad[rows]).sum()
        return sums, None, None


_mix: Callable[..., Tensor] = _Mix.apply  # torch leaves it untyped


class _MixedWeight:
    """One weight as a mixture.

    Attributes:
        name: its module.
    """

    def __init__(
        self,
        weight: WeightAllocation,
        module: nn.Module,
        moments: Moments,
        felt: Tensor | None,
        octaves: Tensor | None,
    ) -> None:
        dense = cast(Tensor, module.weight).detach()
        bias = corrected_bias(module)
        self.name, self.shape = weight.name, dense.shape
        self.bias = None if bias is None else bias.detach()
        self.problem = Problem.of(
            to_matrix(dense).float(), moments, biased=bias is not None, damping=DAMPING, rows=felt
        )
        self.quantizers = [
            _Quantizer.of(self.problem, candidate.spec, octaves) for candidate in weight.candidates
        ]
        # What each candidate makes of the mean input is taken up by the bias, as calibration will do it.
        matrix, mean = self.problem.matrix, moments.mean.to(dense.device)
        self.corrections = None
        if bias is not None:
            off = [(matrix - each.rounded(matrix, slice(None))) @ mean for each in self.quantizers]
            self.corrections = torch.stack(off)

    def mixed(self, shares: Tensor) -> dict[str, Tensor]:
        """The module's parameters, by name, with these shares `[candidates]`."""
        out = _mix(shares, self.problem.matrix, self.quantizers)
        parts = {f"{self.name}.weight": from_matrix(out, self.shape)}
        if self.bias is not None and self.corrections is not None:
            parts[f"{self.name}.bias"] = self.bias + shares @ self.corrections
        return parts


@dataclass(frozen=True)
class _Measured:
    """Where learning starts.

    Attributes:
        losses: float64 `[weights, candidates]`, predicted from measurements, nats; infinity where a weight
            has fewer candidates.
        sizes: float64 `[weights, candidates]`, bytes; 0 where a weight has fewer candidates.
        price: of a byte, nats, with which the best candidates just keep to the budget.
        typical: nats that are typically lost by taking another candidate.
    """

    losses: Tensor
    sizes: Tensor
    price: float
    typical: float

    @classmethod
    def of(cls, weights: Sequence[WeightAllocation], budget: int) -> _Measured:
        """Takes it from measured candidates."""
        most = max(len(weight.candidates) for weight in weights)
        sizes = torch.zeros(len(weights), most, dtype=torch.float64)
        losses = torch.full_like(sizes, math.inf)
        for number, weight in enumerate(weights):
            for place, candidate in enumerate(weight.candidates):
                sizes[number, place], losses[number, place] = candidate.bytes, candidate.loss
        price = _price(losses, sizes, budget)
        costs = losses + price * sizes
        regret = costs - costs.min(dim=1, keepdim=True).values
        others = regret[regret.isfinite() & (regret > 0)]
        return cls(losses, sizes, price, float(others.median()) if len(others) else 1.0)


@dataclass
class _State:
    """What is learned, and what learning it needs; small enough to be written down after every step.

    Attributes:
        step: steps done.
        learned: float32 `[weights, candidates]`, what candidates lose beyond what was measured, over
            `typical`.
        momentum: of its gradient, of the same shape.
        size: running mean square of the gradient's entries.
        price: of a byte, nats.
    """

    step: int
    learned: Tensor
    momentum: Tensor
    size: float
    price: float

    @classmethod
    def at_start(cls, start: _Measured) -> _State:
        """Nothing learned yet."""
        nothing = torch.zeros(start.losses.shape)
        return cls(0, nothing, nothing, 0.0, start.price)

    def losses(self, start: _Measured) -> Tensor:
        """Measured and learned losses, float64 `[weights, candidates]`, nats."""
        return start.losses + start.typical * self.learned

    def logits(self, start: _Measured) -> Tensor:
        """The likelier the less a candidate loses, its bytes paid for; float32, minus infinity for none."""
        costs = (self.losses(start) + self.price * start.sizes) / start.typical
        logits = (costs.min(dim=1, keepdim=True).values - costs).clamp(min=_LEAST_LOGIT)
        return logits.masked_fill(start.losses.isinf(), -math.inf).float()

    def save(self, path: Path) -> None:
        """Writes it down, exactly."""
        state = {"step": self.step, "size": self.size, "price": self.price}
        rows = {"learned": self.learned.tolist(), "momentum": self.momentum.tolist()}
        write_json(path, {**state, **rows})

    def restore(self, path: Path) -> None:
        """Goes on from what `save` wrote, if there is anything.

        Raises:
            TrainingError: it cannot be read, or is of other weights.
        """
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            learned, momentum = torch.tensor(found["learned"]), torch.tensor(found["momentum"])
            if learned.shape != self.learned.shape or momentum.shape != self.learned.shape:
                raise ValueError("other weights or candidates")
            self.learned, self.momentum = learned, momentum
            self.step, self.size, self.price = int(found["step"]), float(found["size"]), float(found["price"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TrainingError(
                "unreadable state of the allocation",
                where=path,
                found=str(error),
                remedy="Delete this file; what was learned is then learned again.",
            ) from None


def learn_allocation(
    model: nn.Module,
    measured: Allocation,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    seed: int,
    state_file: Path,
    network: Network = SEQUENCE_TO_SEQUENCE,
    octaves: Mapping[str, Tensor] | None = None,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Allocation:
    """Chooses anew among the candidates next to the chosen ones, from how all of them do together.

    Args:
        model: the dense model, a Transformers class; not changed.
        measured: where to start, see `allocate.allocate`.
        batches: the number of a step to the inputs of `distill.Distillation`, on the model's device.
        steps: how many steps the mixtures are trained.
        seed: of what is drawn.
        state_file: gets the state after every step; a call that was cut off goes on from there, to the same
            choice.
        network: how the model is run.
        octaves: as for `make_student`.
        autocast: the dtype the model runs in, None for its own.
        progress: called with the steps done, and of how many.

    Returns:
        The choice, within the same budget; the candidates' losses are those that were measured.

    Raises:
        TrainingError: the loss is not finite, or the state file cannot be read.
    """
    device = next(model.parameters()).device
    near = [_nearest(weight) for weight in measured.weights]
    start = _Measured.of(near, measured.budget)
    state = _State.at_start(start)
    state.restore(state_file)
    main = str(cast(Any, model).main_input_name)
    inputs = [_taught(batches(number), main) for number in range(min(_MOMENT_BATCHES, steps))]
    moments, _ = collect_moments(model, [w.name for w in near], inputs, network=network, autocast=autocast)
    named = [w.name for w in near if w.kind not in TABLES]
    felt = output_fisher(model, named, inputs[:FISHER_BATCHES], network=network, autocast=autocast)
    coarser = octaves or {}
    mixtures = [
        _MixedWeight(
            w, model.get_submodule(w.name), moments[w.name], felt.get(w.name),
            coarser.get(f"{w.name}.weight"),
        )
        for w in near
    ]  # fmt: skip
    student = copy.deepcopy(model).requires_grad_(False)
    distillation = Distillation(student, model, _LOSS, network=network).eval()
    let_recurrent_learn(student)
    for step in range(state.step, steps):
        logits = state.logits(start).requires_grad_()
        warmth = temperature(_WARMEST + (_COLDEST - _WARMEST) * step / steps)
        shares = _draw(logits, warmth, seed, step).to(device)
        exchanged = {
            f"student.{name}": value
            for mixture, row in zip(mixtures, shares, strict=True)
            for name, value in mixture.mixed(row[: len(mixture.quantizers)]).items()
        }
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            losses = torch.func.functional_call(distillation, exchanged, kwargs=dict(batches(step)))
        (gradient,) = torch.autograd.grad(losses["loss"], logits)
        expected = float((logits.detach().softmax(dim=1) * start.sizes).sum())
        if not bool(gradient.isfinite().all()):
            raise TrainingError(
                "the loss of the mixed model is not finite",
                where=f"step {step + 1} of the learned allocation",
                found=float(losses["loss"].detach()),
                remedy="Use allocation = 'measured', or another precision.",
            )
        _take_step(state, gradient, expected / measured.budget - 1.0)
        state.save(state_file)
        if progress is not None:
            progress(state.step, steps)
    return _picked(measured, near, state.losses(start))


def _nearest(weight: WeightAllocation) -> WeightAllocation:
    """The weight with the chosen candidate and its neighbours only."""
    low = max(0, weight.chosen - _NEIGHBOURS)
    few = weight.candidates[low : weight.chosen + _NEIGHBOURS + 1]
    return replace(weight, candidates=few, chosen=weight.chosen - low)


def _price(losses: Tensor, sizes: Tensor, budget: int) -> float:
    """Nats a byte with which the cheapest candidates, loss and bytes together, just keep to the budget."""
    low, high = -40.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        picks = (losses + math.exp(middle) * sizes).argmin(dim=1, keepdim=True)
        low, high = (middle, high) if float(sizes.gather(1, picks).sum()) > budget else (low, middle)
    return math.exp(high)


def _draw(logits: Tensor, warmth: float, seed: int, step: int) -> Tensor:
    """Shares `[weights, candidates]` by Gumbel-softmax (arXiv 1611.01144), the same for a seed and a step."""
    generator = torch.Generator().manual_seed(hash((seed, step)) % 2**63)
    noise = torch.rand(logits.shape, generator=generator).clamp_(min=_LEAST).log_().neg_().log_().neg_()
    return ((logits + noise) / warmth).softmax(dim=1)


def _take_step(state: _State, gradient: Tensor, excess: float) -> None:
    """Moves what is learned, and the price up where the expected bytes exceed the budget (dual ascent).

    One size for the gradients of all weights, and not one each as Adam has it: a weight whose choice hardly
    matters then stays where measuring has put it, instead of wandering about as fast as others learn.

    Args:
        state: changed in place.
        gradient: of the loss by the logits, float32 `[weights, candidates]`.
        excess: share by which the expected bytes exceed the budget.
    """
    square = float(gradient.square().mean())
    state.size = _MOMENTUM * state.size + (1.0 - _MOMENTUM) * square
    state.momentum = _MOMENTUM * state.momentum + (1.0 - _MOMENTUM) * gradient
    state.step += 1
    unbiased = 1.0 - _MOMENTUM**state.step
    move = (state.momentum / unbiased) / max(math.sqrt(state.size / unbiased), _LEAST_SIZE)
    # A logit falls by what its candidate is found to lose.
    state.learned = state.learned + (_RATE * move).clamp(-_MOST, _MOST)
    state.price *= math.exp(_PRICE_RATE * min(max(excess, -_MOST_EXCESS), _MOST_EXCESS))


def _picked(measured: Allocation, near: Sequence[WeightAllocation], losses: Tensor) -> Allocation:
    """The candidates with the least of these losses within the budget."""
    weighed = []
    for weight, row in zip(near, losses.tolist(), strict=True):
        pairs = zip(weight.candidates, row[: len(weight.candidates)], strict=True)
        learned = tuple(replace(candidate, loss=loss) for candidate, loss in pairs)
        weighed.append(replace(weight, candidates=learned))
    found = choose(weighed, measured.budget)
    chosen = [
        replace(old, chosen=old.chosen - few.chosen + new.chosen)
        for old, few, new in zip(measured.weights, near, found.weights, strict=True)
    ]
    return Allocation(tuple(chosen), measured.budget)


def _taught(batch: Batch, main: str) -> dict[str, Tensor]:
    """What the teacher hears, as the network takes it."""
    return {main: batch["taught"], **{k: v for k, v in batch.items() if k not in ("heard", "taught")}}
