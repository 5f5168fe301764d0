"""What families share that say at which frame they heard a label: texts with times, pieces between pauses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from usmlite.audio import SAMPLE_RATE, WINDOW_SECONDS
from usmlite.models.adapter import Decoded, TimedText, Word
from usmlite.models.alignment import (
    Emitted,
    Piece,
    cut_at_pauses,
    joined,
    pause_to_go_on_from,
    words_of,
)
from usmlite.models.options import Options
from usmlite.models.true_length import TrueLengthAdapter


class FrameAdapter(TrueLengthAdapter):
    """An adapter whose labels have times.

    Attributes:
        blank: the label of frames that say nothing.
        labels_a_window: about how many labels 30 seconds of speech have.
    """

    blank: int
    labels_a_window = 400

    def frames(self, lengths: Tensor) -> Tensor:
        """Lengths of the main input, int64 `[batch]`, to frames of the output; 0 where there is none."""
        kind: Any = self.model_class()
        count = getattr(kind, "_get_feat_extract_output_lengths", None) or kind._get_subsampling_output_length
        # It needs nothing of the model but its configuration.
        found: Tensor = count(SimpleNamespace(config=self.config), lengths)
        return found.to(torch.int64).clamp(min=0)

    def outline(self, rows: int) -> dict[str, Tensor]:
        """See `Adapter.outline`. Labels and lengths are numbers, on the CPU."""
        sizes: Any = getattr(self.config, "encoder_config", self.config)
        length = round(WINDOW_SECONDS * SAMPLE_RATE)
        shape: tuple[int, ...] = (rows, length)
        if self.main_input != "input_values":
            bins = getattr(sizes, "num_mel_bins", None) or sizes.feature_projection_input_dim
            # Frames of 10 ms; wav2vec2-BERT has two of them in each.
            length = length // 160 // (1 if hasattr(sizes, "num_mel_bins") else 2)
            shape = (rows, length, bins)
        # No two that follow each other are the same, so that they fit the fewest frames.
        labels = (torch.arange(self.labels_a_window) % 2 + 1).repeat(rows, 1)
        batch = {self.main_input: torch.empty(shape, device="meta"), "labels": labels}
        if self.main_input != "input_values":
            batch["attention_mask"] = torch.empty(rows, length, dtype=torch.int64, device="meta")
        return {**batch, "lengths": torch.full((rows,), length)}

    @cached_property
    def _rate(self) -> tuple[float, float]:
        """Length of the main input for one second, and how much each further one adds."""
        one, eleven = (self._input_length(seconds * SAMPLE_RATE) for seconds in (1, 11))
        return one, (eleven - one) / 10

    def frames_of(self, seconds: float) -> int:
        """About how many frames so much audio has."""
        first, more = self._rate
        return int(self.frames(torch.tensor([int(first + (seconds - 1.0) * more)])))

    def decode_text(self, labels: Sequence[int]) -> str:
        """The text of labels; blanks and special tokens are left out, repeats are kept."""
        plain = [label for label in labels if label != self.blank]
        text = self.tokenizer.decode(plain, group_tokens=False, skip_special_tokens=True)
        return " ".join(str(text).split())

    def _decoded(
        self, emitted: Sequence[Emitted], mean_logprob: float, seconds: float, options: Options
    ) -> Decoded:
        """The text of labels with their times, up to where the next window should begin."""
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
