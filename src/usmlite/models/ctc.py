"""What usmlite must know about encoders with a CTC head: audio of its true length in, a label a frame out.

All such classes of Transformers are run alike; what tells them apart is in `CTCLayout`. Which weights may be
compressed, and what becomes of the others, is said in docs/adding-a-model.md.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parametrize
from transformers import AutoFeatureExtractor, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from usmlite.audio import MIN_SECONDS, SAMPLE_RATE, WINDOW_SECONDS
from usmlite.errors import AudioError, ModelError
from usmlite.models.adapter import (
    WITHOUT_TIMES,
    Adapter,
    Decoded,
    Said,
    TimedText,
    Word,
    check_expected,
    read_processor,
    unknown_task,
)
from usmlite.models.alignment import (
    Emitted,
    Piece,
    align,
    collapse,
    cut_at_pauses,
    joined,
    pause_to_go_on_from,
    words_of,
)
from usmlite.models.ctc_search import search, searches, written_labels
from usmlite.models.options import Options
from usmlite.network import IGNORED, Batch, FrameNetwork, labels_needed

_SAME_AS = {"’": "'", "‘": "'", "ʼ": "'", "`": "'", "–": "-", "—": "-"}  # noqa: RUF001
# A linear layer of fewer outputs is a gate: a few hundred weights that decide for thousands.
_LEAST_OUTPUTS = 16
# Of 30 s of speech, in letters; about.
_LABELS_A_WINDOW = 400
# How many times the parameters in the files a configuration may claim before anything is made for it.
_MOST_CLAIMED = 2


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


class CTCAdapter(Adapter):
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

    def __init__(
        self, config: PretrainedConfig, extractor: Any, tokenizer: Any, *, where: str | Path = "tokenizer"
    ) -> None:
        self.config, self.extractor, self.tokenizer = config, extractor, tokenizer
        self._where = where
        self._characters: dict[str, str] = {}
        sizes = cast(Any, config)
        remedy = "Take the processor's files from the model that the weights come from."
        if getattr(extractor, "sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
            raise ModelError(
                "the model hears another sample rate", where=where, expected=f"{SAMPLE_RATE} Hz",
                found=f"{extractor.sampling_rate} Hz",
            )  # fmt: skip
        # Many tokenizers have marks for the beginning and the end that no text gets and no head knows.
        unused = set(tokenizer.all_special_ids) - {tokenizer.pad_token_id}
        highest = max((n for n in tokenizer.get_vocab().values() if n not in unused), default=-1)
        if highest >= sizes.vocab_size or tokenizer.pad_token_id != sizes.pad_token_id:
            raise ModelError(
                "the tokenizer does not fit the model",
                where=where,
                expected=f"labels below {sizes.vocab_size}, the blank (padding token) {sizes.pad_token_id}",
                found=f"labels up to {highest}, the blank {tokenizer.pad_token_id}",
                remedy=remedy,
            )
        self._set_network()

    def _set_network(self) -> None:
        self.blank = int(cast(Any, self.config).pad_token_id)
        self.main_input = str(self.model_class().main_input_name)
        self.channel_axis = None if self.main_input == "input_values" else 2
        self.network = FrameNetwork(self.layout.encoder, self.layout.head, self.blank, self.frames)

    @classmethod
    def of_weights(cls, config: PretrainedConfig) -> CTCAdapter:
        """See `Adapter.of_weights`."""
        adapter = cast(CTCAdapter, super().of_weights(config))
        adapter._set_network()
        return adapter

    def outline(self, rows: int) -> dict[str, Tensor]:
        """See `Adapter.outline`. Labels and lengths are numbers, on the CPU."""
        sizes = cast(Any, getattr(self.config, "encoder_config", self.config))
        samples = round(WINDOW_SECONDS * SAMPLE_RATE)
        length = samples
        shape: tuple[int, ...] = (rows, samples)
        if self.main_input != "input_values":
            bins = getattr(sizes, "num_mel_bins", None) or sizes.feature_projection_input_dim
            # Frames of 10 ms; wav2vec2-BERT has two of them in each.
            length = samples // 160 // (1 if hasattr(sizes, "num_mel_bins") else 2)
            shape = (rows, length, bins)
        # No two that follow each other are the same, so that they fit the fewest frames.
        labels = (torch.arange(_LABELS_A_WINDOW) % 2 + 1).repeat(rows, 1)
        batch = {self.main_input: torch.empty(shape, device="meta"), "labels": labels}
        if self.main_input != "input_values":
            batch["attention_mask"] = torch.empty(rows, length, dtype=torch.int64, device="meta")
        return {**batch, "lengths": torch.full((rows,), length)}

    @classmethod
    def of(cls, layout: CTCLayout) -> type[CTCAdapter]:
        """The adapter of a class with this layout."""
        return type(f"{layout.model}Adapter", (cls,), {"layout": layout})

    # Files

    @classmethod
    def model_class(cls) -> type[PreTrainedModel]:
        """The class that the layout names."""
        return cast(type[PreTrainedModel], getattr(transformers, cls.layout.model))

    @classmethod
    def from_directory(
        cls, directory: str | Path, config: PretrainedConfig, *, local: bool = True
    ) -> CTCAdapter:
        """Reads what `save_processor` wrote, or any CTC model's directory of Transformers.

        Raises:
            ModelError: tokenizer or feature extractor are missing or damaged, or do not fit.
        """
        extractor = read_processor(AutoFeatureExtractor, directory, "feature extractor", local=local)
        tokenizer = read_processor(AutoTokenizer, directory, "tokenizer", local=local)
        return cls(config, extractor, tokenizer, where=directory)

    def save_processor(self, directory: Path) -> None:
        """Writes the tokenizer's files and `preprocessor_config.json`."""
        self.tokenizer.save_pretrained(directory)
        self.extractor.save_pretrained(directory)

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        """Multiplies out weight norms, and lets attention call its projections; see `Adapter.prepare`."""
        for module in list(model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
            if type(module) is WavLMAttention:
                module.__class__ = CallingAttention

    @classmethod
    def check_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], config: PretrainedConfig, where: str | Path
    ) -> None:
        """All weights that are called alike in both; see `Adapter.check_shapes`."""
        layers = _layers(config)
        if layers > len(shapes):
            raise ModelError(
                "the weights contradict config.json", where=where, expected=f"{layers} layers",
                found=f"{len(shapes)} tensors", remedy="Download the model again.",
            )  # fmt: skip
        with torch.device("meta"):
            skeleton = cls.model_class()(config)
        expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        check_expected(shapes, {name: expected[name] for name in expected if name in shapes}, where)
        claimed = sum(parameter.numel() for parameter in skeleton.parameters())
        held = sum(int(np.prod(shape)) for shape in shapes.values())
        if claimed > _MOST_CLAIMED * held:
            raise ModelError(
                "the weights contradict config.json", where=where, expected=f"{claimed:,} parameters",
                found=f"{held:,}", remedy="Download the model again.",
            )  # fmt: skip

    # Speech

    def frames(self, lengths: Tensor) -> Tensor:
        """Lengths of the main input, int64 `[batch]`, to frames of the output; 0 where there is none."""
        kind: Any = self.model_class()
        count = getattr(kind, "_get_feat_extract_output_lengths", None) or kind._get_subsampling_output_length
        # It needs nothing of the model but its configuration.
        found: Tensor = count(SimpleNamespace(config=self.config), lengths)
        return found.to(torch.int64).clamp(min=0)

    def hear(self, samples: Tensor, seconds: Sequence[float]) -> dict[str, Tensor]:
        """What the feature extractor makes of audio of its true length; see `Adapter.hear`."""
        counts = [min(round(length * SAMPLE_RATE), samples.shape[1]) for length in seconds]
        return self._inputs([row[:count] for row, count in zip(samples, counts, strict=True)])

    def _inputs(self, audio: Sequence[Tensor]) -> dict[str, Tensor]:
        shortest = min(len(samples) for samples in audio)
        if shortest < round(self.shortest * SAMPLE_RATE):
            raise AudioError(
                "the audio is shorter than one frame of the model",
                where=self._where,
                expected=f"at least {self.shortest:.4f} s",
                found=f"{shortest / SAMPLE_RATE:.4f} s",
                remedy="Leave such recordings out.",
            )
        device = audio[0].device
        found = self._extract([samples.float().cpu().numpy() for samples in audio])
        mask = found.get("attention_mask")
        lengths = torch.tensor([len(row) for row in audio]) if mask is None else mask.sum(dim=1)
        return {name: value.to(device) for name, value in {**found, "lengths": lengths.long()}.items()}

    def _extract(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        # Models over samples say whether they were trained with a mask; the others always were.
        masked = self.extractor.return_attention_mask if self.main_input == "input_values" else True
        found = self.extractor(
            list(audio),
            sampling_rate=SAMPLE_RATE,
            padding=True,
            return_attention_mask=masked,
            return_tensors="pt",
        )
        names = (self.main_input, "attention_mask")
        return {name: cast(Tensor, found[name]) for name in names if name in found}

    def _input_length(self, samples: int) -> int:
        """Length of the main input for so many samples; 0 for too few of them."""
        if self.main_input == "input_values":
            return samples
        noise = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
        try:
            # Statistics over a single frame are not defined, and not asked for.
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return int(self._extract([noise])["attention_mask"].sum())
        except (RuntimeError, ValueError, IndexError):
            return 0

    @cached_property
    def shortest(self) -> float:
        """Seconds of audio without which there is not a single frame."""
        low, high = 0, SAMPLE_RATE
        while high - low > 1:
            middle = (low + high) // 2
            enough = int(self.frames(torch.tensor([self._input_length(middle)]))) >= 1
            low, high = (low, middle) if enough else (middle, high)
        return max(high / SAMPLE_RATE, MIN_SECONDS)

    @cached_property
    def _rate(self) -> tuple[float, float]:
        """Length of the main input for one second, and how much each further one adds."""
        one, eleven = (self._input_length(seconds * SAMPLE_RATE) for seconds in (1, 11))
        return one, (eleven - one) / 10

    # Text

    def encode_text(self, text: str) -> list[int]:
        """Labels of a text (as `written`)."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode_text(self, labels: Sequence[int]) -> str:
        """The text of labels; blanks and special tokens are left out, repeats are kept."""
        plain = [label for label in labels if label != self.blank]
        text = self.tokenizer.decode(plain, group_tokens=False, skip_special_tokens=True)
        return " ".join(str(text).split())

    def written(self, text: str) -> str:
        """The text in the tokenizer's case, without punctuation that the tokenizer lacks."""
        return " ".join("".join(self._character(c) for c in text).split())

    def unwritable(self, text: str) -> str:
        """See `Adapter.unwritable`."""
        return "".join(sorted({c for c in text if not c.isspace() and not self._has(c)}))

    def _character(self, character: str) -> str:
        found = self._characters.get(character)
        if found is None:
            forms = (character, character.upper(), character.lower(), _SAME_AS.get(character, " "))
            letter = unicodedata.category(character)[0] in "LMN"
            missing = character if letter else " "
            found = next((form for form in forms if not form.isspace() and self._has(form)), missing)
            self._characters[character] = found
        return found

    def _has(self, character: str) -> bool:
        return bool(self.decode_text(self.encode_text(character)))

    def fits(self, text: str, seconds: float) -> bool:
        """Whether there are frames enough for a text's labels, and a blank between equal ones.

        And for a space to the next text, with which it may share a window.
        """
        labels = torch.tensor([self.encode_text(text)], dtype=torch.int64)
        first, more = self._rate
        length = int(first + (seconds - 1.0) * more)
        return int(labels_needed(labels)) + 1 <= int(self.frames(torch.tensor([length])))

    def teach(
        self, windows: Sequence[Sequence[TimedText]], *, timestamps: Sequence[bool], language: str | None
    ) -> dict[str, Tensor]:
        """The labels of each window's texts, joined by spaces; times and languages are not written."""
        rows = [self.encode_text(self.written(" ".join(t.text for t in window))) for window in windows]
        labels = torch.full((len(rows), max(1, *map(len, rows))), IGNORED, dtype=torch.int64)
        for row, tokens in zip(labels, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        return {"labels": labels}

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

    def _check_options(self, options: Options, previous: Sequence[Sequence[Said]]) -> None:
        if options.task != "transcribe":
            raise unknown_task(options.task, ("transcribe",), self._where, "Choose a Whisper model for that.")
        asked = {
            "an initial prompt": bool(options.initial_prompt),
            "the text before": any(previous),
        }
        for what, given in asked.items():
            if given:
                raise ModelError(
                    f"a CTC model has no use for {what}", where=self._where,
                    remedy="Leave that out, or choose a Whisper model.",
                )  # fmt: skip

    def _decoded(
        self, emitted: Sequence[Emitted], mean_logprob: float, seconds: float, options: Options
    ) -> Decoded:
        advance: float | None = None
        words = words_of(emitted, self.tokenizer) if options.timestamps or options.word_timestamps else []
        if options.timestamps:
            advance = pause_to_go_on_from(words, seconds)
            emitted = [each for each in emitted if advance is None or each.start < advance]
            groups = cut_at_pauses([word for word in words if advance is None or word.start < advance])
            timed = [self._timed(joined(group), group, options) for group in groups]
        else:
            whole = Piece(tuple(each.label for each in emitted), 0.0, seconds, mean_logprob)
            timed = [self._timed(whole, words, options)]
        labels = tuple(each.label for each in emitted)
        segments = tuple(segment for segment in timed if segment.text)
        text = " ".join(segment.text for segment in segments)
        return Decoded(labels, text, segments, options.language or "und", 0.0, mean_logprob, advance)

    def _timed(self, piece: Piece, words: Sequence[Piece], options: Options) -> TimedText:
        found: tuple[Word, ...] | None = None
        if options.word_timestamps:
            texts = ((self.decode_text(word.labels), word) for word in words)
            found = tuple(
                Word(f" {text}", round(word.start, 3), round(word.end, 3), round(math.exp(word.logprob), 4))
                for text, word in texts
                if text
            )
        return TimedText(piece.start, piece.end, self.decode_text(piece.labels), found)

    # Weights

    def compressible(self, model: nn.Module) -> dict[str, str]:
        """Linear layers and convolutions that mix channels; see `Adapter.compressible`.

        A convolution of one step ("pointwise") is a linear layer. Convolutions of one channel each
        (depthwise, and the first one over samples), those of a class of their own (the heads of Parakeet
        and LASR), gates and tables of relative positions are kept.
        """
        kinds: dict[str, str] = {}
        seen: set[int] = set()
        for name, module in model.named_modules():
            kind = _kind(module)
            if kind is not None and id(module.weight) not in seen:
                seen.add(id(module.weight))
                kinds[f"{name}.weight"] = kind
        return kinds

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
        return [f"{self.layout.encoder}.{self.layout.layers}.{i}" for i in range(_layers(self.config))]


def _layers(config: PretrainedConfig) -> int:
    encoder = getattr(config, "encoder_config", config)
    return int(cast(Any, encoder).num_hidden_layers)


def _kind(module: nn.Module) -> str | None:
    """How a layer's weight is compressed; None if it is kept. Subclasses may use theirs otherwise: kept."""
    if type(module) is nn.Linear:
        return "linear" if module.out_features >= _LEAST_OUTPUTS else None
    if type(module) is nn.Conv1d and module.in_channels > module.groups:
        return "linear" if module.kernel_size == (1,) and module.groups == 1 else "conv1d"
    return None


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
