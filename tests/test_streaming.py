from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from usmlite.models import TimedText, Word
from usmlite.runtime import Recognizer
from usmlite.streaming import Update, agreeing

RATE = 16_000


def word(text: str, start: float, length: float = 0.4) -> Word:
    return Word(f" {text}", start, start + length, 0.9)


def samples(seconds: float) -> np.ndarray:
    return np.full(round(seconds * RATE), 0.1, np.float32)


class Speaker:
    """Says the n-th word at second n, and hears the last second of its audio wrong; positions are samples."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, float]] = []
        self.told: list[str] = []

    def __call__(self, audio: np.ndarray, said: str) -> Sequence[TimedText]:
        # The audio counts seconds itself, so that the speaker knows what it hears.
        first, last = float(audio[0]), float(audio[-1])
        self.heard.append((first, last))
        self.told.append(said)
        words = [
            word(f"w{n}" if n + 1 < last else f"wrong{n}x{last:.0f}", n - first)
            for n in range(int(np.ceil(first)), int(np.floor(last)) + 1)
        ]
        return [TimedText(w.start, w.end, w.word.strip(), (w,)) for w in words]


def counting(seconds: int) -> np.ndarray:
    return np.arange(1, seconds * RATE + 1, dtype=np.float32) / RATE


def chunks(audio: np.ndarray, size: int) -> list[np.ndarray]:
    return [audio[low : low + size] for low in range(0, len(audio), size)]


@pytest.mark.parametrize("size", [1_000, RATE, 5 * RATE, 45 * RATE])
def test_what_two_hypotheses_agree_on_is_final_once_and_for_all(size: int) -> None:
    speaker = Speaker()
    updates = list(agreeing(speaker, chunks(counting(70), size)))
    final = "".join(update.final for update in updates).split()
    assert final[:69] == [f"w{n}" for n in range(1, 69)] + final[68:69]
    assert [int(w.strip("w")) for w in final[:68]] == list(range(1, 69))
    assert [u.seconds for u in updates] == sorted(u.seconds for u in updates)
    assert updates[-1].partial == ""
    starts = [w.start for u in updates for w in u.words]
    assert starts == sorted(starts)
    assert starts[:68] == pytest.approx(range(1, 69), abs=0.01)
    # What is final leaves the buffer, and no window is longer than the model's.
    assert max(last - first for first, last in speaker.heard) <= 30.0
    if size <= 5 * RATE:
        assert max(last - first for first, last in speaker.heard[len(speaker.heard) // 3 :]) < 22.0
    assert all(len(told) <= 200 for told in speaker.told)
    # And is told instead: the words up to where the buffer begins.
    assert speaker.told[-1].endswith(f"w{int(np.ceil(speaker.heard[-1][0])) - 1}")


def test_partial_text_is_what_may_change() -> None:
    script = iter([["one"], ["one", "too"], ["one", "two"], ["one", "two", "three"]])

    def hear(audio: np.ndarray, said: str) -> Sequence[TimedText]:
        words = tuple(word(text, 0.5 * n) for n, text in enumerate(next(script)))
        return [TimedText(0.0, 2.0, "", words)]

    updates = list(agreeing(hear, [samples(1.0)] * 3))
    assert [(u.final, u.partial) for u in updates] == [
        ("", " one"), (" one", " too"), ("", " two"), (" two three", ""),
    ]  # fmt: skip


def test_commas_and_capitals_do_not_count() -> None:
    script = iter(["Well then", "well, then", "well, then"])

    def hear(audio: np.ndarray, said: str) -> Sequence[TimedText]:
        return [TimedText(0.0, 2.0, "", tuple(word(t, 0.5 * n) for n, t in enumerate(next(script).split())))]

    updates = list(agreeing(hear, [samples(1.0)] * 2))
    assert updates[1].final == " well, then"
    assert updates[2].final == ""


def test_words_are_told_apart_by_what_they_say_and_not_by_times_alone() -> None:
    # The last final word's end is put half a second late: the word after it must not be lost for that.
    script = iter([("resist", 0.9), ("resist on any", 0.4), ("resist on any student", 0.4)])

    def hear(audio: np.ndarray, said: str) -> Sequence[TimedText]:
        text, length = next(script)
        starts = (0.0, 0.5, 0.7, 1.2)
        words = [word(t, start, length) for t, start in zip(text.split(), starts, strict=False)]
        return [TimedText(0.0, 2.0, "", tuple(words))]

    updates = list(agreeing(hear, [samples(1.0)] * 2))
    assert "".join(update.final for update in updates) == " resist on any student"


def test_a_word_that_is_heard_otherwise_later_is_not_said_twice() -> None:
    script = iter(["a cat sat", "a cat sat on", "a cut sat on the mat", "a cut sat on the mat"])

    def hear(audio: np.ndarray, said: str) -> Sequence[TimedText]:
        return [TimedText(0.0, 2.0, "", tuple(word(t, 0.4 * n) for n, t in enumerate(next(script).split())))]

    updates = list(agreeing(hear, [samples(1.0)] * 3))
    assert "".join(update.final for update in updates) == " a cat sat on the mat"


def test_who_never_agrees_loses_nothing() -> None:
    count = 0

    def hear(audio: np.ndarray, said: str) -> Sequence[TimedText]:
        nonlocal count
        count += 1
        return [TimedText(0.0, 1.0, "", (word(f"guess{count}", len(audio) / RATE - 0.5),))]

    updates = list(agreeing(hear, [samples(1.0)] * 40))
    assert updates[28].final.startswith(" guess")
    assert updates[28].partial == ""
    assert sum(bool(u.final) for u in updates) == 2


def test_a_word_far_behind_is_final_without_agreement() -> None:
    count = 0

    def hear(audio: np.ndarray, said: str) -> Sequence[TimedText]:
        nonlocal count
        count += 1
        return [TimedText(0.0, 2.0, "", (word(f"guess{count}", 0.5), word("sure", 1.0)))]

    updates = list(agreeing(hear, [samples(1.0)] * 11))
    assert [u.seconds for u in updates if u.final] == [9.0, 10.0]
    assert "".join(u.final for u in updates) == " guess9 sure"


def test_silence_is_not_decoded() -> None:
    def hear(audio: np.ndarray, said: str) -> Sequence[TimedText]:
        pytest.fail("nothing is there to hear")

    updates = list(agreeing(hear, [np.zeros(RATE, np.float32)] * 3))
    assert updates[-1] == Update("", "", 3.0)
    assert list(agreeing(hear, [])) == [Update("", "", 0.0)]


def test_chunks_are_checked() -> None:
    with pytest.raises(ValueError, match="int16"):
        list(agreeing(lambda audio, said: (), [np.zeros(10, np.int16)]))
    with pytest.raises(ValueError, match="every"):
        list(agreeing(lambda audio, said: (), [], every=0.0))


def test_real_speech_comes_out_as_it_went_in(
    small_model: Recognizer, sentences: list[tuple[np.ndarray, str]]
) -> None:
    gap = np.zeros(RATE // 2, np.float32)
    audio = np.concatenate([part for each, _ in sentences[:2] for part in (each, gap)])
    updates = list(small_model.stream(chunks(audio, RATE // 4), every=2.0))
    said = "".join(update.final for update in updates).strip()
    assert [w.strip(".,").lower() for w in said.split()] == [
        w.strip(".,").lower() for _, text in sentences[:2] for w in text.split()
    ]
    # Some of it is final before the end.
    assert updates[-2].words or updates[-3].words
    ends = [w.end for update in updates for w in update.words]
    assert ends == sorted(ends)
