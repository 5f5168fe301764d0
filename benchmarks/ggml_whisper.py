"""What `usmlite.export.ggml` writes of a dense model, and one more kind of blocks: q2_k."""

from __future__ import annotations

import ctypes
from importlib import metadata
from pathlib import Path

import numpy as np

from usmlite.atomic import replacing
from usmlite.export import ggml
from usmlite.export.source import dense_source
from usmlite.models import Teacher

SUPER_BLOCK = 256  # weights of q2_k that are packed together
_Q2_K = 10


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


def _ggml() -> ctypes.CDLL:
    for file in metadata.files("pywhispercpp") or ():
        if file.name.startswith("libggml-base"):
            return ctypes.CDLL(str(file.locate()))
    raise OSError("pywhispercpp brings no libggml-base")


KINDS = {**ggml.KINDS, "q2_k": ggml.Kind(10, _Q2_K, SUPER_BLOCK, q2_k)}


def write(teacher: Teacher, path: Path, kind: str) -> None:
    """Writes a dense model as a ggml file.

    Args:
        teacher: the model.
        path: the file.
        kind: one of `KINDS`.

    Raises:
        ValueError: rows of the model cannot be cut into blocks of this kind.
    """
    source, chosen = dense_source(teacher), KINDS[kind]
    for stored in source.tensors.values():
        if stored.kind in ("linear", "embedding") and stored.shape[1] % chosen.block:
            raise ValueError(
                f"{kind} packs {chosen.block} weights of a row together, and {stored.name} has rows of "
                f"{stored.shape[1]}"
            )
    with replacing(path) as file:
        ggml.write_kind(source, chosen, file, lambda share: None)
