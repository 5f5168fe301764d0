"""Recognizers with a decoder, other than Whisper, small enough to build, compress and pack in a blink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedModel

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, "▁t", "▁to", "er"]
_NUMBERS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
# With the weights of a usual start so narrow a network would say the same whatever it hears.
_WIDE = 0.3
CONFIGS: dict[str, dict[str, Any]] = {
    "MoonshineForConditionalGeneration": {
        "hidden_size": 32, "intermediate_size": 48, "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "max_position_embeddings": 64,
        "initializer_range": _WIDE, "decoder_start_token_id": 0,
    },
    "MoonshineStreamingForConditionalGeneration": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 1600, "decoder_start_token_id": 0,
        "initializer_range": _WIDE,
        "encoder_config": {
            "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "sliding_windows": [[16, 4], [16, 0]], "initializer_range": _WIDE,
        },
    },
    "Speech2TextForConditionalGeneration": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "conv_channels": 32,
        "max_target_positions": 64, "decoder_start_token_id": 2, "init_std": _WIDE,
        "scale_embedding": False,
    },
}  # fmt: skip


def _runs(name: str) -> bool:
    """Whether Transformers can do without what is not installed here."""
    if name == "Speech2TextForConditionalGeneration":
        return transformers.utils.is_sentencepiece_available()
    return hasattr(transformers, name)


WITHOUT = [name for name in CONFIGS if not _runs(name)]
"""Classes that cannot be tested here."""
CLASSES = [
    pytest.param(name, marks=pytest.mark.skipif(name in WITHOUT, reason="needs sentencepiece"))
    for name in CONFIGS
]


def small_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a class with random weights."""
    kind = getattr(transformers, name)
    config = kind.config_class(**{**_NUMBERS, **CONFIGS[name], "vocab_size": len(PIECES), **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(config).eval()
    return model


def save_pieces(folder: Path) -> None:
    """A tokenizer of word pieces."""
    backend = Tokenizer(Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def save_sentencepiece(folder: Path) -> None:
    """The same as `Speech2TextTokenizer` has it: a SentencePiece model and numbers."""
    import io
    import json

    import sentencepiece

    model = io.BytesIO()
    texts = ["to ten", "see me", *(" ".join((letter * 2, letter)) for letter in LETTERS)] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=len(PIECES) - 6, model_type="char",
        pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spm.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(piece for piece in found if not piece.startswith("<"))]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    tokenizer = transformers.Speech2TextTokenizer(str(folder / "vocab.json"), str(folder / "spm.model"))
    (folder / "vocab.json").unlink()
    tokenizer.save_pretrained(folder)
    (folder / "spm.model").unlink()


def save_model(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A model's directory as Transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    small_model(name, seed, **changes).save_pretrained(folder)
    if name == "Speech2TextForConditionalGeneration":
        save_sentencepiece(folder)
        transformers.Speech2TextFeatureExtractor().save_pretrained(folder)
        return folder
    save_pieces(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    extractor.save_pretrained(folder)
    return folder
