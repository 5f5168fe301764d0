"""Whisper in the file format of whisper.cpp, in float16 or in ggml's quantized blocks.

The layout is that of whisper.cpp's `models/convert-pt-to-ggml.py`; what is quantized is what its
`examples/quantize` does: every matrix, the token embedding included, but neither convolutions nor positions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from transformers import WhisperFeatureExtractor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from usmlite.errors import SpecError
from usmlite.export.integers import bits_of, block_steps
from usmlite.export.plan import Becomes
from usmlite.export.source import Source, Stored, as_float
from usmlite.kernels import ExpandedWeight
from usmlite.models import WhisperAdapter

BLOCK = 32  # weights that share a scale
AUTO = "auto"
_MAGIC = 0x67676D6C  # "ggml"
_QUANTIZATION_VERSION = 2000  # GGML_QNT_VERSION * GGML_QNT_VERSION_FACTOR
_FLOAT32, _FLOAT16 = 0, 1

# Transformers' names to openai/whisper's, in the order in which they are replaced.
_NAMES = (
    ("model.", ""),
    (".layers.", ".blocks."),
    ("self_attn_layer_norm", "attn_ln"),
    ("encoder_attn_layer_norm", "cross_attn_ln"),
    ("final_layer_norm", "mlp_ln"),
    ("self_attn.", "attn."),
    ("encoder_attn.", "cross_attn."),
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("out_proj", "out"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
    ("embed_positions.weight", "positional_embedding"),
    ("embed_tokens", "token_embedding"),
    ("encoder.layer_norm", "encoder.ln_post"),
    ("decoder.layer_norm", "decoder.ln"),
)


def q4_0(weight: np.ndarray) -> bytes:
    """Blocks of 32 as ggml's `quantize_row_q4_0_ref`: a float16 scale, then 32 codes of 4 bits.

    Args:
        weight: float32 `[rows, columns]`, columns a multiple of 32.
    """
    return _pack_4(*_offset_codes(weight, 16))


def q5_0(weight: np.ndarray) -> bytes:
    """As `q4_0` with 5 bits: the scale, the codes' highest bits, then their lower four."""
    return _pack_5(*_offset_codes(weight, 32))


def q8_0(weight: np.ndarray) -> bytes:
    """Blocks of 32 as ggml's `quantize_row_q8_0_ref`: a float16 scale, then 32 signed bytes."""
    blocks = weight.reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    values = blocks * _inverse(scale)
    codes = np.trunc(values + np.copysign(np.float32(0.5), values)).astype(np.int8)  # C's roundf
    return _pack_8(scale, codes)


def _pack_4(scale: np.ndarray, codes: np.ndarray) -> bytes:
    return np.concatenate([_half(scale), _nibbles(codes)], axis=1).tobytes()


def _pack_5(scale: np.ndarray, codes: np.ndarray) -> bytes:
    highest = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([_half(scale), highest, _nibbles(codes & 15)], axis=1).tobytes()


def _pack_8(scale: np.ndarray, codes: np.ndarray) -> bytes:
    return np.concatenate([_half(scale), codes.astype(np.int8).view(np.uint8)], axis=1).tobytes()


def _offset_codes(weight: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales, float32 `[blocks, 1]`, and codes from 0 up, uint8 `[blocks, 32]`."""
    blocks = weight.reshape(-1, BLOCK)
    # The weight farthest from 0 gets the lowest code, of which there is one more than above 0.
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = (farthest / np.float32(-levels // 2)).astype(np.float32)
    values = blocks * _inverse(scale) + np.float32(levels / 2 + 0.5)
    return scale, np.minimum(values.astype(np.int8), levels - 1).astype(np.uint8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    inverse: np.ndarray = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return inverse


def _half(scale: np.ndarray) -> np.ndarray:
    return scale.astype("<f2").view(np.uint8)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    half = BLOCK // 2
    packed: np.ndarray = codes[:, :half] | codes[:, half:] << 4
    return packed


@dataclass(frozen=True)
class Kind:
    """One kind of ggml weights.

    Attributes:
        file: its number as a file's type (`ggml_ftype`).
        tensor: its number as a tensor's type (`ggml_type`).
        block: a row's length must be a multiple of it.
        encode: rounds float32 `[rows, columns]` to bytes; None where nothing is quantized.
        bits: of its codes, where they can be taken over without rounding.
        pack: scales `[blocks, 1]` and codes `[blocks, 32]` to bytes, where they can.
    """

    file: int
    tensor: int
    block: int = 1
    encode: Callable[[np.ndarray], bytes] | None = None
    bits: int | None = None
    pack: Callable[[np.ndarray, np.ndarray], bytes] | None = None

    def take_over(self, weight: ExpandedWeight | None) -> bytes | None:
        """A weight's own integers and steps as blocks; None where they do not fit."""
        if weight is None or not self.holds(weight) or self.pack is None or self.bits is None:
            return None
        steps = block_steps(weight, BLOCK)
        assert steps is not None
        # q8_0 has signed codes, the others count from the lowest.
        lowest = 0 if self.bits == 8 else 1 << self.bits - 1
        codes = weight.levels.cpu().numpy().astype(np.int16).reshape(-1, BLOCK) + lowest
        return self.pack(
            steps.cpu().numpy().reshape(-1, 1), codes.astype(np.int8 if not lowest else np.uint8)
        )

    def holds(self, weight: ExpandedWeight) -> bool:
        """Whether its blocks hold a weight as it is."""
        if self.bits is None or weight.column_scale is not None or weight.columns % BLOCK:
            return False
        steps = block_steps(weight, BLOCK)
        return (
            steps is not None
            and bool((steps.half().float() == steps).all())
            and bits_of(weight.levels, (self.bits,)) is not None
        )


KINDS = {
    "f16": Kind(1, _FLOAT16),
    "q8_0": Kind(7, 8, BLOCK, q8_0, 8, _pack_8),
    "q5_0": Kind(8, 6, BLOCK, q5_0, 5, _pack_5),
    "q4_0": Kind(2, 2, BLOCK, q4_0, 4, _pack_4),
}
FORMS = (AUTO, *KINDS)
_BLOCK_BYTES = {"q8_0": 34, "q5_0": 22, "q4_0": 18}


def resolve(source: Source, form: str) -> str:
    """The kind that "auto" stands for: the smallest that holds every matrix as it is, else q8_0.

    float16 where rows are no multiple of 32, or the model is not quantized.

    Raises:
        SpecError: rows are no multiple of 32 and another kind than float16 is asked for.
    """
    matrices = [stored for stored in source.tensors.values() if _is_matrix(stored)]
    uneven = next((stored for stored in matrices if stored.shape[1] % BLOCK), None)
    if form != AUTO:
        if uneven is not None and form != "f16":
            raise SpecError(
                f"{form} packs {BLOCK} weights of a row together", where=uneven.name,
                expected=f"rows of a multiple of {BLOCK}", found=uneven.shape[1],
                remedy="Export with --dtype f16.",
            )  # fmt: skip
        return form
    levels = [source.levels(stored.name) for stored in matrices]
    known = [weight for weight in levels if weight is not None]
    if uneven is not None or not known:
        return "f16"
    for name in ("q4_0", "q5_0"):
        if len(known) == len(levels) and all(KINDS[name].holds(weight) for weight in known):
            return name
    return "q8_0"


def plan(source: Source, form: str) -> Iterator[Becomes]:
    """Matrices in blocks; convolutions in float16; positions, biases and norms in float32."""
    kind = KINDS[form]
    for stored in source.tensors.values():
        count = int(np.prod(stored.shape))
        if not _is_matrix(stored):
            half = stored.kind == "conv1d"
            yield Becomes(stored.name, "float16" if half else "float32", count * (2 if half else 4), not half)
        elif kind.encode is None:
            yield Becomes(stored.name, "float16", 2 * count, False)
        else:
            levels = source.levels(stored.name)
            exact = levels is not None and kind.holds(levels)
            yield Becomes(
                stored.name, f"{form}, blocks of {BLOCK}", count // BLOCK * _BLOCK_BYTES[form], exact
            )


def write(source: Source, form: str, file: BinaryIO, progress: Callable[[float], None]) -> None:
    """Writes the one file that whisper.cpp reads."""
    write_kind(source, KINDS[form], file, progress)


def write_kind(source: Source, kind: Kind, file: BinaryIO, progress: Callable[[float], None]) -> None:
    """Writes a file whose matrices are all of this kind."""
    for part in _head(cast(WhisperAdapter, source.adapter), kind):
        file.write(part)
    for index, stored in enumerate(source.tensors.values()):
        file.write(_tensor(source, stored, kind))
        progress((index + 1) / len(source.tensors))


def _head(adapter: WhisperAdapter, kind: Kind) -> Iterator[bytes]:
    config = adapter.config
    yield struct.pack(
        "<12i", _MAGIC, config.vocab_size, config.max_source_positions, config.d_model,
        config.encoder_attention_heads, config.encoder_layers, config.max_target_positions, config.d_model,
        config.decoder_attention_heads, config.decoder_layers, config.num_mel_bins,
        kind.file + _QUANTIZATION_VERSION * (kind.encode is not None),
    )  # fmt: skip
    filters = cast(Any, WhisperFeatureExtractor)(feature_size=config.num_mel_bins).mel_filters
    yield struct.pack("<2i", *filters.T.shape)
    yield np.ascontiguousarray(filters.T, dtype="<f4").tobytes()
    # The tokens before <|endoftext|>; whisper.cpp knows the special ones by their place.
    yield struct.pack("<i", adapter.end)
    for text in text_tokens(adapter):
        yield struct.pack("<i", len(text)) + text


def text_tokens(adapter: WhisperAdapter) -> list[bytes]:
    """The bytes of every token before <|endoftext|>."""
    byte_of = {character: byte for byte, character in cast(Any, bytes_to_unicode)().items()}
    tokens = cast("list[str]", adapter.tokenizer.convert_ids_to_tokens(list(range(adapter.end))))
    return [bytes(byte_of[character] for character in token) for token in tokens]


def _tensor(source: Source, stored: Stored, kind: Kind) -> bytes:
    name, shape = openai_name(stored.name), stored.shape
    if not _is_matrix(stored):
        if ".conv" in name and name.endswith(".bias"):
            shape = (*shape, 1)
        half = stored.kind == "conv1d"
        data = as_float(source.tensor(stored.name)).numpy().astype("<f2" if half else "<f4")
        return _entry(name, shape, _FLOAT16 if half else _FLOAT32, data.tobytes())
    if kind.encode is None:
        data = as_float(source.tensor(stored.name)).numpy().astype("<f2")
        return _entry(name, shape, _FLOAT16, data.tobytes())
    blocks = kind.take_over(source.levels(stored.name))
    if blocks is None:
        # whisper.cpp quantizes a float16 file.
        rounded = as_float(source.tensor(stored.name)).half().float().numpy()
        blocks = kind.encode(rounded)
    return _entry(name, shape, kind.tensor, blocks)


def _is_matrix(stored: Stored) -> bool:
    return stored.kind in ("linear", "embedding")


def openai_name(name: str) -> str:
    """The name in openai/whisper of a weight of Transformers."""
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


def _entry(name: str, shape: Sequence[int], kind: int, data: bytes) -> bytes:
    # The fastest axis comes first.
    header = struct.pack(f"<{3 + len(shape)}i", len(shape), len(name), kind, *reversed(shape))
    return header + name.encode() + data
