"""CTC recognizers of every class, small enough to build, compress and pack in a blink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedModel

from usmlite.models.whisper_ctc import WhisperForCTC

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
_ENCODER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
# Two strided convolutions: a frame is 320 samples, 20 ms, as in the real models.
_CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": (16, 16), "conv_kernel": (20, 24), "conv_stride": (20, 16), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_WAVES = {**_ENCODER, **_CONVOLUTIONS}
# With the weights of a usual start so narrow a network would say the same at every frame.
_CONFORMER: dict[str, Any] = {
    **_ENCODER, "conv_kernel_size": 5, "subsampling_conv_channels": 16, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Wav2Vec2ForCTC": _WAVES,
    "HubertForCTC": {**_WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "WavLMForCTC": {**_WAVES, "num_buckets": 8, "max_bucket_distance": 16},
    "Wav2Vec2ConformerForCTC": {**_WAVES, "conv_depthwise_kernel_size": 5},
    "Wav2Vec2BertForCTC": {**_ENCODER, "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 5},
    "ParakeetForCTC": {"encoder_config": _CONFORMER},
    "LasrForCTC": {"encoder_config": {**_CONFORMER, "num_mel_bins": 128}},
    "Data2VecAudioForCTC": {**_WAVES, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
    "WhisperForCTC": {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
        "init_range": 0.2,
    },
}  # fmt: skip


def _kind(name: str) -> Any:
    return WhisperForCTC if name == "WhisperForCTC" else getattr(transformers, name)


def _runs(name: str) -> bool:
    """Whether Transformers can hear for a class: older ones need librosa for Parakeet's features."""
    try:
        getattr(transformers, name.replace("ForCTC", "FeatureExtractor"), list)()
    except ImportError:
        return False
    return True


WITHOUT = [name for name in CONFIGS if not _runs(name)]
"""Classes that cannot be tested here."""
CLASSES = [
    pytest.param(name, marks=pytest.mark.skipif(name in WITHOUT, reason="its features need librosa"))
    for name in CONFIGS
]


def small_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a class with random weights, but for batch norms, which look as if they had been trained."""
    kind = _kind(name)
    config = kind.config_class(**{**CONFIGS[name], "vocab_size": 32, "pad_token_id": 0, **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def save_letters(folder: Path, letters: str = LETTERS) -> None:
    """A tokenizer of letters, and a feature extractor for samples."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    tokenizer.save_pretrained(folder)


def save_pieces(folder: Path, name: str) -> None:
    """A tokenizer of word pieces whose padding is label 0."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, "▁t"]
    if name == "LasrForCTC":
        transformers.LasrTokenizer(
            vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0
        ).save_pretrained(folder)
        return
    backend = Tokenizer(Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    transformers.ParakeetTokenizer(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def save_model(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A model's directory as Transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    small_model(name, seed, **changes).save_pretrained(folder)
    if name in ("ParakeetForCTC", "LasrForCTC"):
        save_pieces(folder, name)
        getattr(transformers, name.replace("ForCTC", "FeatureExtractor"))().save_pretrained(folder)
        return folder
    save_letters(folder)
    if name == "Wav2Vec2BertForCTC":
        transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder)
    elif name == "WhisperForCTC":
        transformers.WhisperFeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    else:
        masked = CONFIGS[name].get("feat_extract_norm") == "layer"
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(folder)
    return folder
