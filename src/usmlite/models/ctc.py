"""What usmlite must know about encoders with a CTC head: audio of its true length in, a label a frame out.

All such classes of Transformers are run alike; what tells them apart is in `CTCLayout`. Which weights may be
compressed, and what becomes of the others, is said in docs/adding-a-model.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parametrize
from transformers import PretrainedConfig
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from usmlite.audio import SAMPLE_RATE
from usmlite.errors import ModelError
from usmlite.models.adapter import WITHOUT_TIMES, Decoded, Said, TimedText
from usmlite.models.alignment import align, collapse
from usmlite.models.ctc_search import search, searches, written_labels
from usmlite.models.frames import FrameAdapter
from usmlite.models.options import Options
from usmlite.models.true_length import PROCESSOR_REMEDY, padded
from usmlite.network import IGNORED, Batch, FrameNetwork, labels_needed

# Of 30 s of speech, in letters; about.


@dataclass(frozen=True)
class CTCLayout:
    """Where the parts of a class are.

    Attributes:
        model: the class's name in Transformers.
        encoder: attribute of the model that turns its input into states.
        head: attribute that turns states into logits.
        layers: attribute of the encoder that holds the layers.
        front: beginnings of names, within the encoder, of what makes frames of the input.
    """

    model: str
    encoder: str
    head: str = "lm_head"
    layers: str = "encoder.layers"
    front: tuple[str, ...] = ("feature_extractor", "feature_projection")


def _conformer(model: str, front: str) -> CTCLayout:
    return CTCLayout(model, "encoder", "ctc_head", "layers", (front,))


LAYOUTS = {
    "wav2vec2": CTCLayout("Wav2Vec2ForCTC", "wav2vec2"),
    "hubert": CTCLayout("HubertForCTC", "hubert"),
    "wavlm": CTCLayout("WavLMForCTC", "wavlm"),
    "wav2vec2-conformer": CTCLayout("Wav2Vec2ConformerForCTC", "wav2vec2_conformer"),
    "wav2vec2-bert": CTCLayout("Wav2Vec2BertForCTC", "wav2vec2_bert"),
    "data2vec-audio": CTCLayout("Data2VecAudioForCTC", "data2vec_audio"),
    "parakeet_ctc": _conformer("ParakeetForCTC", "subsampling"),
    "lasr_ctc": _conformer("LasrForCTC", "subsampler"),
}
"""By the `model_type` of the configuration."""


class CTCAdapter(FrameAdapter):
    """The family-specific half of an encoder with a CTC head. `layout` says of which class.

    Args:
        config: the model's configuration.
        extractor: turns samples into the model's input.
        tokenizer: letters or word pieces; its padding token is the blank.
        where: what errors should name.

    Raises:
        ModelError: extractor or tokenizer do not fit the configuration.
    """

    family = "ctc"
    has_idle_parameters = True  # what stands for masked frames in the model's own training
    layout: ClassVar[CTCLayout]

    def _set_network(self) -> None:
        super()._set_network()
        self.blank = int(cast(Any, self.config).pad_token_id)
        self.network = FrameNetwork(self.layout.encoder, self.layout.head, self.blank, self.frames)

    @property
    def called(self) -> str:
        """See `TrueLengthAdapter.called`."""
        return "a CTC model"

    def _check_tokenizer(self) -> None:
        # Many tokenizers have marks for the beginning and the end that no text gets and no head knows.
        sizes, padding = cast(Any, self.config), self.tokenizer.pad_token_id
        highest = self._highest_label([padding])
        if highest >= sizes.vocab_size or padding != sizes.pad_token_id:
            raise ModelError(
                "the tokenizer does not fit the model",
                where=self._where,
                expected=f"labels below {sizes.vocab_size}, the blank (padding token) {sizes.pad_token_id}",
                found=f"labels up to {highest}, the blank {padding}",
                remedy=PROCESSOR_REMEDY,
            )

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        """Multiplies out weight norms, and lets attention call its projections; see `Adapter.prepare`."""
        for module in list(model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
            if type(module) is WavLMAttention:
                module.__class__ = CallingAttention

    @classmethod
    def depth(cls, config: PretrainedConfig) -> int:
        """See `TrueLengthAdapter.depth`."""
        return int(cast(Any, getattr(config, "encoder_config", config)).num_hidden_layers)

    # Speech

    def _extract(self, audio: Sequence[np.ndarray], **settings: Any) -> dict[str, Tensor]:
        # Models over samples say whether they were trained with a mask; the others always were.
        masked = self.extractor.return_attention_mask if self.main_input == "input_values" else True
        return super()._extract(audio, return_attention_mask=masked, **settings)

    # Text

    def fits(self, text: str, seconds: float) -> bool:
        """Whether there are frames enough for a text's labels, and a blank between equal ones.

        And for a space to the next text, with which it may share a window.
        """
        labels = torch.tensor([self.encode_text(text)], dtype=torch.int64)
        return int(labels_needed(labels)) + 1 <= self.frames_of(seconds)

    def teach(
        self, windows: Sequence[Sequence[TimedText]], *, timestamps: Sequence[bool], language: str | None
    ) -> dict[str, Tensor]:
        """The labels of each window's texts, joined by spaces; times and languages are not written."""
        rows = [self.encode_text(self.written(" ".join(t.text for t in window))) for window in windows]
        return {"labels": padded(rows, IGNORED)}

    # Decoding

    def transcribe(
        self,
        model: nn.Module,
        audio: Sequence[Tensor],
        options: Options = WITHOUT_TIMES,
        *,
        previous: Sequence[Sequence[Said]] = (),
    ) -> list[Decoded]:
        """The likeliest label of each frame, repeats and blanks left out; see `Adapter.transcribe`.

        With beams, a language model or hotwords it is the likeliest text, laid on the frames that say it.
        """
        self._check_options(options, previous)
        batch = self._inputs(audio)
        dtype = next(model.parameters()).dtype
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with torch.inference_mode():
            logits = self.network.logits(model, batch, self.states(model, batch))
            rows = torch.split(logits.float().log_softmax(dim=-1), self.frames(batch["lengths"]).tolist())
        return [
            self._placed(row, len(samples) / SAMPLE_RATE, options)
            for samples, row in zip(audio, rows, strict=True)
        ]

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        """The encoder's output, `[batch, frames, d]`, as fast as can be; see `FrameNetwork.states`."""
        return self.network.states(model, batch)

    def _placed(self, row: Tensor, seconds: float, options: Options) -> Decoded:
        """What is said in frames whose log probabilities are `[frames, labels]`."""
        labels = self._searched(row.cpu(), options) if searches(options) else row.argmax(dim=1)
        logprobs = row.gather(1, labels.to(row.device)[:, None])[:, 0]
        emitted = collapse(labels.tolist(), logprobs.tolist(), self.blank, seconds)
        return self._decoded(emitted, float(logprobs.mean()), seconds, options)

    def _searched(self, row: Tensor, options: Options) -> Tensor:
        """The labels of frames, int64 `[frames]`, of the text that a search prefers."""
        asked = replace(options, hotwords=self.written(options.hotwords or ""))
        text = search(row.numpy(), self._written_labels(row.shape[1]), asked)
        return align(row, self.encode_text(text), self.blank)

    def _written_labels(self, count: int) -> tuple[str, ...]:
        tokens = [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(range(count)))]
        delimiter = getattr(self.tokenizer, "word_delimiter_token", None)
        return written_labels(tokens, self.blank, delimiter, self.tokenizer.all_special_tokens)

    # Weights

    @classmethod
    def part(cls, name: str) -> str:
        """The feature encoder, the encoder or the head."""
        layout = cls.layout
        if name.startswith(f"{layout.head}."):
            return "head"
        front = tuple(f"{layout.encoder}.{part}" for part in layout.front)
        return "feature encoder" if name.startswith(front) else "encoder"

    def layers(self) -> list[str]:
        """The encoder's layers."""
        return [f"{self.layout.encoder}.{self.layout.layers}.{i}" for i in range(self.depth(self.config))]


class CallingAttention(WavLMAttention):
    """WavLM's attention, with projections that are called and not only asked for their weights."""

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
    ) -> tuple[Tensor, Any]:
        """The same as in Transformers, but for the attention's weights.

        Args:
            hidden_states: `[batch, frames, d]`.
            attention_mask: 1 where there is audio, `[batch, frames]`, or None.
            gated_position_bias: `[batch * heads, frames, frames]`.

        Returns:
            `[batch, frames, d]`, and None.
        """
        batch, frames, width = hidden_states.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, frames, self.num_heads, self.head_dim).transpose(1, 2)

        query, key, value = (
            heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = gated_position_bias.view(batch, self.num_heads, frames, frames).to(query.dtype)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask.ne(1)[:, None, None], -torch.inf)
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, frames, width)), None
