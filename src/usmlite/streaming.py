"""Text while audio arrives: what two hypotheses in a row agree on is final.

Local agreement (Macháček et al. 2023, arXiv 2307.14743; Liu et al. 2020): the audio that is not yet settled
is decoded again whenever some more of it has come. The words that begin this text and began the one before
are final; the others may still change. Audio whose segments are final leaves the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from usmlite.audio import SAMPLE_RATE, SILENCE, WINDOW_SECONDS
from usmlite.models import TimedText, Word

_TRIM_SECONDS = 15.0  # a buffer longer than this gives up the segments that are final
_MOST_SECONDS = WINDOW_SECONDS - 2.0  # and one longer than this gives up whatever it must
_TOLD = 200  # characters of the text before the buffer that the model is told
_AT_ONCE = 10.0  # the most audio between two hypotheses, in seconds: they must have something in common
_OLD_SECONDS = 8.0  # a word this far behind is final, agreed upon or not: what follows will not change it
_SLACK = 0.1  # seconds by which times of one word may differ between two hypotheses
_OVERLAP = 5  # words that may be heard again where the buffer begins
_RELIABLE = 0.5  # share of the final words that may be heard otherwise now

Hear = Callable[[np.ndarray, str], Sequence[TimedText]]
"""Samples of at most 30 seconds and the text before them, to segments with words."""


@dataclass(frozen=True)
class Update:
    """What is known after some audio.

    Attributes:
        final: text that has become final since the last update, with the space before it.
        partial: what is likely to follow; may change.
        seconds: of audio so far.
        words: of `final`, with times from the beginning of the audio.
    """

    final: str
    partial: str
    seconds: float
    words: tuple[Word, ...] = ()


def agreeing(
    hear: Hear, chunks: Iterable[np.ndarray], *, every: float = 1.0, shortest: float = 0.0
) -> Iterator[Update]:
    """Updates while audio arrives; the last one has no partial text.

    Args:
        hear: the recognizer.
        chunks: float32 mono samples at 16 kHz, of any lengths.
        every: seconds of new audio after which the text is made again.
        shortest: seconds without which `hear` cannot hear.
    """
    if every <= 0:
        raise ValueError(f"every must be above 0, got {every}")
    listener = _Listener(hear, shortest)
    waiting: list[np.ndarray] = []
    held = 0
    for chunk in chunks:
        waiting.append(_checked(chunk))
        held += len(chunk)
        while held >= every * SAMPLE_RATE:
            # A source that was kept waiting may bring a lot.
            samples = np.concatenate(waiting)
            room = listener.room
            yield listener.more(samples[:room])
            waiting, held = [samples[room:]], max(0, len(samples) - room)
    rest = np.concatenate([*waiting, np.zeros(0, np.float32)])
    while len(rest) > listener.room:
        room = listener.room
        yield listener.more(rest[:room])
        rest = rest[room:]
    yield listener.finish(rest)


def _checked(chunk: np.ndarray) -> np.ndarray:
    if chunk.ndim != 1 or not np.issubdtype(chunk.dtype, np.floating):
        raise ValueError(f"chunks must be floating point [samples], got {chunk.dtype} {list(chunk.shape)}")
    return chunk.astype(np.float32, copy=False)


class _Listener:
    """The buffer, the words in it that are final, and the hypothesis about the others."""

    def __init__(self, hear: Hear, shortest: float) -> None:
        self._hear = hear
        self._shortest = shortest
        self._samples = np.zeros(0, np.float32)
        self._start = 0.0  # of the buffer, in seconds
        self._final: list[Word] = []  # in the buffer
        self._said = ""  # before the buffer
        self._gone: list[Word] = []  # the last words of it
        self._guess: list[Word] = []

    @property
    def _now(self) -> float:
        return self._start + len(self._samples) / SAMPLE_RATE

    @property
    def room(self) -> int:
        """Samples that may come at once; never none."""
        return min(round(WINDOW_SECONDS * SAMPLE_RATE) - len(self._samples), round(_AT_ONCE * SAMPLE_RATE))

    @property
    def _settled(self) -> float:
        """Up to where the text is final, in seconds."""
        return self._final[-1].end if self._final else self._start

    def more(self, samples: np.ndarray) -> Update:
        self._samples = np.concatenate([self._samples, samples])
        segments, words = self._listen()
        agreed = _common(self._guess, words)
        while agreed < len(words) and words[agreed].end < self._now - _OLD_SECONDS:
            agreed += 1
        new, self._guess = words[:agreed], words[agreed:]
        self._final += new
        self._trim(segments)
        if len(self._samples) > _MOST_SECONDS * SAMPLE_RATE:
            # Nothing was agreed on for that long: rather a guess than a loss.
            new = [*new, *self._guess]
            self._final += self._guess
            self._guess = []
            self._drop(self._now)
        return Update(_text(new), _text(self._guess), round(self._now, 3), tuple(new))

    def finish(self, samples: np.ndarray) -> Update:
        self._samples = np.concatenate([self._samples, samples])
        _, words = self._listen()
        return Update(_text(words), "", round(self._now, 3), tuple(words))

    def _listen(self) -> tuple[list[TimedText], list[Word]]:
        """The buffer's segments, and the words that are not final yet, with times from the beginning."""
        enough = len(self._samples) >= max(1.0, self._shortest * SAMPLE_RATE)
        if not enough or np.abs(self._samples).max() <= SILENCE:
            return [], []
        segments = [
            replace(
                each,
                start=each.start + self._start,
                end=each.end + self._start,
                words=tuple(
                    replace(w, start=round(w.start + self._start, 3), end=round(w.end + self._start, 3))
                    for w in each.words or ()
                ),
            )
            for each in self._hear(self._samples, self._said[-_TOLD:])
        ]
        words = [word for each in segments for word in each.words or ()]
        words = words[_heard_again(self._gone, words) :]
        return segments, words[_known(self._final, words) :]

    def _trim(self, segments: Sequence[TimedText]) -> None:
        if len(self._samples) <= _TRIM_SECONDS * SAMPLE_RATE:
            return
        # The last segment may go on.
        ends = [each.end for each in segments[:-1] if each.end <= self._settled + _SLACK]
        if ends:
            self._drop(ends[-1])
        elif len(self._samples) > _MOST_SECONDS * SAMPLE_RATE and self._final:
            self._drop(self._settled)

    def _drop(self, until: float) -> None:
        """Takes the audio up to some second, and its words, out of the buffer."""
        gone = [word for word in self._final if word.end <= until + _SLACK]
        self._said += _text(gone)
        self._gone = [*self._gone, *gone][-_OVERLAP:]
        self._final = self._final[len(gone) :]
        count = min(len(self._samples), max(0, round((until - self._start) * SAMPLE_RATE)))
        self._samples = self._samples[count:]
        self._start += count / SAMPLE_RATE


def _text(words: Sequence[Word]) -> str:
    return "".join(word.word for word in words)


def _plain(word: Word) -> str:
    """A word as it is compared: commas come and go."""
    return "".join(c for c in word.word.casefold() if c.isalnum())


def _common(before: Sequence[Word], after: Sequence[Word]) -> int:
    """How many words both begin with."""
    count = 0
    for first, second in zip(before, after, strict=False):
        if _plain(first) != _plain(second):
            break
        count += 1
    return count


def _heard_again(gone: Sequence[Word], words: Sequence[Word]) -> int:
    """How many of the first words are the last ones before the buffer once more: times waver."""
    for count in range(min(len(gone), len(words)), 0, -1):
        last, first = gone[-count:], words[:count]
        near = abs(first[0].start - last[0].start) < 1.0
        if near and [_plain(w) for w in last] == [_plain(w) for w in first]:
            return count
    return 0


def _known(final: Sequence[Word], words: Sequence[Word]) -> int:
    """How many of the first words are those that are final, by the fewest differences; then by time."""
    if not final or not words:
        return 0
    said, heard = [_plain(w) for w in final], [_plain(w) for w in words]
    costs = list(range(len(heard) + 1))
    for index, first in enumerate(said, start=1):
        diagonal, costs[0] = costs[0], index
        for place, second in enumerate(heard, start=1):
            changed = diagonal + (first != second)
            diagonal = costs[place]
            costs[place] = min(changed, costs[place] + 1, costs[place - 1] + 1)
    settled = final[-1].end
    borders = [*(word.start for word in words), words[-1].end]
    least = min(costs)
    if least > _RELIABLE * len(said):
        # Something else is heard altogether: only times are left to go by.
        return sum(word.start <= settled - _SLACK for word in words)
    return min(
        (place for place, cost in enumerate(costs) if cost == least),
        key=lambda place: abs(borders[place] - settled),
    )
