"""Transcripts as files: plain text, JSON, SubRip (SRT), WebVTT and tab-separated values (TSV)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from usmlite.runtime import Segment, Transcript


def to_text(transcript: Transcript) -> str:
    """The text, one segment a line."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def to_json(transcript: Transcript) -> str:
    """An object with `text`, `language`, `duration` (seconds) and `segments`.

    Segments have `start`, `end`, `text` and, where they were asked for, `words`: `word`, `start`, `end`,
    `probability`.
    """
    plain: dict[str, Any] = asdict(transcript)
    for segment in plain["segments"]:
        if segment["words"] is None:
            del segment["words"]
    return json.dumps(plain, ensure_ascii=False, indent=2) + "\n"


def to_tsv(transcript: Transcript) -> str:
    """A header and one segment a line: start and end in whole milliseconds, and the text, between tabs."""
    rows = (
        f"{round(1000 * each.start)}\t{round(1000 * each.end)}\t{' '.join(each.text.split())}\n"
        for each in transcript.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


def to_srt(transcript: Transcript, *, highlight: bool = False) -> str:
    """SubRip: numbered cues, times as `00:00:01,000 --> 00:00:02,500`.

    Args:
        transcript: what to write.
        highlight: a cue for every word, which is underlined while it is spoken; needs words.
    """
    cues = (cue for each in transcript.segments for cue in _cues(each, highlight=highlight))
    return "".join(
        f"{number}\n{_times(start, end, ',')}\n{_marked(pieces, str)}\n\n"
        for number, (start, end, pieces) in enumerate(cues, start=1)
    )


def to_vtt(transcript: Transcript, *, highlight: bool = False) -> str:
    """WebVTT: a header and cues, times as `00:00:01.000 --> 00:00:02.500`.

    Where there are words, their times stand inside the cues (`<00:00:01.240>`): players that know `:past` and
    `:future` show them, the others show the text.

    Args:
        transcript: what to write.
        highlight: a cue for every word, which is underlined while it is spoken, instead.
    """
    out = ["WEBVTT\n\n"]
    for segment in transcript.segments:
        if segment.words and not highlight:
            inside = _one_line(
                "".join(
                    f" <{_clock(w.start, '.')}>{_escaped(w.word.replace('-->', '->'))}" for w in segment.words
                )
            )
            out.append(f"{_times(segment.start, segment.end, '.')}\n{inside}\n\n")
            continue
        for start, end, pieces in _cues(segment, highlight=highlight):
            out.append(f"{_times(start, end, '.')}\n{_marked(pieces, _escaped)}\n\n")
    return "".join(out)


FORMATS: Mapping[str, Callable[[Transcript], str]] = {
    "txt": to_text,
    "json": to_json,
    "srt": to_srt,
    "vtt": to_vtt,
    "tsv": to_tsv,
}
"""File name ending to writer."""


HIGHLIGHTED: Mapping[str, Callable[[Transcript], str]] = {
    "srt": partial(to_srt, highlight=True),
    "vtt": partial(to_vtt, highlight=True),
}
"""File name ending to writer, of those that can underline the word that is spoken."""


def _cues(segment: Segment, *, highlight: bool) -> Iterator[tuple[float, float, tuple[str, str, str]]]:
    """Start, end and text of cues: what is before the underlined word, the word, and what is after it."""
    if not (highlight and segment.words):
        yield segment.start, segment.end, (segment.text, "", "")
        return
    texts = [word.word for word in segment.words]
    shown = segment.start
    for index, word in enumerate(segment.words):
        if word.start > shown:
            yield shown, word.start, (segment.text, "", "")
        # The space before a word is not a part of it.
        spoken = word.word.lstrip()
        before = "".join(texts[:index]) + word.word[: len(word.word) - len(spoken)]
        yield word.start, word.end, (before, spoken, "".join(texts[index + 1 :]))
        shown = word.end


def _marked(pieces: tuple[str, str, str], escape: Callable[[str], str]) -> str:
    # An arrow starts a cue's times.
    before, spoken, after = (escape(piece.replace("-->", "->")) for piece in pieces)
    return _one_line(f"{before}<u>{spoken}</u>{after}" if spoken else before)


def _times(start: float, end: float, separator: str) -> str:
    return f"{_clock(start, separator)} --> {_clock(end, separator)}"


def _clock(seconds: float, separator: str) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{separator}{milliseconds % 1000:03}"


def _one_line(text: str) -> str:
    # An empty line ends a cue in both formats.
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
