"""One weight as the tensors that a file holds for it, its parts: packed, and checked when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from usmlite import kernels
from usmlite.errors import ModelError, PackedModelError
from usmlite.packfile.directory import COPY_AGAIN
from usmlite.spec import Int, LayerSpec, matrix_shape

PARTS = ("codes", "coded", "values", "scale", "zero", "column_scale", "pattern")


def part_shapes(spec: LayerSpec, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each stored part of a `[rows, columns]` weight; none for a kept weight."""
    if spec.is_kept:
        return {}
    stored, groups = spec.stored_columns(columns), spec.scale_groups(columns)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if spec.quant is None:
        parts["values"] = (torch.float16, (rows, stored))
    else:
        parts["codes"] = (torch.uint8, (rows, kernels.code_bytes(stored, spec.quant.bits)))
        scale_dtype = torch.uint8 if spec.quant.scale_bits == 8 else torch.float16
        parts["scale"] = (scale_dtype, (rows, groups))
        if not spec.quant.symmetric:
            parts["zero"] = (torch.uint8, (rows, groups))
        if spec.column_scales:
            parts["column_scale"] = (scale_dtype, (columns,))
    if spec.sparsity is not None:
        code = spec.sparsity.code
        words = math.ceil(math.ceil(columns / spec.sparsity.m) / code.groups)
        parts["pattern"] = (torch.uint8, (rows, words * code.word_bytes))
    return parts


def pack_rows(
    spec: LayerSpec,
    codes: Tensor,
    *,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> dict[str, Tensor]:
    """Packs some rows of a weight; every row is packed on its own.

    Args:
        spec: what the weight becomes.
        codes: uint8 `[rows, columns]`; float16 values if the spec has no codes.
        mask: bool `[rows, columns]`, True where kept; None if dense.
        scale: float `[rows, groups]`, exactly representable as the spec stores scales.
        zero: integer-valued `[rows, groups]`, if asymmetric.

    Returns:
        The parts, with the dtypes and shapes of `part_shapes`.

    Raises:
        ModelError: the mask does not keep N of every M, or a scale cannot be stored.
    """
    rows, columns = codes.shape
    parts: dict[str, Tensor] = {}
    if spec.sparsity is not None:
        if mask is None:
            raise ModelError("a sparse weight without a mask")
        n, m = spec.sparsity.n, spec.sparsity.m
        padding = -columns % m
        if padding:
            codes = torch.nn.functional.pad(codes, (0, padding))
            # The last group's places past the last column, lowest first, fill its N slots.
            left = m - padding
            slots = torch.arange(padding, device=mask.device) < n - left
            mask = torch.cat([mask, slots.expand(rows, padding)], dim=1)
        grouped = mask.reshape(rows, -1, m)
        if not bool((grouped.sum(dim=-1) == n).all()):
            raise ModelError(f"the mask does not keep {n} of every {m} neighbours")
        codes = codes[mask].reshape(rows, -1)
        ranks, code = kernels.pattern_ranks(grouped, n), spec.sparsity.code
        parts["pattern"] = _pack_words(ranks, code.patterns, code.groups, code.word_bytes)
    if spec.quant is None:
        return {"values": codes.half().contiguous(), **parts}
    parts["codes"] = pack_codes(codes, spec.quant.bits)
    if scale is None:
        raise ModelError("a quantized weight without scales")
    parts["scale"] = stored_scales(scale, spec.quant)
    if not spec.quant.symmetric:
        if zero is None:
            raise ModelError("an asymmetric weight without zero points")
        parts["zero"] = zero.to(torch.uint8)
    return parts


def stored_scales(scale: Tensor, quant: Int) -> Tensor:
    """Scales as they are stored: float16, or uint8 codes where the spec says so; of the same shape.

    Raises:
        ModelError: one is not positive, or not exactly what is stored for it.
    """
    coded = quant.scale_bits == 8
    stored = kernels.scale_codes(scale) if coded else scale.half()
    exact = (kernels.scale_of(stored) if coded else stored).float() == scale
    if not bool(exact.all() & (scale > 0).all() & scale.isfinite().all()):
        raise ModelError(f"scales must be positive and exact in {quant.scale_bits} bits")
    return stored


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes to bytes, least significant bit first, dense across bytes, each row ending on a byte.

    Args:
        codes: uint8 `[rows, count]`, below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 `[rows, ceil(count * bits / 8)]`; unused bits are 0.
    """
    if bits == 8:
        return codes.contiguous()
    run_bytes = math.lcm(bits, 8) // 8
    run_codes = run_bytes * 8 // bits
    rows, count = codes.shape
    padding = -count % run_codes
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    runs = codes.reshape(rows, -1, run_codes)
    dtype = torch.uint8 if run_bytes == 1 else torch.int32 if run_bytes <= 3 else torch.int64
    words = runs[..., 0].to(dtype, copy=True)
    for i in range(1, run_codes):
        words |= runs[..., i].to(dtype) << (bits * i)
    packed = torch.empty(*words.shape, run_bytes, dtype=torch.uint8, device=codes.device)
    for i in range(run_bytes):
        packed[..., i] = (words >> (8 * i)) & 255
    return packed.reshape(rows, -1)[:, : kernels.code_bytes(count, bits)].contiguous()


def _pack_words(ranks: Tensor, patterns: int, digits: int, word_bytes: int) -> Tensor:
    """Ranks int64 `[rows, groups]` to uint8 `[rows, words * word_bytes]`."""
    rows, groups = ranks.shape
    padding = -groups % digits
    if padding:
        ranks = torch.nn.functional.pad(ranks, (0, padding))
    runs = ranks.reshape(rows, -1, digits)
    words = runs[..., digits - 1].clone()
    for digit in range(digits - 2, -1, -1):
        words.mul_(patterns).add_(runs[..., digit])
    out = torch.empty(*words.shape, word_bytes, dtype=torch.uint8, device=ranks.device)
    for i in range(word_bytes):
        out[..., i] = (words >> (8 * i)) & 255
    return out.reshape(rows, -1)


def packed_weight(
    spec: LayerSpec, shape: Sequence[int], parts: Mapping[str, Tensor], *, where: str
) -> kernels.PackedWeight:
    """Checked parts of one weight, ready for the kernels.

    Args:
        spec: what the weight became.
        shape: the weight's own shape, two or three dimensions.
        parts: the stored parts by name.
        where: file and weight, for errors.

    Raises:
        PackedModelError: a part is missing, of another dtype or shape, or holds impossible values.
    """
    rows, columns = matrix_shape(shape)
    expected = part_shapes(spec, rows, columns)
    if set(parts) != set(expected):
        raise PackedModelError(
            "the stored parts do not fit the layer's spec", where=where,
            expected=", ".join(sorted(expected)), found=", ".join(sorted(parts)), remedy=COPY_AGAIN,
        )  # fmt: skip
    for name, (dtype, part_shape) in expected.items():
        part = parts[name]
        if part.dtype != dtype or tuple(part.shape) != part_shape:
            raise PackedModelError(
                "contradicts the layer's spec", where=f"{where}.{name}",
                expected=f"{dtype} {list(part_shape)}", found=f"{part.dtype} {list(part.shape)}",
                remedy=COPY_AGAIN,
            )  # fmt: skip
    layout = None
    if spec.sparsity is not None:
        code = spec.sparsity.code
        layout = kernels.PatternLayout(spec.sparsity.n, spec.sparsity.m, code.word_bytes, code.groups)
    weight = kernels.PackedWeight(
        columns=columns,
        bits=None if spec.quant is None else spec.quant.bits,
        offset=0.0 if spec.quant is None else spec.quant.zero,
        group=spec.group,
        layout=layout,
        codes=parts["values" if spec.quant is None else "codes"],
        scale=_scales(parts.get("scale"), f"{where}.scale"),
        zero=parts.get("zero"),
        column_scale=_scales(parts.get("column_scale"), f"{where}.column_scale"),
        pattern=parts.get("pattern"),
    )
    _check_values(weight, where)
    if spec.quant is not None and spec.quant.grid == "ternary":
        _check_ternary(weight.codes, where)
    return weight


def _scales(stored: Tensor | None, where: str) -> Tensor | None:
    """Scales in float16."""
    if stored is None or stored.dtype != torch.uint8:
        return stored
    if stored.numel() and int(stored.max()) > kernels.MOST_SCALE_CODE:
        raise PackedModelError(
            "impossible scale", where=where, expected=f"0 to {kernels.MOST_SCALE_CODE}",
            found=int(stored.max()), remedy=COPY_AGAIN,
        )  # fmt: skip
    return kernels.scale_of(stored)


def _check_ternary(codes: Tensor, where: str) -> None:
    """Refuses the fourth code of 2 bits, both of them set."""
    for low, high in kernels.row_blocks(*codes.shape):
        block = codes[low:high]
        if bool((block & (block >> 1) & 0x55).any()):
            raise PackedModelError(
                "impossible ternary code", where=f"{where}.codes, rows {low} to {high - 1}",
                expected="0, 1 or 2", found=3, remedy=COPY_AGAIN,
            )  # fmt: skip


def _check_values(weight: kernels.PackedWeight, where: str) -> None:
    if weight.bits is None:
        check_finite(weight.codes, f"{where}.values")
    for part, scale in (("scale", weight.scale), ("column_scale", weight.column_scale)):
        if scale is not None and not bool((scale > 0).all() & scale.isfinite().all()):
            bad = scale[~((scale > 0) & scale.isfinite())]
            raise PackedModelError(
                "impossible scale", where=f"{where}.{part}", expected="finite numbers above 0",
                found=f"{bad[0].item()} ({bad.numel()} such)", remedy=COPY_AGAIN,
            )  # fmt: skip
    if weight.zero is not None and weight.bits is not None:
        highest = int(weight.zero.max())
        if highest >= 1 << weight.bits:
            raise PackedModelError(
                "impossible zero point", where=f"{where}.zero",
                expected=f"0 to {(1 << weight.bits) - 1}", found=highest, remedy=COPY_AGAIN,
            )  # fmt: skip
    if weight.layout is not None and weight.pattern is not None:
        layout = weight.layout
        limit = layout.patterns**layout.digits
        # The last word of a row may describe fewer groups; its other digits are 0.
        last = layout.patterns ** ((weight.groups - 1) % layout.digits + 1)
        for low, high in kernels.row_blocks(weight.rows, weight.columns):
            words = kernels.pattern_words(weight.pattern[low:high], layout.word_bytes)
            # A word with its highest bit set reads as negative: it is above every limit too.
            bad_word = (words < 0) | (words >= limit if limit < 1 << 63 else torch.zeros_like(words).bool())
            bad_word[:, -1] |= words[:, -1] >= last if last < 1 << 63 else False
            if bool(bad_word.any()):
                row, word = (int(i) for i in bad_word.nonzero()[0])
                raise PackedModelError(
                    f"impossible {layout.n}:{layout.m} pattern", where=f"{where}.pattern, row {low + row}",
                    expected=f"a word below {last if word == words.shape[1] - 1 else limit}",
                    found=int(words[row, word]) % (1 << 8 * layout.word_bytes), remedy=COPY_AGAIN,
                )  # fmt: skip


def check_finite(tensor: Tensor, where: str) -> None:
    """Refuses a tensor with NaN or infinity.

    Raises:
        PackedModelError: it has one.
    """
    if tensor.is_floating_point():
        # Twice: summing is fast and keeps NaN and infinity; only a suspicious sum is looked at closely.
        if bool(tensor.sum(dtype=torch.float64).isfinite()):
            return
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise PackedModelError(
                "numbers that are not finite", where=where, expected="finite numbers",
                found=f"{bad} of {tensor.numel()}", remedy=COPY_AGAIN,
            )  # fmt: skip


def to_weight(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """A matrix `[rows, columns]` as the weight it stands for; convolutions are `[out, in, kernel]`."""
    if len(shape) == 2:
        return matrix
    return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
