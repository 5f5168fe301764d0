from __future__ import annotations

from collections.abc import Sequence

import pytest

from usmlite.models import Options
from usmlite.models.decoding import Row
from usmlite.models.fallback import compression_ratio, decode_with_fallback, is_silence
from usmlite.models.options import FALLBACK_TEMPERATURES

LOOP = [1] * 200
SOUND = list(range(40))


def text_of(tokens: Sequence[int]) -> str:
    return "".join(chr(64 + token) for token in tokens)


def row(tokens: list[int], mean: float, temperature: float, no_speech: float = 0.0) -> Row:
    return Row(0, tokens, mean * (len(tokens) + 1), no_speech, temperature=temperature)


class Script:
    """Rows of each window, temperature after temperature."""

    def __init__(self, *windows: list[tuple[list[int], float]]) -> None:
        self.windows = [list(window) for window in windows]
        self.asked: list[tuple[list[int], float]] = []

    def __call__(self, windows: Sequence[int], temperature: float) -> list[Row]:
        self.asked.append((list(windows), temperature))
        return [row(*self.windows[window].pop(0), temperature) for window in windows]


def test_only_what_fails_is_tried_again() -> None:
    script = Script(
        [(SOUND, -0.3)], [(LOOP, -0.1), (SOUND, -1.5), (SOUND, -0.6)], [(SOUND, -2.0), (SOUND, -0.5)]
    )
    options = Options(temperatures=FALLBACK_TEMPERATURES)
    found = decode_with_fallback(script, text_of, 3, options)
    assert script.asked == [([0, 1, 2], 0.0), ([1, 2], 0.2), ([1], 0.4)]
    assert [each.temperature for each in found] == [0.0, 0.4, 0.2]


def test_where_all_fail_the_likeliest_that_does_not_repeat_itself_is_taken() -> None:
    options = Options(temperatures=(0.0, 0.5, 1.0))
    script = Script([(LOOP, -0.1), (SOUND, -1.2), (SOUND, -3.0)], [(LOOP, -0.2), (LOOP, -0.1), (LOOP, -0.3)])
    found = decode_with_fallback(script, text_of, 2, options)
    assert [each.temperature for each in found] == [0.5, 0.5]


def test_without_thresholds_nothing_is_tried_again() -> None:
    options = Options(temperatures=(0.0, 1.0), compression_ratio_threshold=None, logprob_threshold=None)
    script = Script([(LOOP, -9.0)])
    assert decode_with_fallback(script, text_of, 1, options)[0].tokens == LOOP
    assert len(script.asked) == 1


def test_silence_is_not_tried_again() -> None:
    options = Options(temperatures=(0.0, 1.0))
    found = decode_with_fallback(lambda windows, t: [row(SOUND, -3.0, t, 0.9)], text_of, 1, options)
    assert found[0].temperature == 0.0


@pytest.mark.parametrize(
    ("no_speech", "mean", "changes", "expected"),
    [
        (0.7, -1.2, {}, True), (0.7, -0.8, {}, False), (0.5, -1.2, {}, False),
        (0.7, -0.1, {"logprob_threshold": None}, True), (0.99, -9.0, {"no_speech_threshold": None}, False),
    ],
)  # fmt: skip
def test_silence(no_speech: float, mean: float, changes: dict[str, None], expected: bool) -> None:
    assert is_silence(no_speech, mean, Options(**changes)) is expected


def test_what_repeats_itself_compresses() -> None:
    assert compression_ratio("the same words again and again, " * 20) > 2.4
    assert compression_ratio("My sister found a silver key behind the school.") < 2.4
    assert compression_ratio("") == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam_size": 0}, {"best_of": 0}, {"patience": 0.0}, {"length_penalty": 1.5}, {"temperatures": ()},
        {"temperatures": (-0.1,)}, {"patience": float("nan")},
    ],
)  # fmt: skip
def test_options_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Options(**wrong)  # type: ignore[arg-type]
