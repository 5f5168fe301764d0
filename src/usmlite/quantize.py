"""Scales, codes and the fake-quantized weight with its straight-through gradient.

All functions work on matrices `[rows, columns]` (see `spec`). Scales and zero points are
`[rows, groups]`; `group` input columns share one, None means one group per row.

Scales are rounded to float16, or to the 8-bit grid, before they are used, because that is how they are
stored: what the student computes with is what ships, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from usmlite import entropy, kernels
from usmlite.kernels import MAX_SCALE, MIN_SCALE, trellis
from usmlite.spec import Int

# Rows are handled in blocks of about this many elements, so that a block's temporaries stay in cache.
_BLOCK_ELEMENTS = 1 << 17
# The mean square of a uniform quantizer's rounding error, in squares of its step.
_ROUNDING_ERROR = 1.0 / 12.0
# A row is never taken for smaller than this, in squares of steps.
_LEAST_SQUARE = 1e-6
# Halvings of the interval in which the step for a rate is searched.
_RATE_TRIES = 10
# On so many weights: more of them would not change the step.
_RATE_WEIGHTS = 1 << 18
# Steps along a trellis at the same rate: half as large, and a little more because the search spends fewer
# bits (docs/decisions/0030).
_TRELLIS_STEP = 0.55
# Codes stay this far within their ends at first, because compensation may make a weight larger.
_RATE_REACH = 0.9
# With less bits than this the best scale is far from the largest weight, and fitting it is worth the time.
_FEW_BITS = 3
_LEAST_FRACTION = 0.1
# How often a scale is fitted to the codes, which then follow it.
_FITS = 3
# Steps of the uniform quantizer with the least error, in standard deviations of a normal distribution, by
# bits (Max 1960, "Quantizing for minimum distortion", table II), and that of three levels.
_NORMAL_STEPS = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
_TERNARY_STEP = 1.224


def spread(per_group: Tensor, columns: int, group: int | None) -> Tensor:
    """Per-group values `[rows, groups]` to a tensor that broadcasts against `[rows, columns]`."""
    if group is None or per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group, dim=1)[:, :columns]


def _grouped(matrix: Tensor, group: int | None, fill: float) -> Tensor:
    """`[rows, columns]` to `[rows, groups, group]`, the last group padded with `fill`."""
    rows, columns = matrix.shape
    size = columns if group is None else group
    padding = -columns % max(size, 1)
    if padding:
        matrix = torch.nn.functional.pad(matrix, (0, padding), value=fill)
    return matrix.reshape(rows, -1, size)


def round_scale(scale: Tensor, bits: int = 16) -> Tensor:
    """The float32 value of the scale as it is stored, kept in float16's normal range.

    Args:
        scale: float32, any shape.
        bits: 16 for float16, or 8 (`kernels.scale_codes`).
    """
    if bits == 8:
        return kernels.scale_of(kernels.scale_codes(scale)).float()
    return scale.clamp(MIN_SCALE, MAX_SCALE).half().float()


def column_scales(weight: Tensor, quant: Int) -> Tensor:
    """One scale a column: its root mean square over that of the whole weight, so that 1 changes nothing.

    Args:
        weight: float32 `[rows, columns]`.
        quant: says how scales are stored.

    Returns:
        float32 `[columns]`, rounded as stored. Empty columns get the scale of the smallest other one.
    """
    peak = weight.abs().amax()
    if not peak > 0 or not peak.isfinite():
        return torch.ones(weight.shape[1], device=weight.device)
    # Against the peak, because squares of what float32 can hold may overflow.
    size = (weight / peak).square().mean(dim=0).sqrt()
    size = size.clamp(min=float(size[size > 0].min()))
    return round_scale(size / size.square().mean().sqrt(), quant.scale_bits)


def min_max(weight: Tensor, quant: Int, group: int | None) -> tuple[Tensor, Tensor | None]:
    """Scales that just cover the largest weights.

    Args:
        weight: float32 `[rows, columns]`, already pruned.
        quant: the codes.
        group: inputs per scale, or None for one scale a row.

    Returns:
        scale: float32 `[rows, groups]`, rounded as stored.
        zero: integer-valued float32 `[rows, groups]` if asymmetric, else None.
    """
    scale = round_scale(_covering(weight, quant, group), quant.scale_bits)
    if quant.symmetric:
        return scale, None
    low = _grouped(weight, group, 0.0).amin(dim=-1).clamp(max=0.0)
    return scale, (-low / scale).round().clamp(0, quant.max_code)


def _covering(weight: Tensor, quant: Int, group: int | None) -> Tensor:
    """The min-max scales before they are rounded."""
    grouped = _grouped(weight, group, 0.0)
    if quant.symmetric:
        # The integer grid reaches one step further below zero than above: cover the lesser side.
        reach = quant.zero if quant.grid == "midrise" else quant.max_code - quant.zero
        return grouped.abs().amax(dim=-1) / reach
    # Zero must be a level: pruned weights and padding are zeros.
    return (grouped.amax(dim=-1).clamp(min=0.0) - grouped.amin(dim=-1).clamp(max=0.0)) / quant.max_code


def following(scale: Tensor, weight: Tensor, quant: Int, group: int | None) -> Tensor:
    """Min-max scales with a gradient to the weights that they are computed from: each group's largest.

    Args:
        scale: float32 `[rows, groups]`, as `min_max` gives it.
        weight: float32 `[rows, columns]`, already pruned, with a gradient.
        quant: the codes.
        group: inputs per scale, or None.

    Returns:
        The same scales; what they add to the gradient takes the rounding to float16 as no rounding.
    """
    exact = _covering(weight, quant, group)
    return scale + (exact - exact.detach())


def min_error(
    weight: Tensor,
    mask: Tensor | None,
    quant: Int,
    group: int | None,
    *,
    importance: Tensor | None = None,
    candidates: int = 24,
    smallest: float = 0.35,
) -> tuple[Tensor, Tensor | None]:
    """Scales that minimise the squared rounding error of the kept weights.

    Tries `candidates` fractions of the min-max scale and keeps the best for every group. With 1 or 2 bits
    it is then fitted to its codes by least squares. For one bit, whose codes are the signs, that is exact:
    the levels become plus and minus the mean magnitude, as in XNOR-Net (arXiv 1603.05279) and the
    binarized USM RNN-T (arXiv 2406.02887); for the ternary grid, a threshold at half the scale and the mean
    of what lies above it (arXiv 1605.04711).

    Args:
        weight: float32 `[rows, columns]`, already pruned.
        mask: bool `[rows, columns]`, True where kept; None if dense.
        quant: the codes.
        group: inputs per scale, or None.
        importance: float32 `[columns]`, weights of the squared errors (such as the mean square of
            each input), or None for equal weights.
        candidates: how many fractions are tried.
        smallest: the smallest fraction; with 1 or 2 bits a tenth is tried too.

    Returns:
        As `min_max`.
    """
    full, zero = min_max(weight, quant, group)
    best, best_error = full, torch.full_like(full, float("inf"))

    def sums(values: Tensor) -> Tensor:
        return _grouped(values if importance is None else values * importance, group, 0.0).sum(dim=-1)

    def keep_better(scale: Tensor) -> None:
        nonlocal best, best_error
        total = sums((fake_quantize(weight, mask, scale, zero, quant, group) - weight).square_())
        better = total < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, total, best_error)

    low = min(smallest, _LEAST_FRACTION) if quant.bits < _FEW_BITS else smallest
    for fraction in torch.linspace(low, 1.0, candidates).tolist():
        keep_better(round_scale(full * fraction, quant.scale_bits))
    for _ in range(_FITS if quant.bits < _FEW_BITS else 0):
        levels = fake_quantize(weight, mask, best, zero, quant, group) / spread(best, weight.shape[1], group)
        # Where all levels are zero this is no number, and never better.
        keep_better(round_scale(sums(levels * weight) / sums(levels.square()), quant.scale_bits))
    return best, zero


def rate_scales(
    weight: Tensor,
    quant: Int,
    rate: float,
    rows: Tensor,
    columns: Tensor,
    *,
    inward: bool = False,
    along_trellis: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales with which entropy coding spends about `rate` bits on a weight.

    At a given rate the squared error is least if all weights whose errors count alike have the same step,
    however large they are, and codes enough not to be clipped (Gish and Pierce 1968). Where errors count
    differently, each octave of a step saves one bit on its weights.

    Args:
        weight: float32 `[rows, columns]`.
        quant: symmetric codes, of more bits than the rate.
        rate: bits a weight.
        rows: float32 `[rows]`, positive: how large the steps of a row are next to those of others.
        columns: float32 `[columns]`, the same of columns. Those with a weight too large for the codes get
            larger steps.
        inward: whether weights will be `drawn_in` before they are rounded.
        along_trellis: whether codes will follow a trellis (`trellis`); about, again.

    Returns:
        scale: float32 `[rows, 1]`, rounded as stored.
        column_scale: float32 `[columns]`, rounded as stored.
    """
    columns = round_scale(columns / columns.log().mean().exp(), quant.scale_bits)
    scaled = weight / (rows.unsqueeze(1) * columns)
    # What is searched on: every so many rows.
    sample = scaled[:: max(1, weight.numel() // _RATE_WEIGHTS)].cpu()
    contexts = entropy.Contexts.of(sample.numpy())
    size, one = float(scaled.square().mean().sqrt()) or 1.0, torch.ones(1, 1)
    # The rate falls by about a bit where the step doubles.
    low, high = -12.0, 6.0
    for _ in range(_RATE_TRIES):
        middle = (low + high) / 2
        steps = sample / (size * 2.0**middle)
        if inward:
            steps = drawn_in(steps, row_squares(steps))
        codes = quantize(steps, one, None, quant, None)
        bits = entropy.entropy_of(entropy.count_codes(codes.numpy(), quant.bits, contexts))
        low, high = (middle, high) if bits > rate else (low, middle)
    step, reach = size * 2.0**high, quant.max_code - quant.zero
    if along_trellis:
        step, reach = step * _TRELLIS_STEP, trellis.REACH
    scale = round_scale(rows.unsqueeze(1) * step, quant.scale_bits)
    largest = (weight / scale).abs().amax(dim=0) / (_RATE_REACH * reach)
    return scale, torch.where(largest > columns, round_scale(largest, quant.scale_bits), columns)


def row_squares(steps: Tensor) -> Tensor:
    """Mean squares of rows, float32 `[rows]`, of weights in steps `[rows, columns]`; for `drawn_in`."""
    return steps.square().mean(dim=1).clamp_(min=_LEAST_SQUARE)


def drawn_in(steps: Tensor, rows: Tensor, share: float = 1.0) -> Tensor:
    """Weights drawn towards zero before they are rounded, where small codes are the cheap ones.

    A code costs the more bits the further it is from zero. With normally distributed weights the least
    error at a given number of bits comes of thresholds between codes that lie further out by a common
    factor (entropy-constrained scalar quantization: Chou, Lookabaugh and Gray 1989; docs/decisions/0018).
    The factor is Wiener's, the weights' mean square over that with the rounding error's, row by row and
    column by column: little at three bits, a quarter at one.

    Args:
        steps: float32 `[rows, columns]`, weights in steps; a part of the columns will do.
        rows: float32 `[rows]`, `row_squares` of all columns.
        share: of the rounding error that is counted.

    Returns:
        float32 `[rows, columns]`, to be rounded.
    """
    size = rows.unsqueeze(1)
    return steps / (1.0 + share * _ROUNDING_ERROR / (size * (steps.square() / size).mean(dim=0)))


def finer_scales(scale: Tensor, zero: Tensor | None, quant: Int, finer: Int) -> tuple[Tensor, Tensor | None]:
    """Scales for more bits, from scales that have little error with fewer.

    They shrink as the best step of a normal distribution does (Max 1960), so that nothing is searched; the
    middle of the range stays where it is.

    Args:
        scale: float32 `[rows, groups]`, rounded as float16.
        zero: as `min_max` gives it.
        quant: the codes that these are for.
        finer: codes of the same kind with more bits.

    Returns:
        As `min_max`.
    """
    step = _TERNARY_STEP if quant.grid == "ternary" else _NORMAL_STEPS[quant.bits]
    shrunk = round_scale(scale * (_NORMAL_STEPS[finer.bits] / step))
    if zero is None:
        return shrunk, None
    middle = (quant.max_code / 2 - zero) * scale
    return shrunk, (finer.max_code / 2 - middle / shrunk).round().clamp(0, finer.max_code)


def finer_rate_scales(scale: Tensor, weight: Tensor, quant: Int, octaves: float) -> Tensor:
    """Scales for a higher rate: each bit halves them, until the codes just reach the row's largest weight.

    Args:
        scale: float32 `[rows, 1]`, as `rate_scales` gives it.
        weight: float32 `[rows, columns]`.
        quant: the codes.
        octaves: by how many bits the rate is higher.

    Returns:
        float32 `[rows, 1]`, rounded as stored.
    """
    floor = weight.detach().abs().amax(dim=1, keepdim=True) / (quant.max_code - quant.zero)
    return round_scale(torch.maximum(scale * 2.0**-octaves, floor.minimum(scale)), quant.scale_bits)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, quant: Int, group: int | None) -> Tensor:
    """Weights to codes: round(weight / scale + zero), clamped to 0 .. `quant.max_code`.

    Args:
        weight: float32 `[rows, columns]`.
        scale: float32 `[rows, groups]`, rounded as float16.
        zero: as `min_max` gives it.
        quant: the codes.
        group: inputs per scale, or None.

    Returns:
        uint8 `[rows, columns]`.
    """
    columns = weight.shape[1]
    offset = quant.zero if zero is None else spread(zero, columns, group)
    codes = (weight / spread(scale, columns, group)).add_(offset).round_().clamp_(0, quant.max_code)
    return codes.to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, quant: Int, group: int | None) -> Tensor:
    """Codes to weights: (code - zero) * scale, in float32. The inverse side of `quantize`."""
    columns = codes.shape[1]
    offset = quant.zero if zero is None else spread(zero.float(), columns, group)
    return (codes.float() - offset) * spread(scale.float(), columns, group)


def fake_quantize(
    weight: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    quant: Int,
    group: int | None,
) -> Tensor:
    """The weight that the codes stand for, pruned weights exactly zero. No gradient."""
    out = dequantize(quantize(weight, scale, zero, quant, group), scale, zero, quant, group)
    # Selected, not multiplied: a product would make negative zeros.
    return out if mask is None else torch.where(mask, out, torch.zeros_like(out))


def add_noise(weight: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """The weight with uniform noise from -1/2 to 1/2 of a step, which stands in for rounding.

    Args:
        weight: float32 `[rows, columns]`.
        scale: float32 `[rows, groups]`.
        group: inputs per scale, or None.
    """
    return weight + torch.rand_like(weight).sub_(0.5) * spread(scale, weight.shape[1], group)


class FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with gradients to the master weight and to the scale, or to its log if that is learned.

    The weight's gradient passes straight through, also to pruned weights (a mask can only move if
    they learn), and stops where a kept weight is clipped, because moving it changes nothing. The
    scale's gradient is that of learned step size quantization (LSQ, arXiv 1902.08153), but for one bit,
    where LSQ's would shrink the scale below the mean magnitude, the exact one. That of a learned scale is
    multiplied by it, because the parameter is the scale's logarithm: Adam's steps are then relative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scale: Tensor | None,
        scale: Tensor | None,
        mask: Tensor | None,
        zero: Tensor | None,
        quant: Int,
        group: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns the fake-quantized `[rows, columns]` in `dtype`; give `log_scale` or `scale`."""
        if log_scale is not None:
            scale = round_scale(log_scale.exp(), quant.scale_bits)
        assert scale is not None
        rows, columns = weight.shape
        out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
        for low, high in _blocks(rows, columns, weight.device):
            block_zero = None if zero is None else zero[low:high]
            block_scale = spread(scale[low:high], columns, group)
            offset = quant.zero if block_zero is None else spread(block_zero, columns, group)
            values = (weight[low:high] / block_scale).add_(offset).round_().clamp_(0, quant.max_code)
            if zero is not None:
                values.add_(0.0)  # -0.0 becomes 0.0, as the stored unsigned code has it
            values.sub_(offset).mul_(block_scale)
            if mask is not None:
                values.masked_fill_(~mask[low:high], 0.0)
            out[low:high] = values
        ctx.save_for_backward(weight, scale, mask, zero)
        ctx.quant, ctx.group, ctx.learned = quant, group, log_scale is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to the weight and the log scale."""
        (grad,) = grads
        weight, scale, mask, zero = ctx.saved_tensors
        quant: Int = ctx.quant
        rows, columns = weight.shape
        # One bit is the sign, which no scale changes: its value is the scale times a constant.
        signs = quant.bits == 1 and quant.symmetric
        grad_weight = torch.empty_like(weight)
        grad_scale = torch.empty_like(scale) if ctx.learned or ctx.needs_input_grad[2] else None
        for low, high in _blocks(rows, columns, weight.device):
            block = grad_weight[low:high]
            block.copy_(grad[low:high])
            block_scale = spread(scale[low:high], columns, ctx.group)
            offset = quant.zero if zero is None else spread(zero[low:high], columns, ctx.group)
            position = (weight[low:high] / block_scale).add_(offset)
            code = position.round()
            clipped = (code < 0) | (code > quant.max_code)
            if grad_scale is not None:
                code.clamp_(0, quant.max_code)
                # d(value)/d(scale): the level where clipped, level minus position where not.
                level = code - offset
                slope = level if signs else torch.where(clipped, level, code.sub_(position))
                slope.mul_(block)
                if mask is not None:
                    slope.masked_fill_(~mask[low:high], 0.0)
                total = _grouped(slope, ctx.group, 0.0).sum(dim=-1)
                grad_scale[low:high] = total
            if mask is not None:
                clipped &= mask[low:high]
            block.masked_fill_(clipped, 0.0)
        if grad_scale is not None and ctx.learned:
            kept = columns if mask is None else max(1, int(mask[0].sum()))
            per_group = kept if ctx.group is None else max(1, kept * ctx.group // columns)
            grad_scale.mul_(scale).mul_(1.0 / math.sqrt(per_group * quant.max_code))
        to_log, to_scale = (grad_scale, None) if ctx.learned else (None, grad_scale)
        return grad_weight, to_log, to_scale, None, None, None, None, None


def _blocks(rows: int, columns: int, device: torch.device) -> list[tuple[int, int]]:
    """Row ranges: small enough for the cache on a CPU, everything at once on an accelerator."""
    if device.type != "cpu":
        return [(0, rows)] if rows else []
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    return [(low, min(low + step, rows)) for low in range(0, rows, step)]
