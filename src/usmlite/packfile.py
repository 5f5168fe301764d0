"""The packed model's files: byte layout, versioned header, and the checks that make them safe to read.

docs/format.md describes the same for somebody who writes another reader. Nothing that a file says is
believed before it has been compared with the file's real size and with what the other files say.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from usmlite import entropy, kernels
from usmlite.errors import ModelError, OutputError, PackedModelError, SpecError
from usmlite.spec import TRELLIS_STATES, Int, LayerSpec, matrix_shape

QUANT_METHOD = "usmlite"
FORMAT_VERSION = 3
# What is written without anything that this version cannot say, for the sake of older readers.
_PLAIN_VERSION = 2
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
PARTS = ("codes", "coded", "values", "scale", "zero", "column_scale", "pattern")

_MAX_CONFIG_BYTES = 16 << 20
_MAX_HEADER_BYTES = 64 << 20
_MAX_COMPUTED = 1 << 26
_CHUNK_BYTES = 1 << 20
# How many times as large fixed-width codes may be as the entropy-coded ones in the file.
_MOST_EXPANSION = 16
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
PROCESSOR_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "normalizer.json", "sentencepiece.bpe.model",
)  # fmt: skip
# What a packed model consists of; anything else in its directory is the user's.
_OWN_FILES = frozenset({WEIGHTS_NAME, CONFIG_NAME, *PROCESSOR_FILES})
_AGAIN = "Copy or download the packed model again."


# One weight


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
            expected=", ".join(sorted(expected)), found=", ".join(sorted(parts)), remedy=_AGAIN,
        )  # fmt: skip
    for name, (dtype, part_shape) in expected.items():
        part = parts[name]
        if part.dtype != dtype or tuple(part.shape) != part_shape:
            raise PackedModelError(
                "contradicts the layer's spec", where=f"{where}.{name}",
                expected=f"{dtype} {list(part_shape)}", found=f"{part.dtype} {list(part.shape)}",
                remedy=_AGAIN,
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
            found=int(stored.max()), remedy=_AGAIN,
        )  # fmt: skip
    return kernels.scale_of(stored)


def _check_ternary(codes: Tensor, where: str) -> None:
    """Refuses the fourth code of 2 bits, both of them set."""
    for low, high in kernels.row_blocks(*codes.shape):
        block = codes[low:high]
        if bool((block & (block >> 1) & 0x55).any()):
            raise PackedModelError(
                "impossible ternary code", where=f"{where}.codes, rows {low} to {high - 1}",
                expected="0, 1 or 2", found=3, remedy=_AGAIN,
            )  # fmt: skip


def _check_values(weight: kernels.PackedWeight, where: str) -> None:
    if weight.bits is None:
        check_finite(weight.codes, f"{where}.values")
    for part, scale in (("scale", weight.scale), ("column_scale", weight.column_scale)):
        if scale is not None and not bool((scale > 0).all() & scale.isfinite().all()):
            bad = scale[~((scale > 0) & scale.isfinite())]
            raise PackedModelError(
                "impossible scale", where=f"{where}.{part}", expected="finite numbers above 0",
                found=f"{bad[0].item()} ({bad.numel()} such)", remedy=_AGAIN,
            )  # fmt: skip
    if weight.zero is not None and weight.bits is not None:
        highest = int(weight.zero.max())
        if highest >= 1 << weight.bits:
            raise PackedModelError(
                "impossible zero point", where=f"{where}.zero",
                expected=f"0 to {(1 << weight.bits) - 1}", found=highest, remedy=_AGAIN,
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
                    found=int(words[row, word]) % (1 << 8 * layout.word_bytes), remedy=_AGAIN,
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
                found=f"{bad} of {tensor.numel()}", remedy=_AGAIN,
            )  # fmt: skip


def to_weight(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """A matrix `[rows, columns]` as the weight it stands for; convolutions are `[out, in, kernel]`."""
    if len(shape) == 2:
        return matrix
    return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that belong in a file, tied ones once; not what a model computes itself."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


# Tensors that are computed


def _sinusoids(length: int, channels: int) -> Tensor:
    """Whisper's encoder positions, in float32 as openai/whisper `model.py` computes them."""
    increment = math.log(10000) / (channels // 2 - 1)
    rates = torch.exp(-increment * torch.arange(channels // 2))
    angles = torch.arange(length)[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


COMPUTED: dict[str, Callable[[int, int], Tensor]] = {
    "sinusoids": _sinusoids,
    # Checkpoints that were once stored in float16 have the rounded table.
    "sinusoids-float16": lambda length, channels: _sinusoids(length, channels).half().float(),
}


def compute(rule: str, shape: Sequence[int]) -> Tensor:
    """A tensor that is computed instead of stored, float32.

    Args:
        rule: a name in `COMPUTED`.
        shape: `[length, channels]`.

    Raises:
        PackedModelError: such a table cannot have this shape.
    """
    if len(shape) != 2 or shape[1] < 4 or shape[1] % 2 or math.prod(shape) > _MAX_COMPUTED:
        raise PackedModelError(
            "cannot be computed", where=rule,
            expected=f"[length, an even number of channels], at most {_MAX_COMPUTED} numbers",
            found=list(shape), remedy=_AGAIN,
        )  # fmt: skip
    return COMPUTED[rule](*shape)


def computed_rule(table: Tensor, *, tolerance: float = 1e-3) -> str | None:
    """The rule that computes this table most closely; None if none comes within the tolerance."""
    if table.dim() != 2 or not table.numel() or table.shape[1] < 4 or table.shape[1] % 2:
        return None
    # Row 0 is sin(0) and cos(0): a look at it spares the whole table for other tensors.
    row = torch.cat([torch.zeros(table.shape[1] // 2), torch.ones(table.shape[1] // 2)])
    if not bool(((table[0].float().cpu() - row).abs() <= tolerance).all()):
        return None
    differences = {
        rule: float((make(*table.shape).to(table.device) - table.float()).abs().max())
        for rule, make in COMPUTED.items()
    }
    best = min(differences, key=differences.__getitem__)
    return best if differences[best] <= tolerance else None


# The manifest: `quantization_config` in config.json


@dataclass(frozen=True)
class PackedLayer:
    """What the packed model says of one weight.

    Attributes:
        shape: its shape in the model.
        spec: what it became.
        coded: bytes of its entropy-coded codes, and of its scales if they have 8 bits; None where they are
            stored with a fixed width.
        tables: how many tables of frequencies are among these bytes.
        trellis: how many states the trellis has that the entropy-coded codes follow; None without one.
    """

    shape: tuple[int, ...]
    spec: LayerSpec
    coded: int | None = None
    tables: int = 1
    trellis: int | None = None

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each part as it lies in the file."""
        parts = part_shapes(self.spec, *matrix_shape(self.shape))
        if self.coded is None:
            return parts
        rest = {name: part for name, part in parts.items() if name not in ("codes", *self._beside())}
        return {"coded": (torch.uint8, (self.coded,)), **rest}

    def _beside(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parts that lie with entropy-coded codes."""
        if self.spec.quant is None or self.spec.quant.scale_bits != 8:
            return {}
        shapes = part_shapes(self.spec, *matrix_shape(self.shape))
        return {name: shapes[name][1] for name in ("scale", "column_scale") if name in shapes}

    def decoded(self, parts: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
        """The parts with fixed-width codes.

        Args:
            parts: as they lie in the file.
            where: file and weight, for errors.

        Raises:
            PackedModelError: the coded codes are not what the spec asks for.
        """
        if self.coded is None or "coded" not in parts:
            return dict(parts)
        assert self.spec.quant is not None
        rows, columns = matrix_shape(self.shape)
        stored, bits = self.spec.stored_columns(columns), self.spec.quant.bits
        beside = self._beside()
        sizes = [math.prod(part) for part in beside.values()]
        try:
            codes, found = entropy.decode(
                parts["coded"].cpu().numpy(), bits, (rows, stored), self.tables, sum(sizes),
                trellis=self.trellis,
            )  # fmt: skip
        except ValueError as error:
            raise PackedModelError(
                "impossible entropy-coded codes", where=f"{where}.coded", found=error, remedy=_AGAIN
            ) from None
        rest = {name: part for name, part in parts.items() if name != "coded"}
        pieces = torch.split(torch.from_numpy(found.copy()), sizes) if sizes else ()
        rest |= {
            name: piece.reshape(part) for (name, part), piece in zip(beside.items(), pieces, strict=True)
        }
        return rest | {"codes": pack_codes(torch.from_numpy(codes), bits)}

    def encoded(
        self, parts: Mapping[str, Tensor], codes: Tensor, trellis: int | None = None
    ) -> tuple[PackedLayer, dict[str, Tensor]]:
        """The parts with entropy-coded codes, and what the manifest says then; else as they are.

        Args:
            parts: with fixed-width codes.
            codes: uint8 `[rows, stored]`, the same ones.
            trellis: how many states the trellis has that they follow; None without one.

        Raises:
            ModelError: the codes do not follow it.
        """
        assert self.spec.quant is not None
        beside = [parts[name].reshape(-1) for name in self._beside()]
        array, bits = codes.numpy(), self.spec.quant.bits
        try:
            contexts = entropy.best_contexts(array, bits, trellis)
            data = entropy.encode(
                array, bits, contexts, torch.cat(beside).numpy() if beside else None, trellis=trellis
            )
        except ValueError as error:
            raise ModelError(
                "the weight does not follow its trellis", found=error,
                remedy="Start it with calibrate's method 'hessian', and do not train it.",
            ) from None  # fmt: skip
        low, high = coded_bounds(self.fixed_bytes)
        if not low <= len(data) <= high:
            return self, dict(parts)
        rest = {name: part for name, part in parts.items() if name not in ("codes", *self._beside())}
        layer = replace(self, coded=len(data), tables=contexts.tables, trellis=trellis)
        return layer, {"coded": torch.from_numpy(data), **rest}

    @property
    def fixed_bytes(self) -> int:
        """Bytes with a fixed width of what entropy coding puts together."""
        shapes = part_shapes(self.spec, *matrix_shape(self.shape))
        return sum(math.prod(shapes[name][1]) for name in ("codes", *self._beside()) if name in shapes)

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        coded = {} if self.coded is None else {"coded": self.coded}
        if self.tables > 1:
            coded["tables"] = self.tables
        if self.trellis is not None:
            coded["trellis"] = self.trellis
        return {"shape": list(self.shape), **self.spec.to_dict(), **coded}


@dataclass(frozen=True)
class Manifest:
    """The `quantization_config` of a packed model.

    Attributes:
        layers: module name to shape and spec of every compressed weight.
        computed: tensor name to the rule that computes it.
        digest: "sha256:" and 64 hexadecimal digits over all tensors, see `digest`.
        version: the usmlite that wrote it.
    """

    layers: Mapping[str, PackedLayer]
    computed: Mapping[str, str]
    digest: str
    version: str

    @property
    def format_version(self) -> int:
        """The least version of the format that can say this."""
        plain = all(layer.trellis is None for layer in self.layers.values())
        return _PLAIN_VERSION if plain else FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "digest": self.digest,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "computed": dict(self.computed),
            "usmlite_version": self.version,
        }

    @classmethod
    def from_dict(cls, values: object, *, where: str) -> Manifest:
        """Reads `to_dict`'s form.

        Raises:
            PackedModelError: it is not ours, from a newer usmlite, or damaged.
        """
        if not isinstance(values, Mapping) or values.get("quant_method") != QUANT_METHOD:
            found = values.get("quant_method") if isinstance(values, Mapping) else None
            raise PackedModelError(
                "not a packed model of usmlite", where=where,
                expected=f"quantization_config with quant_method {QUANT_METHOD!r}",
                found="no quantization_config" if values is None else f"quant_method {found!r}",
                remedy="Give the directory that `usmlite compress` wrote.",
            )  # fmt: skip
        where = f"{where}: quantization_config"
        version = values.get("format_version")
        if version not in (_PLAIN_VERSION, FORMAT_VERSION) or not isinstance(version, int):
            what, remedy = "unusable format version", _AGAIN
            if isinstance(version, int) and version > FORMAT_VERSION:
                what = "packed by a newer usmlite"
                remedy = "Install a newer usmlite: pip install --upgrade usmlite."
            elif version == 1 and not isinstance(version, bool):
                what, remedy = "packed by an usmlite before its first release", "Compress the model again."
            raise PackedModelError(
                what, where=f"{where}.format_version",
                expected=f"{_PLAIN_VERSION} or {FORMAT_VERSION}", found=repr(version),
                remedy=remedy,
            )  # fmt: skip
        digest_text = values.get("digest")
        if not isinstance(digest_text, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest_text):
            raise PackedModelError(
                "unusable digest", where=f"{where}.digest", expected="'sha256:' and 64 hexadecimal digits",
                found=repr(digest_text)[:100], remedy=_AGAIN,
            )  # fmt: skip
        layers = values.get("layers")
        if not isinstance(layers, Mapping):
            raise PackedModelError("no layers", where=f"{where}.layers", remedy=_AGAIN)
        computed = values.get("computed", {})
        # As a list: what a file says need not be hashable.
        if not isinstance(computed, Mapping) or any(rule not in list(COMPUTED) for rule in computed.values()):
            raise PackedModelError(
                "unknown computed tensors", where=f"{where}.computed",
                expected=f"tensor names with {' or '.join(COMPUTED)}",
                found=repr(computed)[:100], remedy=_AGAIN,
            )  # fmt: skip
        return cls(
            {
                str(name): _read_layer(layer, version, f"{where}.layers[{name!r}]")
                for name, layer in layers.items()
            },
            {str(name): str(rule) for name, rule in computed.items()},
            digest_text,
            str(values.get("usmlite_version")),
        )

    def tensors(
        self, shapes: Mapping[str, tuple[int, ...]], *, where: str
    ) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """What the weights file must hold for a model.

        Args:
            shapes: name and shape of every parameter and buffer of the model, tied ones once.
            where: what errors should name.

        Returns:
            Dtype (None: float16, float32 or any whole numbers) and shape of every stored tensor.

        Raises:
            PackedModelError: the manifest speaks of weights that the model does not have, or not so.
        """
        unknown = {f"{name}.weight" for name in self.layers} | set(self.computed)
        unknown -= set(shapes)
        if unknown:
            raise PackedModelError(
                "describes a weight that the model does not have", where=f"{where}: quantization_config",
                expected="weights of the model", found=min(unknown), remedy=_AGAIN,
            )  # fmt: skip
        out: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if layer is None:
                if name not in self.computed:
                    out[name] = (None, shape)
                continue
            if layer.shape != shape:
                raise PackedModelError(
                    "the layer's shape contradicts the model's config", where=f"{where}: {name}",
                    expected=list(shape), found=list(layer.shape), remedy=_AGAIN,
                )  # fmt: skip
            for part, described in layer.parts().items():
                out[f"{name}.{part}"] = described
        return out


def _read_layer(values: object, version: int, where: str) -> PackedLayer:
    if not isinstance(values, Mapping):
        raise PackedModelError(
            "unreadable layer", where=where, expected="an object", found=repr(values)[:100]
        )
    rest = dict(values)
    shape, coded, tables = rest.pop("shape", None), rest.pop("coded", None), rest.pop("tables", 1)
    trellis = rest.pop("trellis", None)
    # Bounded, so that no product of a hostile file's numbers gets out of hand.
    if (
        not isinstance(shape, list)
        or len(shape) not in (2, 3)
        or any(
            not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 1 << 31 for size in shape
        )
    ):
        raise PackedModelError(
            "unusable shape", where=f"{where}.shape", expected="2 or 3 whole numbers above 0",
            found=repr(shape)[:100], remedy=_AGAIN,
        )  # fmt: skip
    try:
        spec = LayerSpec.from_dict(rest, where=where)
        if spec.is_kept:
            raise SpecError("neither bits nor sparsity", expected="a compressed layer")
        layer = PackedLayer(tuple(shape), spec, coded, tables, trellis)
    except (SpecError, TypeError) as error:
        raise PackedModelError(f"unusable layer spec: {error}", where=where, remedy=_AGAIN) from None
    if coded is not None:
        low, high = coded_bounds(layer.fixed_bytes)
        if not isinstance(coded, int) or isinstance(coded, bool) or not low <= coded <= high:
            raise PackedModelError(
                "unusable number of bytes", where=f"{where}.coded", expected=f"{low} to {high}",
                found=repr(coded)[:100], remedy=_AGAIN,
            )  # fmt: skip
    most = 1 if coded is None else entropy.MOST_TABLES
    if not isinstance(tables, int) or isinstance(tables, bool) or not 1 <= tables <= most:
        raise PackedModelError(
            "unusable number of tables", where=f"{where}.tables", expected=f"1 to {most}",
            found=repr(tables)[:100], remedy=_AGAIN,
        )  # fmt: skip
    if trellis is not None:
        _check_trellis(layer, version, f"{where}.trellis")
    return layer


def _check_trellis(layer: PackedLayer, version: int, where: str) -> None:
    known = isinstance(layer.trellis, int) and layer.trellis in TRELLIS_STATES
    quant = layer.spec.quant
    fits = layer.coded is not None and quant is not None and quant == Int(8, scale_bits=quant.scale_bits)
    if version == _PLAIN_VERSION or not known or not fits or layer.spec.sparsity is not None:
        raise PackedModelError(
            "unusable trellis", where=where,
            expected=f"{', '.join(map(str, TRELLIS_STATES))} states, of dense entropy-coded codes of 8 bits, "
            f"in version {FORMAT_VERSION}",
            found=f"{layer.trellis!r:.100} of {layer.spec}, version {version}", remedy=_AGAIN,
        )  # fmt: skip


def coded_bounds(fixed: int) -> tuple[int, int]:
    """The least and the most bytes that entropy-coded codes may have instead of `fixed` bytes.

    The lower bound keeps a small hostile file from growing without limit when it is decoded.
    """
    return math.ceil(fixed / _MOST_EXPANSION), fixed - 1


def usmlite_version() -> str:
    """The installed version, "unknown" where the package is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("usmlite")
    return "unknown"


# Reading


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: bytes `start` to `stop` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class WeightsFile:
    """A safetensors file whose header has been checked; tensors are memory-mapped when asked for.

    Attributes:
        path: the file.
        size: its bytes.
        entries: what it holds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Checks the header against the file's real size, before anything is allocated for it.

        Raises:
            PackedModelError: the file is missing, truncated, or its header is impossible.
        """
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.entries = _read_header(file, self.size, str(self.path))
        except OSError as error:
            raise PackedModelError(
                "cannot be read", where=self.path, found=error.strerror or str(error), remedy=_AGAIN
            ) from error

    def digest(self) -> str:
        """The digest over all tensors, read in chunks.

        For every tensor, from the largest element size to the smallest and by name (as UTF-8) within one:
        the line `["name","F16",[384,96]]` (JSON without spaces, then a newline) and the tensor's bytes.

        Returns:
            "sha256:" and 64 hexadecimal digits.
        """
        state = hashlib.sha256()
        with open(self.path, "rb") as file:
            for name in sorted(self.entries, key=lambda name: _file_order(name, self.entries[name].dtype)):
                entry = self.entries[name]
                line = json.dumps([name, _DTYPE_NAMES[entry.dtype], list(entry.shape)], separators=(",", ":"))
                state.update(f"{line}\n".encode())
                file.seek(entry.start)
                left = entry.stop - entry.start
                while left:
                    chunk = file.read(min(left, _CHUNK_BYTES))
                    if not chunk:
                        raise PackedModelError("shrank while it was read", where=self.path, remedy=_AGAIN)
                    state.update(chunk)
                    left -= len(chunk)
        return f"sha256:{state.hexdigest()}"

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Gives a function that maps one tensor by name. Mapped tensors stay valid afterwards."""
        try:
            with safe_open(self.path, framework="pt") as file:
                yield lambda name: cast(Tensor, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise PackedModelError(
                "cannot be read", where=self.path, found=str(error), remedy=_AGAIN
            ) from error

    def check_digest(self, expected: str) -> None:
        """Compares the digest.

        Raises:
            PackedModelError: the tensors are not those that were packed.
        """
        found = self.digest()
        if found != expected:
            raise PackedModelError(
                "the tensors were altered after packing", where=self.path, expected=expected, found=found,
                remedy=_AGAIN,
            )  # fmt: skip

    def check_tensors(self, expected: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]]) -> None:
        """Compares names, dtypes (None: float16, float32 or any whole numbers) and shapes.

        Raises:
            PackedModelError: a tensor is missing, too many, or of another dtype or shape.
        """
        missing = sorted(set(expected) - set(self.entries))
        extra = sorted(set(self.entries) - set(expected))
        for names, what in (
            (missing, "tensors are missing"),
            (extra, "tensors that the model does not have"),
        ):
            if names:
                listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise PackedModelError(
                    what, where=self.path,
                    expected=listed if names is missing else f"the tensors that {CONFIG_NAME} describes",
                    found="not in the file" if names is missing else listed,
                    remedy=f"{WEIGHTS_NAME} and {CONFIG_NAME} must come from the same packing. {_AGAIN}",
                )  # fmt: skip
        for name, (dtype, shape) in expected.items():
            entry = self.entries[name]
            usual = entry.dtype in (torch.float16, torch.float32) or not (
                entry.dtype.is_floating_point or entry.dtype.is_complex
            )
            if entry.shape != shape or not (usual if dtype is None else entry.dtype == dtype):
                raise PackedModelError(
                    f"contradicts {CONFIG_NAME}", where=f"{self.path}: {name}",
                    expected=f"{_DTYPE_NAMES[dtype or torch.float16]} {list(shape)}",
                    found=f"{_DTYPE_NAMES[entry.dtype]} {list(entry.shape)}",
                    remedy=f"{WEIGHTS_NAME} and {CONFIG_NAME} must come from the same packing. {_AGAIN}",
                )  # fmt: skip

    def weight(self, name: str, layer: PackedLayer, read: Callable[[str], Tensor]) -> kernels.PackedWeight:
        """One compressed weight, its values checked.

        Args:
            name: its module.
            layer: what the manifest says of it.
            read: what `open` gives.
        """
        where = f"{self.path}: {name}.weight"
        parts = {part: read(f"{name}.weight.{part}") for part in layer.parts()}
        return packed_weight(layer.spec, layer.shape, layer.decoded(parts, where=where), where=where)


def _file_order(name: str, dtype: torch.dtype) -> tuple[int, bytes]:
    # Large elements first keeps every tensor aligned in the file.
    return -dtype.itemsize, name.encode()


def _read_header(file: BinaryIO, size: int, where: str) -> dict[str, Entry]:
    def wrong(what: str, expected: object, found: object) -> PackedModelError:
        return PackedModelError(what, where=where, expected=expected, found=found, remedy=_AGAIN)

    head = file.read(8)
    if len(head) < 8:
        raise wrong("truncated", "at least 8 bytes", f"{len(head)} bytes")
    length = int.from_bytes(head, "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise wrong("impossible header length", f"2 to {min(_MAX_HEADER_BYTES, size - 8)} bytes", length)
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise wrong("unreadable header", "JSON", error) from None
    if not isinstance(header, dict):
        raise wrong("unreadable header", "an object", type(header).__name__)
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, values in header.items():
        entry = _read_entry(values, 8 + length)
        if entry is None:
            raise wrong(
                f"impossible header entry {name!r}",
                "dtype, shape and data_offsets that agree",
                f"{values}"[:200],
            )
        entries[name] = entry
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise wrong(f"tensors overlap or leave gaps at {name!r}", f"start at byte {end}", entry.start)
        end = entry.stop
    if end != size:
        raise wrong(
            "truncated" if end > size else "longer than its header says", f"{end} bytes", f"{size} bytes"
        )
    return entries


def _read_entry(values: object, base: int) -> Entry | None:
    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62

    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        return None
    dtype = _DTYPES.get(values["dtype"]) if isinstance(values["dtype"], str) else None
    shape, offsets = values["shape"], values["data_offsets"]
    if dtype is None or not isinstance(shape, list) or not isinstance(offsets, list):
        return None
    if len(shape) > 8 or len(offsets) != 2 or not all(whole(value) for value in [*shape, *offsets]):
        return None
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        return None
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a packed model's config.json.

    Raises:
        PackedModelError: not a directory, no config.json in it, or not JSON.
    """
    path = member(directory, CONFIG_NAME)
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise PackedModelError(
                "too large", where=path, expected=f"at most {_MAX_CONFIG_BYTES} bytes",
                found=path.stat().st_size, remedy=_AGAIN,
            )  # fmt: skip
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackedModelError("cannot be read", where=path, found=error.strerror, remedy=_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise PackedModelError("not JSON", where=path, expected="JSON", found=error, remedy=_AGAIN) from None
    if not isinstance(config, dict):
        raise PackedModelError(
            "not a model's config",
            where=path,
            expected="an object",
            found=type(config).__name__,
            remedy=_AGAIN,
        )
    return config


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest in a packed model's config.json.

    Raises:
        PackedModelError: as `read_config` and `Manifest.from_dict`.
    """
    config = read_config(directory)
    return Manifest.from_dict(config.get("quantization_config"), where=str(Path(directory) / CONFIG_NAME))


def is_packed(directory: str | os.PathLike[str]) -> bool:
    """Whether this is a directory whose config.json says that usmlite packed it; reads nothing else."""
    try:
        config = read_config(directory)
    except PackedModelError:
        return False
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == QUANT_METHOD


def member(directory: str | os.PathLike[str], name: str) -> Path:
    """The path of one of the directory's own regular files.

    Links that lead out of the directory are refused; only a snapshot in a Hugging Face cache may
    link to the blobs beside it.

    Raises:
        PackedModelError: there is no such file, or it is not the directory's own.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise PackedModelError(
            "no such directory", where=folder, expected="the directory of a packed model",
            found="a file" if folder.exists() else "nothing",
        )  # fmt: skip
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise PackedModelError(
            "a link that leads out of the directory", where=path, expected=f"a file in {folder}", found=real,
            remedy="Copy the file itself into the directory.",
        )  # fmt: skip
    try:
        mode = real.stat().st_mode
    except OSError as error:
        index = folder / f"{name}.index.json"
        raise PackedModelError(
            "cannot be read" if os.path.lexists(path) else "no such file", where=path,
            found=f"{index.name}, which packed models do not use" if index.exists() else error.strerror,
            remedy=f"A packed model holds {CONFIG_NAME} and {WEIGHTS_NAME}. {_AGAIN}",
        ) from None  # fmt: skip
    if not stat.S_ISREG(mode):
        raise PackedModelError("not a regular file", where=path, remedy=_AGAIN)
    return path


# Writing


class WeightsWriter:
    """Writes a safetensors file tensor by tensor, so that no more than one need be in memory.

    All dtypes and shapes are told at the start; the tensors may then come in any order.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Creates the file and writes its header.

        Raises:
            OSError: it cannot be written.
        """
        header: dict[str, Any] = {
            "__metadata__": {"format": "pt", "packed_by": f"usmlite {usmlite_version()}"}
        }
        offset = 0
        self._left: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        for name in sorted(tensors, key=lambda name: _file_order(name, tensors[name][0])):
            dtype, shape = tensors[name]
            stop = offset + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, stop],
            }
            self._left[name] = (dtype, shape, offset)
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._file = open(path, "xb")  # noqa: SIM115
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
        except OSError:
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor.

        Raises:
            OSError: it cannot be written.
            ValueError: not the dtype or shape that was announced, or written before.
        """
        dtype, shape, offset = self._left.pop(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: announced {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        self._file.seek(self._base + offset)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for low in range(0, raw.numel(), _CHUNK_BYTES):
            self._file.write(raw[low : low + _CHUNK_BYTES].numpy().tobytes())

    def close(self, *, complete: bool = True) -> None:
        """Flushes to the disk and closes.

        Args:
            complete: whether every tensor must have been written.

        Raises:
            OSError: it cannot be written.
            ValueError: a tensor was announced and never written.
        """
        with self._file as file:
            if complete:
                if self._left:
                    raise ValueError(f"never written: {', '.join(self._left)}")
                file.flush()
                os.fsync(file.fileno())


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its place when the block ends well.

    A packed model of ours that is there is replaced; other files in it move along. If the block fails,
    nothing stays of the new one and the old one is untouched.

    Raises:
        OutputError: something else is there, or the place cannot be written.
    """
    target = Path(directory).absolute()
    if target.is_symlink():
        target = target.resolve()
    _refuse_foreign(target)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _swap(temporary, target)
    except OSError as error:
        raise OutputError(
            "cannot be written", where=target, found=error.strerror or str(error),
            remedy="Nothing was changed; make room or choose another place, then try again.",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    for path in old.iterdir():
        # What the new model also has, or is a packed model's alone, goes with the old one.
        if not (target / path.name).exists() and path.name not in _OWN_FILES:
            path.rename(target / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(
            "is not a directory", where=target, expected="a new name", found="a file",
            remedy="Choose another place.",
        )  # fmt: skip
    if any(target.iterdir()) and not is_packed(target):
        raise OutputError(
            "exists and is not a packed model", where=target,
            expected="a new name, an empty directory, or a packed model to replace",
            found=", ".join(sorted(path.name for path in target.iterdir())[:3]),
            remedy="Choose another place, or empty it yourself.",
        )  # fmt: skip
