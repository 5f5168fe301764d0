"""When each word was said, by where the decoder looked: openai/whisper `timing.py`.

Some heads of the cross-attention follow the speech. The text is read once more in one pass; these heads'
weights, normalised over the tokens and smoothed over time, are a picture of which token belongs to which
frame; dynamic time warping finds the monotonic path through it. A word begins where the path enters its
first token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from usmlite.models.adapter import Attention, TimedText, Word
from usmlite.models.segments import Piece

SECONDS_PER_FRAME = 0.02
_SMOOTHED = 7  # frames of the median filter
_NO_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
_SENTENCE_ENDS = ".。!！?？"  # noqa: RUF001
_BEFORE_A_WORD = "\"'“¿([{-"
_AFTER_A_WORD = "\"'.。,，!！?？:：”)]}、"  # noqa: RUF001
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
# A word takes at most twice the median word, and that is taken for 0.7 seconds at most.
_MOST_MEDIAN, _LONGEST = 0.7, 2.0


@dataclass(frozen=True)
class TokenTimes:
    """Times and probabilities of a text's tokens.

    Attributes:
        starts: seconds from the window's beginning, one for each token and one for the end.
        probabilities: of the tokens, among all text.
    """

    starts: tuple[float, ...]
    probabilities: tuple[float, ...]


@torch.inference_mode()
def token_times(
    model: nn.Module,
    encoded: Tensor,
    texts: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    end: int,
    attentions: Sequence[Attention],
    heads: Sequence[tuple[int, int]],
    seconds: Sequence[float],
) -> list[TokenTimes]:
    """When the tokens of texts that are known were said.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode, its layers possibly replaced.
        encoded: the encoder's output, `[batch, positions, d_model]`.
        texts: text tokens for each row.
        prompts: what stands before each text, from <|startoftranscript|> to <|notimestamps|>, equally long.
        end: the token that ends a text; ids below it are text.
        attentions: the cross-attentions, by layer.
        heads: layer and head of each attention head that follows the speech.
        seconds: how much of each row is audio.

    Returns:
        Times for each row.
    """
    network: Any = model
    told = len(prompts[0])
    width = told + max(map(len, texts)) + 1
    ids = torch.tensor(
        [
            [*prompt, *text, *[end] * (width - told - len(text))]
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        device=encoded.device,
    )
    layers = sorted({layer for layer, _ in heads})
    with _caught(model, [attentions[layer] for layer in layers]) as caught:
        hidden = network.model.decoder(
            input_ids=ids, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
    found = []
    for row, text in enumerate(texts):
        frames = max(1, min(round(seconds[row] / SECONDS_PER_FRAME), encoded.shape[1]))
        tokens = told + len(text)
        weights = torch.stack(
            [
                _weights(caught, attentions[layer], head, row, tokens, frames, network.config.d_model)
                for layer, head in heads
            ]
        )
        # The place before a token is where it is looked for.
        starts = _starts(weights[:, told - 1 :])
        logits = network.proj_out(hidden[row, told - 1 : tokens - 1]).float()[:, :end]
        chances = logits.softmax(dim=-1).gather(1, ids[row, told:tokens, None])[:, 0]
        found.append(TokenTimes(tuple(starts), tuple(chances.tolist())))
    return found


@contextmanager
def _caught(model: nn.Module, attentions: Sequence[Attention]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the attentions' queries and keys, by module name, while the block runs the model."""
    caught: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            caught[name] = output

        return hook

    names = [name for attention in attentions for name in (attention.queries, attention.keys)]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _weights(
    caught: dict[str, Tensor], attention: Attention, head: int, row: int, tokens: int, frames: int, d: int
) -> Tensor:
    """One head's attention from tokens to the frames that are audio, float32 `[tokens, frames]`."""
    wide = d // attention.heads
    part = slice(head * wide, (head + 1) * wide)
    queries = caught[attention.queries][row, :tokens, part].float()
    keys = caught[attention.keys][row, :frames, part].float()
    return (queries @ keys.T / math.sqrt(wide)).softmax(dim=-1)


def _starts(weights: Tensor) -> list[float]:
    """Seconds at which the path through weights `[heads, tokens, frames]` enters each token."""
    spread, mean = torch.std_mean(weights, dim=1, keepdim=True, unbiased=False)
    picture = _smooth((weights - mean) / spread.clamp(min=1e-9)).mean(dim=0)
    return [frame * SECONDS_PER_FRAME for frame in entered(-picture.cpu().double().numpy())]


def _smooth(weights: Tensor) -> Tensor:
    """Median over neighboring frames."""
    half = _SMOOTHED // 2
    if weights.shape[-1] <= half:
        return weights
    padded = nn.functional.pad(weights, (half, half), mode="reflect")
    smooth: Tensor = padded.unfold(-1, _SMOOTHED, 1).median(dim=-1).values
    return smooth


def entered(costs: np.ndarray) -> list[int]:
    """The frame at which the cheapest monotonic path enters each token (dynamic time warping).

    Args:
        costs: float64 `[tokens, frames]`, of putting a token at a frame.

    Returns:
        One frame for each token, never falling.
    """
    tokens, frames = costs.shape
    total = np.empty((tokens, frames))
    total[0] = np.cumsum(costs[0])
    for token in range(1, tokens):
        # From the token before, at this frame or the one before; or along this token, which is a running
        # minimum once the token's own costs up to there are taken off.
        above = total[token - 1]
        from_above = above.copy()
        from_above[1:] = np.minimum(above[1:], above[:-1])
        along = np.cumsum(costs[token])
        before = np.concatenate([[0.0], along[:-1]])
        total[token] = along + np.minimum.accumulate(from_above - before)
    found = [0] * tokens
    token, frame = tokens - 1, frames - 1
    while token > 0:
        here = [
            total[token - 1, frame - 1] if frame else np.inf,
            total[token - 1, frame],
            total[token, frame - 1] if frame else np.inf,
        ]
        step = int(np.argmin(here))
        if step != 2:
            found[token] = frame
            token -= 1
        if step != 1:
            frame -= 1
    return found


def split_words(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], language: str
) -> list[tuple[str, int]]:
    """Cuts text tokens into words and punctuation marks: the text of each, and how many tokens it takes.

    Languages without spaces are cut at every character that tokens make whole.
    """
    whole = decode(tokens)
    characters: list[tuple[str, int]] = []
    start = offset = 0
    for index in range(1, len(tokens) + 1):
        text = decode(tokens[start:index])
        broken = text.find("\ufffd")
        # Part of a character, unless the text really has the mark that stands for one.
        if broken >= 0 and not (offset + broken < len(whole) and whole[offset + broken] == "\ufffd"):
            continue
        characters.append((text, index - start))
        start, offset = index, offset + len(text)
    if start < len(tokens):
        characters.append((decode(tokens[start:]), len(tokens) - start))
    if language in _NO_SPACES:
        return characters
    words: list[tuple[str, int]] = []
    for text, count in characters:
        if words and not text.startswith(" ") and text.strip() not in _PUNCTUATION:
            before, taken = words[-1]
            words[-1] = before + text, taken + count
        else:
            words.append((text, count))
    return words


def timed_words(texts: Sequence[Sequence[tuple[str, int]]], times: TokenTimes) -> list[list[Word]]:
    """Words with their times, punctuation joined to them.

    Args:
        texts: of each segment, as `split_words` cuts them.
        times: of all their tokens, one after the other.
    """
    found: list[list[Word]] = []
    first = 0
    for text in texts:
        words = []
        for word, count in text:
            last = first + count
            chance = sum(times.probabilities[first:last]) / count
            words.append(Word(word, times.starts[first], times.starts[last], chance))
            first = last
        found.append(words)
    most = _LONGEST * typical([word for words in found for word in words])
    return [_joined(_shortened(words, most)) for words in found]


def typical(words: Sequence[Word]) -> float:
    """The median length of a word in seconds, 0.7 at most."""
    return min(_MOST_MEDIAN, median([w.end - w.start for w in words if w.end > w.start] or [0.0]))


def _shortened(words: list[Word], most: float) -> list[Word]:
    """Without the pauses that the path puts into a word, or a full stop, where a sentence ends."""
    out: list[Word] = []
    for index, word in enumerate(words):
        if index and word.end - word.start > most:
            if word.word.strip() in _SENTENCE_ENDS:
                word = replace(word, end=word.start + most)
            elif words[index - 1].word.strip() in _SENTENCE_ENDS:
                word = replace(word, start=word.end - most)
        out.append(word)
    return out


def _joined(words: list[Word]) -> list[Word]:
    """Punctuation together with the word that it stands beside."""
    after: list[Word] = []
    for word in words:
        if after and word.word and word.word in _AFTER_A_WORD and not after[-1].word.endswith(" "):
            after[-1] = replace(after[-1], word=after[-1].word + word.word, end=word.end)
        else:
            after.append(word)
    out: list[Word] = []
    for word in after:
        mark = out[-1].word if out else ""
        if mark.startswith(" ") and mark.strip() and mark.strip() in _BEFORE_A_WORD:
            out[-1] = replace(word, word=mark + word.word, start=out[-1].start)
        else:
            out.append(word)
    return out


def word_segments(
    pieces: Sequence[Piece],
    texts: Sequence[Sequence[int]],
    times: TokenTimes,
    decode: Callable[[Sequence[int]], str],
    language: str,
) -> list[TimedText]:
    """A window's segments with their words.

    Args:
        pieces: the segments.
        texts: the text tokens of each.
        times: of all these tokens, one after the other.
        decode: text tokens to text, with the space before it.
        language: code, which says whether words have spaces between them.

    Returns:
        The segments that have a text.
    """
    cut = [split_words(text, decode, language) for text in texts]
    words = timed_words(cut, times)
    usual = typical([word for piece in words for word in piece])
    found: list[TimedText] = []
    for piece, text, inside in zip(pieces, texts, words, strict=True):
        said = decode(text).strip()
        if said:
            spoken = found[-1].end if found else 0.0
            found.append(_fitted(TimedText(piece.start, piece.end, said), inside, usual, spoken))
    return found


def _fitted(text: TimedText, words: Sequence[Word], usual: float, spoken: float) -> TimedText:
    """A segment with its words: it lasts from the first to the last, unless one of these is implausibly long.

    Args:
        text: with the times that the model wrote.
        words: of this text.
        usual: how long a word takes, see `typical`.
        spoken: when the segment before it ended, in seconds.
    """
    if not words:
        return replace(text, words=())
    inner = _after_a_pause(list(words), usual, spoken)
    first, last = inner[0], inner[-1]
    start, end = first.start, last.end
    if start < text.start - 0.5 and text.start < first.end:
        start = max(0.0, min(first.end - usual, text.start))
    if end > text.end + 0.5 and text.end > last.start:
        end = max(last.start + usual, text.end)
    inner[0] = replace(inner[0], start=start)
    inner[-1] = replace(inner[-1], end=end)
    return TimedText(round(start, 2), round(end, 2), text.text, tuple(map(_rounded, inner)))


def _after_a_pause(words: list[Word], usual: float, spoken: float) -> list[Word]:
    """Takes the pause before a segment out of its first two words: the path has nowhere else to put it."""
    most = _LONGEST * usual
    first, second = words[0], words[1] if len(words) > 1 else None
    long = first.end - first.start > most or (second is not None and second.end - first.start > 2 * most)
    if not long or first.end - spoken <= 2 * most:
        return words
    if second is not None and second.end - second.start > most:
        border = max(first.start, second.end - most)
        first, words[1] = replace(first, end=border), replace(second, start=border)
    words[0] = replace(first, start=max(first.start, first.end - most))
    return words


def _rounded(word: Word) -> Word:
    return Word(word.word, round(word.start, 2), round(word.end, 2), round(word.probability, 4))
