"""The quantizer that Transformers uses to load packed models. `hf` registers it.

Weights are checked as `load_packed` checks them and expanded to ordinary layers while Transformers
loads them. Saving writes the stored tensors again, as long as the weights are those that were loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from usmlite import kernels, packfile
from usmlite.errors import OutputError, PackedModelError
from usmlite.packfile import PARTS, QUANT_METHOD, Manifest, WeightsFile


def register() -> None:
    """Enters configuration and quantizer into Transformers' registry; once."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(PackedConfig)
        register_quantizer(QUANT_METHOD)(PackedQuantizer)


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The `quantization_config` of a packed model, checked.

    Args:
        values: as config.json holds it.

    Raises:
        PackedModelError: it is not ours, from a newer usmlite, or damaged.
    """

    def __init__(self, **values: Any) -> None:
        self.manifest = Manifest.from_dict({**values, "quant_method": QUANT_METHOD}, where="config.json")
        # Transformers names its own methods by an enumeration of strings; a registered one is plain text.
        self.quant_method = cast(Any, QUANT_METHOD)

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return self.manifest.to_dict()


class _Unpack(ConversionOps):  # type: ignore[misc, unused-ignore]
    """Stored parts of one weight to the weight."""

    def __init__(self, quantizer: PackedQuantizer) -> None:
        # Transformers looks for this name: it then leaves the parts' dtypes alone.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unpack:
        # Transformers copies a converter for every weight; the quantizer is one and the same.
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        name = cast(str, kwargs["full_layer_name"])
        parts: dict[str, Tensor] = {}
        for source, found in input_dict.items():
            part = source.removesuffix("$").rpartition(".")[2]
            parts[part] = found[0] if isinstance(found, list) else found
        return {name: [self.hf_quantizer.unpack(name, parts)]}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("the quantizer saves the stored tensors itself")


class PackedQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Loads a packed model into ordinary layers."""

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._weights: WeightsFile | None = None
        self._prefix = ""
        self._dtype = torch.float32

    @property
    def manifest(self) -> Manifest:
        """What config.json says of the packed weights."""
        return self.quantization_config.manifest

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses to quantize a dense model on the fly.

        Raises:
            PackedModelError: the model is not packed.
        """
        if not self.pre_quantized:
            raise PackedModelError(
                "usmlite does not compress while Transformers loads", where="quantization_config",
                remedy="Run `usmlite compress` first and load the directory that it writes.",
            )  # fmt: skip

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Weights are computed in float32 unless another dtype is asked for."""
        self._dtype = dtype or torch.float32
        return self._dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        files = kwargs.get("checkpoint_files") or []
        if len(files) != 1:
            raise PackedModelError(
                "not one weights file", where="from_pretrained", expected=packfile.WEIGHTS_NAME,
                found=", ".join(map(str, files)) or "none", remedy="Load the packed directory itself.",
            )  # fmt: skip
        # Importing models while Transformers loads its registry would go round in a circle.
        from usmlite.models import prepare

        prepare(model)
        self._weights = WeightsFile(files[0])
        # The base model (AutoModel) knows its weights without the prefix that the file has.
        tensors = packfile.stored_tensors(model)
        whole = any(f"{name}.weight" in tensors for name in self.manifest.layers)
        self._prefix = "" if whole else f"{cast(Any, model).base_model_prefix}."
        # Transformers ties weights only after they are loaded.
        tied = set(cast(Any, model).all_tied_weights_keys)
        shapes = {
            self._prefix + name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in tied
        }
        where = str(Path(files[0]).with_name(packfile.CONFIG_NAME))
        self._weights.check_tensors(self.manifest.tensors(shapes, where=where))
        self._weights.check_digest(self.manifest.digest)
        ignored = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        own = {f"^{name.removeprefix(self._prefix)}$".replace(".", r"\.") for name in self.manifest.computed}
        cast(Any, model)._keys_to_ignore_on_load_missing = ignored | own
        return model

    def get_weight_conversions(self) -> list[Any]:
        """One rule for all weights: their parts, whichever there are, become the weight."""
        from transformers.core_model_loading import WeightConverter

        sources = [f"weight.{part}$" for part in PARTS]
        return [WeightConverter(sources, "weight", [_Unpack(self)])]

    def unpack(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """The weight that stored parts stand for, in the dtype the model is loaded in.

        Args:
            name: the weight's name in the model.
            parts: by name, as they lie in the file.
        """
        module = (self._prefix + name).removesuffix(".weight")
        layer = self.manifest.layers[module]
        path = None if self._weights is None else self._weights.path
        where = f"{path}: {name}"
        parts = layer.decoded(parts, where=where)
        weight = packfile.packed_weight(layer.spec, layer.shape, parts, where=where)
        return packfile.to_weight(kernels.unpack(weight), layer.shape).to(self._dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        with torch.no_grad():
            for name, rule in self.manifest.computed.items():
                parameter = model.get_parameter(name.removeprefix(self._prefix))
                parameter.copy_(packfile.compute(rule, tuple(parameter.shape)))
        # Transformers would reverse the conversion when it saves; `get_state_dict_and_metadata` does that.
        cast(Any, model)._weight_conversions = None
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The stored tensors, for `save_pretrained`.

        Raises:
            OutputError: a weight is no longer the one that was loaded.
        """
        if self._weights is None or self._prefix or self._dtype != torch.float32:
            raise OutputError(
                "only a packed model that was loaded whole and in float32 can be saved",
                where="save_pretrained",
                remedy="Copy the directory it was loaded from.",
            )  # fmt: skip
        self._weights.check_digest(self.manifest.digest)
        stored: dict[str, Tensor] = {}
        with self._weights.open() as read, torch.no_grad():
            for name, parameter in packfile.stored_tensors(model).items():
                module = name.removesuffix(".weight")
                if module in self.manifest.layers:
                    layer = self.manifest.layers[module]
                    # Copies: the file that is mapped may be the one that is written.
                    parts = {part: read(f"{name}.{part}").clone() for part in layer.parts()}
                    stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
                    loaded = self.unpack(name, parts)
                elif name in self.manifest.computed:
                    loaded = packfile.compute(self.manifest.computed[name], tuple(parameter.shape))
                else:
                    stored[name] = read(name).clone()
                    loaded = stored[name].to(parameter.dtype)
                if not torch.equal(loaded, parameter.detach().cpu()):
                    raise OutputError(
                        "the weight was changed after loading and no longer fits its codes", where=name,
                        remedy="Pack the trained student with usmlite instead.",
                    )  # fmt: skip
        return stored, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saving writes the stored tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training would leave the codes behind; train a student instead."""
        return False
