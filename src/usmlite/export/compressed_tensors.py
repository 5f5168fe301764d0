"""Linear layers as packed integers: compressed-tensors' `pack-quantized`, which Transformers loads with it.

The layout is that of compressed-tensors' `compressors/pack_quantized`: `weight_packed` int32, codes plus
2^(bits-1), the lowest bits first and dense across words; `weight_scale`; `weight_shape`. The token embedding
stays float16, for it is tied to the output projection, and so do convolutions and positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usmlite.export.integers import bits_of, round_to_blocks
from usmlite.export.plan import Becomes
from usmlite.export.source import Source, Stored, as_float
from usmlite.export.transformers import plain_tensor, unprepared_model, write_config, write_tensors
from usmlite.packfile import WEIGHTS_NAME, pack_codes, stored_tensors

AUTO = "auto"
FORMS = (AUTO, "int8", "int4")
_WORD_BYTES = 4
_WIDTHS = range(2, 9)
_ROUNDED_GROUP = 32


@dataclass(frozen=True)
class _Scheme:
    """How a layer is quantized: bits, columns that share a scale (None for a whole row)."""

    bits: int
    group: int | None

    def __str__(self) -> str:
        return f"int{self.bits}, " + ("one scale a row" if self.group is None else f"groups of {self.group}")

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        words = math.ceil(columns * self.bits / (8 * _WORD_BYTES))
        groups = 1 if self.group is None else columns // self.group
        return {
            "weight_packed": (torch.int32, (rows, words)),
            "weight_scale": (torch.float32, (rows, groups)),
            "weight_shape": (torch.int64, (2,)),
        }

    def config(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False,
            "strategy": "channel" if self.group is None else "group", "group_size": self.group,
        }  # fmt: skip
        return {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
            "format": "pack-quantized",
        }  # fmt: skip


def plan(source: Source, form: str) -> Iterator[Becomes]:
    """Linear layers as integers, all else as float16; whole numbers as they are."""
    for stored in source.tensors.values():
        scheme, exact = _scheme(source, stored, form)
        if scheme is not None:
            parts = scheme.shapes(*_matrix(stored)).values()
            size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)
            yield Becomes(stored.name, str(scheme), size, exact)
            continue
        tensor = source.tensor(stored.name)
        if not tensor.is_floating_point():
            yield Becomes(stored.name, str(tensor.dtype)[6:], tensor.nbytes, True)
        else:
            yield Becomes(
                stored.name, "float16", 2 * tensor.numel(), bool((tensor.half().float() == tensor).all())
            )


def write(source: Source, form: str, folder: Path, progress: Callable[[float], None]) -> None:
    """Writes `model.safetensors`, `config.json` that says how it is quantized, and the processor."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    schemes: dict[str, _Scheme] = {}
    exact: set[str] = set()
    plain: dict[str, tuple[int, ...]] = {}
    for name, tensor in stored_tensors(unprepared_model(source)).items():
        stored = source.tensors.get(name)
        scheme, fits = (None, False) if stored is None else _scheme(source, stored, form)
        if stored is not None and scheme is not None:
            schemes[name] = scheme
            exact |= {name} if fits else set()
            parts = scheme.shapes(*_matrix(stored))
            shapes |= {name.removesuffix("weight") + part: shape for part, shape in parts.items()}
        else:
            plain[name] = tuple(tensor.shape)
            shapes[name] = (torch.float16 if tensor.is_floating_point() else tensor.dtype, plain[name])

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in plain.items():
            yield name, plain_tensor(source, name, shape).to(shapes[name][0])
        for name, scheme in schemes.items():
            for part, tensor in _parts(source, name, scheme, name in exact).items():
                yield name.removesuffix("weight") + part, tensor

    write_tensors(folder / WEIGHTS_NAME, shapes, tensors(), progress)
    write_config(source, {"dtype": "float32", "quantization_config": _config(schemes)}, folder)
    source.adapter.save_processor(folder)


def _config(schemes: dict[str, _Scheme]) -> dict[str, Any]:
    layers: dict[_Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        layers.setdefault(scheme, []).append(name.removesuffix(".weight"))
    groups = {f"group_{i}": scheme.config(names) for i, (scheme, names) in enumerate(layers.items())}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        # Otherwise weights appear in a hook before the model's own first call, and Whisper's `generate` calls
        # its encoder before that.
        "dequantize": True, "config_groups": groups, "ignore": [], "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def _matrix(stored: Stored) -> tuple[int, int]:
    rows, columns = stored.shape
    return rows, columns


def _scheme(source: Source, stored: Stored, form: str) -> tuple[_Scheme | None, bool]:
    """How a tensor is quantized, if it is, and whether that is its own integers and steps."""
    if stored.kind != "linear":
        return None, False
    most = 4 if form == "int4" else 8
    weight, columns = source.levels(stored.name), stored.shape[1]
    if weight is not None and weight.column_scale is None and weight.step is not None:
        bits = bits_of(weight.levels, [bits for bits in _WIDTHS if bits <= most])
        group = None if weight.step.shape[1] == 1 else weight.group
        if bits is not None and (group is None or columns % group == 0):
            return _Scheme(bits, group), True
    if form == AUTO and weight is None:
        return None, False
    return _Scheme(most, _ROUNDED_GROUP if columns % _ROUNDED_GROUP == 0 else None), False


def _parts(source: Source, name: str, scheme: _Scheme, exact: bool) -> dict[str, Tensor]:
    rows, columns = _matrix(source.tensors[name])
    weight = source.levels(name)
    if exact and weight is not None and weight.step is not None:
        levels, steps = weight.levels.cpu(), weight.step.cpu()
    else:
        levels, steps = round_to_blocks(as_float(source.tensor(name)), scheme.bits, scheme.group or columns)
    codes = pack_codes((levels.to(torch.int16) + (1 << scheme.bits - 1)).to(torch.uint8), scheme.bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _WORD_BYTES)).contiguous()
    return {
        "weight_packed": padded.view(torch.int32),
        "weight_scale": steps.float().contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
