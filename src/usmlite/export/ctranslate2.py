"""Whisper for CTranslate2, and so for faster-whisper: the inverse of `models.ctranslate2`.

Layout and names are those of CTranslate2's `specs/model_spec.py` and `specs/whisper_spec.py`, settings and
vocabulary those that its `converters/transformers.py` writes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from usmlite.atomic import write_json
from usmlite.errors import ModelError
from usmlite.export.integers import fits_rows, round_to_blocks
from usmlite.export.plan import Becomes
from usmlite.export.source import Source, as_float
from usmlite.models import WhisperAdapter
from usmlite.models.ctranslate2 import BINARY_VERSION, SPEC_NAME, SPEC_REVISION
from usmlite.packfile import to_weight

FORMS = ("int8", "float16", "float32")
_TYPES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}
_GELU = 3
_TOKENS = "model.decoder.embed_tokens.weight"


@dataclass(frozen=True)
class _Variable:
    """One variable of the file and the tensors that are stacked in it."""

    name: str
    sources: tuple[str, ...]
    is_weight: bool


def plan(source: Source, form: str) -> Iterator[Becomes]:
    """Weights as int8 with a scale for each row, where that is asked for; everything else as float."""
    for variable in _variables(source):
        for name in variable.sources:
            stored = source.tensors.get(name)
            if stored is None:
                continue  # the zeros that stand for a bias that Whisper has not
            count = int(np.prod(stored.shape))
            if form != "int8" or not variable.is_weight:
                kind = "float32" if form == "int8" else form
                yield Becomes(name, kind, count * (2 if kind == "float16" else 4), kind == "float32")
            else:
                levels = source.levels(name)
                exact = levels is not None and fits_rows(levels)
                yield Becomes(name, "int8, one scale a row", count + 4 * stored.shape[0], exact)


def write(source: Source, form: str, folder: Path, progress: Callable[[float], None]) -> None:
    """Writes `model.bin`, `config.json`, `vocabulary.json`, the tokenizer and the feature extractor."""
    adapter = cast(WhisperAdapter, source.adapter)
    variables = _variables(source)
    scalars = _scalars(adapter)
    scales = sum(variable.is_weight for variable in variables) if form == "int8" else 0
    with (folder / "model.bin").open("xb") as file:
        file.write(struct.pack("<I", BINARY_VERSION) + _string(SPEC_NAME))
        file.write(struct.pack("<II", SPEC_REVISION, len(variables) + len(scalars) + scales))
        for name, value in scalars.items():
            _write_variable(file, name, value)
        for index, variable in enumerate(variables):
            _write_weights(file, source, variable, form)
            progress((index + 1) / len(variables))
        aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
        file.write(struct.pack("<I", len(aliases)))
        for alias, target in aliases.items():
            file.write(_string(alias) + _string(target))
    adapter.save_processor(folder)
    write_json(folder / "config.json", _settings(adapter))
    write_json(folder / "vocabulary.json", vocabulary(adapter))


def _variables(source: Source) -> list[_Variable]:
    """All variables but scalars, by their names in CTranslate2."""
    config = cast(WhisperAdapter, source.adapter).config
    found: list[_Variable] = []

    def layer(target: str, *sources: str) -> None:
        found.append(_Variable(f"{target}/weight", tuple(f"{name}.weight" for name in sources), True))
        found.append(_Variable(f"{target}/bias", tuple(f"{name}.bias" for name in sources), False))

    def norm(target: str, name: str) -> None:
        found.append(_Variable(f"{target}/gamma", (f"{name}.weight",), False))
        found.append(_Variable(f"{target}/beta", (f"{name}.bias",), False))

    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        if side == "encoder":
            for name in ("conv1", "conv2"):
                layer(f"encoder/{name}", f"model.encoder.{name}")
        else:
            found.append(_Variable("decoder/embeddings/weight", (_TOKENS,), True))
        positions = f"model.{side}.embed_positions.weight"
        found.append(_Variable(f"{side}/position_encodings/encodings", (positions,), False))
        for index in range(layers):
            target, name = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            own, cross = f"{name}.self_attn", f"{name}.encoder_attn"
            layer(f"{target}/self_attention/linear_0", f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
            layer(f"{target}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{target}/self_attention/layer_norm", f"{name}.self_attn_layer_norm")
            if side == "decoder":
                layer(f"{target}/attention/linear_0", f"{cross}.q_proj")
                layer(f"{target}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                layer(f"{target}/attention/linear_2", f"{cross}.out_proj")
                norm(f"{target}/attention/layer_norm", f"{name}.encoder_attn_layer_norm")
            layer(f"{target}/ffn/linear_0", f"{name}.fc1")
            layer(f"{target}/ffn/linear_1", f"{name}.fc2")
            norm(f"{target}/ffn/layer_norm", f"{name}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
    return found


def _scalars(adapter: WhisperAdapter) -> dict[str, Tensor]:
    """Switches, which say that this is Whisper's kind of transformer."""
    config = adapter.config

    def number(value: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    return {
        "decoder/activation": number(_GELU, torch.int8),
        "decoder/alibi": number(0, torch.int8),
        "decoder/alibi_use_positive_positions": number(0, torch.int8),
        "decoder/alignment_heads": number(1, torch.int16),
        "decoder/alignment_layer": number(-1, torch.int16),
        "decoder/num_heads": number(config.decoder_attention_heads, torch.int16),
        "decoder/pre_norm": number(1, torch.int8),
        "decoder/scale_alibi": number(0, torch.int8),
        "decoder/scale_embeddings": number(0, torch.int8),
        "decoder/start_from_zero_embedding": number(0, torch.int8),
        "encoder/num_heads": number(config.encoder_attention_heads, torch.int16),
    }


def _write_weights(file: BinaryIO, source: Source, variable: _Variable, form: str) -> None:
    if form == "int8" and variable.is_weight:
        parts = [_rows(source, name) for name in variable.sources]
        _write_variable(file, variable.name, torch.cat([levels for levels, _ in parts]))
        _write_variable(file, f"{variable.name}_scale", torch.cat([scale for _, scale in parts]))
        return
    dtype = torch.float16 if form == "float16" else torch.float32
    tensors = [_tensor(source, name) for name in variable.sources]
    _write_variable(file, variable.name, torch.cat(tensors).to(dtype))


def _tensor(source: Source, name: str) -> Tensor:
    if name.endswith("k_proj.bias"):  # stacked with two that have one
        return torch.zeros(source.tensors[name.removesuffix("bias") + "weight"].shape[0])
    return as_float(source.tensor(name))


def _rows(source: Source, name: str) -> tuple[Tensor, Tensor]:
    """Int8 in the weight's own shape, and by what it was multiplied, float32 `[rows]`."""
    levels = source.levels(name)
    shape = source.tensors[name].shape
    if levels is not None and fits_rows(levels):
        assert levels.step is not None
        return to_weight(levels.levels.to(torch.int8), shape).cpu(), 1 / levels.step[:, 0].cpu()
    weight = as_float(source.tensor(name))
    matrix = weight.reshape(weight.shape[0], -1)
    rounded, step = round_to_blocks(matrix, 8, matrix.shape[1])
    return rounded.reshape(weight.shape), 1 / step[:, 0]


def _write_variable(file: BinaryIO, name: str, tensor: Tensor) -> None:
    data = tensor.contiguous().numpy()
    if data.nbytes >= 1 << 32:
        raise ModelError(
            "CTranslate2's format has no room for a weight of 4 GB", where=name, found=f"{data.nbytes} bytes",
            remedy="Export with --dtype int8 or float16.",
        )  # fmt: skip
    file.write(_string(name) + struct.pack("<B", data.ndim))
    file.write(struct.pack(f"<{data.ndim}I", *data.shape))
    file.write(struct.pack("<BI", _TYPES[tensor.dtype], data.nbytes))
    file.write(data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes())


def _string(text: str) -> bytes:
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def _settings(adapter: WhisperAdapter) -> dict[str, object]:
    config, generation = adapter.config, adapter.generation
    heads: Sequence[Sequence[int]] | None = getattr(generation, "alignment_heads", None)
    if heads is None:
        # As the converter does: those of the last half of the layers.
        half = range(config.decoder_layers // 2, config.decoder_layers)
        heads = [[layer, head] for layer in half for head in range(config.decoder_attention_heads)]
    return {
        "alignment_heads": [list(pair) for pair in heads],
        "lang_ids": sorted(adapter.languages.values()),
        "suppress_ids": list(generation.suppress_tokens or ()),
        "suppress_ids_begin": list(generation.begin_suppress_tokens or ()),
    }


def vocabulary(adapter: WhisperAdapter) -> list[str]:
    """Every token by its number, with names for the timestamps that no tokenizer file holds."""
    begin, size = adapter.timestamp_begin, adapter.config.vocab_size
    tokens = cast("list[str | None]", adapter.tokenizer.convert_ids_to_tokens(list(range(begin))))
    times = (f"<|{(number - begin) * 0.02:.2f}|>" for number in range(begin, size))
    return [*(token or "" for token in tokens), *times]
