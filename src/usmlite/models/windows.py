"""Windows to tokens by whatever search the options name, those of one prompt length side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from usmlite.models.decoding import DecodingOptions, Prompt, Row, begin, decode_greedily
from usmlite.models.fallback import decode_with_fallback
from usmlite.models.options import Options
from usmlite.models.search import decode_by_drawing, decode_with_beams


def decode_windows(
    model: nn.Module,
    encoded: Tensor,
    prompt: Prompt,
    vocabulary: DecodingOptions,
    options: Options,
    text_of: Callable[[Sequence[int]], str],
) -> list[Row]:
    """Decodes windows, some of them again at higher temperatures.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode, its layers possibly replaced.
        encoded: the encoder's output, `[batch, positions, d_model]`.
        prompt: what the decoder is told first; `previous` of any lengths, one for each window.
        vocabulary: the vocabulary and the rules.
        options: how texts are searched for, and when a text is not trusted.
        text_of: tokens to text.

    Returns:
        One row for each window, in order.
    """

    def decode(windows: Sequence[int], temperature: float) -> list[Row]:
        rows: dict[int, Row] = {}
        for group in _alike(windows, prompt.previous):
            heard = encoded if len(group) == len(encoded) else encoded[group]
            told = replace(prompt, previous=[prompt.previous[window] for window in group])
            found = _search(model, heard, told, vocabulary, options, temperature)
            rows.update(zip(group, found, strict=True))
        return [rows[window] for window in windows]

    return decode_with_fallback(decode, text_of, len(encoded), options)


def _alike(windows: Sequence[int], previous: Sequence[Sequence[int]]) -> list[list[int]]:
    """Windows by the length of what stands before them: a step takes rows of one length."""
    groups: dict[int, list[int]] = {}
    for window in windows:
        groups.setdefault(len(previous[window]), []).append(window)
    return list(groups.values())


def _search(
    model: nn.Module,
    encoded: Tensor,
    prompt: Prompt,
    vocabulary: DecodingOptions,
    options: Options,
    temperature: float,
) -> list[Row]:
    if temperature > 0:
        return decode_by_drawing(
            model, encoded, prompt, vocabulary,
            temperature=temperature, best_of=options.best_of, length_penalty=options.length_penalty,
            seed=options.seed,
        )  # fmt: skip
    if options.beam_size > 1:
        return decode_with_beams(
            model, encoded, prompt, vocabulary,
            beam_size=options.beam_size, patience=options.patience, length_penalty=options.length_penalty,
        )  # fmt: skip
    return decode_greedily(model, encoded, prompt, vocabulary)


@torch.inference_mode()
def likeliest_languages(
    model: nn.Module, encoded: Tensor, start: int, languages: Mapping[str, int]
) -> list[dict[str, float]]:
    """The probability of every language, likeliest first (openai/whisper `detect_language`).

    Args:
        model: a multilingual `WhisperForConditionalGeneration` in eval mode.
        encoded: the encoder's output, `[batch, positions, d_model]`.
        start: <|startoftranscript|>.
        languages: code to token.

    Returns:
        Code to probability, for each row.
    """
    rules = DecodingOptions(end=start, timestamp_begin=None, no_timestamps=start, no_speech=None)
    _, _, logits, _ = begin(model, encoded, Prompt(start, ()), rules)
    chances = logits[:, list(languages.values())].softmax(dim=-1).tolist()
    return [dict(sorted(zip(languages, row, strict=True), key=lambda pair: -pair[1])) for row in chances]
