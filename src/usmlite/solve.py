"""One weight, pruned and rounded so that its output on known inputs changes little.

SparseGPT (arXiv 2301.00774) jointly with GPTQ's rounding (arXiv 2210.17323), any N:M, any bits; see `solve`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from usmlite import kernels
from usmlite import quantize as q
from usmlite.entropy import Contexts
from usmlite.errors import SpecError
from usmlite.kernels import trellis
from usmlite.moments import Moments
from usmlite.sparsify import nm_mask
from usmlite.spec import NM, Int, LayerSpec

# What is added to a Hessian's diagonal, as a share of its mean, unless somebody knows better.
DAMPING = 0.01
# Columns between two updates of all later columns: inside, only the block's own columns are updated.
_BLOCK_COLUMNS = 128
# Rows solved together: a block of columns of this many rows stays in a core's cache. Trellises start anew.
_BLOCK_ROWS = trellis.ROWS
# Inputs that calibration never saw still count a little: other speech may use them.
_LEAST_IMPORTANCE = 1e-4
# How much rows count at least, next to the mean: chosen among 0.01 to 1 (docs/decisions/0013).
_LEAST_ROW = 0.3
# How much of its rounding interval a kept master weight may use (the rest is room for float error).
_HALF_STEP = 0.499
# The least a kept master weight may be, in steps; and in floats, where there are no steps.
_LEAST_STEP = 1e-3
_TINY = 1e-10
# Pruned master weights end at most this far up to the least kept one of their group.
_BELOW_KEPT = 0.95
_DAMPING_TRIES = 12
# For tables of rows: how much a row counts as itself next to its use as the weight of a projection.
_TABLE_DAMPING = 1.0
# How far weights are drawn towards zero in coordinate descent, next to the walk (docs/decisions/0018).
_DRAWN_AGAIN = 0.5
# What a bit may cost along a trellis, in squares of steps: the slope of the rate-distortion curve is near
# 0.36 at high rates, and all from 0.3 to 0.45 did alike (docs/decisions/0030).
_BIT_PRICE = 0.4
# Coordinate descent after the walk: three sweeps give nearly all of what eight do.
_SWEEPS = 3


@dataclass(frozen=True)
class Problem:
    """One weight, the inputs that it is multiplied by, and what errors of its outputs cost.

    Attributes:
        matrix: float32 `[rows, columns]`, the weight.
        hessian: float32 `[columns, columns]`, what an error of a row costs.
        damping: what `solve` shall add to the Hessian's diagonal, as a share of its mean.
        rows: float32 `[rows]`, how much each row's error counts, 1 on average; None if all count alike.
        is_table: whether rows are looked up as well.
    """

    matrix: Tensor
    hessian: Tensor
    damping: float
    rows: Tensor | None = None
    is_table: bool = False

    @classmethod
    def of(
        cls, weight: Tensor, moments: Moments, *, biased: bool, damping: float, rows: Tensor | None = None
    ) -> Problem:
        """Makes one.

        Args:
            weight: float32 `[rows, columns]`.
            moments: of its inputs.
            biased: whether a bias takes up what goes wrong on the mean input.
            damping: the least damping.
            rows: float32 `[rows]`, how much the loss feels each output (`fisher`), in any unit.
        """
        hessian = (moments.covariance if biased else moments.hessian).to(weight.device)
        if moments.is_table:
            # Its rows are looked up whole, also where an output projection shares them. Rounded for the
            # projection's inputs alone they are spoiled as inputs: Whisper then repeats words without end.
            damping = max(damping, _TABLE_DAMPING)
        if rows is not None and bool(rows.mean() > 0):
            # What a few utterances show of it is uncertain: no row counts for nothing.
            rows = (rows / rows.mean()).to(weight.device) + _LEAST_ROW
            rows = rows / rows.mean()
        else:
            rows = None
        return cls(weight, hessian, damping, rows, moments.is_table)

    @property
    def inward(self) -> bool:
        """Whether weights at a rate are drawn towards zero before they are rounded.

        Not those of tables: their rows are what the likely words' scores are made of, and all of these
        would be drawn in together (docs/decisions/0018).
        """
        return not self.is_table

    @property
    def cost(self) -> Tensor:
        """The Hessian with the damping on its diagonal: of a table, the cost of both its uses."""
        mean = self.hessian.diagonal().mean()
        return self.hessian + self.damping * mean * torch.eye(len(self.hessian), device=mean.device)

    def rate_scales(
        self, quant: Int, rate: float, octaves: Tensor | None, *, along_trellis: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scales of rows and of columns for a rate, as `quantize.rate_scales` gives them.

        At a given rate the error is least if every step costs the same. What a step of a column costs when
        all later columns make up for it is the square of the Cholesky factor's diagonal, not the
        Hessian's: few bits are spent on columns which others can stand in for.

        Args:
            quant: symmetric codes, of more bits than the rate.
            rate: bits a weight.
            octaves: float32 `[rows]`, by how many doublings the steps of a table's rows are larger, or None.
            along_trellis: whether codes will follow a trellis.
        """
        rows = torch.ones(len(self.matrix), device=self.matrix.device)
        if octaves is not None:
            rows = torch.exp2(octaves.to(rows.device))
        elif self.rows is not None:
            rows = self.rows.rsqrt()
        columns = q.column_scales(self.matrix, quant) if self.is_table else self._column_steps
        return q.rate_scales(
            self.matrix, quant, rate, rows, columns, inward=self.inward, along_trellis=along_trellis
        )

    @functools.cached_property
    def _column_steps(self) -> Tensor:
        """Steps of columns that all cost the same, float32 `[columns]`, in no particular unit."""
        plan, _, _ = _plan(self.hessian, LayerSpec(), self.damping, covering=False)
        steps = torch.empty_like(plan.factor[0])
        steps[plan.order] = plan.factor.diagonal()
        return steps


def corrected_bias(layer: nn.Module) -> Tensor | None:
    """The bias that takes up what goes wrong on the mean input; None where there is none.

    With channel groups the rows see different inputs, of which only the sum over all groups is known.
    """
    return None if getattr(layer, "groups", 1) > 1 else getattr(layer, "bias", None)


def importance_of(squares: Tensor) -> Tensor:
    """How much inputs count, by their mean squares, float32 `[columns]`: 1 on average, none negligible."""
    mean = squares.mean()
    if not mean > 0:
        return torch.ones_like(squares)
    return (squares / mean).clamp(min=_LEAST_IMPORTANCE)


def relative_error(weight: Tensor, compressed: Tensor, hessian: Tensor, rows: Tensor | None = None) -> float:
    """tr(R E H E^T) / tr(R W H W^T) with E = W - What; 0 if both are zero.

    R is diagonal, how much each row counts (`rows`, float32 `[rows]`), or the identity.
    """
    error = reference = 0.0
    for low in range(0, len(weight), _BLOCK_ROWS):
        block = weight[low : low + _BLOCK_ROWS]
        difference = block - compressed[low : low + _BLOCK_ROWS]
        counts = torch.ones(()) if rows is None else rows[low : low + _BLOCK_ROWS]
        counts = counts.to(block.device)
        error += float((((difference @ hessian) * difference).sum(dim=1) * counts).sum())
        reference += float((((block @ hessian) * block).sum(dim=1) * counts).sum())
    return max(error, 0.0) / reference if reference > 0 else 0.0


@dataclass
class Solution:
    """A weight that `solve` pruned and rounded.

    Attributes:
        master: float32 `[rows, columns]`, master weights that prune and round to `values`; over the column
            scales.
        values: float32 `[rows, columns]`, the compressed weight, over the column scales.
        mask: bool `[rows, columns]`, or None if dense.
        scale: float32 `[rows, groups]`, rounded as float16, or None if not quantized.
        zero: float32 `[rows, groups]` if asymmetric, else None.
        damping: the damping in the end.
        notes: what was unusual.
    """

    master: Tensor
    values: Tensor
    mask: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    damping: float
    notes: list[str] = field(default_factory=list)


def solve(
    weight: Tensor,
    hessian: Tensor,
    spec: LayerSpec,
    *,
    damping: float = DAMPING,
    importance: Tensor | None = None,
    covering: bool = False,
    scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    inward: bool = False,
) -> Solution:
    """Prunes and rounds a weight so that its output on the given inputs changes little.

    SparseGPT (arXiv 2301.00774) with GPTQ's rounding (arXiv 2210.17323): columns are handled in
    turn; what pruning and rounding change in one is made up for by the columns still to come,
    along the Cholesky factor of the inverse Hessian. The mask of each N:M group, and the scale of
    each scale group, are chosen when the group is reached; a scale for the whole row is chosen first.
    A second walk takes scales that suit the compensated weights; each row keeps the better walk.
    Then codes and scales are improved in turn by coordinate descent, the masks staying. A row that
    the plain start serves better keeps the plain start.

    With a trellis all rows of a column are rounded at once, by a search over them that counts both the
    squared error after compensation and the bits that the entropy coder will spend on the codes; what each
    costs is taken from the walk before.

    Args:
        weight: float32 `[rows, columns]`.
        hessian: float32 `[columns, columns]`, the mean of x x^T over the inputs x.
        spec: what the weight becomes.
        damping: what is added to the Hessian's diagonal, as a share of its mean. If the Hessian
            cannot be inverted with it, ten times as much is, and so on.
        importance: float32 `[columns]`, positive: the student's masks rank |master| * sqrt(importance),
            with the master weights over the column scales.
        covering: whether the student derives its scales from its largest master weights (min-max);
            then no kept weight lies outside the codes, and each group has one at the end of its range.
        scale: float32 `[rows, 1]`, if it is not to be chosen here; for symmetric codes without groups.
        column_scale: float32 `[columns]`, if every column has a scale as well.
        inward: whether weights are drawn towards zero before they are rounded to a given scale, because
            small codes are cheaper (`quantize.drawn_in`): a little more error for many fewer bits.

    Returns:
        The solution. Its master weights are the compensated ones before rounding, moved so that they
        round to the chosen codes (from inside each code's interval) and that their N:M mask is the
        chosen one.
    """
    rows, columns = weight.shape
    weight = weight.float() if column_scale is None else weight.float() / column_scale
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    given = scale
    plan, damping, notes = _plan(hessian, spec, damping, covering and given is None)
    plan = replace(plan.scaled(column_scale), inward=inward and given is not None)
    if spec.trellis is not None and given is None:
        raise SpecError("a trellis without scales", where="solve", remedy="Give scale, of `rate_scales`.")
    master, values = torch.empty_like(weight), torch.empty_like(weight)
    mask = None if spec.sparsity is None else torch.empty_like(weight, dtype=torch.bool)
    zero = None
    if spec.quant is not None:
        scale = torch.empty(rows, spec.scale_groups(columns), device=weight.device)
        zero = None if spec.quant.symmetric else torch.empty_like(scale)
    for low in range(0, rows, _BLOCK_ROWS):
        block = slice(low, low + _BLOCK_ROWS)
        part = _solve_rows(weight[block], importance, plan, None if given is None else given[block])
        master[block], values[block] = part.master, part.values
        for whole, piece in ((mask, part.mask), (scale, part.scale), (zero, part.zero)):
            if whole is not None and piece is not None:
                whole[block] = piece
    return Solution(master, values, mask, scale, zero, damping, notes)


def drafts(
    weight: Tensor,
    hessian: Tensor,
    specs: Iterable[tuple[LayerSpec, Tensor | None, Tensor | None]],
    *,
    damping: float = DAMPING,
) -> Iterator[Solution]:
    """What a weight would become under several specs, for comparing them, in a quarter of the time.

    One walk and one sweep for each spec, and one factor of the Hessian for all that walk alike. Errors came
    out 2 to 3 % above those of `solve` at every number of bits and N:M, 20 % at one bit.

    Args:
        weight: float32 `[rows, columns]`; some of the rows will do.
        hessian: as for `solve`.
        specs: what the weight may become, each with its scales of rows and of columns where they are given,
            as for `solve`. Those with a rate are rounded inward.
        damping: as for `solve`.

    Yields:
        A solution for each spec, whose master weights are not fitted to its codes.
    """
    plans: dict[tuple[int, int], _Plan] = {}
    for spec, scale, column_scale in specs:
        walk = (1 if spec.sparsity is None else spec.sparsity.m, spec.group or 0)
        if walk not in plans:
            plans[walk] = _plan(hessian, spec, damping, covering=False)[0]
        plan = replace(plans[walk], spec=spec, inward=spec.rate is not None).scaled(column_scale)
        matrix = weight.float() if column_scale is None else weight.float() / column_scale
        paths = None if spec.trellis is None or scale is None else _Paths(matrix / scale, plan)
        found = _walk(matrix, plan, scale, paths=paths)
        if paths is not None:
            yield _polish(matrix, found, plan, sweeps=1, fit=False, paths=paths)
            continue
        fit = scale is None
        yield found if spec.quant is None else _polish(matrix, found, plan, sweeps=1, fit=fit)


@dataclass(frozen=True)
class _Plan:
    """What all rows of a weight share.

    Attributes:
        spec: what the weight becomes.
        order: int64 `[columns]`, the column at each position of the walk.
        factor: float32 `[columns, columns]`, upper Cholesky factor of the inverse Hessian, in order.
        hessian: float32 `[columns, columns]`, as it was given, not in order.
        damped: the same with the damping on its diagonal.
        blocks: first and last position (exclusive) of each block; no group crosses a block's edge.
        patterns: position where an N:M group starts, to its width.
        groups: position where a scale group starts, to its width and number; empty if the scale is
            the row's.
        covering: as for `solve`.
        inward: as for `solve`.
    """

    spec: LayerSpec
    order: Tensor
    factor: Tensor
    hessian: Tensor
    damped: Tensor
    blocks: list[tuple[int, int]]
    patterns: dict[int, int]
    groups: dict[int, tuple[int, int]]
    covering: bool
    inward: bool = False

    def scaled(self, column_scale: Tensor | None) -> _Plan:
        """The same walk for the weight over these column scales; the order and the damping stay."""
        if column_scale is None:
            return self
        both = column_scale * column_scale.unsqueeze(1)
        return replace(
            self,
            factor=self.factor / column_scale[self.order],
            hessian=self.hessian * both,
            damped=self.damped * both,
        )


def _plan(hessian: Tensor, spec: LayerSpec, damping: float, covering: bool) -> tuple[_Plan, float, list[str]]:
    columns = len(hessian)
    m = 1 if spec.sparsity is None else spec.sparsity.m
    group = 1 if spec.group is None else spec.group
    # A unit is the least run of columns that cuts neither an N:M group nor a scale group.
    edges = [column for column in range(columns) if column % m == 0 and column % group == 0]
    units = list(zip(edges, [*edges[1:], columns], strict=True))
    squares = hessian.diagonal()
    # The strongest inputs first: while there are many columns left to make up for their error.
    known = squares.cpu()
    strength = [float(known[first:last].mean()) for first, last in units]
    units = [units[i] for i in sorted(range(len(units)), key=lambda i: -strength[i])]
    order: list[int] = []
    blocks, patterns, groups = [], {}, {}
    start = 0
    for first, last in units:
        if len(order) - start >= _BLOCK_COLUMNS:
            blocks.append((start, len(order)))
            start = len(order)
        for column in range(first, last):
            position = len(order)
            if spec.sparsity is not None and column % m == 0:
                patterns[position] = min(m, columns - column)
            if spec.group is not None and column % group == 0:
                groups[position] = (min(group, columns - column), column // group)
            order.append(column)
    blocks.append((start, columns))
    ordered = torch.tensor(order, device=hessian.device)
    back = torch.argsort(ordered)
    factor, damped, damping, notes = _inverse_factor(hessian[ordered][:, ordered], damping)
    damped = damped[back][:, back].contiguous()
    plan = _Plan(spec, ordered, factor, hessian, damped, blocks, patterns, groups, covering)
    return plan, damping, notes


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float, list[str]]:
    """The upper triangular U with U^T U = D^-1, and D = H + damping * mean(diag H) * I, float32.

    Also the damping that it took, and what was unusual.
    """
    values = hessian.double()
    mean = float(values.diagonal().mean())
    identity = torch.eye(len(values), dtype=torch.float64, device=values.device)
    equal = identity.float()
    if not mean > 0:
        return equal, equal, damping, ["all inputs were zero: all counted alike"]
    used = damping
    for _ in range(_DAMPING_TRIES):
        damped = values + used * mean * identity
        # From the last column up: D = R R^T with R upper triangular, hence U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
            if bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all()):
                notes = [] if used == damping else [f"damping raised from {damping:g} to {used:g}"]
                return factor, damped.float(), used, notes
        used = max(used * 10.0, 1e-6)
    return equal, equal, used, ["the Hessian could not be inverted: all inputs counted alike"]


def _solve_rows(weight: Tensor, importance: Tensor, plan: _Plan, given: Tensor | None) -> Solution:
    """`solve` for some of the rows."""
    spec, quant, nm = plan.spec, plan.spec.quant, plan.spec.sparsity
    if spec.trellis is not None and given is not None:
        paths = _Paths(weight / given, plan)
        _walk(weight, plan, given, paths=paths)
        paths.count_again()
        found = _polish(weight, _walk(weight, plan, given, paths=paths), plan, fit=False, paths=paths)
        found.master = _fit_kept(found, plan)
        return found
    found = _walk(weight, plan, given)
    if given is not None:
        found = _polish(weight, found, plan, fit=False)
    elif quant is not None:
        # Compensation changes the weights that the scales were chosen for: choose them again.
        again = _walk(weight, plan, *_scales(found.master, found.mask, plan))
        found = _better(found, again, weight, plan.damped)
        found = _polish(weight, found, plan)
    found = _better(found, _plain(weight, importance, plan, given), weight, plan.hessian)
    master = _fit_kept(found, plan)
    scale, zero, values = found.scale, found.zero, found.values
    if quant is not None and scale is not None and plan.covering:
        _fit_range(master, found.mask, scale, zero, spec)
        pruned = _pruned(master, found.mask)
        scale, zero = q.min_max(pruned, quant, spec.group)
        values = q.fake_quantize(pruned, found.mask, scale, zero, quant, spec.group)
    if found.mask is not None and nm is not None:
        master = _fit_pruned(master, found.mask, importance, nm)
    return Solution(master, values, found.mask, scale, zero, 0.0)


def _walk(
    weight: Tensor,
    plan: _Plan,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    paths: _Paths | None = None,
) -> Solution:
    """The walk over the columns; its master weights are the compensated ones as they are.

    Scales are chosen on the way unless they are given. Columns are rounded along `paths`, if there are any.
    """
    spec, quant, nm = plan.spec, plan.spec.quant, plan.spec.sparsity
    rows, columns = weight.shape
    # Transposed, so that the column at hand is contiguous.
    work = weight[:, plan.order].T.contiguous()
    values = torch.empty_like(work)
    kept = None
    diagonal = plan.factor.diagonal().unsqueeze(1)
    if nm is not None:
        kept = torch.empty(work.shape, dtype=torch.bool, device=work.device)
        for position, width in plan.patterns.items():
            _choose(work, kept, diagonal, position, width, nm)
    given = scale is not None
    row_scale = row_zero = None
    if quant is not None:
        if scale is None:
            scale = torch.empty(rows, spec.scale_groups(columns), device=work.device)
            zero = None if quant.symmetric else torch.empty_like(scale)
        if spec.group is None and not given:
            _scale_into(scale, zero, 0, work, kept, plan, 0, columns)
        row_scale, row_zero = scale[:, 0], None if zero is None else zero[:, 0]
    drawing = plan.inward and scale is not None and paths is None
    sizes = q.row_squares(weight / scale) if drawing and scale is not None else None
    order = plan.order.tolist()
    for start, stop in plan.blocks:
        errors = torch.empty(stop - start, rows, device=work.device)
        for position in range(start, stop):
            if nm is not None and kept is not None and position in plan.patterns:
                _choose(work, kept, diagonal, position, plan.patterns[position], nm)
            if scale is not None and position in plan.groups:
                width, number = plan.groups[position]
                if not given:
                    _scale_into(scale, zero, number, work, kept, plan, position, width)
                row_scale = scale[:, number].contiguous()
                row_zero = None if zero is None else zero[:, number].contiguous()
            column, value = work[position], values[position]
            if paths is not None and row_scale is not None:
                cost = 1.0 / float(diagonal[position]) ** 2
                torch.mul(paths.round(order[position], column / row_scale, cost), row_scale, out=value)
            else:
                drawn = column if sizes is None else _drawn_in(column, row_scale, sizes)
                _round(drawn, row_scale, row_zero, plan, out=value)
            if kept is not None:
                value.masked_fill_(~kept[position], 0.0)
            error = torch.sub(column, value, out=errors[position - start]).div_(diagonal[position])
            work[position + 1 : stop].addr_(plan.factor[position, position + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(plan.factor[start:stop, stop:].T, errors, alpha=-1)
    back = torch.argsort(plan.order)
    mask = None if kept is None else kept[back].T.contiguous()
    return Solution(work[back].T.contiguous(), values[back].T.contiguous(), mask, scale, zero, 0.0)


class _Paths:
    """Rounds whole columns along a trellis, where the cost of errors and of bits together is least.

    What codes cost is counted from those of the last walk or sweep, in tables as the entropy coder has them:
    by the sizes of rows and columns, and by quantizer.
    """

    def __init__(self, steps: Tensor, plan: _Plan) -> None:
        """Takes the weight in steps, `[rows, columns]`, for what codes cost at first."""
        assert plan.spec.trellis is not None
        self._states = plan.spec.trellis
        array = steps.cpu().numpy()
        contexts = Contexts.of(array)
        self._tables = np.ascontiguousarray(contexts.select(0, len(array)).T.astype(np.uint8))
        self._count = contexts.tables
        # A squared step costs as much in all rows and columns, but for the rounding of their scales.
        self._unit = float(plan.factor.diagonal().log().mean().exp()) ** 2 / _BIT_PRICE
        self._priced = plan.inward
        self._bits = np.zeros((self._count, 2, trellis.SYMBOLS), np.float32)
        self._codes = np.ascontiguousarray(trellis.nearest(array, self._states).T)
        self.count_again()

    def count_again(self) -> None:
        """Takes what codes cost from the present ones."""
        if self._priced:
            symbols, quantizers = trellis.split(self._codes.T, self._states)
            self._bits = trellis.costs(trellis.count(symbols, quantizers, self._tables.T, self._count))

    def round(self, column: int, steps: Tensor, cost: float) -> Tensor:
        """Rounds a column.

        Args:
            column: which one.
            steps: float32 `[rows]`, its weights in steps.
            cost: of the square of a scale, next to those of other columns.

        Returns:
            float32 `[rows]`, whole numbers of steps.
        """
        found = trellis.search(
            steps.cpu().numpy()[None], self._states, weight=np.array([cost * self._unit], np.float32),
            tables=self._tables[column][None], bits=self._bits,
        )  # fmt: skip
        self._codes[column] = found[0]
        return torch.from_numpy(found[0].astype(np.float32) - trellis.ZERO).to(steps.device)


def _polish(
    weight: Tensor,
    found: Solution,
    plan: _Plan,
    *,
    sweeps: int = _SWEEPS,
    fit: bool = True,
    paths: _Paths | None = None,
) -> Solution:
    """Improves codes and scales in turn while the mask stays.

    Coordinate descent: every column in turn is rounded from where the error of all the others
    would have it (the walk only looks ahead); then each row's scale is fitted to its codes by
    least squares, unless it shall stay. Neither can raise the error, but for the scale's rounding to float16,
    and where small codes are cheaper for that (`quantize.drawn_in`).
    """
    quant, group = plan.spec.quant, plan.spec.group
    assert quant is not None
    assert found.scale is not None
    columns = weight.shape[1]
    scale, zero, hessian = found.scale, found.zero, plan.damped
    squares = hessian.diagonal()
    values, wanted = found.values.T.contiguous(), found.master.T.contiguous()
    kept = None if found.mask is None else found.mask.T.contiguous()
    original = weight.T.contiguous()
    sizes = q.row_squares(weight / scale) if plan.inward and paths is None else None
    for _ in range(sweeps):
        if paths is not None:
            paths.count_again()
        pull = hessian @ (original - values)
        if fit and group is None and not plan.covering:
            weighed = hessian @ values
            size = (values * weighed).sum(dim=0)
            ratio = torch.where(size > 0, 1.0 + (values * pull).sum(dim=0) / size, 1.0).clamp(0.5, 2.0)
            fitted = q.round_scale(scale[:, 0] * ratio, quant.scale_bits)
            ratio = fitted / scale[:, 0]
            pull -= weighed * (ratio - 1.0)
            values, scale = values * ratio, fitted.unsqueeze(1)
        for start in range(0, columns, _BLOCK_COLUMNS):
            stop = min(start + _BLOCK_COLUMNS, columns)
            before = values[start:stop].clone()
            for column in range(start, stop):
                number = 0 if group is None else column // group
                value, target = values[column], wanted[column]
                # Where the column would be best if it were not rounded; pruned ones stay as they were.
                best = value + pull[column] / squares[column]
                target.copy_(best if kept is None else torch.where(kept[column], best, target))
                if sizes is not None:
                    target.copy_(_drawn_in(target, scale[:, 0], sizes, _DRAWN_AGAIN))
                change = value.clone()
                if paths is not None:
                    steps = paths.round(column, target / scale[:, 0], float(squares[column]))
                    torch.mul(steps, scale[:, 0], out=value)
                else:
                    row_zero = None if zero is None else zero[:, number]
                    _round(target, scale[:, number], row_zero, plan, out=value)
                if kept is not None:
                    value.masked_fill_(~kept[column], 0.0)
                change.sub_(value)
                pull[start:stop].addr_(hessian[start:stop, column], change)
            changed = before.sub_(values[start:stop])
            pull[:start].addmm_(hessian[:start, start:stop], changed)
            pull[stop:].addmm_(hessian[stop:, start:stop], changed)
    # The fit multiplied float values: take them from the codes again.
    mask = found.mask
    settled = q.fake_quantize(values.T.contiguous(), mask, scale, zero, quant, group)
    return Solution(wanted.T.contiguous(), settled, mask, scale, zero, 0.0)


def _plain(weight: Tensor, importance: Tensor, plan: _Plan, given: Tensor | None) -> Solution:
    """The start without compensation, as the student makes it."""
    nm, quant = plan.spec.sparsity, plan.spec.quant
    mask = None if nm is None else nm_mask(weight.abs() * importance.sqrt(), nm)
    if quant is None:
        return Solution(weight, _pruned(_to_half(weight), mask), mask, None, None, 0.0)
    scale, zero = _scales(weight, mask, plan) if given is None else (given, None)
    if plan.inward:
        steps = weight / scale
        weight = q.drawn_in(steps, q.row_squares(steps)).mul_(scale)
    values = q.fake_quantize(_pruned(weight, mask), mask, scale, zero, quant, plan.spec.group)
    return Solution(weight, values, mask, scale, zero, 0.0)


def _better(one: Solution, other: Solution, weight: Tensor, hessian: Tensor) -> Solution:
    """For each row the solution with the lesser output error."""

    def errors(solution: Solution) -> Tensor:
        difference = weight - solution.values
        return ((difference @ hessian) * difference).sum(dim=1, keepdim=True)

    better = errors(other) < errors(one)

    def pick(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else torch.where(better, second, first)

    return Solution(
        torch.where(better, other.master, one.master), torch.where(better, other.values, one.values),
        pick(one.mask, other.mask), pick(one.scale, other.scale), pick(one.zero, other.zero), 0.0,
    )  # fmt: skip


def _pruned(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else weight.masked_fill(~mask, 0.0)


def _round(column: Tensor, scale: Tensor | None, zero: Tensor | None, plan: _Plan, *, out: Tensor) -> None:
    """Rounds one column `[rows]` to its codes' values, or to float16."""
    quant = plan.spec.quant
    if quant is None or scale is None:
        out.copy_(_to_half(column))
        return
    offset = quant.zero if zero is None else zero
    torch.div(column, scale, out=out)
    out.add_(offset).round_().clamp_(_lowest_code(plan), quant.max_code)
    out.sub_(offset).mul_(scale)


def _drawn_in(column: Tensor, scale: Tensor | None, sizes: Tensor, share: float = 1.0) -> Tensor:
    """A column `[rows]` drawn towards zero, for `_round`."""
    assert scale is not None
    return q.drawn_in((column / scale).unsqueeze(1), sizes, share).squeeze(1).mul_(scale)


def _choose(work: Tensor, kept: Tensor, diagonal: Tensor, position: int, width: int, nm: NM) -> None:
    """Chooses the mask of one N:M group of all rows: what costs least after compensation goes."""
    group = slice(position, position + width)
    kept[group] = nm_mask((work[group] / diagonal[group]).square_().T, nm).T


def _scale_into(
    scale: Tensor, zero: Tensor | None, number: int,
    work: Tensor, kept: Tensor | None, plan: _Plan, position: int, width: int,
) -> None:  # fmt: skip
    """Chooses the scale and zero point of one group from its weights as they are now."""
    group = slice(position, position + width)
    mask = None if kept is None else kept[group].T.contiguous()
    found, found_zero = _scales(work[group].T.contiguous(), mask, plan, plan.order[group])
    scale[:, number] = found[:, 0]
    if zero is not None and found_zero is not None:
        zero[:, number] = found_zero[:, 0]


def _scales(
    weight: Tensor, mask: Tensor | None, plan: _Plan, columns: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for a weight, or one for these columns of it."""
    quant = plan.spec.quant
    assert quant is not None
    group = plan.spec.group if columns is None else None
    pruned = _pruned(weight, mask)
    if plan.covering:
        return q.min_max(pruned, quant, group)
    squares = plan.hessian.diagonal()
    squares = squares if columns is None else squares[columns]
    importance = squares if bool((squares > 0).any()) else None
    return q.min_error(pruned, mask, quant, group, importance=importance)


def _lowest_code(plan: _Plan) -> int:
    # Scales that cover the largest weight never reach the integer grid's lowest code (see `min_max`).
    quant = plan.spec.quant
    return int(plan.covering and quant is not None and quant.symmetric and quant.grid == "integer")


def _to_half(values: Tensor) -> Tensor:
    return values.clamp(-kernels.MAX_SCALE, kernels.MAX_SCALE).half().float()


def _fit_kept(found: Solution, plan: _Plan) -> Tensor:
    """Moves the weights into the rounding intervals of their codes, and away from zero.

    At zero a kept weight would tie with pruned ones when masks are recomputed.
    """
    spec, quant = plan.spec, plan.spec.quant
    wanted, values, scale, zero = found.master, found.values, found.scale, found.zero
    if quant is None or scale is None:
        return torch.where(wanted.abs() < _TINY, torch.full_like(wanted, _TINY), wanted)
    columns = values.shape[1]
    step = q.spread(scale, columns, spec.group)
    low, high = values - _HALF_STEP * step, values + _HALF_STEP * step
    if plan.covering:
        offset = quant.zero if zero is None else q.spread(zero, columns, spec.group)
        low = torch.maximum(low, (_lowest_code(plan) - offset) * step)
        high = torch.minimum(high, (quant.max_code - offset) * step)
    master = wanted.clamp(low, high)
    least = (_LEAST_STEP * step).expand_as(master)
    return torch.where(master.abs() < least, torch.where(high >= least, least, -least), master)


def _fit_pruned(master: Tensor, kept: Tensor, importance: Tensor, nm: NM) -> Tensor:
    """Moves pruned weights below the least kept one of their N:M group, as the student ranks them."""
    rows, columns = master.shape
    weights = importance.sqrt()
    padding = -columns % nm.m
    scores = (master.abs() * weights).masked_fill(~kept, float("inf"))
    scores = nn.functional.pad(scores, (0, padding), value=float("inf")).reshape(rows, -1, nm.m)
    limit = _BELOW_KEPT * scores.amin(dim=-1, keepdim=True).expand(scores.shape)
    limit = limit.reshape(rows, -1)[:, :columns] / weights
    return torch.where(kept, master, master.clamp(-limit, limit))


def _fit_range(
    master: Tensor, kept: Tensor | None, scale: Tensor, zero: Tensor | None, spec: LayerSpec
) -> None:
    """Moves the largest kept weights of each scale group to the ends of its range, in place.

    A student whose scales follow the largest weights then finds the scales that were chosen.
    """
    quant, columns = spec.quant, master.shape[1]
    assert quant is not None
    size = columns if spec.group is None else spec.group
    for number, first in enumerate(range(0, columns, size)):
        values, step = master[:, first : first + size], scale[:, number : number + 1]
        present = torch.ones_like(values, dtype=torch.bool) if kept is None else kept[:, first : first + size]
        # The least scale stands for groups without any large weight.
        movable = present.any(dim=1, keepdim=True) & (step > kernels.MIN_SCALE)
        if zero is None:
            reach = quant.zero if quant.grid == "midrise" else quant.max_code - quant.zero
            at = values.abs().masked_fill(~present, -1.0).argmax(dim=1, keepdim=True)
            ends = [(at, (reach * step).copysign(values.gather(1, at)), movable)]
        else:
            offset = zero[:, number : number + 1]
            highest = values.masked_fill(~present, -torch.inf).argmax(dim=1, keepdim=True)
            lowest = values.masked_fill(~present, torch.inf).argmin(dim=1, keepdim=True)
            ends = [
                (highest, (quant.max_code - offset) * step, movable & (offset < quant.max_code)),
                (lowest, -offset * step, movable & (offset > 0)),
            ]
        for at, end, where in ends:
            values.scatter_(1, at, torch.where(where, end, values.gather(1, at)))
