"""Whisper weights in the file format of whisper.cpp, in float16 or in ggml's quantized blocks.

The layout is that of whisper.cpp's `models/convert-pt-to-ggml.py`; what is quantized is what its
`examples/quantize` does: every matrix, the token embedding included, but neither convolutions nor positions.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import WhisperFeatureExtractor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from usmlite.atomic import replacing
from usmlite.models import Teacher

BLOCK, SUPER_BLOCK = 32, 256  # weights that share a scale; in q2_k, blocks that are packed together
_MAGIC = 0x67676D6C  # "ggml"
_QUANTIZATION_VERSION = 2000  # GGML_QNT_VERSION * GGML_QNT_VERSION_FACTOR
_FLOAT32, _FLOAT16 = 0, 1
_Q2_K = 10

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
    scales, codes = _offset_codes(weight, 16)
    return np.concatenate([scales, _nibbles(codes)], axis=1).tobytes()


def q5_0(weight: np.ndarray) -> bytes:
    """As `q4_0` with 5 bits: the scale, the codes' highest bits, then their lower four."""
    scales, codes = _offset_codes(weight, 32)
    highest = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([scales, highest, _nibbles(codes & 15)], axis=1).tobytes()


def q8_0(weight: np.ndarray) -> bytes:
    """Blocks of 32 as ggml's `quantize_row_q8_0_ref`: a float16 scale, then 32 signed bytes."""
    blocks = weight.reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    values = blocks * _inverse(scale)
    codes = np.trunc(values + np.copysign(np.float32(0.5), values)).astype(np.int8)  # C's roundf
    return np.concatenate([_half(scale), codes.view(np.uint8)], axis=1).tobytes()


def q2_k(weight: np.ndarray) -> bytes:
    """Super-blocks of 256, made by the ggml that comes with pywhispercpp: their search is no short code."""
    rows, columns = weight.shape
    library = _ggml()
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]  # fmt: skip
    source = np.ascontiguousarray(weight, dtype=np.float32)
    target = np.zeros(rows * library.ggml_row_size(_Q2_K, columns), dtype=np.uint8)
    library.ggml_quantize_chunk(_Q2_K, source.ctypes.data, target.ctypes.data, 0, rows, columns, None)
    return target.tobytes()


def _offset_codes(weight: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales as bytes `[blocks, 2]` and codes from 0 up, uint8 `[blocks, 32]`."""
    blocks = weight.reshape(-1, BLOCK)
    # The weight farthest from 0 gets the lowest code, of which there is one more than above 0.
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = (farthest / np.float32(-levels // 2)).astype(np.float32)
    values = blocks * _inverse(scale) + np.float32(levels / 2 + 0.5)
    return _half(scale), np.minimum(values.astype(np.int8), levels - 1).astype(np.uint8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    inverse: np.ndarray = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return inverse


def _half(scale: np.ndarray) -> np.ndarray:
    return scale.astype("<f2").view(np.uint8)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    half = BLOCK // 2
    packed: np.ndarray = codes[:, :half] | codes[:, half:] << 4
    return packed


def _ggml() -> ctypes.CDLL:
    for file in metadata.files("pywhispercpp") or ():
        if file.name.startswith("libggml-base"):
            return ctypes.CDLL(str(file.locate()))
    raise OSError("pywhispercpp brings no libggml-base")


@dataclass(frozen=True)
class Kind:
    """One kind of ggml weights.

    Attributes:
        file: its number as a file's type (`ggml_ftype`).
        tensor: its number as a tensor's type (`ggml_type`).
        block: a row's length must be a multiple of it.
        encode: float32 `[rows, columns]` to bytes; None where nothing is quantized.
    """

    file: int
    tensor: int
    block: int = 1
    encode: Callable[[np.ndarray], bytes] | None = None


KINDS = {
    "f16": Kind(1, _FLOAT16),
    "q8_0": Kind(7, 8, BLOCK, q8_0),
    "q5_0": Kind(8, 6, BLOCK, q5_0),
    "q4_0": Kind(2, 2, BLOCK, q4_0),
    "q2_k": Kind(10, _Q2_K, SUPER_BLOCK, q2_k),
}


def write(teacher: Teacher, path: Path, kind: str) -> None:
    """Writes a dense model as a ggml file.

    Args:
        teacher: the model.
        path: the file.
        kind: one of `KINDS`.

    Raises:
        ValueError: rows of the model cannot be cut into blocks of this kind.
    """
    chosen = KINDS[kind]
    with replacing(path) as file:
        for part in _parts(teacher, kind, chosen):
            file.write(part)


def _parts(teacher: Teacher, kind: str, chosen: Kind) -> Iterator[bytes]:
    config, adapter = teacher.adapter.config, teacher.adapter
    quantized = chosen.encode is not None
    yield struct.pack(
        "<12i", _MAGIC, config.vocab_size, config.max_source_positions, config.d_model,
        config.encoder_attention_heads, config.encoder_layers, config.max_target_positions, config.d_model,
        config.decoder_attention_heads, config.decoder_layers, config.num_mel_bins,
        chosen.file + _QUANTIZATION_VERSION * quantized,
    )  # fmt: skip
    filters = cast(Any, WhisperFeatureExtractor)(feature_size=config.num_mel_bins).mel_filters
    yield struct.pack("<2i", *filters.T.shape)
    yield np.ascontiguousarray(filters.T, dtype="<f4").tobytes()
    # The tokens before <|endoftext|>; whisper.cpp knows the special ones by their place.
    byte_of = {character: byte for byte, character in cast(Any, bytes_to_unicode)().items()}
    yield struct.pack("<i", adapter.end)
    for token in adapter.tokenizer.convert_ids_to_tokens(list(range(adapter.end))):
        text = bytes(byte_of[character] for character in token)
        yield struct.pack("<i", len(text)) + text
    for name, parameter in teacher.model.named_parameters():
        weight = parameter.detach().numpy()
        ours = openai_name(name)
        if ".conv" in ours and ours.endswith(".bias"):
            weight = weight.reshape(-1, 1)
        if weight.ndim == 1 or ours.endswith((".bias", "positional_embedding")):
            yield _tensor(ours, weight.shape, _FLOAT32, weight.astype("<f4").tobytes())
        elif weight.ndim == 2 and chosen.encode is not None:
            if weight.shape[1] % chosen.block:
                raise ValueError(
                    f"{kind} packs {chosen.block} weights of a row together, and {ours} has rows of "
                    f"{weight.shape[1]}"
                )
            # whisper.cpp quantizes a float16 file.
            rounded = weight.astype(np.float16).astype(np.float32)
            yield _tensor(ours, weight.shape, chosen.tensor, chosen.encode(rounded))
        else:
            yield _tensor(ours, weight.shape, _FLOAT16, weight.astype("<f2").tobytes())


def openai_name(name: str) -> str:
    """The name in openai/whisper of a weight of Transformers."""
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


def _tensor(name: str, shape: Sequence[int], kind: int, data: bytes) -> bytes:
    # The fastest axis comes first.
    header = struct.pack(f"<{3 + len(shape)}i", len(shape), len(name), kind, *reversed(shape))
    return header + name.encode() + data
