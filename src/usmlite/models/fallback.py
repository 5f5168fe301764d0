"""A second try where a result is not trusted: openai/whisper `transcribe.py`, `decode_with_fallback`.

A text that repeats itself, or that the model itself finds unlikely, is drawn anew at a higher temperature.
Where every temperature fails, the likeliest text of those that do not repeat themselves is taken, as
faster-whisper does; openai/whisper takes the last one, which is the wildest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from usmlite.models.decoding import Row
from usmlite.models.options import Options


def compression_ratio(text: str) -> float:
    """How many times smaller zlib makes a text: above 2.4 it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def is_silence(no_speech: float, mean_logprob: float, options: Options) -> bool:
    """Whether a window holds no speech: the model says so, and does not trust its text either."""
    if options.no_speech_threshold is None or no_speech <= options.no_speech_threshold:
        return False
    return options.logprob_threshold is None or mean_logprob <= options.logprob_threshold


def decode_with_fallback(
    decode: Callable[[Sequence[int], float], list[Row]],
    text_of: Callable[[Sequence[int]], str],
    count: int,
    options: Options,
) -> list[Row]:
    """Decodes windows at the first temperature, and those that fail at the next one, and so on.

    Args:
        decode: rows of some windows, by their numbers, at a temperature.
        text_of: tokens to text.
        count: how many windows there are.
        options: temperatures and thresholds.

    Returns:
        One row for each window.
    """
    tries: list[list[Row]] = [[] for _ in range(count)]
    left = list(range(count))
    for temperature in options.temperatures:
        for window, row in zip(left, decode(left, temperature), strict=True):
            tries[window].append(row)
        left = [window for window in left if _fails(tries[window][-1], text_of, options)]
        if not left:
            break
    failed = set(left)
    return [_best(rows, text_of, options) if n in failed else rows[-1] for n, rows in enumerate(tries)]


def _repeats(row: Row, text_of: Callable[[Sequence[int]], str], options: Options) -> bool:
    most = options.compression_ratio_threshold
    return most is not None and compression_ratio(text_of(row.tokens)) > most


def _fails(row: Row, text_of: Callable[[Sequence[int]], str], options: Options) -> bool:
    if is_silence(row.no_speech, row.mean_logprob(), options):
        return False
    least = options.logprob_threshold
    return _repeats(row, text_of, options) or (least is not None and row.mean_logprob() < least)


def _best(rows: list[Row], text_of: Callable[[Sequence[int]], str], options: Options) -> Row:
    sound = [row for row in rows if not _repeats(row, text_of, options)]
    return max(sound or rows, key=Row.mean_logprob)
