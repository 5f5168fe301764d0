from __future__ import annotations

import json

import pytest

from usmlite.formats import FORMATS, to_json, to_srt, to_text, to_vtt
from usmlite.runtime import Segment, Transcript

TRANSCRIPT = Transcript(
    text="Hello. R&D says <b>wait</b> --> now",
    segments=(Segment(0.0, 2.5, "Hello."), Segment(3661.04, 3662.9996, "R&D says <b>wait</b> --> now")),
    duration=3663.0,
    language="en",
)
SILENCE = Transcript("", (), 1.0, "en")


def test_text_has_one_segment_a_line() -> None:
    assert to_text(TRANSCRIPT) == "Hello.\nR&D says <b>wait</b> --> now\n"
    assert to_text(SILENCE) == ""


def test_json_holds_everything() -> None:
    found = json.loads(to_json(TRANSCRIPT))
    assert found == {
        "text": TRANSCRIPT.text,
        "segments": [
            {"start": 0.0, "end": 2.5, "text": "Hello."},
            {"start": 3661.04, "end": 3662.9996, "text": "R&D says <b>wait</b> --> now"},
        ],
        "duration": 3663.0,
        "language": "en",
    }
    assert "日本" in to_json(Transcript("日本", (), 1.0, "ja"))


def test_srt() -> None:
    assert to_srt(TRANSCRIPT) == (
        "1\n00:00:00,000 --> 00:00:02,500\nHello.\n\n"
        "2\n01:01:01,040 --> 01:01:03,000\nR&D says <b>wait</b> -> now\n\n"
    )
    assert to_srt(SILENCE) == ""


def test_vtt() -> None:
    assert to_vtt(TRANSCRIPT) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nHello.\n\n"
        "01:01:01.040 --> 01:01:03.000\nR&amp;D says &lt;b&gt;wait&lt;/b&gt; -&gt; now\n\n"
    )
    assert to_vtt(SILENCE) == "WEBVTT\n\n"


@pytest.mark.parametrize("name", ["srt", "vtt"])
def test_a_cue_is_one_line_whatever_the_text(name: str) -> None:
    text = "one\n\ntwo\r\nthree"
    written = FORMATS[name](Transcript(text, (Segment(0, 1, text),), 1.0, "en"))
    assert "one two three\n\n" in written


def test_every_format_has_a_writer() -> None:
    assert list(FORMATS) == ["txt", "json", "srt", "vtt", "tsv"]
