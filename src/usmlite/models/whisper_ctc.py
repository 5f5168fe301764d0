"""Whisper's encoder with a CTC head: a class of Transformers that Transformers does not have.

Unlike Whisper it hears audio of its true length, not 30 padded seconds; it may attend in chunks, so that what
it says does not wait for the end of the audio (arXiv 1910.11871, section 3), and it may be told between its
layers what it would say so far (self-conditioned CTC, Nozaki and Komatsu, arXiv 2104.02724; OWSM-CTC,
arXiv 2402.12654). `hf` registers it, so that `AutoModelForCTC` knows it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, pad
from transformers import AutoModelForCTC, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer, sinusoids

from usmlite.models.whisper_ctc_config import WhisperCTCConfig

_STRIDE = 2  # of the second convolution: an encoder frame is two log-mel frames, 20 ms


class SelfConditioning(nn.Module):
    """Tells the layers that follow what the model would say after those before."""

    def __init__(self, config: WhisperCTCConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size)
        self.back = nn.Linear(config.vocab_size, config.d_model)

    def forward(self, states: Tensor) -> Tensor:
        """`[batch, frames, d]` to the same; the logits are what `head` gives, one for each frame."""
        posterior = self.head(self.norm(states)).float().softmax(dim=-1)
        return cast(Tensor, states + self.back(posterior.to(states.dtype)))


class WhisperCTCEncoder(nn.Module):
    """Whisper's encoder for audio of its true length."""

    def __init__(self, config: WhisperCTCConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=_STRIDE, padding=1)
        self.layers = nn.ModuleList(
            WhisperEncoderLayer(cast(Any, config)) for _ in range(config.encoder_layers)
        )
        self.conditioning = nn.ModuleDict(
            {str(layer): SelfConditioning(config) for layer in sorted(set(config.intermediate_layers))}
        )
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """Encodes log-mel features.

        Args:
            input_features: float `[batch, mel bins, log-mel frames]`, 10 ms each.
            attention_mask: `[batch, log-mel frames]`, 1 where there is audio, 0 after it; None if all is.

        Returns:
            `last_hidden_state`, `[batch, frames, d * time_reduction]`, a frame for every 2 * time_reduction
            of the input (the last may be begun); what comes after the audio means nothing.
        """
        longest = self.config.max_source_positions * _STRIDE
        parts = []
        for first in range(0, input_features.shape[-1], longest):
            piece = slice(first, first + longest)
            mask = None if attention_mask is None else attention_mask[:, piece]
            parts.append(self._encode(input_features[:, :, piece], mask))
        return BaseModelOutput(last_hidden_state=cast(Any, torch.cat(parts, dim=1)))

    def _encode(self, features: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        if mask is not None:
            # Convolutions reach over the end of the audio, where alone there would be zeros.
            features = features * mask[:, None].to(features.dtype)
        states = gelu(self.conv1(features))
        if mask is not None:
            states = states * mask[:, None].to(states.dtype)
        states = gelu(self.conv2(states)).transpose(1, 2)
        frames = states.shape[1]
        states = states + positions(self.config.max_source_positions, states)[:frames]
        states = dropout(states, self.config.dropout, self.training)
        heard = None if mask is None else mask[:, ::_STRIDE]
        allowed = self.allowed(frames, heard, states)
        for number, layer in enumerate(self.layers, start=1):
            out = layer(states, attention_mask=allowed)
            states = out[0] if isinstance(out, tuple) else out
            if str(number) in self.conditioning:
                states = self.conditioning[str(number)](states)
        states = dropout(self.layer_norm(states), self.config.dropout, self.training)
        if heard is not None and self.config.time_reduction > 1:
            states = states * heard[..., None].to(states.dtype)
        return self.stacked(states)

    def stacked(self, states: Tensor) -> Tensor:
        """`[batch, frames, d]` to what the head reads, `[batch, fewer frames, d * time_reduction]`."""
        together = self.config.time_reduction
        if together == 1:
            return states
        states = pad(states, (0, 0, 0, -states.shape[1] % together))
        return states.reshape(len(states), -1, together * states.shape[-1])

    def allowed(self, frames: int, heard: Tensor | None, states: Tensor) -> Tensor | None:
        """What is added to attention scores: 0 where a frame may look, -inf where it may not.

        Args:
            frames: how many.
            heard: bool `[batch, frames]`, the frames that are audio; None if all are.
            states: of the device and dtype that are wanted.

        Returns:
            `[batch or 1, 1, frames, frames]`; None where every frame may look everywhere.
        """
        if heard is None and not self.config.chunk_frames:
            return None
        may = torch.ones(1, frames, frames, dtype=torch.bool, device=states.device)
        if self.config.chunk_frames:
            chunk = torch.arange(frames, device=states.device) // self.config.chunk_frames
            back = chunk[:, None] - chunk[None, :]
            may = ((back >= 0) & (back <= self.config.left_chunks))[None]
        if heard is not None:
            # A frame after the audio looks at itself, for the softmax over nothing is not a number.
            own = torch.eye(frames, dtype=torch.bool, device=states.device)
            may = (may & heard[:, None, :]) | own
        lowest = torch.finfo(states.dtype).min
        return torch.zeros(may.shape, dtype=states.dtype, device=states.device).masked_fill(~may, lowest)[
            :, None
        ]


class WhisperForCTC(PreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """The encoder and a linear layer that gives every frame a distribution over labels and the blank."""

    config_class = WhisperCTCConfig
    base_model_prefix = "encoder"
    main_input_name = "input_features"
    _supports_sdpa = True
    _no_split_modules = ["WhisperEncoderLayer"]  # noqa: RUF012 - as Transformers declares it

    def __init__(self, config: WhisperCTCConfig) -> None:
        super().__init__(config)
        self.encoder = WhisperCTCEncoder(config)
        self.ctc_head = nn.Linear(config.d_model * config.time_reduction, config.vocab_size)
        cast(Any, self).post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.normal_(module.weight, std=self.config.init_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def _get_feat_extract_output_lengths(self, lengths: Tensor) -> Tensor:
        """Log-mel frames, int64 `[batch]`, to frames of the output."""
        frames = -(-lengths // _STRIDE)
        return cast(Tensor, -(-frames // self.config.time_reduction))

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """Logits, and with labels the CTC loss.

        Args:
            input_features: float `[batch, mel bins, log-mel frames]`.
            attention_mask: `[batch, log-mel frames]`, 1 where there is audio; None if all is.
            labels: int64 `[batch, labels]`, -100 after the last; None for no loss.
            **unused: what pipelines of Transformers pass to every model.

        Returns:
            `logits`, `[batch, frames, vocab_size]`, of the blank after the audio, and `loss` in nats.
        """
        states = self.encoder(input_features, attention_mask).last_hidden_state
        logits = self.ctc_head(states)
        if attention_mask is None:
            attention_mask = input_features.new_ones(len(logits), input_features.shape[-1])
        frames = self._get_feat_extract_output_lengths(attention_mask.sum(dim=1).long())
        # Pipelines decode what comes after the audio too: nothing is said there.
        after = torch.arange(logits.shape[1], device=logits.device) >= frames[:, None]
        nothing = torch.full_like(logits[0, 0], torch.finfo(logits.dtype).min)
        nothing[self.config.pad_token_id] = 0.0
        logits = torch.where(after[..., None], nothing, logits)
        loss = None
        if labels is not None:
            real = labels >= 0
            loss = nn.functional.ctc_loss(
                logits.float().log_softmax(dim=-1).transpose(0, 1),
                labels.clamp(min=0),
                frames,
                real.sum(dim=1),
                blank=cast(int, self.config.pad_token_id),
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=True,
            )
        return CausalLMOutput(loss=cast(Any, loss), logits=logits)

    @classmethod
    @torch.no_grad()
    def from_whisper(cls, whisper: Any, **settings: Any) -> WhisperForCTC:
        """A model with the encoder of a Whisper model and a new head.

        Args:
            whisper: a `WhisperForConditionalGeneration`; not changed.
            **settings: what the configuration shall have beside Whisper's sizes: `vocab_size` and the like.

        Returns:
            In float32 and eval mode. What is new is drawn from torch's generator.

        Raises:
            ValueError: a setting is out of its range.
        """
        theirs = whisper.config
        same = (
            "num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim",
            "max_source_positions", "activation_function",
        )  # fmt: skip
        model = cls(WhisperCTCConfig(**{name: getattr(theirs, name) for name in same}, **settings))
        encoder = whisper.get_encoder()
        found = {
            name: value.float()
            for name, value in encoder.state_dict().items()
            if "embed_positions" not in name
        }
        missing = model.encoder.load_state_dict(found, strict=False)
        unexpected = [name for name in missing.missing_keys if not name.startswith("conditioning.")]
        if unexpected or missing.unexpected_keys:
            raise ValueError(f"not Whisper's encoder: {[*unexpected, *missing.unexpected_keys][0]}")
        return cast(WhisperForCTC, cast(Any, model).eval())


@lru_cache(maxsize=4)
def _table(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Outside inference mode, for what is cached may meet autograd later.
    with torch.inference_mode(False):
        return sinusoids(length, width).to(device=device, dtype=dtype)


def positions(length: int, states: Tensor) -> Tensor:
    """Whisper's sinusoids, `[length, d]`, of the device and dtype of the states."""
    return _table(length, states.shape[-1], states.device, states.dtype)


AutoModelForCTC.register(WhisperCTCConfig, WhisperForCTC, exist_ok=True)
