"""What is exported: a model's tensors one by one, in float and, where it has them, as small integers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from usmlite import hub, packfile
from usmlite.info import describe
from usmlite.kernels import ExpandedWeight
from usmlite.load import dense_recognizer, load
from usmlite.models import Adapter, Teacher, skeleton
from usmlite.packed import StoredWeight
from usmlite.runtime import Recognizer
from usmlite.spec import CompressionSpec


@dataclass(frozen=True)
class Stored:
    """How one tensor is stored before the export.

    Attributes:
        name: of the parameter or buffer.
        shape: its shape.
        kind: "linear", "conv1d", "embedding", "positions"; "other" for biases, norms and buffers.
        form: in words, such as "int4 2:4, coded".
        bytes: in the file it comes from.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    form: str
    bytes: int

    @property
    def is_weight(self) -> bool:
        """Whether it is a matrix or a convolution, not a bias, a norm or a buffer."""
        return self.kind != "other"


class Source:
    """A model to export.

    Args:
        recognizer: the model; a packed one's weights are held as "int8".
        tensors: how each of its tensors is stored, in the order of the network.
    """

    def __init__(self, recognizer: Recognizer, tensors: dict[str, Stored]) -> None:
        self.recognizer = recognizer
        self.tensors = tensors

    @property
    def adapter(self) -> Adapter:
        """What goes with the network."""
        return self.recognizer.adapter

    @property
    def config(self) -> PretrainedConfig:
        """The dense model's configuration."""
        return self.adapter.config

    @property
    def name(self) -> str:
        """What it was called when it was asked for."""
        return self.recognizer.name

    def _place(self, name: str) -> StoredWeight | Tensor:
        parent, _, attribute = name.rpartition(".")
        return cast("StoredWeight | Tensor", getattr(self.recognizer.model.get_submodule(parent), attribute))

    def tensor(self, name: str) -> Tensor:
        """A tensor in full, in its own shape; float32 unless it holds whole numbers."""
        found = self._place(name)
        if isinstance(found, StoredWeight):
            return found.unpack()
        found = found.detach()
        return found.float() if found.is_floating_point() else found

    def levels(self, name: str) -> ExpandedWeight | None:
        """A weight as whole multiples of steps; None if it is floats.

        Returns:
            A matrix `[out, in]`; of a convolution `[out, kernel * in]`.
        """
        found = self._place(name)
        if not isinstance(found, StoredWeight):
            return None
        value = found.value
        assert isinstance(value, ExpandedWeight), "held as int8"
        return None if value.step is None else value


def open_source(source: str | Path) -> Source:
    """A packed, dense or student model, as `usmlite.load` takes it.

    Raises:
        ModelError: unknown or unsupported source.
        PackedModelError: a damaged packed model.
        TrainingError: a damaged student.
    """
    # A packed model on the hub is fetched once, for what it holds and for what it says of it.
    named = None if Path(source).is_dir() else hub.parse(source)
    place = (None if named is None else hub.fetch_packed(*named)) or source
    recognizer = load(place, hold="int8")
    recognizer.name = str(source)
    if recognizer.kind == "packed":
        rows = describe(place, CompressionSpec()).rows
        tensors = {row.name: Stored(row.name, row.shape, row.kind, row.spec, row.bytes) for row in rows}
        return Source(recognizer, tensors)
    return Source(recognizer, _dense_tensors(recognizer.model, recognizer.adapter))


def dense_source(teacher: Teacher) -> Source:
    """A dense model that is loaded already."""
    return Source(dense_recognizer(teacher), _dense_tensors(teacher.model, teacher.adapter))


def _dense_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Stored]:
    kinds = adapter.compressible(model) | dict.fromkeys(adapter.computed(model), "positions")
    return {
        name: Stored(
            name, tuple(tensor.shape), kinds.get(name, "other"), str(tensor.dtype)[6:], tensor.nbytes
        )
        for name, tensor in packfile.stored_tensors(model).items()
    }  # fmt: skip


def plain_model(source: Source) -> nn.Module:
    """The Transformers model of a source without memory for its weights, as its own class makes it."""
    return skeleton(source.config)


def plain_config(source: Source) -> dict[str, Any]:
    """config.json of the dense model."""
    values: dict[str, Any] = source.config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = [source.adapter.model_class().__name__]
    return values


def as_float(tensor: Tensor) -> Tensor:
    """Contiguous float32 on the CPU, for NumPy."""
    return tensor.detach().to("cpu", torch.float32).contiguous()
