"""The weights file, in the safetensors format: its header checked first, and written tensor by tensor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from usmlite import kernels
from usmlite.errors import PackedModelError
from usmlite.packfile.directory import CONFIG_NAME, COPY_AGAIN, WEIGHTS_NAME
from usmlite.packfile.layer import PackedLayer
from usmlite.packfile.manifest import usmlite_version
from usmlite.packfile.parts import packed_weight

_MAX_HEADER_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
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
                "cannot be read", where=self.path, found=error.strerror or str(error), remedy=COPY_AGAIN
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
                        raise PackedModelError("shrank while it was read", where=self.path, remedy=COPY_AGAIN)
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
                "cannot be read", where=self.path, found=str(error), remedy=COPY_AGAIN
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
                remedy=COPY_AGAIN,
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
                    remedy=f"{WEIGHTS_NAME} and {CONFIG_NAME} must come from the same packing. {COPY_AGAIN}",
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
                    remedy=f"{WEIGHTS_NAME} and {CONFIG_NAME} must come from the same packing. {COPY_AGAIN}",
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


def _file_order(name: str, dtype: torch.dtype) -> tuple[int, bytes]:
    # Large elements first keeps every tensor aligned in the file.
    return -dtype.itemsize, name.encode()


def _read_header(file: BinaryIO, size: int, where: str) -> dict[str, Entry]:
    def wrong(what: str, expected: object, found: object) -> PackedModelError:
        return PackedModelError(what, where=where, expected=expected, found=found, remedy=COPY_AGAIN)

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
