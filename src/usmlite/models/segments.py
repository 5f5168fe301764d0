"""A window's tokens to segments, cut at their timestamps: openai/whisper `transcribe.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from usmlite.audio import WINDOW_SECONDS
from usmlite.models.decoding import SECONDS_PER_TIMESTAMP


@dataclass(frozen=True)
class Piece:
    """Tokens between two timestamps.

    Attributes:
        start: seconds from the window's beginning.
        end: seconds from the window's beginning.
        tokens: with their timestamps.
    """

    start: float
    end: float
    tokens: tuple[int, ...]


def cut_at_timestamps(
    tokens: Sequence[int], timestamp_begin: int, min_advance: float
) -> tuple[list[Piece], float | None]:
    """Cuts a window's tokens at their timestamps.

    Args:
        tokens: what was decoded with timestamps.
        timestamp_begin: id of <|0.00|>.
        min_advance: where the next window would begin less than this many seconds after this one, the
            window is taken whole instead. openai/whisper has no such bound, and a model that emits
            0.02-second segments makes it decode 50 windows for a second of audio.

    Returns:
        The segments that are complete, and where the next window should begin, in seconds from the start
        of this one; None where this window is used up.
    """

    def seconds(token: int) -> float:
        return round((token - timestamp_begin) * SECONDS_PER_TIMESTAMP, 2)

    times = [token >= timestamp_begin for token in tokens]
    cuts = [index for index in range(1, len(tokens)) if times[index - 1] and times[index]]
    closed = times[-2:] == [False, True]
    if not cuts:
        given = [token for token, is_time in zip(tokens, times, strict=True) if is_time]
        end = seconds(given[-1]) if given and given[-1] != timestamp_begin else WINDOW_SECONDS
        begin = seconds(given[0]) if len(given) > 1 else 0.0
        return [Piece(begin, end, tuple(tokens))], None
    pieces = [
        Piece(seconds(tokens[first]), seconds(tokens[last - 1]), tuple(tokens[first:last]))
        for first, last in zip([0, *cuts], cuts, strict=False)
    ]
    rest = tuple(tokens[cuts[-1] :])
    begin = seconds(rest[0])
    if closed:
        pieces.append(Piece(begin, seconds(rest[-1]), rest))
    elif begin < min_advance:
        pieces.append(Piece(begin, WINDOW_SECONDS, rest))
    else:
        # The text after the last pair was cut off by the window: the next one hears it whole.
        return pieces, seconds(tokens[cuts[-1] - 1])
    return pieces, None
