"""How windows are transcribed: what is asked for, how tokens are searched for, when a result is not trusted.

Names and meanings are those of openai/whisper `transcribe.py` and `decoding.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FALLBACK_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""openai/whisper's, each tried where the one before gave a result that is not trusted."""


@dataclass(frozen=True)
class Options:
    """What a transcription is asked for. The defaults are greedy search, once.

    Attributes:
        timestamps: whether segments with times are wanted.
        word_timestamps: whether each word's time and probability are wanted too.
        language: code or English name; None lets a multilingual model find out.
        task: "transcribe", or "translate" into English (multilingual Whisper models).
        beam_size: how many texts are followed side by side at temperature 0; 1 is greedy.
        patience: how many times the beam size of finished texts to wait for (Kasai et al. 2022,
            arXiv 2204.05424).
        length_penalty: exponent alpha of Wu et al. 2016 (arXiv 1609.08144) by which finished texts are
            ranked, 0 to 1; None ranks by the mean log probability.
        best_of: how many texts are drawn above temperature 0, of which the likeliest is taken.
        temperatures: what to divide log probabilities by, one after the other, while a result fails the
            two checks below; 0 does not draw, but searches.
        compression_ratio_threshold: a text that zlib makes smaller than by this factor repeats itself;
            None checks nothing.
        logprob_threshold: a text of a lower mean log probability is not trusted; None checks nothing.
        no_speech_threshold: a window is silence if the model says so with a higher probability than this,
            and its text is not above `logprob_threshold`; None keeps every text.
        initial_prompt: text that each window is told stands before it: names, spelling, style.
        hotwords: words to expect, told before everything else; CTC models prefer them while they search.
        language_model: a word n-gram language model for CTC models, an ARPA file or KenLM's binary form. Its
            words must be written as the model's labels are, such as in lower case.
        lm_weight: what its log probability counts, beside the model's own.
        lm_bonus: what each word counts with a language model, so that it does not prefer few words.
        seed: of what is drawn above temperature 0. Every window draws from its own start: what it says
            does not depend on the others.

    Raises:
        ValueError: a number is out of its range.
    """

    timestamps: bool = True
    word_timestamps: bool = False
    language: str | None = None
    task: str = "transcribe"
    beam_size: int = 1
    patience: float = 1.0
    length_penalty: float | None = None
    best_of: int = 5
    temperatures: tuple[float, ...] = (0.0,)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    initial_prompt: str | None = None
    hotwords: str | None = None
    language_model: str | None = None
    lm_weight: float = 0.5
    lm_bonus: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.best_of < 1:
            raise ValueError(f"beam_size and best_of must be at least 1: {self.beam_size}, {self.best_of}")
        if not (self.patience > 0 and math.isfinite(self.patience)):
            raise ValueError(f"patience must be above 0, got {self.patience}")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise ValueError(f"length_penalty must be 0 to 1, got {self.length_penalty}")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise ValueError(f"temperatures must be one or more numbers from 0 on, got {self.temperatures}")
