"""A packed model in memory: the Transformers model whose covered layers compute from stored weights.

`load_packed` checks the directory and builds the model. How the weights are held is a choice between
speed and memory: as float32 (ordinary layers), as one small integer each, or packed as in the file. With the
native library the last two are computed with as they lie in memory.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usmlite import kernels, packfile
from usmlite.errors import ModelError, OutputError, PackedModelError
from usmlite.memory import return_freed_memory
from usmlite.models import Adapter, adapter_class, read_configuration, skeleton
from usmlite.packfile import CONFIG_NAME, WEIGHTS_NAME, Manifest, WeightsFile

Hold = Literal["float32", "int8", "packed", "mapped"]
HOLDS: tuple[Hold, ...] = get_args(Hold)

_LAYERS = (
    "encoder_layers", "decoder_layers", "num_hidden_layers", "encoder_num_hidden_layers",
    "decoder_num_hidden_layers", "num_decoder_layers", "num_conv_layers",
)  # fmt: skip
_MOST_POSITIONS = 1 << 20  # of tables that are computed; ten hours of audio have fewer


def fastest_hold() -> Hold:
    """How weights should be held where speed is what counts.

    Raises:
        ModelError: the environment asks for kernels that are not there.
    """
    try:
        return "float32" if kernels.implementation() == "reference" else "int8"
    except ValueError as error:
        raise ModelError("no such kernels", found=error, remedy="Unset the variable.") from None


class StoredWeight(nn.Module):
    """One weight's stored tensors, as buffers whose names extend the weight's own.

    They move between devices with the model; `half()` and the like leave their dtypes alone.

    Args:
        weight: packed or expanded.
        shape: the weight's own shape.
        activations: how the native library multiplies by it, see `kernels.NativeWeight`.

    Attributes:
        dtype: of the model around it, which rows that are looked up are given in.
    """

    dtype = torch.float32

    def __init__(
        self,
        weight: kernels.PackedWeight | kernels.ExpandedWeight,
        shape: tuple[int, ...],
        activations: kernels.Activations = "int8",
    ) -> None:
        super().__init__()
        self.shape = shape
        self._activations = activations
        self._prepared: kernels.NativeWeight | None = None
        self._kind = type(weight)
        self._names: dict[str, str] = {}
        self._plain: dict[str, Any] = {}
        for field in fields(weight):
            value = getattr(weight, field.name)
            if not isinstance(value, Tensor):
                self._plain[field.name] = value
                continue
            self._names[field.name] = (
                "values" if value.is_floating_point() and field.name == "codes" else field.name
            )
            self.register_buffer(self._names[field.name], value)

    @property
    def value(self) -> kernels.PackedWeight | kernels.ExpandedWeight:
        """The stored tensors, on the device where the buffers are now."""
        tensors = {field: self._buffers[name] for field, name in self._names.items()}
        return self._kind(**cast(dict[str, Any], {**self._plain, **tensors}))

    @property
    def operand(self) -> kernels.PackedWeight | kernels.ExpandedWeight | kernels.NativeWeight:
        """What the kernels compute with: prepared for the native library where it takes such a weight."""
        if self._prepared is None:
            value = self.value
            self._prepared = kernels.prepare(value, self._activations)
            return self._prepared or value
        return self._prepared

    def unpack(self) -> Tensor:
        """The weight in full, float32, in its own shape."""
        return packfile.to_weight(kernels.unpack(self.value), self.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        # Codes are bytes and scales are exact in float16: only the device may change.
        self._prepared = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)).dtype
        super()._apply(lambda buffer: buffer.to(fn(buffer).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own, and prepares them when it is first used.
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        return ", ".join(f"{name}: {str(b.dtype)[6:]} {list(b.shape)}" for name, b in self.named_buffers())


class PackedLinear(nn.Module):
    """A linear layer that multiplies by its stored weight.

    Args:
        layer: the layer it replaces; its bias is kept.
        weight: the stored weight.
        borrowed: the weight belongs to another layer (the tied token embedding).
    """

    def __init__(self, layer: nn.Linear, weight: StoredWeight, *, borrowed: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        if borrowed:
            self.__dict__["weight"] = weight
        else:
            self.weight = weight
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return kernels.linear(input, self.weight.operand, self.bias)


class PackedConv1d(nn.Module):
    """A 1-D convolution with a stored weight."""

    def __init__(self, layer: nn.Conv1d, weight: StoredWeight) -> None:
        super().__init__()
        self.weight, self.bias = weight, layer.bias
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, in, frames]` to `[batch, out, frames']`."""
        operand = self.weight.operand
        if (
            isinstance(operand, kernels.NativeWeight)
            and isinstance(self.padding, tuple)
            and self.dilation == (1,)
            and self.groups == 1
        ):
            windows = kernels.convolve(input, operand, self.bias, self.stride[0], self.padding[0])
            if windows is not None:
                return windows
        weight = self.weight.unpack().to(input.dtype)
        return nn.functional.conv1d(
            input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class PackedEmbedding(nn.Module):
    """A token embedding that unpacks only the rows asked for."""

    def __init__(self, layer: nn.Embedding, weight: StoredWeight) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` to `[..., dimension]`."""
        return kernels.embedding(input, self.weight.operand).to(self.weight.dtype)


class PackedPositions(nn.Module):
    """A learned position table with the call signature of Transformers' Whisper decoder."""

    def __init__(self, layer: nn.Embedding, weight: StoredWeight) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.weight = weight

    def forward(
        self, input: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Positions of token ids `[batch, tokens]`, `[(batch,) tokens, dimension]`."""
        if position_ids is None:
            stop = min(past_key_values_length + input.shape[1], self.num_embeddings)
            position_ids = torch.arange(past_key_values_length, stop, device=input.device)
        return kernels.embedding(position_ids, self.weight.operand).to(self.weight.dtype)


def load_packed(
    directory: str | os.PathLike[str], *, hold: Hold = "float32", activations: kernels.Activations = "int8"
) -> tuple[PreTrainedModel, Adapter]:
    """Loads a packed model.

    Args:
        directory: what `pack` wrote.
        hold: how the weights are kept in memory: "float32" expands them once; "int8" keeps one byte per
            weight, "packed" the bytes of the file, and both multiply by these with the native library;
            "mapped" is "packed" that stays in the file, which must not change while the model is in use
            (what is entropy-coded, and small tensors, are in memory all the same).
            Without it they are multiplied by the scale, or unpacked, in every call, and "float32" is the
            fastest.
        activations: what the native library multiplies weights of "int8" and "packed" with: "int8" rounds
            each row of activations to 256 steps, "float32" leaves them as they are.

    Returns:
        The Transformers model in eval mode, no parameter requiring a gradient, and its adapter.

    Raises:
        PackedModelError: the directory is damaged, altered, not ours or from a newer usmlite.
        ModelError: its tokenizer is missing or damaged, or the environment asks for kernels that are not
            there.
        ValueError: there is no such `hold`.
    """
    if hold not in HOLDS:
        raise ValueError(f"hold must be one of {', '.join(HOLDS)}, got {hold!r}")
    fastest_hold()  # refuses a wrong environment before anything is read
    kernels.warn_if_missing()
    folder = Path(directory)
    config_path = folder / CONFIG_NAME
    values = packfile.read_config(folder)
    manifest = Manifest.from_dict(values.pop("quantization_config", None), where=str(config_path))
    weights = WeightsFile(packfile.member(folder, WEIGHTS_NAME))
    model = _skeleton(values, len(weights.entries), config_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in packfile.stored_tensors(model).items()}
    weights.check_tensors(manifest.tensors(shapes, where=str(config_path)))
    weights.check_digest(manifest.digest)
    for name in packfile.PROCESSOR_FILES:
        if os.path.lexists(folder / name):
            packfile.member(folder, name)
    _compute_buffers(model)
    config = cast(Any, model).config
    family = adapter_class(config.model_type, config_path)
    # The tokenizer takes as long as the weights, and neither waits for the other.
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(family.from_directory, folder, config)
        _fill(model, manifest, weights, hold, activations)
    adapter = reading.result()
    adapter.restore_settings(model)
    if hold != "float32":
        # Written by Transformers, the stored weights would not be a model that anybody can load.
        model.__dict__["save_pretrained"] = _refuse_saving
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # Reading the tokenizer and decoding leave behind half as much again as the model takes.
    return_freed_memory()
    return cast(PreTrainedModel, model), adapter


def arithmetic(model: nn.Module) -> str:
    """What a model computes its compressible layers with, for reports.

    Such as "native (avx2), int8 activations"; of weights that the native library does not take, how many
    there are and why; "torch, float32" for ordinary layers.
    """
    stored = [module for module in model.modules() if isinstance(module, StoredWeight)]
    if not stored:
        return f"torch, {str(next(model.parameters()).dtype)[6:]}"
    operands = [weight.operand for weight in stored]
    native = [operand for operand in operands if isinstance(operand, kernels.NativeWeight)]
    if not native:
        return f"{kernels.implementation()}, float32 activations"
    text = f"{kernels.implementation()}, {native[0].activations} activations"
    reasons = Counter(
        kernels.obstacle(operand) for operand in operands if not isinstance(operand, kernels.NativeWeight)
    )
    for reason, count in reasons.items():
        text += f"; {count} of {len(stored)} weights by the reference ({reason})"
    return text


def _refuse_saving(save_directory: object, *args: object, **kwargs: object) -> NoReturn:
    raise OutputError(
        "a packed model in memory is not saved again", where=str(save_directory),
        remedy="Copy the directory it was loaded from.",
    )  # fmt: skip


def _skeleton(values: dict[str, Any], tensors: int, path: Path) -> nn.Module:
    """The model that the config describes, without memory for its weights."""

    def wrong(expected: object, found: object) -> PackedModelError:
        return PackedModelError(
            "does not describe a model that can be loaded", where=path, expected=expected, found=found,
            remedy=packfile.COPY_AGAIN,
        )  # fmt: skip

    try:
        family = adapter_class(values.get("model_type"), path)
    except ModelError as error:
        raise wrong(error.expected, error.found) from error
    for name, value in family.fixed_settings.items():
        if values.get(name, value) != value:
            raise wrong(f"{name} of {value}", repr(values[name]))
    for settings in (values, values.get("encoder_config")):
        for name, value in settings.items() if isinstance(settings, dict) else ():
            if name in _LAYERS and not (isinstance(value, int) and 0 <= value <= tensors):
                # Every layer has tensors of its own; more layers than tensors would only cost time.
                raise wrong(f"{name} of at most {tensors}", repr(value))
            tables = name.startswith("max_") and "position" in name
            if tables and not (isinstance(value, int) and 0 <= value <= _MOST_POSITIONS):
                raise wrong(f"{name} of at most {_MOST_POSITIONS}", repr(value))
            if name.endswith("attention_heads") and not (isinstance(value, int) and value >= 1):
                # Whether they divide the width is checked by Transformers, which takes negative ones as well.
                raise wrong(f"{name} of at least 1", repr(value))
            if name.endswith("dropout") and not (isinstance(value, int | float) and 0 <= value <= 1):
                # Nothing is dropped here, but torch looks at it all the same, when the model is used.
                raise wrong(f"{name} from 0 to 1", repr(value))
    try:
        return skeleton(read_configuration(values, path))
    except ModelError as error:
        raise wrong(error.expected or "the config of a known model", error.found) from error
    except Exception as error:  # a config that is not to be trusted can fail anywhere
        raise wrong("the config of a known model", f"{type(error).__name__}: {error}"[:300]) from error


@torch.no_grad()
def _compute_buffers(model: nn.Module) -> None:
    """Gives a skeleton the buffers that no file holds, as Transformers does when it loads one."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if not _is_stored(module, name)]
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if names:
            cast(Any, model)._init_weights(module)


def _is_stored(module: nn.Module, buffer: str) -> bool:
    return buffer in module.state_dict()


@torch.no_grad()
def _fill(
    model: nn.Module,
    manifest: Manifest,
    weights: WeightsFile,
    hold: Hold,
    activations: kernels.Activations,
) -> None:
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)

    def make(module: str) -> Tensor | StoredWeight:
        layer = manifest.layers[module]
        weight = weights.weight(module, layer, read)
        if hold == "float32":
            return packfile.to_weight(kernels.unpack(weight), layer.shape)
        if hold == "mapped":
            return StoredWeight(weight, layer.shape, activations)
        form = _copied(weight) if hold == "packed" else kernels.expand(weight)
        return StoredWeight(form, layer.shape, activations)

    # Decoding waits for nobody: side by side, the largest first.
    largest = sorted(manifest.layers, key=lambda module: -math.prod(manifest.layers[module].shape))
    with weights.open() as read, ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        made = {module: pool.submit(torch.no_grad()(make), module) for module in largest}
        try:
            for name, empty in packfile.stored_tensors(model).items():
                module = name.removesuffix(".weight")
                names = tied.get(id(empty), [name])
                if module in made:
                    weight = made.pop(module).result()
                    if isinstance(weight, StoredWeight):
                        _replace_layers(model, names, weight)
                    else:
                        _set(model, names, nn.Parameter(weight, requires_grad=False))
                elif name in manifest.computed:
                    table = packfile.compute(manifest.computed[name], tuple(empty.shape))
                    _set(model, names, nn.Parameter(table, requires_grad=False))
                else:
                    value = read(name)
                    packfile.check_finite(value, f"{weights.path}: {name}")
                    value = value.to(empty.dtype, copy=True)
                    is_parameter = isinstance(empty, nn.Parameter)
                    _set(model, names, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        finally:
            for waiting in made.values():
                waiting.cancel()


def _copied(weight: kernels.PackedWeight) -> kernels.PackedWeight:
    """Out of the mapped file, so that what happens to the file later cannot matter."""
    tensors = {name: getattr(weight, name) for name in ("codes", "scale", "zero", "pattern", "column_scale")}
    copies: dict[str, Any] = {
        name: None if value is None else value.clone() for name, value in tensors.items()
    }
    return replace(weight, **copies)


def _set(model: nn.Module, names: list[str], value: Tensor) -> None:
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, value)


def _replace_layers(model: nn.Module, names: list[str], weight: StoredWeight) -> None:
    """Replaces the layer that owns the weight, and those that are tied to it."""
    for index, name in enumerate(names):
        module = name.removesuffix(".weight")
        layer = model.get_submodule(module)
        if isinstance(layer, nn.Linear):
            new: nn.Module = PackedLinear(layer, weight, borrowed=index > 0)
        elif isinstance(layer, nn.Conv1d):
            new = PackedConv1d(layer, weight)
        elif type(layer) is nn.Embedding:
            new = PackedEmbedding(layer, weight)
        elif isinstance(layer, nn.Embedding):
            new = PackedPositions(layer, weight)
        else:
            raise PackedModelError(
                f"a {type(layer).__name__} cannot be packed", where=module, remedy="Hold it as float32."
            )
        model.set_submodule(module, new)
