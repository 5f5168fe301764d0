"""Plain float weights for Transformers, and for anything that reads its directories."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from usmlite.export.plan import Becomes
from usmlite.export.source import Source, plain_config, plain_model
from usmlite.packfile import CONFIG_NAME, WEIGHTS_NAME, WeightsWriter, stored_tensors

FORMS = ("float32", "float16", "bfloat16")
_NORMED = ".parametrizations.weight.original"


def plan(source: Source, form: str) -> Iterator[Becomes]:
    """Every tensor as `form`; whole numbers as they are."""
    dtype = getattr(torch, form)
    for name, tensor in stored_tensors(plain_model(source)).items():
        if tensor.is_floating_point():
            yield Becomes(name, form, tensor.numel() * dtype.itemsize, form == "float32")
        else:
            yield Becomes(name, str(tensor.dtype)[6:], tensor.nbytes, True)


def write(source: Source, form: str, folder: Path, progress: Callable[[float], None]) -> None:
    """Writes `model.safetensors`, `config.json`, the tokenizer and the feature extractor."""
    dtype = getattr(torch, form)
    shapes = {
        name: (dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in stored_tensors(unprepared_model(source)).items()
    }
    tensors = ((name, plain_tensor(source, name, shape).to(kind)) for name, (kind, shape) in shapes.items())
    write_tensors(folder / WEIGHTS_NAME, shapes, tensors, progress)
    write_config(source, {"dtype": form}, folder)
    source.adapter.save_processor(folder)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[float], None],
) -> None:
    """Writes a safetensors file tensor by tensor."""
    total = sum(math.prod(shape) for _, shape in shapes.values())
    done = 0
    writer = WeightsWriter(path, shapes)
    try:
        for name, tensor in tensors:
            writer.write(name, tensor)
            done += tensor.numel()
            progress(done / total)
    except BaseException:
        writer.close(complete=False)
        raise
    writer.close()


def unprepared_model(source: Source) -> nn.Module:
    """The model as its class in Transformers makes it, without memory for its weights."""
    kind: Any = source.adapter.model_class()
    with torch.device("meta"):
        model: nn.Module = kind(kind.config_class.from_dict(plain_config(source)))
    return model


def plain_tensor(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor by the name that the class in Transformers has for it.

    Weight norms, which are multiplied out when a model is prepared, are taken apart again into a direction
    (`original1`, the weight itself) and its length (`original0`).
    """
    module, mark, part = name.partition(_NORMED)
    if not mark:
        return source.tensor(name)
    weight = source.tensor(f"{module}.weight")
    if part == "1":
        return weight
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    length: Tensor = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    return length


def write_config(source: Source, changes: dict[str, object], folder: Path) -> None:
    """config.json of the dense model with some settings changed."""
    values = plain_config(source) | changes
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
