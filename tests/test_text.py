"""The Whisper English normalizer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite.text import normalize

# What openai/whisper's own code (release 20250625) makes of them.
EXPECTED = [
    (
        "MISTER QUILTER IS THE APOSTLE OF THE MIDDLE CLASSES",
        "mister quilter is the apostle of the middle classes",
    ),
    (
        "Mr. Quilter is the apostle of the middle classes,",
        "mister quilter is the apostle of the middle classes",
    ),
    ("He's gone; she'll  come.", "he has gone she will come"),
    ("I can't, won't and ain't", "i can not will not and aint"),
    ("the colour of my favourite neighbour", "the color of my favorite neighbor"),
    ("um, twenty-one [laughs] (coughs) hmm", "21"),
    ("one oh one", "101"),
    ("ten thousand dollars", "$10000"),
    ("$20 million", "$20000000"),
    ("two and a half percent", "2.5%"),
    ("the nineteen sixties, the 274th", "the 1960s the 274th"),
    ("double oh seven", "007"),
    ("Zoë's café", "zoe is cafe"),
    ("'cause I said so", "cause i said so"),
    ("", ""),
    (" , ! ", ""),
    ("(music)", ""),
    ("and then...", "and then ."),
]


@pytest.mark.parametrize(("text", "expected"), EXPECTED)
def test_equals_openai(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_words_and_single_spaces(text: str) -> None:
    words = normalize(text)
    assert words == " ".join(words.split())


NUMBERS = ["one", "ten", "thirty", "million", "oh", "double", "point", "and", "half", "percent"]
SIGNS = ["$5", "3/4", "1.2.3", "-4", "20th", "'s", "½", "٣"]


@given(st.lists(st.sampled_from(NUMBERS + SIGNS), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_numbers(words: list[str]) -> None:
    normalize(" ".join(words))


@pytest.mark.parametrize(
    "text", ["one " * 6_000, "nine million " * 3_000, "so " + "1" * 6_000, "one point " * 3_000]
)
def test_a_model_that_loops_does_not_stop_the_evaluation(text: str) -> None:
    assert normalize(text)


def test_the_module_is_light() -> None:
    code = "import sys, usmlite.text; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
