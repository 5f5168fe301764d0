"""What families share that say at which frame they heard a label: texts with times, pieces between pauses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

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
    """An adapter whose labels have times."""

    def frames(self, lengths: Tensor) -> Tensor:
        """Lengths of the main input, int64 `[batch]`, to frames of the output; 0 where there is none."""
        kind: Any = self.model_class()
        count = getattr(kind, "_get_feat_extract_output_lengths", None) or kind._get_subsampling_output_length
        # It needs nothing of the model but its configuration.
        found: Tensor = count(SimpleNamespace(config=self.config), lengths)
        return found.to(torch.int64).clamp(min=0)

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
