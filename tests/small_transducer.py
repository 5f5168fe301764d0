"""Transducers small enough to build, compress and pack in a blink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from small_ctc import CONFIGS as CTC
from small_ctc import WITHOUT as WITHOUT_CTC
from small_ctc import save_pieces

BLANK = 32
_JOINT: dict[str, Any] = {
    "encoder_config": {**CTC["ParakeetForCTC"]["encoder_config"], "initializer_range": 0.3},
    "decoder_hidden_size": 32, "num_decoder_layers": 2, "vocab_size": 33, "blank_token_id": BLANK,
    "pad_token_id": 0, "max_symbols_per_step": 3,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "ParakeetForRNNT": _JOINT,
    "ParakeetForTDT": {**_JOINT, "durations": [0, 1, 2, 3]},
}
WITHOUT = [name for name in CONFIGS if not hasattr(transformers, name) or "ParakeetForCTC" in WITHOUT_CTC]
"""Classes that cannot be tested here."""
CLASSES = [
    pytest.param(name, marks=pytest.mark.skipif(name in WITHOUT, reason="needs a newer Transformers"))
    for name in CONFIGS
]


def small_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a class with random weights, but for batch norms, which look as if they had been trained."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(kind.config_class(**{**CONFIGS[name], **changes})).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def save_model(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A model's directory as Transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    small_model(name, seed, **changes).save_pretrained(folder)
    save_pieces(folder, "ParakeetForCTC")
    transformers.ParakeetFeatureExtractor().save_pretrained(folder)
    return folder
