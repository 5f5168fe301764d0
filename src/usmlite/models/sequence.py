"""What usmlite must know about recognizers with a decoder, other than Whisper: true lengths in, text out.

All such classes of Transformers are run alike; what tells them apart is in `SequenceLayout`. Texts are found
by Transformers' own `generate`, greedily, and have no times: long recordings are cut where they are quiet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool1d, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from usmlite.audio import SAMPLE_RATE, WINDOW_SAMPLES, WINDOW_SECONDS
from usmlite.errors import ModelError
from usmlite.models.adapter import WITHOUT_TIMES, Attention, Decoded, Said, TimedText, read_processor
from usmlite.models.options import Options
from usmlite.models.true_length import PROCESSOR_REMEDY, TrueLengthAdapter, padded
from usmlite.network import IGNORED, Batch, SequenceNetwork

# A text of more tokens than this would be spoken faster than anybody can, in any script: it repeats itself.
_TOKENS_A_SECOND, _LEAST_TOKENS = 15, 16
# The last part of a full window, in seconds, in which a quiet place is looked for, and how long that is.
_LOOK_BACK, _QUIET = 10.0, 0.3
_STEP = SAMPLE_RATE // 100
_TOKENS_A_WINDOW = 100  # of 30 s of speech; about


@dataclass(frozen=True)
class SequenceLayout:
    """Where the parts of a class are, and what its configuration calls their sizes.

    Attributes:
        model: the class's name in Transformers.
        frames: configuration and attention mask, int64 `[batch, length of the input]`, to which frames of the
            encoder's output are audio, bool `[batch, frames]`; must say what the encoder itself does.
        front: beginnings of names, within the encoder, of what makes frames of the input.
        encoder_layers: setting with the number of the encoder's layers, perhaps within another setting.
        decoder_layers: the same of the decoder.
        heads: of the decoder's attention.
        positions: how many tokens the decoder can write.
        encoder: attribute of the model that turns its input into states.
        decoder: attribute that turns tokens and states into what is projected onto the vocabulary.
        attention: attribute of the decoder's layers that looks at the speech.
        multiple: what the length of the input is a multiple of.
    """

    model: str
    frames: Callable[[Any, Tensor], Tensor]
    front: tuple[str, ...]
    encoder_layers: str
    decoder_layers: str
    heads: str
    positions: str
    encoder: str = "model.encoder"
    decoder: str = "model.decoder"
    attention: str = "encoder_attn"
    multiple: int = 1


def _moonshine_frames(config: Any, mask: Tensor) -> Tensor:
    """Three convolutions over samples; Transformers takes every 384th sample's word for a frame."""
    count = mask.shape[1]
    for kernel, stride in ((127, 64), (7, 3), (3, 2)):
        count = max(0, (count - kernel) // stride + 1)
    found: Tensor = mask[:, :: 64 * 3 * 2][:, :count].bool()
    return found


def _streaming_frames(config: Any, mask: Tensor) -> Tensor:
    """Frames of some milliseconds, then two convolutions over what came before."""
    length = round(config.encoder_config.sample_rate * config.encoder_config.frame_ms / 1000)
    valid = mask.sum(dim=1) // length
    found = (torch.arange(mask.shape[1] // length, device=mask.device) < valid[:, None]).float()
    for _ in range(2):
        found = max_pool1d(pad(found, (4, 0)), 5, 2) if found.shape[1] else found
    there: Tensor = found.bool()
    return there


def _halved_frames(config: Any, mask: Tensor) -> Tensor:
    """Every convolution halves the frames."""
    counts = torch.stack((torch.full_like(mask[:, 0].long(), mask.shape[1]), mask.sum(dim=1).long()))
    for _ in range(config.num_conv_layers):
        counts = torch.div(counts - 1, 2, rounding_mode="floor") + 1
    found: Tensor = torch.arange(int(counts[0, 0]), device=mask.device) < counts[1, :, None]
    return found


LAYOUTS = {
    "moonshine": SequenceLayout(
        "MoonshineForConditionalGeneration", _moonshine_frames, ("conv", "groupnorm"),
        "encoder_num_hidden_layers", "decoder_num_hidden_layers", "decoder_num_attention_heads",
        "max_position_embeddings",
    ),
    "moonshine_streaming": SequenceLayout(
        "MoonshineStreamingForConditionalGeneration", _streaming_frames, ("embedder",),
        "encoder_config.num_hidden_layers", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", multiple=80,
    ),
    "speech_to_text": SequenceLayout(
        "Speech2TextForConditionalGeneration", _halved_frames, ("conv",),
        "encoder_layers", "decoder_layers", "decoder_attention_heads", "max_target_positions",
    ),
}  # fmt: skip
"""By the `model_type` of the configuration."""


@dataclass
class _Heard(BaseModelOutput):
    """The encoder's output as decoders of Transformers want it."""

    attention_mask: Tensor | None = None


class Likelihoods(LogitsProcessor):
    """Notes how likely the tokens are that `generate` takes.

    Args:
        vocabulary: how many tokens there are; what the network says beyond them is no token, and never taken.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._found: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `[batch, vocabulary]` as they are, but for what is no token."""
        scores[:, self._vocabulary :] = -torch.inf
        self._found.append(scores.float().log_softmax(dim=-1).amax(dim=-1))
        return scores

    def rows(self) -> list[list[float]]:
        """The natural log probability of every token that was taken, for each row."""
        found: list[list[float]] = torch.stack(self._found, dim=1).tolist()
        return found


class SequenceAdapter(TrueLengthAdapter):
    """The family-specific half of a recognizer with a decoder. `layout` says of which class.

    Args:
        config: the model's configuration.
        extractor: turns samples into the model's input.
        tokenizer: word pieces.
        generation: what decoding begins and ends with; None for what the configuration says.
        where: what errors should name.

    Raises:
        ModelError: extractor or tokenizer do not fit the configuration.
    """

    family = "sequence-to-sequence"
    layout: ClassVar[SequenceLayout]
    kinds = frozenset({"linear", "conv1d", "embedding"})
    generation: GenerationConfig

    def __init__(
        self,
        config: PretrainedConfig,
        extractor: Any,
        tokenizer: Any,
        generation: GenerationConfig | None = None,
        *,
        where: str | Path = "tokenizer",
    ) -> None:
        self.generation = generation or GenerationConfig.from_model_config(cast(Any, config))
        super().__init__(config, extractor, tokenizer, where=where)

    def _set_network(self) -> None:
        super()._set_network()
        self.network = SequenceNetwork(self.layout.encoder, self.layout.decoder, self._heard)

    def _check_tokenizer(self) -> None:
        vocabulary, highest = cast(Any, self.config).vocab_size, self._highest_label(())
        if highest >= vocabulary or self.tokenizer.eos_token_id not in self._ends:
            raise ModelError(
                "the tokenizer does not fit the model",
                where=self._where,
                expected=f"tokens below {vocabulary}, the end {' or '.join(map(str, self._ends))}",
                found=f"tokens up to {highest}, the end {self.tokenizer.eos_token_id}",
                remedy=PROCESSOR_REMEDY,
            )

    @property
    def _ends(self) -> list[int]:
        """The tokens that end a text."""
        end = self._setting("eos_token_id")
        return [] if end is None else [end] if isinstance(end, int) else list(end)

    @property
    def _prompt(self) -> list[int]:
        """The tokens before a text: a start, and perhaps a language."""
        start, bos = self._setting("decoder_start_token_id"), self._setting("bos_token_id")
        told = [bos if start is None else start, self.generation.forced_bos_token_id]
        return [token for token in told if token is not None]

    def _setting(self, name: str) -> Any:
        found = getattr(self.generation, name, None)
        return getattr(self.config, name, None) if found is None else found

    # Files

    @classmethod
    def from_directory(
        cls, directory: str | Path, config: PretrainedConfig, *, local: bool = True
    ) -> SequenceAdapter:
        """Reads what `save_processor` wrote, or any such model's directory of Transformers.

        Raises:
            ModelError: tokenizer or feature extractor are missing or damaged, or do not fit.
        """
        extractor, tokenizer = cls.read(directory, local=local)
        settings, generation = Path(directory) / "generation_config.json", None
        if settings.is_file() or not local:
            generation = read_processor(
                GenerationConfig, directory, "generation settings", local=local, where=settings
            )
        return cls(config, extractor, tokenizer, generation, where=directory)

    def save_processor(self, directory: Path) -> None:
        """Writes the tokenizer's files, `preprocessor_config.json` and `generation_config.json`."""
        super().save_processor(directory)
        self.generation.save_pretrained(directory)

    def restore_settings(self, model: nn.Module) -> None:
        """For Transformers' own `generate`."""
        cast(Any, model).generation_config = self.generation

    @classmethod
    def depth(cls, config: PretrainedConfig) -> int:
        """See `TrueLengthAdapter.depth`."""
        return sum(cls._counts(config).values())

    @classmethod
    def _counts(cls, config: PretrainedConfig) -> dict[str, int]:
        """Layers of the encoder and of the decoder, by the module's name."""
        layout = cls.layout
        settings = {layout.encoder: layout.encoder_layers, layout.decoder: layout.decoder_layers}
        return {name: int(attrgetter(setting)(config)) for name, setting in settings.items()}

    # Speech

    def _heard(self, mask: Tensor) -> Tensor:
        return self.layout.frames(self.config, mask)

    def frames(self, lengths: Tensor) -> Tensor:
        """See `TrueLengthAdapter.frames`; each length as if it were alone."""
        multiple = self.layout.multiple
        counts = []
        for length in lengths.tolist():
            mask = torch.arange(multiple * math.ceil(max(1, length) / multiple)) < length
            counts.append(int(self._heard(mask[None].long()).sum()))
        return torch.tensor(counts)

    def _extract(self, audio: Sequence[np.ndarray], **settings: Any) -> dict[str, Tensor]:
        # In digital silence nothing varies, and features over their standard deviation are not numbers.
        with np.errstate(invalid="ignore", divide="ignore"):
            found = super()._extract(audio, pad_to_multiple_of=self.layout.multiple, **settings)
        return {name: value.nan_to_num() for name, value in found.items()}

    def outline(self, rows: int) -> dict[str, Tensor]:
        """See `Adapter.outline`."""
        length = round(WINDOW_SECONDS * SAMPLE_RATE)
        shape: tuple[int, ...] = (rows, length)
        if self.main_input != "input_values":
            length //= SAMPLE_RATE // 100
            shape = (rows, length, cast(Any, self.config).input_feat_per_channel)
        tokens = min(_TOKENS_A_WINDOW, self._positions)
        written = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
        return {
            self.main_input: torch.empty(shape, device="meta"),
            "attention_mask": torch.empty(rows, length, dtype=torch.int64, device="meta"),
            "lengths": torch.full((rows,), length),
            "decoder_input_ids": written,
            "labels": torch.zeros(rows, tokens, dtype=torch.int64),
        }

    # Text

    def fits(self, text: str, seconds: float) -> bool:
        """Whether the decoder can write so long a text."""
        return len(self.encode_text(text)) + len(self._prompt) <= self._positions

    @property
    def _positions(self) -> int:
        return int(attrgetter(self.layout.positions)(self.config))

    def teach(
        self, windows: Sequence[Sequence[TimedText]], *, timestamps: Sequence[bool], language: str | None
    ) -> dict[str, Tensor]:
        """The start, the texts joined by spaces, the end; what does not fit is cut off.

        Times are not written, and the language is the one that the model was made for.
        """
        prompt, end = self._prompt, self._ends[0]
        texts = [self.encode_text(self.written(" ".join(t.text for t in window))) for window in windows]
        rows = [[*prompt, *text, end][: self._positions + 1] for text in texts]
        before = [IGNORED] * (len(prompt) - 1)
        return {
            "decoder_input_ids": padded([row[:-1] for row in rows], self._padding),
            "labels": padded([[*before, *row[len(prompt) :]] for row in rows], IGNORED),
        }

    @property
    def _padding(self) -> int:
        found = self._setting("pad_token_id")
        return int(self._ends[0] if found is None else found)

    def words(self, tokens: Tensor) -> Tensor:
        """Which tokens are text: bool of the same shape, False for the prompt and the end."""
        special = torch.tensor([*self.tokenizer.all_special_ids, *self._prompt, *self._ends])
        return ~torch.isin(tokens, special.to(tokens.device))

    # Decoding

    def transcribe(
        self,
        model: nn.Module,
        audio: Sequence[Tensor],
        options: Options = WITHOUT_TIMES,
        *,
        previous: Sequence[Sequence[Said]] = (),
    ) -> list[Decoded]:
        """The likeliest token after the other; see `Adapter.transcribe`.

        There are no times but those of windows. Where they are asked for, a full window is heard up to its
        quietest place only, and the next one begins there.
        """
        self._check_options(options, previous)
        cuts = [_quietest(samples) if options.timestamps else None for samples in audio]
        heard = [samples[:cut] for samples, cut in zip(audio, cuts, strict=True)]
        limits = [self._limit(len(samples) / SAMPLE_RATE) for samples in heard]
        likelihoods = Likelihoods(cast(Any, self.config).vocab_size)
        with torch.inference_mode():
            tokens = cast(Any, model).generate(
                **self._encoded(model, heard),
                generation_config=self._greedy(max(limits)),
                logits_processor=LogitsProcessorList([likelihoods]),
            )
        # The start is no step of `generate`, a language is one.
        rows = zip(tokens[:, 1:].tolist(), likelihoods.rows(), limits, strict=True)
        return [
            self._decoded(row[:limit], chances, samples, cut, options)
            for samples, cut, (row, chances, limit) in zip(heard, cuts, rows, strict=True)
        ]

    def _check_options(self, options: Options, previous: Sequence[Sequence[Said]]) -> None:
        super()._check_options(options, previous)
        self._refuse_search(options)
        if options.word_timestamps:
            raise ModelError(
                f"{self.called} does not say when it heard a word", where=self._where,
                remedy="Leave times of words and streaming out, or choose a Whisper or CTC model.",
            )  # fmt: skip

    def _limit(self, seconds: float) -> int:
        """The most tokens that so much audio can have."""
        most = max(_LEAST_TOKENS, math.ceil(_TOKENS_A_SECOND * seconds))
        return min(most, self._positions - len(self._prompt))

    def _encoded(self, model: nn.Module, audio: Sequence[Tensor]) -> dict[str, Any]:
        """What the encoder makes of each window alone, so that the others' lengths do not matter."""
        dtype = next(model.parameters()).dtype
        states, masks, frames = [], [], []
        for samples in audio:
            batch: Batch = self._inputs([samples])
            batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
            states.append(self.network.states(model, batch)[0])
            masks.append(batch["attention_mask"][0])
            frames.append(self._heard(batch["attention_mask"])[0].long())
        together, there = (pad_sequence(rows, batch_first=True) for rows in (states, frames))
        outputs = _Heard(last_hidden_state=cast(Any, together), attention_mask=there)
        return {"encoder_outputs": outputs, "attention_mask": pad_sequence(masks, batch_first=True)}

    def _greedy(self, limit: int) -> GenerationConfig:
        return cast(Any, GenerationConfig)(  # type: ignore[no-any-return]
            max_new_tokens=limit, num_beams=1, do_sample=False, early_stopping=False, length_penalty=1.0,
            decoder_start_token_id=self._prompt[0], forced_bos_token_id=self.generation.forced_bos_token_id,
            eos_token_id=self._ends, pad_token_id=self._padding, bos_token_id=self._setting("bos_token_id"),
            suppress_tokens=self.generation.suppress_tokens,
        )  # fmt: skip

    def _decoded(
        self, row: Sequence[int], chances: Sequence[float], samples: Tensor, cut: int | None, options: Options
    ) -> Decoded:
        stop = next((i for i, token in enumerate(row) if token in self._ends), len(row))
        counted = chances[: stop + 1]
        text = self.decode_text(row[:stop])
        segments = (TimedText(0.0, len(samples) / SAMPLE_RATE, text),) if text else ()
        mean = sum(counted) / max(1, len(counted))
        advance = None if cut is None else cut / SAMPLE_RATE
        return Decoded(tuple(row[:stop]), text, segments, options.language or "und", 0.0, mean, advance)

    # Weights

    @classmethod
    def part(cls, name: str) -> str:
        """The feature encoder, the encoder, or the decoder with the token embedding."""
        if not name.startswith(f"{cls.layout.encoder}."):
            return "decoder"
        front = tuple(f"{cls.layout.encoder}.{part}" for part in cls.layout.front)
        return "feature encoder" if name.startswith(front) else "encoder"

    def layers(self) -> list[str]:
        """The encoder's layers, then the decoder's."""
        counts = self._counts(self.config)
        return [f"{name}.layers.{i}" for name, count in counts.items() for i in range(count)]

    def attentions(self) -> list[Attention]:
        """The attentions from the text to the speech."""
        layout, count = self.layout, self._counts(self.config)[self.layout.decoder]
        places = [f"{layout.decoder}.layers.{i}.{layout.attention}" for i in range(count)]
        heads = int(attrgetter(layout.heads)(self.config))
        return [Attention(f"{place}.q_proj", f"{place}.k_proj", heads) for place in places]


def _quietest(samples: Tensor) -> int | None:
    """Where a window can be cut, in samples: the middle of the quietest moment near the end of a full one."""
    if len(samples) < WINDOW_SAMPLES:
        return None
    first = len(samples) - round(_LOOK_BACK * SAMPLE_RATE)
    energy = samples[first:].float().square().unfold(0, round(_QUIET * SAMPLE_RATE), _STEP).mean(dim=1)
    return first + int(energy.argmin()) * _STEP + round(_QUIET * SAMPLE_RATE) // 2
