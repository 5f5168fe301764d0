"""The configuration of `WhisperForCTC`, apart: Transformers asks for it before models can be imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

MODEL_TYPE = "whisper_ctc"


class WhisperCTCConfig(PretrainedConfig):  # type: ignore[no-untyped-call, unused-ignore]
    """The configuration of a `WhisperForCTC`; names that Whisper has too mean the same.

    Args:
        vocab_size: labels, the blank among them.
        num_mel_bins: of the log-mel features.
        d_model: width of the encoder.
        encoder_layers: how many.
        encoder_attention_heads: of each layer.
        encoder_ffn_dim: width of the feed-forward layers.
        max_source_positions: encoder frames (20 ms) that are encoded together; longer audio is cut.
        activation_function: of the feed-forward layers.
        dropout: in training, of what every layer adds and of what the head reads.
        attention_dropout: in training, of attention weights.
        activation_dropout: in training, within feed-forward layers.
        init_range: standard deviation of new weights.
        chunk_frames: encoder frames of a chunk; a frame hears its own and `left_chunks` before it. 0: all.
        left_chunks: see `chunk_frames`.
        time_reduction: encoder frames that the head reads together: 1 gives 50 labels a second, 2 gives 25.
        intermediate_layers: numbers of the layers (from 1) after which the model is told what it would say.
        ctc_loss_reduction: of `forward`'s loss: "mean" over labels and batch, or "sum".
        pad_token_id: the blank.
        **settings: those of every configuration.

    Raises:
        ValueError: a number is out of its range.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012 - as Transformers declares it
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
    }

    def __init__(
        self,
        vocab_size: int = 32,
        num_mel_bins: int = 80,
        d_model: int = 384,
        encoder_layers: int = 4,
        encoder_attention_heads: int = 6,
        encoder_ffn_dim: int = 1536,
        max_source_positions: int = 1500,
        activation_function: str = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        init_range: float = 0.02,
        chunk_frames: int = 0,
        left_chunks: int = 0,
        time_reduction: int = 1,
        intermediate_layers: Sequence[int] = (),
        ctc_loss_reduction: str = "mean",
        pad_token_id: int = 0,
        **settings: Any,
    ) -> None:
        self.vocab_size, self.num_mel_bins, self.d_model = vocab_size, num_mel_bins, d_model
        self.encoder_layers, self.encoder_attention_heads = encoder_layers, encoder_attention_heads
        self.encoder_ffn_dim, self.max_source_positions = encoder_ffn_dim, max_source_positions
        self.activation_function, self.dropout = activation_function, dropout
        self.attention_dropout, self.activation_dropout = attention_dropout, activation_dropout
        self.init_range, self.chunk_frames, self.left_chunks = init_range, chunk_frames, left_chunks
        self.time_reduction, self.intermediate_layers = time_reduction, list(intermediate_layers)
        self.ctc_loss_reduction = ctc_loss_reduction
        super().__init__(**{"pad_token_id": pad_token_id, **settings})
        self._check()

    def _check(self) -> None:
        least = {
            "vocab_size": 2, "max_source_positions": 1, "time_reduction": 1, "chunk_frames": 0,
            "left_chunks": 0,
        }  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.max_source_positions % self.time_reduction:
            raise ValueError(
                f"time_reduction must divide {self.max_source_positions} frames, got {self.time_reduction}"
            )
        between = range(1, self.encoder_layers)
        if any(layer not in between for layer in self.intermediate_layers):
            raise ValueError(
                f"intermediate_layers must be from 1 to {self.encoder_layers - 1}, got "
                f"{self.intermediate_layers}"
            )
