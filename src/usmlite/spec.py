"""What each weight of a model becomes: the compression spec and the bytes it costs.

This module is plain data (no torch), so that the command line can check and print specs at once.

Every weight is treated as a matrix `[rows, columns]`: one row per output channel, the input axis
along the columns. A convolution `[out, in, kernel]` becomes `[out, kernel * in]`, so that
neighbours along the columns are neighbouring input channels.

Shapes that do not divide are never skipped:
    * N:M: the last group of a row is padded with virtual zero columns that lose every comparison;
      it stores N slots like every other group, unused slots hold the code of the padding.
    * scale groups: the last group of a row is shorter.
    * bits: each row's codes end on a byte boundary.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from usmlite.errors import SpecError

MAX_M = 32
SCALE_BITS = (16, 8)
TRELLIS_STATES = (4, 8, 16, 32)
ZERO_POINT_BYTES = 1  # uint8
FLOAT_BYTES = 2  # kept weights are stored as float16

Grid = Literal["integer", "midrise", "ternary"]
GRIDS: tuple[Grid, ...] = ("integer", "midrise", "ternary")
Kind = Literal["linear", "conv1d", "embedding", "positions"]
KINDS: tuple[Kind, ...] = ("linear", "conv1d", "embedding", "positions")
TABLES: tuple[Kind, ...] = ("embedding", "positions")
"""Weights whose rows are looked up."""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Int:
    """Integer codes of `bits` bits: weight = (code - zero) * scale, code in 0 .. `max_code`.

    Attributes:
        bits: 1 to 8.
        symmetric: the zero is a constant of the grid; otherwise each scale group stores its own
            integer zero point.
        grid: "integer" has a level at zero (zero = 2^(bits-1)); "midrise" puts zero between two
            levels (zero = (2^bits - 1) / 2), so that 2 bits give -1.5, -0.5, 0.5, 1.5 times the
            scale. One bit is always midrise: its two levels are plus and minus half the scale.
            "ternary" has three of the four codes of 2 bits: -1, 0 and 1 times the scale. They take 2 bits
            each where codes have a fixed width; entropy coding brings them below log2(3) = 1.58.
        scale_bits: of each stored scale: 16 for float16, or 8 for powers of two in eighths of an octave.
    """

    bits: int
    symmetric: bool = True
    grid: Grid = "integer"
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if not _is_integer(self.bits) or not 1 <= self.bits <= 8:
            raise SpecError(
                "unsupported number of bits",
                where="bits",
                expected="a whole number from 1 to 8",
                found=repr(self.bits),
                remedy="Use 8, 4 or 3 bits if you are not sure.",
            )
        if self.scale_bits not in SCALE_BITS:
            raise SpecError(
                "unsupported scales", where="scale_bits", expected="16 or 8", found=repr(self.scale_bits)
            )
        if self.grid not in GRIDS:
            raise SpecError("unknown grid", where="grid", expected=", ".join(GRIDS), found=repr(self.grid))
        if self.grid == "ternary" and self.bits != 2:
            raise SpecError(
                "a ternary grid has codes of 2 bits",
                where="grid",
                expected="bits = 2",
                found=f"bits = {self.bits}",
            )
        if self.grid != "integer" and not self.symmetric:
            raise SpecError(
                f"a {self.grid} grid has no zero point",
                where="grid",
                expected="symmetric = true",
                found="symmetric = false",
                remedy="Use grid = 'integer' for asymmetric codes.",
            )
        if self.bits == 1 and self.symmetric and self.grid == "integer":
            object.__setattr__(self, "grid", "midrise")

    @property
    def max_code(self) -> int:
        """The highest code: 2^bits - 1, but 2 on the ternary grid."""
        return 2 if self.grid == "ternary" else (1 << self.bits) - 1

    @property
    def zero(self) -> float:
        """The code that stands for zero on a symmetric grid (may lie between two codes)."""
        return float(1 << (self.bits - 1)) if self.grid == "integer" else self.max_code / 2

    def with_bits(self, bits: int) -> Int:
        """Codes of the same kind with another number of bits; a ternary grid becomes integer."""
        if bits == self.bits:
            return self
        return Int(bits, symmetric=self.symmetric, grid="integer" if self.grid == "ternary" else self.grid)

    def __str__(self) -> str:
        if self.grid == "ternary":
            return "ternary"
        suffix = "" if self.symmetric else " asymmetric"
        if self.grid == "midrise" and self.bits > 1:
            suffix = " midrise"
        return f"int{self.bits}{suffix}"


@dataclass(frozen=True)
class PatternCode:
    """The fixed-width code of N:M patterns: `groups` patterns as digits of one little-endian word.

    A word of `word_bytes` bytes holds sum(rank_i * patterns^i) for i < `groups`.
    """

    patterns: int
    word_bytes: int
    groups: int


@dataclass(frozen=True)
class NM:
    """N weights kept of every M neighbours along the input axis."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (_is_integer(self.n) and _is_integer(self.m)) or not 1 <= self.n < self.m <= MAX_M:
            raise SpecError(
                "impossible sparsity",
                where="sparsity",
                expected=f"N:M with 1 <= N < M <= {MAX_M}, such as 2:4 (2 kept of every 4)",
                found=f"{self.n}:{self.m}",
                remedy="Leave sparsity out for a dense model.",
            )

    @classmethod
    def parse(cls, text: str) -> NM | None:
        """Reads "2:4"; "dense" and "none" give None."""
        if text.strip().lower() in ("dense", "none", ""):
            return None
        head, colon, tail = text.partition(":")
        if not colon or not head.strip().isdigit() or not tail.strip().isdigit():
            raise SpecError(
                "unreadable sparsity",
                where="sparsity",
                expected="N:M such as 2:4, or 'dense'",
                found=repr(text),
            )
        return cls(int(head), int(tail))

    @property
    def patterns(self) -> int:
        """How many patterns a group can have: M choose N."""
        return math.comb(self.m, self.n)

    @property
    def code(self) -> PatternCode:
        """The word size of 1, 2, 4 or 8 bytes that wastes least; the smallest of equals."""
        best: PatternCode | None = None
        for word_bytes in (1, 2, 4, 8):
            # 63 bits at most: words are read as signed 64-bit integers.
            limit = 1 << min(8 * word_bytes, 63)
            groups = 0
            while self.patterns ** (groups + 1) <= limit:
                groups += 1
            better = groups and (best is None or word_bytes * best.groups < best.word_bytes * groups)
            if better:
                best = PatternCode(self.patterns, word_bytes, groups)
        assert best is not None, "C(32, 16) < 2^63"
        return best

    def bits_per_weight(self, bits: int) -> float:
        """What a weight costs on average, pruned ones counted: its share of codes and pattern."""
        return self.n / self.m * bits + 8 * self.code.word_bytes / (self.code.groups * self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class LayerSpec:
    """What one weight becomes. The default keeps it, in float16.

    Attributes:
        quant: integer codes, or None for float16 values.
        sparsity: N:M along the input axis, or None for dense.
        group: how many neighbouring input columns share one scale; None for one scale per output
            channel (row). The group counts the columns of the full, unpruned weight.
        column_scales: every column has a scale as well, which multiplies its weights on top of the
            row's. For tables in which some columns are far larger than others, as in token embeddings.
        rate: bits a weight that entropy coding shall spend on the codes. Steps are then chosen for that and
            not for the number of codes, of which there only need to be enough; rows and columns whose
            errors matter less get larger ones. They are not trained: training would change the rate.
        trellis: codes of a column follow each other along a trellis of so many states, 4, 8, 16 or 32
            (`kernels.trellis`); None where each code stands by itself. Less error at the same rate. Such a
            weight is made by second-order rounding, and cannot be trained.
    """

    quant: Int | None = None
    sparsity: NM | None = None
    group: int | None = None
    column_scales: bool = False
    rate: float | None = None
    trellis: int | None = None

    def __post_init__(self) -> None:
        if self.group is not None and (not _is_integer(self.group) or self.group < 1):
            raise SpecError(
                "unusable group",
                where="group",
                expected="a whole number of inputs, at least 1",
                found=repr(self.group),
            )
        if self.group is not None and self.quant is None:
            raise SpecError(
                "a group without quantization", where="group", remedy="Set bits, or leave group out."
            )
        if not isinstance(self.column_scales, bool):
            raise SpecError(
                "wrong type", where="column_scales", expected="true or false", found=repr(self.column_scales)
            )
        if self.column_scales and self.quant is None:
            raise SpecError(
                "column scales without quantization",
                where="column_scales",
                remedy="Set bits, or leave column_scales out.",
            )

        if self.rate is not None:
            self._check_rate()
        if self.trellis is not None:
            self._check_trellis()

    def _check_rate(self) -> None:
        rate: object = self.rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 8:
            raise SpecError(
                "unusable rate", where="rate", expected="bits a weight, above 0 and at most 8",
                found=repr(self.rate),
            )  # fmt: skip
        if self.quant is None or not self.quant.symmetric or self.quant.bits < rate or not self.column_scales:
            raise SpecError(
                "a rate without codes for it", where="rate",
                expected="symmetric codes of no fewer bits, with column scales",
                found="float16" if self.quant is None else str(self.quant),
            )  # fmt: skip
        if self.sparsity is not None or self.group is not None:
            raise SpecError(
                "a rate with sparsity or groups", where="rate", expected="dense, one scale per row",
                remedy="Leave rate out, or sparsity and group.",
            )  # fmt: skip

    def _check_trellis(self) -> None:
        if not _is_integer(self.trellis) or self.trellis not in TRELLIS_STATES:
            raise SpecError(
                "unusable trellis", where="trellis",
                expected=f"{', '.join(map(str, TRELLIS_STATES))} states", found=repr(self.trellis),
            )  # fmt: skip
        if self.rate is None or self.quant is None or self.quant.bits != 8 or self.quant.grid != "integer":
            raise SpecError(
                "a trellis without a rate", where="trellis", expected="a rate, and integer codes of 8 bits",
                found="no rate" if self.rate is None else str(self.quant),
                remedy="Set rate, or leave trellis out.",
            )  # fmt: skip

    @classmethod
    def at_rate(cls, rate: float, trellis: int | None = None) -> LayerSpec:
        """So many bits a weight, and all the codes there are, so that the largest weights are not clipped."""
        return cls(Int(8, scale_bits=8), column_scales=True, rate=rate, trellis=trellis)

    @property
    def precision(self) -> float | None:
        """Bits a weight: the rate, or those of the codes; None without quantization."""
        return self.rate if self.rate is not None or self.quant is None else float(self.quant.bits)

    def with_precision(self, bits: int) -> LayerSpec:
        """This spec with other codes or, if it has a rate, with another rate.

        Raises:
            SpecError: not quantized, or an unusable number of bits.
        """
        if self.quant is None:
            raise SpecError("precision without quantization", where="bits", remedy="Set bits.")
        if self.rate is not None:
            return replace(self, rate=float(bits))
        return replace(self, quant=self.quant.with_bits(bits))

    @property
    def is_kept(self) -> bool:
        """Whether the weight stays a plain float16 tensor."""
        return self.quant is None and self.sparsity is None

    def stored_columns(self, columns: int) -> int:
        """Codes stored per row."""
        if self.sparsity is None:
            return columns
        return math.ceil(columns / self.sparsity.m) * self.sparsity.n

    def scale_groups(self, columns: int) -> int:
        """Scales stored per row."""
        return 1 if self.group is None else max(1, math.ceil(columns / self.group))

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Bytes of each stored part of a `[rows, columns]` weight; with a rate, about."""
        stored = self.stored_columns(columns)
        if self.quant is None:
            parts = {"values": rows * stored * FLOAT_BYTES}
        else:
            scales = rows * self.scale_groups(columns)
            parts = {
                "codes": rows * math.ceil(stored * (self.rate or self.quant.bits) / 8),
                "scale": scales * self.quant.scale_bits // 8,
            }
            if not self.quant.symmetric:
                parts["zero"] = scales * ZERO_POINT_BYTES
            if self.column_scales:
                parts["column_scale"] = columns * self.quant.scale_bits // 8
        if self.sparsity is not None:
            code = self.sparsity.code
            words = math.ceil(math.ceil(columns / self.sparsity.m) / code.groups)
            parts["pattern"] = rows * words * code.word_bytes
        return parts

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a `[rows, columns]` weight, all parts."""
        return sum(self.sizes(rows, columns).values())

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON and TOML hold it."""
        out: dict[str, Any] = {"bits": None if self.quant is None else self.quant.bits}
        if self.quant is not None and not self.quant.symmetric:
            out["symmetric"] = False
        if self.quant is not None and self.quant.grid != "integer" and self.quant.bits > 1:
            out["grid"] = self.quant.grid
        if self.quant is not None and self.quant.scale_bits != 16:
            out["scale_bits"] = self.quant.scale_bits
        if self.sparsity is not None:
            out["sparsity"] = str(self.sparsity)
        if self.group is not None:
            out["group"] = self.group
        if self.column_scales:
            out["column_scales"] = True
        if self.rate is not None:
            out["rate"] = self.rate
        if self.trellis is not None:
            out["trellis"] = self.trellis
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "spec") -> LayerSpec:
        """Reads `to_dict`'s form; `bits` may be "float" or None.

        Raises:
            SpecError: an unknown key or an impossible value; it names `where`.
        """
        known = {
            "bits", "symmetric", "grid", "scale_bits", "sparsity", "group", "column_scales", "rate",
            "trellis",
        }  # fmt: skip
        unknown = sorted(set(values) - known)
        if unknown:
            raise SpecError(
                "unknown key", where=where, expected=", ".join(sorted(known)), found=", ".join(unknown)
            )
        bits = values.get("bits")
        try:
            quant = (
                None
                if bits in (None, "float")
                else Int(
                    bits,
                    symmetric=values.get("symmetric", True),
                    grid=values.get("grid", "integer"),
                    scale_bits=values.get("scale_bits", 16),
                )
            )
            sparsity = values.get("sparsity")
            if sparsity is not None and not isinstance(sparsity, str):
                raise SpecError("unreadable sparsity", expected="text such as '2:4'", found=repr(sparsity))
            return cls(
                quant,
                None if sparsity is None else NM.parse(sparsity),
                values.get("group"),
                values.get("column_scales", False),
                values.get("rate"),
                values.get("trellis"),
            )
        except SpecError as error:
            raise SpecError(
                error.what,
                where=where if error.where is None else f"{where}.{error.where}",
                expected=error.expected,
                found=error.found,
                remedy=error.remedy,
            ) from None

    def __str__(self) -> str:
        if self.is_kept:
            return "float16"
        if self.rate is not None:
            return f"{self.rate:g} bits coded" + ("" if self.trellis is None else f", trellis {self.trellis}")
        parts = ["float16" if self.quant is None else str(self.quant)]
        if self.sparsity is not None:
            parts.append(str(self.sparsity))
        if self.group is not None:
            parts.append(f"group {self.group}")
        if self.column_scales:
            parts.append("column scales")
        return " ".join(parts)


KEEP = LayerSpec()


@dataclass(frozen=True)
class Rule:
    """`spec` for every weight whose module name matches `match` and whose kind is `kind`.

    Attributes:
        match: a shell-style pattern over module names (`model.encoder.*`, `*.fc1`).
        spec: what those weights become.
        kind: "linear", "conv1d", "embedding", "positions", or None for all.
    """

    match: str
    spec: LayerSpec
    kind: Kind | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise SpecError("unknown kind", where="kind", expected=", ".join(KINDS), found=repr(self.kind))

    def covers(self, name: str, kind: str) -> bool:
        """Whether this rule speaks of module `name` of kind `kind`."""
        return self.kind in (None, kind) and fnmatch.fnmatchcase(name, self.match)

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON and TOML hold it."""
        head: dict[str, Any] = {"match": self.match}
        if self.kind is not None:
            head["kind"] = self.kind
        return head | self.spec.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "rule") -> Rule:
        """Reads `to_dict`'s form."""
        rest = dict(values)
        match, kind = rest.pop("match", "*"), rest.pop("kind", None)
        if not isinstance(match, str):
            raise SpecError("unreadable match", where=where, expected="text", found=repr(match))
        return cls(match, LayerSpec.from_dict(rest, where=where), kind)


@dataclass(frozen=True)
class CompressionSpec:
    """Ordered rules for a whole model; the first rule that covers a weight decides.

    A weight that no rule covers is kept in float16; `usmlite info` lists it as kept.
    """

    rules: tuple[Rule, ...] = field(default=())

    @classmethod
    def simple(
        cls,
        bits: int | None,
        sparsity: NM | str | None = None,
        group: int | None = None,
        *,
        symmetric: bool = True,
        grid: Grid = "integer",
        embedding_bits: float | None = None,
        coded: bool = True,
        scale_bits: int = 16,
        first: Iterable[Rule] = (),
    ) -> CompressionSpec:
        """The usual case in one line.

        Linear layers get `bits` and `sparsity`. Token embeddings are quantized with column scales and
        never pruned: at equal bytes fewer bits cost them far less than pruning does
        (docs/decisions/0006), and with entropy coding a rate costs them far less than bits do
        (docs/decisions/0009). Convolutions and position tables, about 2 % of a Whisper model, get
        dense int8: they are the most sensitive weights and cost next to nothing.

        Args:
            bits: 1 to 8, or None for float16.
            sparsity: `NM(2, 4)`, "2:4", or None for dense.
            group: inputs per scale, or None for one scale per output channel.
            symmetric: see `Int`.
            grid: see `Int`. A token embedding of other than 2 bits is not ternary but integer.
            embedding_bits: of token embeddings; a rate where codes are entropy-coded. None takes the least
                whole number that spends no fewer bits on a weight than `bits` with `sparsity` do: 3 for
                int4 with 2:4.
            coded: whether codes will be entropy-coded.
            scale_bits: see `Int`.
            first: rules that come before these.
        """
        nm = NM.parse(sparsity) if isinstance(sparsity, str) else sparsity
        quant = None if bits is None else Int(bits, symmetric=symmetric, grid=grid, scale_bits=scale_bits)
        if embedding_bits is None and bits is not None:
            embedding_bits = bits if nm is None else math.ceil(nm.bits_per_weight(bits))
        embedding = KEEP
        if embedding_bits is not None:
            whole = math.ceil(embedding_bits)
            if coded and symmetric and group is None:
                embedding = LayerSpec.at_rate(embedding_bits)
            else:
                grid = "integer" if grid == "ternary" and whole != 2 else grid
                codes = Int(whole, symmetric=symmetric, grid=grid, scale_bits=scale_bits)
                embedding = LayerSpec(codes, None, group, True)
        return cls(
            (
                *first,
                Rule("*", KEEP if bits is None else LayerSpec(Int(8, scale_bits=scale_bits)), "conv1d"),
                Rule(
                    "*",
                    KEEP if bits is None else LayerSpec(Int(8, scale_bits=scale_bits), column_scales=True),
                    "positions",
                ),
                Rule("*", embedding, "embedding"),
                Rule("*", LayerSpec(quant, nm, group)),
            )
        )

    def resolve(self, name: str, kind: str) -> LayerSpec:
        """What the weight of module `name` becomes."""
        for rule in self.rules:
            if rule.covers(name, kind):
                return rule.spec
        return KEEP

    def unused(self, kinds: Mapping[str, str]) -> list[Rule]:
        """Rules that decide nothing for a model with these modules (name to kind)."""
        deciding = {
            next((i for i, rule in enumerate(self.rules) if rule.covers(name, kind)), -1)
            for name, kind in kinds.items()
        }
        return [rule for i, rule in enumerate(self.rules) if i not in deciding]

    def to_list(self) -> list[dict[str, Any]]:
        """The rules as JSON and TOML hold them."""
        return [rule.to_dict() for rule in self.rules]

    @classmethod
    def from_list(cls, rules: Sequence[Mapping[str, Any]], *, where: str = "spec.rules") -> CompressionSpec:
        """Reads `to_list`'s form."""
        return cls(tuple(Rule.from_dict(rule, where=f"{where}[{i}]") for i, rule in enumerate(rules)))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """`[rows, columns]` of a weight: `[out, in]` as it is, `[out, in, kernel]` to `[out, kernel * in]`.

    Raises:
        SpecError: neither two nor three dimensions.
    """
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 3:
        return shape[0], shape[1] * shape[2]
    raise SpecError("weight of unsupported shape", expected="2 or 3 dimensions", found=list(shape))
