"""Labels with times, out of the likeliest label of each frame: words, pieces between pauses, where to go on.

CTC says when it emits a label, within a frame or two of when it was said (Graves et al., ICML 2006). Words
are told apart as tokenizers mark them: by a delimiter ("|"), or by a mark that their first piece begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from usmlite.audio import WINDOW_SECONDS

_MARKS = ("▁", "Ġ", " ")
# Pauses that end a subtitle, and the most that one may last, in seconds.
_PAUSE, _LONGEST = 0.5, 10.0
# The last part of a window, in seconds, in which a pause is looked for to go on from.
_LOOK_BACK = 10.0


@dataclass(frozen=True)
class Emitted:
    """One label, with its repeats over neighboring frames.

    Attributes:
        label: not the blank.
        start: seconds from the window's beginning.
        end: seconds from the window's beginning, of the last repeat's frame.
        logprob: natural logarithm of the probability, the mean over its frames.
    """

    label: int
    start: float
    end: float
    logprob: float


@dataclass(frozen=True)
class Piece:
    """Labels that belong together: a word, or words without a pause between them.

    Attributes:
        labels: with the marks between words.
        start: seconds from the window's beginning.
        end: seconds from the window's beginning.
        logprob: natural logarithm of the probability, the mean over the labels.
    """

    labels: tuple[int, ...]
    start: float
    end: float
    logprob: float


def collapse(labels: Sequence[int], logprobs: Sequence[float], blank: int, seconds: float) -> list[Emitted]:
    """Labels of frames to what they say: repeats once, blanks left out.

    Args:
        labels: one for each frame.
        logprobs: of these, natural logarithms.
        blank: the label that says nothing, and separates repeats that are meant.
        seconds: length of all frames.
    """
    found: list[Emitted] = []
    step = seconds / max(1, len(labels))
    first = 0
    for index in range(1, len(labels) + 1):
        if index < len(labels) and labels[index] == labels[first]:
            continue
        if labels[first] != blank:
            mean = sum(logprobs[first:index]) / (index - first)
            found.append(Emitted(labels[first], first * step, index * step, mean))
        first = index
    return found


def align(logprobs: Tensor, labels: Sequence[int], blank: int) -> Tensor:
    """Lays labels on frames so that they are likeliest there (Viterbi over blanks and labels).

    Args:
        logprobs: natural logarithms, float32 `[frames, vocabulary]`, on the CPU.
        labels: what is said, without blanks.
        blank: the label that says nothing; at least one between two that are the same.

    Returns:
        The label of each frame, int64 `[frames]`; only blanks where the labels do not fit the frames.
    """
    frames = len(logprobs)
    states = torch.full((2 * len(labels) + 1,), blank)
    states[1::2] = torch.tensor(labels, dtype=torch.int64)
    repeats = sum(a == b for a, b in pairwise(labels))
    if not labels or len(labels) + repeats > frames:
        return torch.full((frames,), blank)
    # A label may follow another one without a blank between them, if it is not the same.
    skips = torch.full((len(states),), -torch.inf)
    skips[2:][(states[2:] != blank) & (states[2:] != states[:-2])] = 0.0
    emissions = logprobs[:, states]
    score = torch.full((len(states),), -torch.inf)
    score[:2] = emissions[0, :2]
    came = torch.zeros(frames, len(states), dtype=torch.int64)
    for frame in range(1, frames):
        ways = torch.stack((
            score,
            torch.nn.functional.pad(score, (1, 0), value=-torch.inf)[:-1],
            torch.nn.functional.pad(score, (2, 0), value=-torch.inf)[:-2] + skips,
        ))  # fmt: skip
        best = ways.max(dim=0)
        score, came[frame] = best.values + emissions[frame], best.indices
    state = len(states) - 1 - int(score[-1] < score[-2])
    path = torch.zeros(frames, dtype=torch.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = states[state]
        state -= int(came[frame, state])
    return path


def words_of(emitted: Sequence[Emitted], tokenizer: Any) -> list[Piece]:
    """The words of emitted labels, each with the delimiter before it.

    Args:
        emitted: in order of time.
        tokenizer: knows the labels' tokens.
    """
    special = set(tokenizer.all_special_ids)
    delimiter = getattr(tokenizer, "word_delimiter_token", None)
    tokens = tokenizer.convert_ids_to_tokens([each.label for each in emitted])
    groups: list[list[Emitted]] = []
    prefix: list[int] = []
    prefixes: list[list[int]] = []
    begins = True
    for each, token in zip(emitted, tokens, strict=True):
        if token == delimiter or token in _MARKS:
            prefix, begins = [each.label], True
        elif each.label not in special:
            if begins or token.startswith(_MARKS):
                groups.append([])
                prefixes.append(prefix)
            groups[-1].append(each)
            prefix, begins = [], False
    return [
        Piece(
            (*before, *(each.label for each in group)),
            group[0].start,
            group[-1].end,
            sum(each.logprob for each in group) / len(group),
        )
        for before, group in zip(prefixes, groups, strict=True)
    ]


def cut_at_pauses(words: Sequence[Piece]) -> list[list[Piece]]:
    """Words in pieces of speech, each up to the next pause."""
    pieces: list[list[Piece]] = []
    for word in words:
        together = pieces and (
            word.start - pieces[-1][-1].end < _PAUSE and word.end - pieces[-1][0].start <= _LONGEST
        )
        if together:
            pieces[-1].append(word)
        else:
            pieces.append([word])
    return pieces


def joined(words: Sequence[Piece]) -> Piece:
    """Words, at least one, as one piece."""
    return Piece(
        tuple(label for word in words for label in word.labels),
        words[0].start,
        words[-1].end,
        sum(word.logprob for word in words) / len(words),
    )


def pause_to_go_on_from(words: Sequence[Piece], seconds: float) -> float | None:
    """Where the next window should begin, so that it cuts no word: in the longest of the last pauses.

    Args:
        words: of a window, in order of time.
        seconds: its length. One that is not full is the last one of its recording.

    Returns:
        Seconds from the window's beginning; None where the window is used up.
    """
    if seconds < WINDOW_SECONDS or not words or seconds - words[-1].end >= _PAUSE:
        return None
    pauses = [
        (after.start - before.end, (before.end + after.start) / 2)
        for before, after in pairwise(words)
        if (before.end + after.start) / 2 >= seconds - _LOOK_BACK
    ]
    return max(pauses)[1] if pauses else None
