from __future__ import annotations

import json

import pytest

from usmlite.formats import FORMATS, HIGHLIGHTED, to_json, to_srt, to_text, to_tsv, to_vtt
from usmlite.models import Word
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


SPOKEN = Transcript(
    text="Hello, R&D --> you.",
    segments=(
        Segment(1.0, 3.0, "Hello, R&D", (Word(" Hello,", 1.0, 1.5, 0.9), Word(" R&D", 2.0, 3.0, 0.8))),
        Segment(3.0, 4.0, "--> you.", (Word(" -->", 3.0, 3.5, 0.1), Word(" you.", 3.5, 4.0, 0.7))),
    ),
    duration=5.0,
    language="en",
)


def test_json_has_words_where_they_were_asked_for() -> None:
    first = json.loads(to_json(SPOKEN))["segments"][0]
    assert first["words"][0] == {"word": " Hello,", "start": 1.0, "end": 1.5, "probability": 0.9}


def test_tsv() -> None:
    assert to_tsv(TRANSCRIPT) == (
        "start\tend\ttext\n0\t2500\tHello.\n3661040\t3663000\tR&D says <b>wait</b> --> now\n"
    )
    tabs = Transcript("a\tb", (Segment(0, 1, "a\tb\nc"),), 1.0, "en")
    assert to_tsv(tabs).splitlines()[1] == "0\t1000\ta b c"
    assert to_tsv(SILENCE) == "start\tend\ttext\n"


def test_vtt_has_the_times_of_words() -> None:
    assert to_vtt(SPOKEN) == (
        "WEBVTT\n\n00:00:01.000 --> 00:00:03.000\n<00:00:01.000> Hello, <00:00:02.000> R&amp;D\n\n"
        "00:00:03.000 --> 00:00:04.000\n<00:00:03.000> -&gt; <00:00:03.500> you.\n\n"
    )


def test_words_are_underlined_while_they_are_spoken() -> None:
    assert HIGHLIGHTED["srt"](SPOKEN).split("\n\n")[:4] == [
        "1\n00:00:01,000 --> 00:00:01,500\n<u>Hello,</u> R&D",
        "2\n00:00:01,500 --> 00:00:02,000\nHello, R&D",
        "3\n00:00:02,000 --> 00:00:03,000\nHello, <u>R&D</u>",
        "4\n00:00:03,000 --> 00:00:03,500\n<u>-></u> you.",
    ]
    assert "\nHello, <u>R&amp;D</u>\n" in HIGHLIGHTED["vtt"](SPOKEN)
    assert HIGHLIGHTED["srt"](TRANSCRIPT) == to_srt(TRANSCRIPT)


@pytest.mark.parametrize("name", ["srt", "vtt"])
def test_a_cue_is_one_line_whatever_the_text(name: str) -> None:
    text = "one\n\ntwo\r\nthree"
    written = FORMATS[name](Transcript(text, (Segment(0, 1, text),), 1.0, "en"))
    assert "one two three\n\n" in written


def test_every_format_has_a_writer() -> None:
    assert list(FORMATS) == ["txt", "json", "srt", "vtt", "tsv"]
