"""What a packed model says of one compressed weight, and its codes entropy-coded or of a fixed width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from usmlite import entropy
from usmlite.errors import ModelError, PackedModelError, SpecError
from usmlite.packfile.directory import COPY_AGAIN
from usmlite.packfile.parts import pack_codes, part_shapes
from usmlite.spec import TRELLIS_STATES, Int, LayerSpec, matrix_shape

FORMAT_VERSION = 3
# What is written without anything that this version cannot say, for the sake of older readers.
PLAIN_VERSION = 2
# How many times as large fixed-width codes may be as the entropy-coded ones in the file.
_MOST_EXPANSION = 16


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

    @property
    def bytes(self) -> int:
        """What the parts take in the file."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.parts().values())

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
                "impossible entropy-coded codes", where=f"{where}.coded", found=error, remedy=COPY_AGAIN
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
        low, high = _coded_bounds(self.fixed_bytes)
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

    @classmethod
    def from_dict(cls, values: object, version: int, *, where: str) -> PackedLayer:
        """Reads `to_dict`'s form.

        Args:
            values: what config.json holds.
            version: the format's.
            where: what errors should name.

        Raises:
            PackedModelError: it is damaged.
        """
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
                not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 1 << 31
                for size in shape
            )
        ):
            raise PackedModelError(
                "unusable shape", where=f"{where}.shape", expected="2 or 3 whole numbers above 0",
                found=repr(shape)[:100], remedy=COPY_AGAIN,
            )  # fmt: skip
        try:
            spec = LayerSpec.from_dict(rest, where=where)
            if spec.is_kept:
                raise SpecError("neither bits nor sparsity", expected="a compressed layer")
            layer = cls(tuple(shape), spec, coded, tables, trellis)
        except (SpecError, TypeError) as error:
            raise PackedModelError(f"unusable layer spec: {error}", where=where, remedy=COPY_AGAIN) from None
        if coded is not None:
            low, high = _coded_bounds(layer.fixed_bytes)
            if not isinstance(coded, int) or isinstance(coded, bool) or not low <= coded <= high:
                raise PackedModelError(
                    "unusable number of bytes", where=f"{where}.coded", expected=f"{low} to {high}",
                    found=repr(coded)[:100], remedy=COPY_AGAIN,
                )  # fmt: skip
        most = 1 if coded is None else entropy.MOST_TABLES
        if not isinstance(tables, int) or isinstance(tables, bool) or not 1 <= tables <= most:
            raise PackedModelError(
                "unusable number of tables", where=f"{where}.tables", expected=f"1 to {most}",
                found=repr(tables)[:100], remedy=COPY_AGAIN,
            )  # fmt: skip
        if trellis is not None:
            _check_trellis(layer, version, f"{where}.trellis")
        return layer


def _check_trellis(layer: PackedLayer, version: int, where: str) -> None:
    known = isinstance(layer.trellis, int) and layer.trellis in TRELLIS_STATES
    quant = layer.spec.quant
    fits = layer.coded is not None and quant is not None and quant == Int(8, scale_bits=quant.scale_bits)
    if version == PLAIN_VERSION or not known or not fits or layer.spec.sparsity is not None:
        raise PackedModelError(
            "unusable trellis", where=where,
            expected=f"{', '.join(map(str, TRELLIS_STATES))} states, of dense entropy-coded codes of 8 bits, "
            f"in version {FORMAT_VERSION}",
            found=f"{layer.trellis!r:.100} of {layer.spec}, version {version}", remedy=COPY_AGAIN,
        )  # fmt: skip


def _coded_bounds(fixed: int) -> tuple[int, int]:
    """The least and the most bytes that entropy-coded codes may have instead of `fixed` bytes.

    The lower bound keeps a small hostile file from growing without limit when it is decoded.
    """
    return math.ceil(fixed / _MOST_EXPANSION), fixed - 1
