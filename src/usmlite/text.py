"""Transcript normalization: what two texts go through before their words are compared.

The English normalizer of the Whisper paper (arXiv 2212.04356, appendix C): lower case, no punctuation,
contractions spelled out, numbers as digits, British spellings made American, fillers dropped. The
code is Transformers' copy of openai/whisper `normalizers/english.py`; the list of spellings, which
Transformers does not ship, is OpenAI's file, beside this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any, cast


def normalize(text: str) -> str:
    """Normalizes a transcript with the Whisper English normalizer.

    Args:
        text: a transcript, in any style.

    Returns:
        Lower-case words separated by one space; empty if nothing of the text counts as a word.
    """
    # OpenAI's code leaves a space at either end of some texts.
    return _normalized(text).strip()


def _normalized(text: str) -> str:
    try:
        return _normalizer()(text)
    except ValueError:
        # A number of more digits than Python converts (4300), as models that loop can write over a long
        # recording: one of them must not end the evaluation of a whole corpus.
        words = text.split()
        middle = len(words) // 2
        if not middle:
            return text.lower()
        return " ".join(_normalized(" ".join(half)) for half in (words[:middle], words[middle:]))


@cache
def _normalizer() -> Callable[[str], str]:
    # Transformers takes a second to import, which `usmlite --help` should not wait for.
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings = json.loads(resources.files("usmlite").joinpath("english_spellings.json").read_bytes())
    untyped = cast("Any", EnglishTextNormalizer)
    return cast("Callable[[str], str]", untyped(spellings))
