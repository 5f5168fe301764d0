"""Whisper's windows to text: what the decoder is told, and what its tokens say.

The order of tokens is that of openai/whisper (Radford et al. 2022, arXiv 2212.04356, section 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, WhisperConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from usmlite.audio import SAMPLE_RATE, WINDOW_SAMPLES, WINDOW_SECONDS, log_mel
from usmlite.errors import ModelError
from usmlite.models.adapter import WITHOUT_TIMES, Adapter, Decoded, Said, TimedText, unknown_task
from usmlite.models.decoding import SECONDS_PER_TIMESTAMP, DecodingOptions, Prompt, Row
from usmlite.models.engine import encode
from usmlite.models.options import Options
from usmlite.models.segments import Piece, cut_at_timestamps
from usmlite.models.windows import decode_windows, likeliest_languages
from usmlite.models.word_times import token_times, word_segments

TASKS = ("transcribe", "translate")
_MIN_ADVANCE = 1.0  # seconds by which a window must get on, or it is taken whole


class WhisperDecoding(Adapter):
    """The half of Whisper's adapter that listens; `WhisperAdapter` is the whole.

    Attributes:
        end: <|endoftext|>; ids below it are text.
        start: <|startoftranscript|>.
        no_timestamps: <|notimestamps|>.
        timestamp_begin: <|0.00|>.
        no_speech: <|nospeech|>, if there is such a token.
        is_multilingual: whether the vocabulary has languages and tasks.
        generation: suppressed tokens, heads that follow the speech, and the like.
    """

    config: WhisperConfig
    generation: GenerationConfig
    end: int
    start: int
    no_timestamps: int
    timestamp_begin: int
    no_speech: int | None
    is_multilingual: bool
    _backend: Any
    _where: str | Path

    def _token(self, name: str) -> int:
        number = self._backend.token_to_id(name)
        if number is None:
            raise ModelError(
                "the tokenizer is not a Whisper tokenizer",
                where=self._where,
                expected=f"a token {name}",
                remedy="Take tokenizer.json from the model that the weights come from.",
            )
        return int(number)

    # Languages

    @cached_property
    def languages(self) -> dict[str, int]:
        """Language code to token id; empty for an English-only model."""
        if not self.is_multilingual:
            return {}
        ids = range(self.start + 1, self._token("<|translate|>"))
        return {str(self._backend.id_to_token(number)).strip("<|>"): number for number in ids}

    @property
    def only_language(self) -> str | None:
        """English, for an English-only model."""
        return None if self.is_multilingual else "en"

    @property
    def searches(self) -> bool:
        """See `Adapter.searches`."""
        return True

    @property
    def tells_languages(self) -> bool:
        """A multilingual model does."""
        return self.is_multilingual

    def language_code(self, language: str | None) -> str | None:
        """The code of a language given by code or English name; None stays None.

        Raises:
            ModelError: the model does not know the language.
        """
        if language is None:
            return None
        code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        known = self.languages or {"en": self.start}
        if code not in known:
            raise ModelError(
                f"the model does not know the language {language!r}",
                where=self._where,
                expected="one of " + ", ".join(known) if self.is_multilingual else "English",
                remedy="Choose another language"
                + ("." if self.is_multilingual else ", or a multilingual model such as base."),
            )
        return code

    # Features and text

    def features(self, samples: Tensor) -> Tensor:
        """Log-mel features.

        Args:
            samples: `[batch, 480000]`, 30 s at 16 kHz, zero-padded.

        Returns:
            float32 `[batch, mel bins, 3000]`, on the samples' device.
        """
        if samples.ndim != 2 or samples.shape[1] != WINDOW_SAMPLES:
            raise ValueError(f"samples must be [batch, {WINDOW_SAMPLES}], got {list(samples.shape)}")
        return log_mel(samples, self.config.num_mel_bins)

    def encode_text(self, text: str) -> list[int]:
        """Text tokens; markup that looks like a special token is taken apart, not obeyed."""
        plain = text.replace("<|", "< |")
        return list(self._backend.encode(plain, add_special_tokens=False).ids)

    def decode_text(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens and timestamps are left out."""
        text = self._backend.decode([token for token in tokens if token < self.end])
        return str(text).strip()

    def _prefix(self, language: int | None, task: str, timestamps: bool) -> list[int]:
        """The prompt after <|startoftranscript|>."""
        prefix = [] if language is None else [language, self._token(f"<|{task}|>")]
        return prefix if timestamps else [*prefix, self.no_timestamps]

    # Windows

    def transcribe(
        self,
        model: nn.Module,
        audio: Sequence[Tensor],
        options: Options = WITHOUT_TIMES,
        *,
        previous: Sequence[Sequence[Said]] = (),
    ) -> list[Decoded]:
        """See `Adapter.transcribe`; windows are padded with silence to 30 seconds."""
        seconds = [len(samples) / SAMPLE_RATE for samples in audio]
        found = self.decode(model, self.features(_padded(audio)), options, previous=previous, seconds=seconds)
        if not options.timestamps:
            return found
        return [replace(each, advance=self.segments(each.tokens)[1]) for each in found]

    def languages_heard(self, model: nn.Module, audio: Sequence[Tensor]) -> list[dict[str, float]]:
        """See `Adapter.languages_heard`."""
        if not self.is_multilingual:
            return super().languages_heard(model, audio)
        encoded = self._encode(model, self.features(_padded(audio)))
        return likeliest_languages(model, encoded, self.start, self.languages)

    def decode(
        self,
        model: nn.Module,
        features: Tensor,
        options: Options = WITHOUT_TIMES,
        *,
        previous: Sequence[Sequence[Said]] = (),
        seconds: Sequence[float] = (),
        max_new_tokens: int = 224,
    ) -> list[Decoded]:
        """Transcribes windows.

        Args:
            model: a `WhisperForConditionalGeneration` in eval mode; its layers may be replaced.
            features: `[batch, mel bins, 3000]`, as `features` returns them.
            options: what is asked for; times are decoded under the rules of openai/whisper.
            previous: for each window, what was said before it; empty where nobody knows. What has times is
                told with them where times are asked for.
            seconds: how much of each window is audio, for the times of words; empty for all of it.
            max_new_tokens: the most tokens for one window.

        Returns:
            One result for each window, in order.

        Raises:
            ModelError: the model does not know the language or the task.
        """
        if options.language_model is not None:
            raise ModelError(
                "a Whisper model has no use for a word language model", where=self._where,
                remedy="Leave that out, or choose a CTC model.",
            )  # fmt: skip
        code = self.language_code(options.language)
        self._check_task(options.task)
        encoded = self._encode(model, features)
        vocabulary = DecodingOptions(
            end=self.end,
            timestamp_begin=self.timestamp_begin if options.timestamps else None,
            no_timestamps=self.no_timestamps,
            no_speech=self.no_speech,
            suppress=tuple(self.generation.suppress_tokens or ()),
            suppress_first=tuple(self.generation.begin_suppress_tokens or ()),
            max_new_tokens=max_new_tokens,
        )
        rows = decode_windows(
            model,
            encoded,
            self._prompt(code, options, previous, len(features)),
            vocabulary,
            options,
            self.decode_text,
        )
        codes = {number: name for name, number in self.languages.items()}
        languages = [code or codes.get(row.language or self.end, "en") for row in rows]
        found = [
            self._decoded(row, options.timestamps, language)
            for row, language in zip(rows, languages, strict=True)
        ]
        if not options.word_timestamps:
            return found
        lengths = list(seconds) or [WINDOW_SECONDS] * len(rows)
        return self._with_words(model, encoded, found, options, lengths)

    def _check_task(self, task: str) -> None:
        if task not in TASKS or (task != "transcribe" and not self.is_multilingual):
            remedy = "." if self.is_multilingual else ", or a multilingual model such as base."
            tasks = TASKS if self.is_multilingual else TASKS[:1]
            raise unknown_task(task, tasks, self._where, f"Choose another task{remedy}")

    def _encode(self, model: nn.Module, features: Tensor) -> Tensor:
        network = cast(Any, model)
        norm = network.model.encoder.layer_norm.weight  # norms are kept as they are by every compression
        with torch.inference_mode():
            return encode(network, features.to(norm.device, norm.dtype))

    def _prompt(
        self, code: str | None, options: Options, previous: Sequence[Sequence[Said]], batch: int
    ) -> Prompt:
        task, timestamps = options.task, options.timestamps
        before = [self._before(options, previous[row] if previous else ()) for row in range(batch)]
        if self.is_multilingual and code is None:
            return Prompt(
                self.start,
                lambda found: self._prefix(found, task, timestamps),
                tuple(self.languages.values()),
                before,
            )
        return Prompt(
            self.start, self._prefix(self.languages.get(code or "en"), task, timestamps), (), before
        )

    def _before(self, options: Options, previous: Sequence[Said]) -> list[int]:
        """Tokens before <|startoftranscript|>: hotwords, the initial prompt and the end of what was said."""
        told = [text for text in (options.hotwords, options.initial_prompt) if text and text.strip()]
        fixed = [token for text in told for token in self.encode_text(f" {text.strip()}")]
        room = self.config.max_target_positions // 2 - 1
        fixed = fixed[:room]
        said = [token for piece in previous for token in self._told(piece, options.timestamps)]
        said = said[max(0, len(said) - (room - len(fixed))) :]
        return [self._token("<|startofprev|>"), *fixed, *said] if fixed or said else []

    def _told(self, piece: Said, timestamps: bool) -> list[int]:
        """Tokens of what was said; a model that is told a text without times forgets to give any itself."""
        text = piece if isinstance(piece, str) else piece.text
        tokens = self.encode_text(f" {text.strip()}") if text.strip() else []
        if isinstance(piece, str) or not timestamps or not tokens:
            return tokens
        start, end = (round(seconds / SECONDS_PER_TIMESTAMP) for seconds in (piece.start, piece.end))
        return [self.timestamp_begin + start, *tokens, self.timestamp_begin + end]

    def _decoded(self, row: Row, timestamps: bool, language: str) -> Decoded:
        text = self.decode_text(row.tokens)
        if timestamps:
            segments, _ = self.segments(row.tokens)
        else:
            segments = (TimedText(0.0, WINDOW_SECONDS, text),) if text else ()
        return Decoded(
            tuple(row.tokens), text, segments, language, row.no_speech, row.mean_logprob(),
            temperature=row.temperature,
        )  # fmt: skip

    def _with_words(
        self,
        model: nn.Module,
        encoded: Tensor,
        found: Sequence[Decoded],
        options: Options,
        seconds: Sequence[float],
    ) -> list[Decoded]:
        cuts = [self._pieces(each, options.timestamps) for each in found]
        texts = [[[t for t in piece.tokens if t < self.end] for piece in pieces] for pieces in cuts]
        spoken = [index for index, pieces in enumerate(texts) if any(pieces)]
        out = [replace(each, segments=tuple(replace(s, words=()) for s in each.segments)) for each in found]
        if not spoken:
            return out
        prompts = [
            [self.start, *self._prefix(self.languages.get(found[index].language), options.task, False)]
            for index in spoken
        ]
        times = token_times(
            model,
            encoded[spoken],
            [[token for text in texts[index] for token in text] for index in spoken],
            prompts,
            self.end,
            self.attentions(),
            self._alignment_heads(),
            [seconds[index] for index in spoken],
        )
        for index, each in zip(spoken, times, strict=True):
            # What a translation says is English, whatever was heard.
            language = "en" if options.task == "translate" else found[index].language
            segments = word_segments(cuts[index], texts[index], each, self._text_of, language)
            out[index] = replace(found[index], segments=tuple(segments))
        return out

    def _pieces(self, found: Decoded, timestamps: bool) -> list[Piece]:
        if timestamps:
            return cut_at_timestamps(found.tokens, self.timestamp_begin, _MIN_ADVANCE)[0]
        return [Piece(0.0, WINDOW_SECONDS, found.tokens)]

    def _alignment_heads(self) -> list[tuple[int, int]]:
        """Heads that follow the speech: the published ones, or else all of the upper half of the layers."""
        given = getattr(self.generation, "alignment_heads", None)
        layers, heads = self.config.decoder_layers, self.config.decoder_attention_heads
        known = [(int(layer), int(head)) for layer, head in given or ()]
        if known and all(0 <= layer < layers and 0 <= head < heads for layer, head in known):
            return known
        return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]

    def _text_of(self, tokens: Sequence[int]) -> str:
        """The text of text tokens, with the space before it."""
        return str(self._backend.decode(list(tokens)))

    def segments(
        self, tokens: Sequence[int], *, min_advance: float = _MIN_ADVANCE
    ) -> tuple[tuple[TimedText, ...], float | None]:
        """Cuts a window's tokens at their timestamps, see `cut_at_timestamps`.

        Returns:
            The segments that are complete and not empty, and where the next window should begin.
        """
        pieces, seek = cut_at_timestamps(tokens, self.timestamp_begin, min_advance)
        texts = (TimedText(p.start, p.end, self.decode_text(p.tokens)) for p in pieces)
        return tuple(text for text in texts if text.text), seek


def _padded(audio: Sequence[Tensor]) -> Tensor:
    """Windows of 30 seconds, silent behind the audio."""
    windows = torch.zeros(len(audio), WINDOW_SAMPLES, device=audio[0].device)
    for row, samples in zip(windows, audio, strict=True):
        row[: len(samples)] = samples
    return windows
