"""Which adapter belongs to which model, by the `model_type` of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from usmlite.errors import ModelError
from usmlite.models.adapter import Adapter
from usmlite.models.ctc import LAYOUTS, CTCAdapter
from usmlite.models.sequence import LAYOUTS as SEQUENCES
from usmlite.models.sequence import SequenceAdapter
from usmlite.models.transducer import LAYOUTS as TRANSDUCERS
from usmlite.models.transducer import TransducerAdapter
from usmlite.models.whisper import WhisperAdapter
from usmlite.models.whisper_ctc_adapter import WhisperCTCAdapter
from usmlite.models.whisper_ctc_config import MODEL_TYPE as WHISPER_CTC

GUIDE = "docs/adding-a-model.md"

_FAMILIES: dict[str, type[Adapter]] = {
    "whisper": WhisperAdapter,
    WHISPER_CTC: WhisperCTCAdapter,
    **{model_type: CTCAdapter.of(layout) for model_type, layout in LAYOUTS.items()},
    **{model_type: SequenceAdapter.of(layout) for model_type, layout in SEQUENCES.items()},
    **{model_type: TransducerAdapter.of(layout) for model_type, layout in TRANSDUCERS.items()},
}


def register(model_type: str, adapter: type[Adapter]) -> None:
    """Makes an adapter known; one that is there for this type is replaced.

    Args:
        model_type: as in config.json.
        adapter: see docs/adding-a-model.md.
    """
    _FAMILIES[model_type] = adapter


def adapter_class(model_type: object, where: str | Path) -> type[Adapter]:
    """The adapter for a `model_type`.

    Raises:
        ModelError: there is none; says what to do about it.
    """
    if isinstance(model_type, str) and model_type in _FAMILIES:
        return _FAMILIES[model_type]
    remedy = f"How to add another stands in {GUIDE}."
    kinds = (
        (
            "an encoder with a CTC head",
            MODEL_FOR_CTC_MAPPING_NAMES,
            "CTCAdapter.of(CTCLayout({!r}, encoder=...))",
        ),
        (
            "a recognizer with a decoder",
            MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            "SequenceAdapter.of(SequenceLayout({!r}, ...))",
        ),
    )
    for kind, known, adapter in kinds:
        name = dict(known).get(str(model_type))
        if name is not None:
            remedy += (
                f" This one is {kind} ({name}), so that this may be all it needs: "
                f"usmlite.models.register({model_type!r}, {adapter.format(name)})."
            )
    raise ModelError(
        "there is no adapter for this model", where=where,
        expected=f"model_type {', '.join(map(repr, _FAMILIES))}", found=repr(model_type), remedy=remedy,
    )  # fmt: skip


def read_configuration(values: dict[str, Any], where: str | Path) -> PretrainedConfig:
    """A configuration from the contents of config.json.

    Raises:
        ModelError: the family is unknown, or the values make no configuration of it.
    """
    model_type = values.get("model_type")
    kind: Any = adapter_class(model_type, where).model_class().config_class
    try:
        return cast(PretrainedConfig, kind.from_dict(values))
    except Exception as error:  # what a damaged configuration raises is Transformers' own affair
        raise ModelError(
            f"not the configuration of a model of type {model_type}",
            where=where,
            found=f"{type(error).__name__}: {error}"[:300],
        ) from error


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The dense model of a configuration, prepared, without memory for its weights."""
    family = adapter_class(config.model_type, "config.json")
    # A packed model's configuration says how it is quantized; the skeleton is not.
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        model: nn.Module = family.model_class()(plain)
    family.prepare(model)
    return model.train(False)


def prepare(model: nn.Module) -> None:
    """Prepares a model of any known family (`Adapter.prepare`); leaves others alone."""
    family = _FAMILIES.get(str(getattr(cast(Any, model).config, "model_type", "")))
    if family is not None:
        family.prepare(model)
