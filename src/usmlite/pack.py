"""A trained student becomes a packed model: the directory that users are given.

Weights are packed row block by row block and written one by one, so that not even the packed model
as a whole is in memory.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from usmlite import kernels, packfile
from usmlite import quantize as q
from usmlite.errors import ModelError, UsmliteError
from usmlite.packfile import CONFIG_NAME, WEIGHTS_NAME, Manifest, PackedLayer, WeightsFile, WeightsWriter
from usmlite.spec import LayerSpec, matrix_shape
from usmlite.student import (
    CompressedLayer,
    CompressedLinear,
    StudentOptions,
    WeightCompression,
    compressed_layers,
)


class Processor(Protocol):
    """What goes with the weights: a `models.Adapter` is one."""

    def save_processor(self, directory: Path) -> None:
        """Writes tokenizer, feature extractor and generation settings."""


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Attributes:
        directory: where.
        weights_bytes: the size of the weights file, all of it.
        digest: over all tensors.
        layers: what each compressed weight became.
        kept: tensors stored in float16 (or as whole numbers), by name with their bytes.
        computed: tensors that are computed and not stored.
    """

    directory: Path
    weights_bytes: int
    digest: str
    layers: dict[str, PackedLayer]
    kept: dict[str, int]
    computed: dict[str, str]


@torch.no_grad()
def pack(
    student: nn.Module, adapter: Processor, directory: str | os.PathLike[str], *, coded: bool = True
) -> Packed:
    """Writes the student as a packed model in the layout of Hugging Face.

    The directory appears whole or not at all. A packed model that is there is replaced.

    Args:
        student: what `make_student` made; its masks and scales are taken as they are now. Tensors that
            are not compressed are rounded to float16 (`student.round_kept` makes the student agree).
        adapter: what goes with it.
        directory: where; new, empty, or a packed model.
        coded: entropy-code the codes of a weight where that makes them smaller. The model is the same and
            loads more slowly.

    Raises:
        ModelError: a weight is not finite, or its mask or its bits do not fit its spec.
        OutputError: something else is there, or it cannot be written.
    """
    with torch.autocast(next(student.parameters()).device.type, enabled=False):
        covered = dict(compressed_layers(student))
        rest = _uncompressed(student, covered)
        computed = {name: rule for name, tensor in rest.items() if (rule := packfile.computed_rule(tensor))}
        kept = {name: tensor for name, tensor in rest.items() if name not in computed}
        return write_packed(
            directory,
            (packed_layer(name, layer, coded=coded) for name, layer in covered.items()),
            {name: (stored_dtype(tensor), tuple(tensor.shape)) for name, tensor in kept.items()},
            kept.__getitem__,
            computed,
            adapter,
            student,
        )


def write_packed(
    directory: str | os.PathLike[str],
    layers: Iterable[tuple[str, PackedLayer, dict[str, Tensor]]],
    kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    computed: dict[str, str],
    adapter: Processor,
    model: nn.Module,
) -> Packed:
    """Writes a packed model of weights that come one by one.

    Args:
        directory: see `pack`.
        layers: of each compressed weight its module, what it becomes and its parts; asked for once.
        kept: dtype and shape of every tensor that is stored as it is.
        read: gives such a tensor by name, in any dtype.
        computed: tensors that are computed, with their rules.
        adapter: what goes with the weights.
        model: whose class and configuration are written; may lie on the meta device.

    Raises:
        ModelError: a tensor is not finite.
        OutputError: something else is there, or it cannot be written.
    """
    with packfile.new_directory(directory) as folder, tempfile.TemporaryDirectory(dir=folder) as aside:
        found: dict[str, PackedLayer] = {}
        for index, (name, layer, parts) in enumerate(layers):
            found[name] = layer
            save_file(parts, Path(aside) / str(index))
        writer = WeightsWriter(folder / WEIGHTS_NAME, _stored_shapes(found, kept))
        try:
            for name, (dtype, _) in kept.items():
                writer.write(name, _as_stored(name, read(name), dtype))
            for index, name in enumerate(found):
                for part, stored in load_file(Path(aside) / str(index)).items():
                    writer.write(f"{name}.weight.{part}", stored)
                (Path(aside) / str(index)).unlink()  # a large model need not lie on the disk twice
        except BaseException:
            writer.close(complete=False)
            raise
        writer.close()
        weights = WeightsFile(folder / WEIGHTS_NAME)
        manifest = Manifest(found, computed, weights.digest(), packfile.usmlite_version())
        adapter.save_processor(folder)
        _write_config(model, manifest, folder / CONFIG_NAME)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in kept.items()}
    return Packed(Path(directory), weights.size, manifest.digest, found, sizes, computed)


def packed_layer(
    name: str, layer: CompressedLayer, *, coded: bool
) -> tuple[str, PackedLayer, dict[str, Tensor]]:
    """One of the layers that `write_packed` takes: see `pack_layer`."""
    return (name, *_stored(name, layer, coded=coded))


def _stored(name: str, layer: CompressedLayer, *, coded: bool) -> tuple[PackedLayer, dict[str, Tensor]]:
    """What becomes of a weight and its parts; with entropy-coded codes, if they are worth it."""
    # A rate says how scales were chosen, which a reader need not know; and with a fixed width, codes that
    # follow a trellis are codes like any others.
    own, shape = layer.compression.spec, tuple(layer.weight.shape)
    spec = replace(own, rate=None, trellis=None)
    parts, packed = pack_layer(name, layer), PackedLayer(shape, spec)
    if not coded or spec.quant is None:
        return packed, parts
    stored = spec.stored_columns(matrix_shape(shape)[1])
    codes = kernels.unpack_codes(parts["codes"], spec.quant.bits, stored)
    try:
        return packed.encoded(parts, codes, own.trellis)
    except ModelError as error:
        raise ModelError(
            error.what, where=f"{name}.weight", found=error.found, remedy=error.remedy
        ) from error


def sample_coding(spec: LayerSpec, options: StudentOptions, *, rows: int = 128, columns: int = 1024) -> float:
    """About what share of its fixed-width bytes a weight takes with entropy coding.

    Measured on normally distributed weights, which those of trained networks resemble.
    """
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    layer = CompressedLinear.wrap(
        _linear(nn.Parameter(weight, requires_grad=False)), WeightCompression(weight, spec, options)
    )
    _, parts = _stored("sample", layer, coded=True)
    return sum(part.nbytes for part in parts.values()) / spec.bytes(rows, columns)


def _linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


def pack_layer(name: str, layer: CompressedLayer) -> dict[str, Tensor]:
    """The stored parts of one compressed weight, packed a few rows at a time.

    Args:
        name: its module, for errors.
        layer: the student's layer.

    Returns:
        Tensors on the CPU as `packfile.part_shapes` describes them.

    Raises:
        ModelError: the weight is not finite, or its mask or its bits do not fit its spec.
    """
    compression = layer.compression
    spec = compression.spec
    if compression.present.precision != spec.precision:
        raise ModelError(
            "the weight has more bits than its spec", where=f"{name}.weight", expected=spec,
            found=compression.present, remedy="Train on, until its bits have descended.",
        )  # fmt: skip
    rows, columns = matrix_shape(layer.weight.shape)
    parts = {
        part: torch.empty(shape, dtype=dtype)
        for part, (dtype, shape) in packfile.part_shapes(spec, rows, columns).items()
    }
    weight = layer.weight.detach()
    # Min-max scales follow each row's weights and are found block by block.
    if compression.column_scale is not None and spec.quant is not None:
        parts["column_scale"].copy_(packfile.stored_scales(compression.column_scale, spec.quant))
    follows = compression.log_scale is None and compression.scale is None
    given = None if follows or spec.quant is None else compression.scales(weight)
    for low, high in kernels.row_blocks(rows, columns):
        matrix = compression.matrix(weight[low:high]).float()
        if not bool(matrix.isfinite().all()):
            raise ModelError(
                "the weight is not finite", where=f"{name}.weight", expected="finite numbers",
                found="NaN or infinity",
                remedy="Go back to an earlier checkpoint and lower the learning rate.",
            )  # fmt: skip
        try:
            block = _pack_block(compression, matrix, given, slice(low, high))
        except UsmliteError as error:
            raise ModelError(error.what, where=f"{name}.weight, rows {low} to {high - 1}") from error
        for part, stored in block.items():
            parts[part][low:high] = stored
    return parts


def _pack_block(
    compression: WeightCompression, matrix: Tensor, given: tuple[Tensor, Tensor | None] | None, rows: slice
) -> dict[str, Tensor]:
    """Packs some rows of a weight exactly as `WeightCompression.forward` computes them."""
    spec = compression.spec
    mask = None if compression.mask is None else compression.mask[rows]
    if spec.quant is None:
        return packfile.pack_rows(spec, matrix.clamp(-kernels.MAX_SCALE, kernels.MAX_SCALE).half(), mask=mask)
    pruned = matrix if mask is None else torch.where(mask, matrix, torch.zeros_like(matrix))
    if given is None:
        scale, zero = q.min_max(pruned, spec.quant, spec.group)
    else:
        scale, zero = given[0][rows], None if given[1] is None else given[1][rows]
    codes = q.quantize(pruned, scale, zero, spec.quant, spec.group)
    return packfile.pack_rows(spec, codes, mask=mask, scale=scale, zero=zero)


def _uncompressed(student: nn.Module, covered: dict[str, CompressedLayer]) -> dict[str, Tensor]:
    """Parameters and buffers that no spec covers, tied ones once, without the student's own state."""
    tensors = packfile.stored_tensors(student)
    owned = tuple(f"{name}.compression." for name in covered)
    weights = {f"{name}.weight" for name in covered}
    return {
        name: tensor for name, tensor in tensors.items() if name not in weights and not name.startswith(owned)
    }


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """How a tensor that is not compressed is stored: parameters as float16.

    Buffers are few, and float16 would lose variances and frequencies.
    """
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float16 if isinstance(tensor, nn.Parameter) else torch.float32


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    out = torch.empty(tensor.numel(), dtype=dtype)
    flat = tensor.reshape(-1)
    for low, high in kernels.row_blocks(flat.numel(), 1):
        block = flat[low:high].float()
        if not bool(block.isfinite().all()):
            raise ModelError(
                "the tensor is not finite", where=name, expected="finite numbers", found="NaN or infinity"
            )
        limit = kernels.MAX_SCALE if dtype == torch.float16 else torch.finfo(dtype).max
        out[low:high] = block.clamp(-limit, limit)
    return out.reshape(tensor.shape)


def _stored_shapes(
    layers: Mapping[str, PackedLayer], kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    out = dict(kept)
    for name, layer in layers.items():
        for part, described in layer.parts().items():
            out[f"{name}.weight.{part}"] = described
    return out


def _write_config(student: nn.Module, manifest: Manifest, path: Path) -> None:
    config: dict[str, Any] = json.loads(cast(Any, student).config.to_json_string())
    config["architectures"] = [type(student).__name__]
    config["dtype"] = "float32"
    config["quantization_config"] = manifest.to_dict()
    path.write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
