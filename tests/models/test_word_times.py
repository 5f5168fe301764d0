from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from small_whisper import lively, small_teacher
from usmlite.models import Options, Word
from usmlite.models.segments import Piece
from usmlite.models.word_times import (
    TokenTimes,
    entered,
    split_words,
    timed_words,
    token_times,
    typical,
    word_segments,
)
from usmlite.runtime import Recognizer


def warped(costs: np.ndarray) -> float:
    """The cost of the cheapest path, written as the textbook writes it."""
    tokens, frames = costs.shape
    total = np.full((tokens + 1, frames + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(1, tokens + 1):
        for j in range(1, frames + 1):
            before = min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
            total[i, j] = costs[i - 1, j - 1] + before
    return float(total[-1, -1])


def cost_of(costs: np.ndarray, starts: list[int]) -> float:
    """The cheapest path that enters each token at its frame: it may go on alone or with the next token."""
    total = 0.0
    ends = [*starts[1:], costs.shape[1]]
    for token, (start, end) in enumerate(zip(starts, ends, strict=True)):
        last = max(start, end - 1)
        # Up to the frame before the next token begins, or that very frame, whichever is cheaper.
        choices = [costs[token, start : last + 1].sum()]
        if token + 1 < len(starts) and end < costs.shape[1]:
            choices.append(costs[token, start : end + 1].sum())
        total += min(choices)
    return total


@pytest.mark.parametrize("seed", range(8))
def test_the_path_is_the_cheapest_one(seed: int) -> None:
    costs = np.random.default_rng(seed).normal(size=(6, 25))
    starts = entered(costs)
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert cost_of(costs, starts) == pytest.approx(warped(costs))


def test_the_path_follows_a_clear_picture() -> None:
    costs = np.ones((4, 20))
    for token, (start, end) in enumerate([(0, 3), (3, 9), (9, 15), (15, 20)]):
        costs[token, start:end] = -1.0
    assert entered(costs) == [0, 3, 9, 15]
    assert entered(np.zeros((1, 5))) == [0]
    assert entered(np.zeros((3, 1))) == [0, 0, 0]


def letters(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (" hello, wörld", "en", [" hello", ",", " wörld"]),
        (" (a) b", "en", [" ", "(a", ")", " b"]),
        ("日本", "ja", ["日", "本"]),
        ("日本 語", "en", ["日本", " 語"]),
        ("", "en", []),
    ],
)
def test_words_are_cut_at_spaces_and_punctuation(text: str, language: str, expected: list[str]) -> None:
    tokens = list(text.encode())
    found = split_words(tokens, letters, language)
    assert [word for word, _ in found] == expected
    assert sum(count for _, count in found) == len(tokens)


def test_half_a_character_at_the_end_is_kept() -> None:
    tokens = list("né".encode())[:-1]
    assert sum(count for _, count in split_words(tokens, letters, "en")) == len(tokens)


def test_punctuation_belongs_to_its_word() -> None:
    text = [(' "', 1), ("Yes", 1), (",", 1), (" (", 1), ("no", 1), (")", 1), (".", 1)]
    times = TokenTimes(tuple(0.1 * n for n in range(8)), (0.5, 1.0, 0.9, 0.3, 0.8, 0.7, 0.6))
    (found,) = timed_words([text], times)
    assert [word.word for word in found] == [' "Yes,', " (no)."]
    assert [time for word in found for time in (word.start, word.end)] == pytest.approx([0.0, 0.3, 0.3, 0.7])
    assert [word.probability for word in found] == [1.0, 0.8]


def test_a_pause_is_not_put_into_the_word_after_it() -> None:
    text = [(" one", 1), (" two", 1), (".", 1), (" three", 1), (" four", 1)]
    times = TokenTimes((0.0, 0.3, 0.6, 0.7, 4.0, 4.3), (1.0,) * 5)
    (found,) = timed_words([text], times)
    assert [word.word for word in found] == [" one", " two.", " three", " four"]
    assert found[2].start == pytest.approx(4.0 - 0.6)
    assert typical(found) == pytest.approx(0.3, abs=0.2)


def test_segments_last_as_long_as_their_words() -> None:
    pieces = [Piece(0.0, 2.0, (70, 1, 2)), Piece(2.0, 30.0, (170, 3)), Piece(30.0, 30.0, ())]
    said = {1: " one", 2: " two", 3: " three"}
    times = TokenTimes((0.4, 0.8, 1.2, 9.0), (0.9, 0.8, 0.7))
    found = word_segments(
        pieces, [[1, 2], [3], []], times, lambda tokens: "".join(said[t] for t in tokens), "en"
    )
    assert [each.text for each in found] == ["one two", "three"]
    assert (found[0].start, found[0].end) == (0.4, 1.2)
    # The path's last word ends where the audio does: its own length is as much as is believed.
    assert found[1].words == (Word(" three", pytest.approx(9.0 - 2 * 0.4, abs=0.1), 9.0, 0.7),)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_has_the_times_that_each_has_alone(seed: int) -> None:
    model, encoded = lively(seed, decoder_layers=2)
    _, adapter = small_teacher(seed, decoder_layers=2)
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15]]
    prompts = [[257, 263]] * 5
    rest = (256, adapter.attentions(), [(0, 1), (1, 0)])
    seconds = [30.0, 2.0, 12.5, 0.5, 29.0]
    together = token_times(model, encoded, texts, prompts, *rest, seconds)
    for row, each in enumerate(together):
        (alone,) = token_times(
            model, encoded[row : row + 1], texts[row : row + 1], prompts[:1], *rest, seconds[row : row + 1]
        )
        assert each.starts == alone.starts
        assert each.probabilities == pytest.approx(alone.probabilities, rel=1e-3)
        assert len(each.starts) == len(texts[row]) + 1
        assert all(a <= b <= seconds[row] for a, b in pairwise(each.starts))
    with torch.inference_mode():
        ids = torch.tensor([[257, 263, 1, 2, 3]])
        logits = model.proj_out(
            model.model.decoder(ids, encoder_hidden_states=encoded[:1], use_cache=False).last_hidden_state
        )[0, 1:4, :256]
        expected = logits.softmax(dim=-1)[range(3), [1, 2, 3]]
    assert together[0].probabilities == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize("timestamps", [True, False])
def test_words_say_what_the_segments_say(
    timestamps: bool, small_model: Recognizer, sentences: list[tuple[np.ndarray, str]]
) -> None:
    samples, text = sentences[0]
    found = small_model.transcribe(samples, Options(word_timestamps=True, timestamps=timestamps))
    words = [word for segment in found.segments for word in segment.words or ()]
    assert "".join(word.word for word in words).strip() == found.text == text
    assert len(words) == len(text.split())
    assert all(a.end <= b.start + 1e-6 for a, b in pairwise(words))
    assert 0.0 <= words[0].start < words[-1].end <= len(samples) / 16_000
    assert all(0.5 < word.probability <= 1.0 for word in words)
    for segment in found.segments:
        assert segment.words
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)


def test_each_word_is_put_where_it_was_said(
    small_model: Recognizer, sentences: list[tuple[np.ndarray, str]]
) -> None:
    gap = np.zeros(16_000, np.float32)
    samples = np.concatenate([part for each, _ in sentences for part in (each, gap)])
    found = small_model.transcribe(samples, word_timestamps=True)
    words = [word for segment in found.segments for word in segment.words or ()]
    start = 0.0
    for audio, text in sentences:
        end = start + len(audio) / 16_000
        inside = [word.word for word in words if start - 0.3 <= (word.start + word.end) / 2 <= end + 0.3]
        assert "".join(inside).strip().rstrip(".,").split()[-2:] == text.rstrip(".").split()[-2:]
        assert len(inside) == len(text.split())
        start = end + 1.0


def test_heads_that_are_not_known_or_wrong_are_those_of_the_upper_half() -> None:
    _, adapter = small_teacher(decoder_layers=4)
    assert adapter._alignment_heads() == [(2, 0), (2, 1), (3, 0), (3, 1)]
    adapter.generation.alignment_heads = [[1, 1], [3, 0]]
    assert adapter._alignment_heads() == [(1, 1), (3, 0)]
    adapter.generation.alignment_heads = [[9, 9]]
    assert adapter._alignment_heads()[0] == (2, 0)
