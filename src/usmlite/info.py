"""What a model's weights take, or would take: every tensor of it, compressed or kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig

from usmlite.errors import ModelError, PackedModelError
from usmlite.load import PACKED_FOLDER, RECIPE_FILE
from usmlite.models import Adapter, adapter_class, load_teacher, read_configuration, skeleton
from usmlite.packfile import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    WeightsFile,
    WeightsWriter,
    is_packed,
    member,
    part_shapes,
    read_config,
    read_manifest,
    stored_tensors,
)
from usmlite.shipped import shipped
from usmlite.spec import CompressionSpec, LayerSpec, matrix_shape
from usmlite.tables import LayerRow, layer_table, readable_bytes

COMPUTED = "computed, not stored"
KEPT, BUFFER = "kept, float16", "kept as it is"
HALF_BYTES = 2


@dataclass(frozen=True)
class ModelInfo:
    """The tensors of a model and their bytes.

    Attributes:
        source: what was asked for.
        packed: whether the bytes are those of a packed model's file; otherwise what they would be.
        rows: every tensor, in the order of the forward pass; tied ones once.
        header_bytes: what the weights file takes beside its tensors.
        float32_bytes: the dense model's parameters in float32, tied ones once.
        unused: rules of the spec that decide nothing for this model.
        saved_bytes: by how much entropy coding made a packed model's file smaller.
        parts: name of each row to the part of the network that it belongs to.
    """

    source: str
    packed: bool
    rows: tuple[LayerRow, ...]
    header_bytes: int
    float32_bytes: int
    unused: tuple[str, ...] = ()
    saved_bytes: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_bytes(self) -> int:
        """Size of the weights file, all of it."""
        return self.header_bytes + sum(row.bytes for row in self.rows)

    @property
    def share(self) -> float:
        """Size of the weights file over the dense model's in float32."""
        return self.file_bytes / self.float32_bytes

    def by_spec(self) -> dict[str, int]:
        """Bytes for each way of storing, largest first."""
        sums: dict[str, int] = {}
        for row in self.rows:
            sums[row.spec] = sums.get(row.spec, 0) + row.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def by_part(self) -> dict[str, int]:
        """Bytes of each part of the network, in the order of the forward pass."""
        sums: dict[str, int] = {}
        for row in self.rows:
            part = self.parts.get(row.name, "other")
            sums[part] = sums.get(part, 0) + row.bytes
        return sums

    def summary(self) -> list[str]:
        """The totals, in words."""
        verb = "takes" if self.packed else "would take"
        parts = ", ".join(f"{part} {readable_bytes(count)}" for part, count in self.by_part().items())
        lines = [f"parts: {parts}"]
        lines += [f"{spec}: {readable_bytes(count)}" for spec, count in self.by_spec().items() if count]
        lines.append(f"header of the file: {readable_bytes(self.header_bytes)}")
        lines.append(
            f"{self.source}: the weights file {verb} {self.file_bytes:,} bytes, {100 * self.share:.2f} % of "
            f"{self.float32_bytes:,} in float32 ({1 / self.share:.1f} times smaller)"
        )
        if self.saved_bytes:
            fixed = self.file_bytes + self.saved_bytes
            share = 100 * fixed / self.float32_bytes
            lines.append(f"with fixed-width codes it would take {fixed:,} bytes, {share:.2f} %")
        elif not self.packed:
            lines.append(
                "(fixed-width codes; entropy coding makes the file smaller once the weights are known)"
            )
        lines += [f"No weight is covered by the rule: {rule}" for rule in self.unused]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {
            "source": self.source,
            "packed": self.packed,
            "file_bytes": self.file_bytes,
            "header_bytes": self.header_bytes,
            "float32_bytes": self.float32_bytes,
            "share": self.share,
            "fixed_width_bytes": self.file_bytes + self.saved_bytes,
            "parts": self.by_part(),
            "tensors": [
                {"name": r.name, "shape": list(r.shape), "kind": r.kind, "spec": r.spec, "bytes": r.bytes}
                for r in self.rows
            ],
            "unused_rules": list(self.unused),
        }


def describe(source: str | Path, spec: CompressionSpec) -> ModelInfo:
    """The tensors of a packed model, or of a dense one after compression.

    Args:
        source: a packed model's directory, a run's directory (its packed model is taken), or anything
            that `load_teacher` takes.
        spec: what the weights of a dense model would become; a packed model has its own.

    Raises:
        ModelError: unknown or unsupported source.
        PackedModelError: a damaged packed model.
    """
    path = shipped(source) or Path(source)
    if (path / RECIPE_FILE).is_file() and (path / PACKED_FOLDER).is_dir():
        path = path / PACKED_FOLDER
    if is_packed(path):
        return _describe_packed(path, str(source))
    return _describe_dense(source, spec)


def information_table(found: ModelInfo) -> Table:
    """The tensors with the sum of their bytes below; biases and norms together on one line."""
    title = found.source if found.packed else f"{found.source}, if it were compressed so"
    vectors = [row for row in found.rows if len(row.shape) < 2 and row.spec == KEPT]
    rows = [row for row in found.rows if row not in vectors]
    if vectors:
        size = sum(math.prod(row.shape) for row in vectors)
        kept = sum(row.bytes for row in vectors)
        rows.append(LayerRow(f"{len(vectors)} biases and norms", (size,), "other", KEPT, kept))
    return layer_table(rows, title=title)


def dense_float32_bytes(config: PretrainedConfig) -> int:
    """Bytes of the parameters in float32 of a model with this configuration, tied ones once."""
    return sum(4 * parameter.numel() for parameter in skeleton(config).parameters())


def _describe_dense(source: str | Path, spec: CompressionSpec) -> ModelInfo:
    teacher = load_teacher(source)
    return describe_weights(teacher.model, teacher.adapter, spec, str(source))


def describe_weights(model: nn.Module, adapter: Adapter, spec: CompressionSpec, source: str) -> ModelInfo:
    """The tensors of a dense model after compression.

    Args:
        model: the dense model; may lie on the meta device.
        adapter: of its family.
        spec: what its weights would become.
        source: what to call it.
    """
    kinds = {name.removesuffix(".weight"): kind for name, kind in adapter.compressible(model).items()}
    computed, shown = adapter.computed(model), _kinds(model)
    rows, stored = [], {}
    for name, parameter in stored_tensors(model).items():
        module, shape = name.removesuffix(".weight"), tuple(parameter.shape)
        kind = kinds.get(module) or (shown.get(module, "other") if name.endswith(".weight") else "other")
        layer = spec.resolve(module, kind) if module in kinds else LayerSpec()
        if name in computed:
            rows.append(LayerRow(name, shape, kind, COMPUTED, 0))
        elif not isinstance(parameter, nn.Parameter):
            rows.append(LayerRow(name, shape, "buffer", BUFFER, parameter.nbytes))
            stored[name] = (parameter.dtype, shape)
        elif layer.is_kept:
            rows.append(LayerRow(name, shape, kind, KEPT, HALF_BYTES * parameter.numel()))
            stored[name] = (torch.float16, shape)
        else:
            size = matrix_shape(shape)
            rows.append(LayerRow(name, shape, kind, str(layer), layer.bytes(*size)))
            for part, described in part_shapes(layer, *size).items():
                stored[f"{name}.{part}"] = described
    unused = tuple(f"{rule.match} ({rule.kind or 'any kind'}): {rule.spec}" for rule in spec.unused(kinds))
    parts = _parts(rows, adapter.part)
    float32_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    return ModelInfo(source, False, tuple(rows), _header_bytes(stored), float32_bytes, unused, parts=parts)


def _parts(rows: Iterable[LayerRow], part: Callable[[str], str]) -> dict[str, str]:
    return {row.name: part(row.name) for row in rows}


def _header_bytes(stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Size of the header that the packed file would have: it is written, to be exact."""
    with tempfile.TemporaryDirectory(prefix="usmlite-") as folder:
        path = Path(folder) / WEIGHTS_NAME
        WeightsWriter(path, stored).close(complete=False)
        return path.stat().st_size


def _describe_packed(path: Path, source: str) -> ModelInfo:
    manifest = read_manifest(path)
    file = WeightsFile(member(path, WEIGHTS_NAME))
    config = _configuration(path)
    model, family = skeleton(config), adapter_class(config.model_type, path)
    kinds = _kinds(model)
    rows, described = [], set()
    for name, parameter in stored_tensors(model).items():
        module = name.removesuffix(".weight")
        kind = kinds.get(module, "other") if name.endswith(".weight") else "other"
        if module in manifest.layers and name.endswith(".weight"):
            layer = manifest.layers[module]
            names = [f"{name}.{part}" for part in layer.parts()]
            form = str(layer.spec) if layer.coded is None else f"{layer.spec}, coded"
            if layer.trellis is not None:
                form += f", trellis {layer.trellis}"
        elif name in manifest.computed:
            names, form = [], COMPUTED
        else:
            names, form = [name], KEPT if isinstance(parameter, nn.Parameter) else BUFFER
        sizes = [file.entries[stored] for stored in names if stored in file.entries]
        described.update(names)
        rows.append(LayerRow(name, tuple(parameter.shape), kind, form, sum(e.stop - e.start for e in sizes)))
    for name, entry in file.entries.items():
        if name not in described:
            rows.append(LayerRow(name, entry.shape, "other", "not of this model", entry.stop - entry.start))
    header = file.size - sum(row.bytes for row in rows)
    float32 = sum(4 * parameter.numel() for parameter in model.parameters())
    saved = 0
    for layer in manifest.layers.values():
        if layer.coded is not None:
            saved += layer.fixed_bytes - layer.coded
    parts = _parts(rows, family.part)
    return ModelInfo(source, True, tuple(rows), header, float32, saved_bytes=saved, parts=parts)


def _configuration(path: Path) -> PretrainedConfig:
    values = {key: value for key, value in read_config(path).items() if key != "quantization_config"}
    try:
        return read_configuration(values, path / CONFIG_NAME)
    except ModelError as error:
        raise PackedModelError(error.what, where=error.where, found=error.found) from error


def _kinds(model: nn.Module) -> dict[str, str]:
    kinds = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            kinds[name] = "linear"
        elif isinstance(layer, nn.Conv1d):
            kinds[name] = "conv1d"
        elif isinstance(layer, nn.Embedding):
            # A table of positions is a class of its own, or was left by Whisper's encoder as it is.
            kinds[name] = (
                "embedding" if type(layer) is nn.Embedding and "positions" not in name else "positions"
            )
    return kinds
