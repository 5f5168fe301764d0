"""CTranslate2 Whisper models (as faster-whisper users have them) read as Transformers weights.

The layout of `model.bin` is that of CTranslate2's `python/ctranslate2/specs/model_spec.py`
(`ModelSpec._serialize`, binary version 6); the names of the variables are those of its
`specs/whisper_spec.py`. Nothing in the file is trusted: every length is checked against what is left of
the file before it is used, and every shape against the model that the file itself describes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig

from usmlite.errors import ModelError

BINARY_VERSION = 6
SPEC_NAME = "WhisperSpec"
SPEC_REVISION = 3

_ITEM_BYTES = {"float32": 4, "int8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2}
_DTYPES = tuple(_ITEM_BYTES)  # the position is the type's number in the file
_MAX_RANK = 8
_GELU = 3  # ctranslate2.specs.common_spec.Activation.GELU
_DEFAULT_HEAD_DIM = 64  # every released Whisper model has it

# Scalars that may hold anything: they do not change the numbers that the model computes.
_INERT_SCALARS = {"decoder/alignment_heads", "decoder/alignment_layer"}
_REQUIRED_SCALARS = {"decoder/pre_norm": 1, "decoder/activation": _GELU, "encoder/activation": _GELU}


@dataclass(frozen=True)
class Variable:
    """One variable of a `model.bin`: where its bytes are and what they mean."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


class _Span:
    """Several files read as if they were one, without copying them together."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"
        self._parts: list[memoryview] = []
        for path in paths:
            try:
                with path.open("rb") as file:
                    self._parts.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                raise ModelError(
                    "the weights cannot be read",
                    where=path,
                    found=str(error),
                    remedy="Download or convert the model again.",
                ) from error
        self.size = sum(len(part) for part in self._parts)

    def read(self, offset: int, size: int) -> memoryview:
        """Bytes `offset` to `offset + size`; a copy only where they cross from one file to the next."""
        pieces = []
        for part in self._parts:
            if offset < len(part) and size:
                piece = part[offset : offset + size]
                pieces.append(piece)
                size -= len(piece)
                offset = 0
            else:
                offset -= min(offset, len(part))
        if len(pieces) == 1:
            return pieces[0]
        return memoryview(b"".join(pieces))


class ModelFile:
    """The directory of variables of a `model.bin`, read without reading the weights.

    Args:
        paths: the file, or the parts it was cut into, in order.

    Raises:
        ModelError: the file is missing, truncated, damaged or of another version.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._span = _Span(paths)
        self.where = self._span.where
        self._offset = 0
        self.variables: dict[str, Variable] = {}
        self._read_header()
        for _ in range(self._unsigned("I", "the number of variables")):
            self._read_variable()
        self._read_aliases()
        if self._offset != self._span.size:
            raise self._damaged(
                "there are bytes after the last entry",
                expected=f"{self._offset} bytes",
                found=f"{self._span.size} bytes",
            )

    def _damaged(self, what: str, *, expected: object = None, found: object = None) -> ModelError:
        return ModelError(
            what,
            where=self.where,
            expected=expected,
            found=found,
            remedy="The file is damaged: download or convert the model again.",
        )

    def _bytes(self, size: int, meaning: str) -> memoryview:
        left = self._span.size - self._offset
        if size > left:
            raise self._damaged(
                f"the file ends early, in {meaning} at byte {self._offset}",
                expected=f"{size} bytes",
                found=f"{left} bytes",
            )
        data = self._span.read(self._offset, size)
        self._offset += size
        return data

    def _unsigned(self, code: str, meaning: str) -> int:
        number = struct.unpack(f"<{code}", self._bytes(struct.calcsize(code), meaning))[0]
        return int(number)

    def _string(self, meaning: str) -> str:
        start = self._offset
        raw = bytes(self._bytes(self._unsigned("H", meaning), meaning))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{meaning} at byte {start} is not text") from error
        if not text.endswith("\0") or not text[:-1].isprintable():
            raise self._damaged(f"{meaning} at byte {start} is not a name")
        return text[:-1]

    def _read_header(self) -> None:
        remedy = (
            "Convert the model again with CTranslate2 3 or 4 (ct2-transformers-converter), "
            "or give the Hugging Face directory it was made from."
        )
        version = self._unsigned("I", "the binary version")
        if version != BINARY_VERSION:
            raise ModelError(
                "this is not a CTranslate2 model.bin that usmlite can read",
                where=self.where,
                expected=f"binary version {BINARY_VERSION}",
                found=version,
                remedy=remedy,
            )
        spec = self._string("the model type")
        revision = self._unsigned("I", "the model type's revision")
        if spec != SPEC_NAME or revision != SPEC_REVISION:
            raise ModelError(
                "this CTranslate2 model is of an unsupported type",
                where=self.where,
                expected=f"{SPEC_NAME} revision {SPEC_REVISION}",
                found=f"{spec} revision {revision}",
                remedy=remedy,
            )

    def _read_variable(self) -> None:
        name = self._string("a variable's name")
        if name in self.variables:
            raise self._damaged(f"variable {name} is there twice")
        rank = self._unsigned("B", f"the rank of {name}")
        if rank > _MAX_RANK:
            raise self._damaged(
                f"variable {name} has too many dimensions", expected=f"at most {_MAX_RANK}", found=rank
            )
        shape = tuple(self._unsigned("I", f"the shape of {name}") for _ in range(rank))
        number = self._unsigned("B", f"the type of {name}")
        if number >= len(_DTYPES):
            raise self._damaged(
                f"variable {name} is of an unknown type", expected=f"0 to {len(_DTYPES) - 1}", found=number
            )
        dtype = _DTYPES[number]
        size = self._unsigned("I", f"the size of {name}")
        wanted = _ITEM_BYTES[dtype]
        for dimension in shape:
            wanted *= dimension
        if size != wanted:
            raise self._damaged(
                f"the size of variable {name} contradicts its shape {shape} of {dtype}",
                expected=f"{wanted} bytes",
                found=f"{size} bytes",
            )
        offset = self._offset
        self._bytes(size, f"variable {name}")
        self.variables[name] = Variable(name, shape, dtype, offset, size)

    def _read_aliases(self) -> None:
        for _ in range(self._unsigned("I", "the number of aliases")):
            alias = self._string("an alias")
            target = self._string("an alias's target")
            if target not in self.variables or alias in self.variables:
                raise self._damaged(f"alias {alias} of {target} contradicts the variables")
            self.variables[alias] = self.variables[target]

    def __contains__(self, name: str) -> bool:
        return name in self.variables

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a variable."""
        if name not in self.variables:
            raise self._damaged(f"variable {name} is missing")
        return self.variables[name].shape

    def scalar(self, name: str) -> int:
        """The value of an integer of rank 0."""
        shape = self.shape(name)
        variable = self.variables[name]
        if shape or variable.dtype not in ("int8", "int16", "int32"):
            raise self._damaged(
                f"variable {name} has the wrong form",
                expected="one integer",
                found=f"shape {shape} of {variable.dtype}",
            )
        data = self._span.read(variable.offset, variable.size)
        return int(np.frombuffer(data, dtype=f"<i{variable.size}")[0])

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A variable as float32, dequantized if it is stored as int8 or int16.

        Args:
            name: the variable.
            rows: only this part of the first axis.

        Returns:
            A new float32 tensor. CTranslate2 stores `round(w * scale)`, with a `scale` for each row
            (int8) or for the whole variable (int16).
        """
        shape = self.shape(name)
        variable = self.variables[name]
        count, row_shape = (shape[0], shape[1:]) if shape else (1, ())
        start, stop, _ = (rows or slice(None)).indices(count)
        row_bytes = variable.size // count if count else 0
        data = self._span.read(variable.offset + start * row_bytes, (stop - start) * row_bytes)
        values = _as_float32(data, variable.dtype).reshape(stop - start, *row_shape)
        if variable.dtype in ("int8", "int16"):
            scale_name = f"{variable.name}_scale"
            scale = self.tensor(scale_name) if variable.dtype == "int16" else self.tensor(scale_name, rows)
            allowed = {"int8": (stop - start,), "int16": (1,)}[variable.dtype]
            if tuple(scale.shape) != allowed or not bool((scale > 0).all()):
                raise self._damaged(
                    f"variable {scale_name} cannot scale {name}",
                    expected=f"positive numbers of shape {allowed}",
                    found=f"shape {tuple(scale.shape)}",
                )
            values /= scale.reshape(-1, *([1] * len(row_shape)))
        elif variable.dtype == "int32":
            raise self._damaged(f"variable {name} has the wrong type", expected="weights", found="int32")
        return values


def _as_float32(data: memoryview, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":  # the upper half of a float32; NumPy has no such type
        halves = np.frombuffer(data, dtype="<u2").astype(np.uint32)
        return torch.from_numpy((halves << np.uint32(16)).view(np.float32))
    code = {"float32": "<f4", "float16": "<f2", "int8": "i1", "int16": "<i2", "int32": "<i4"}[dtype]
    return torch.from_numpy(np.frombuffer(data, dtype=code).astype(np.float32))


def read_config(file: ModelFile) -> WhisperConfig:
    """The architecture that the variables describe; token ids are left to the caller.

    Raises:
        ModelError: the variables do not describe a Whisper model.
    """
    _check_scalars(file)
    vocab_size, d_model = _shape(file, "decoder/embeddings/weight", 2)
    _, mel_bins, _ = _shape(file, "encoder/conv1/weight", 3)
    encoder_layers, decoder_layers = (_count_layers(file, side) for side in ("encoder", "decoder"))
    heads: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        name = f"{side}/num_heads"
        count = heads[side] = file.scalar(name) if name in file else d_model // _DEFAULT_HEAD_DIM
        if count < 1 or d_model % count:
            raise ModelError(
                f"the {side}'s number of heads contradicts its width",
                where=file.where,
                expected=f"a divisor of {d_model}",
                found=count,
                remedy="The file is damaged: download or convert the model again.",
            )
    return WhisperConfig(
        vocab_size=vocab_size,
        num_mel_bins=mel_bins,
        d_model=d_model,
        encoder_layers=encoder_layers,
        encoder_attention_heads=heads["encoder"],
        encoder_ffn_dim=_shape(file, "encoder/layer_0/ffn/linear_0/weight", 2)[0],
        decoder_layers=decoder_layers,
        decoder_attention_heads=heads["decoder"],
        decoder_ffn_dim=_shape(file, "decoder/layer_0/ffn/linear_0/weight", 2)[0],
        max_source_positions=_shape(file, "encoder/position_encodings/encodings", 2)[0],
        max_target_positions=_shape(file, "decoder/position_encodings/encodings", 2)[0],
        activation_function="gelu",
        dropout=0.0,
        use_cache=True,
        tie_word_embeddings=True,
    )


def _shape(file: ModelFile, name: str, rank: int) -> tuple[int, ...]:
    shape = file.shape(name)
    if len(shape) != rank or 0 in shape:
        raise ModelError(
            f"variable {name} has the wrong shape",
            where=file.where,
            expected=f"{rank} dimensions",
            found=shape,
            remedy="The file is damaged: download or convert the model again.",
        )
    return shape


def _count_layers(file: ModelFile, side: str) -> int:
    count = 0
    while f"{side}/layer_{count}/self_attention/linear_0/weight" in file:
        count += 1
    if not count:
        raise ModelError(
            f"the {side} has no layers",
            where=file.where,
            remedy="The file is damaged: download or convert the model again.",
        )
    return count


def _check_scalars(file: ModelFile) -> None:
    """Refuses switches that would make CTranslate2 compute something that Whisper does not."""
    for name, variable in file.variables.items():
        if variable.shape or name in _INERT_SCALARS or name.endswith(("/num_heads", "_scale")):
            continue
        wanted = _REQUIRED_SCALARS.get(name, 0)
        value = file.scalar(name)
        if value != wanted:
            raise ModelError(
                f"{name} asks for something that the Whisper of Transformers does not do",
                where=file.where,
                expected=wanted,
                found=value,
                remedy="Give the Hugging Face directory that the model was converted from.",
            )


def read_weights(file: ModelFile, config: WhisperConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every weight of `WhisperForConditionalGeneration` by its name there, in float32.

    `proj_out.weight` is left out: it is tied to the token embedding. The last check, after the last
    weight, is that nothing in the file was left unread.

    Raises:
        ModelError: a variable is missing, of a wrong shape, or unknown.
    """
    d_model = config.d_model
    seen: set[str] = set()

    def read(name: str, shape: tuple[int, ...], rows: slice | None = None) -> torch.Tensor:
        found = file.shape(name)
        if found != shape:
            raise ModelError(
                f"variable {name} has the wrong shape",
                where=file.where,
                expected=shape,
                found=found,
                remedy="The file is damaged: download or convert the model again.",
            )
        seen.update((name, f"{name}_scale"))
        return file.tensor(name, rows)

    def linear(source: str, target: str, inputs: int, outputs: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{target}.weight", read(f"{source}/weight", (outputs, inputs))
        yield f"{target}.bias", read(f"{source}/bias", (outputs,))

    def norm(source: str, target: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{target}.weight", read(f"{source}/gamma", (d_model,))
        yield f"{target}.bias", read(f"{source}/beta", (d_model,))

    def stacked(source: str, target: str, parts: str) -> Iterator[tuple[str, torch.Tensor]]:
        total = len(parts) * d_model
        for index, part in enumerate(parts):
            rows = slice(index * d_model, (index + 1) * d_model)
            yield f"{target}.{part}_proj.weight", read(f"{source}/weight", (total, d_model), rows)
            bias = read(f"{source}/bias", (total,), rows)
            if part != "k":
                yield f"{target}.{part}_proj.bias", bias
            elif bool(bias.any()):
                raise ModelError(
                    f"{source} has a bias on its keys, which Whisper has not",
                    where=file.where,
                    remedy="Give the Hugging Face directory that the model was converted from.",
                )

    for side, layers, ffn in (
        ("encoder", config.encoder_layers, config.encoder_ffn_dim),
        ("decoder", config.decoder_layers, config.decoder_ffn_dim),
    ):
        if side == "encoder":
            positions = config.max_source_positions
            for name, inputs in (("conv1", config.num_mel_bins), ("conv2", d_model)):
                yield f"model.encoder.{name}.weight", read(f"encoder/{name}/weight", (d_model, inputs, 3))
                yield f"model.encoder.{name}.bias", read(f"encoder/{name}/bias", (d_model,))
        else:
            positions = config.max_target_positions
            yield (
                "model.decoder.embed_tokens.weight",
                read("decoder/embeddings/weight", (config.vocab_size, d_model)),
            )
        yield (
            f"model.{side}.embed_positions.weight",
            read(f"{side}/position_encodings/encodings", (positions, d_model)),
        )
        for index in range(layers):
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            yield from stacked(f"{source}/self_attention/linear_0", f"{target}.self_attn", "qkv")
            yield from linear(
                f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj", d_model, d_model
            )
            yield from norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            if side == "decoder":
                yield from stacked(f"{source}/attention/linear_0", f"{target}.encoder_attn", "q")
                yield from stacked(f"{source}/attention/linear_1", f"{target}.encoder_attn", "kv")
                yield from linear(
                    f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj", d_model, d_model
                )
                yield from norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            yield from linear(f"{source}/ffn/linear_0", f"{target}.fc1", d_model, ffn)
            yield from linear(f"{source}/ffn/linear_1", f"{target}.fc2", ffn, d_model)
            yield from norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
    _check_projection(file)
    seen.add("decoder/projection/weight")
    unread = sorted(name for name, variable in file.variables.items() if name not in seen and variable.shape)
    if unread:
        raise ModelError(
            f"the file holds variables that Whisper has not, {unread[0]} first",
            where=file.where,
            found=f"{len(unread)} of them",
            remedy="Give the Hugging Face directory that the model was converted from.",
        )


def _check_projection(file: ModelFile) -> None:
    projection, embedding = "decoder/projection/weight", "decoder/embeddings/weight"
    if projection not in file or file.variables[projection] != file.variables[embedding]:
        raise ModelError(
            "the output projection is not the token embedding, as it is in every Whisper model",
            where=file.where,
            expected=f"{projection} as an alias of {embedding}",
            remedy="Give the Hugging Face directory that the model was converted from.",
        )
