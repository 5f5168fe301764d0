"""Transcripts as files: plain text, JSON, SubRip (SRT) and WebVTT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict

from usmlite.runtime import Segment, Transcript


def to_text(transcript: Transcript) -> str:
    """The text, one segment a line."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def to_json(transcript: Transcript) -> str:
    """An object with `text`, `language`, `duration` (seconds) and `segments` (`start`, `end`, `text`)."""
    return json.dumps(asdict(transcript), ensure_ascii=False, indent=2) + "\n"


def to_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues, times as `00:00:01,000 --> 00:00:02,500`."""
    return "".join(
        f"{number}\n{_times(segment, ',')}\n{_one_line(segment.text)}\n\n"
        for number, segment in enumerate(transcript.segments, start=1)
    )


def to_vtt(transcript: Transcript) -> str:
    """WebVTT: a header and cues, times as `00:00:01.000 --> 00:00:02.500`."""
    cues = (
        f"{_times(segment, '.')}\n{_escaped(_one_line(segment.text))}\n\n" for segment in transcript.segments
    )
    return "WEBVTT\n\n" + "".join(cues)


FORMATS: Mapping[str, Callable[[Transcript], str]] = {
    "txt": to_text,
    "json": to_json,
    "srt": to_srt,
    "vtt": to_vtt,
}
"""File name ending to writer."""


def _times(segment: Segment, separator: str) -> str:
    return f"{_clock(segment.start, separator)} --> {_clock(segment.end, separator)}"


def _clock(seconds: float, separator: str) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{separator}{milliseconds % 1000:03}"


def _one_line(text: str) -> str:
    # An empty line ends a cue in both formats, and an arrow starts its times.
    return " ".join(text.split()).replace("-->", "->")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
