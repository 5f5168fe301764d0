"""Prefix beam search for CTC, with a word n-gram language model and hotwords: another package's work.

The search is that of pyctcdecode (Hannun et al., arXiv 1408.2873, with shallow fusion), in C++ with KenLM, as
the package `ctc-beam-decoder` has it; `pyctcdecode`, whose interface it has, serves where that is what is
installed. docs/decisions/0027 says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from usmlite.errors import ModelError
from usmlite.models.options import Options

BEAMS = 64
"""Texts followed side by side where a language model or hotwords are given, and no number."""
_PACKAGES = ("ctc_beam_decoder", "pyctcdecode")
_PRIVATE = 0xE000  # characters of Unicode's private use area stand for what no text has


def searches(options: Options) -> bool:
    """Whether the likeliest label of each frame is not enough for what is asked for."""
    return options.beam_size > 1 or options.language_model is not None or bool(_words(options.hotwords))


def search(logprobs: np.ndarray, labels: tuple[str, ...], options: Options) -> str:
    """The likeliest text of one recording.

    Args:
        logprobs: of the labels, natural logarithms, float32 `[frames, labels]`.
        labels: what each writes, see `written_labels`.
        options: beams, language model and its weight, hotwords as the labels write them.

    Raises:
        ModelError: no package is installed that searches, or the language model cannot be read.
    """
    found = _decoder(labels, options.language_model, options.lm_weight, options.lm_bonus)
    beams = options.beam_size if options.beam_size > 1 else BEAMS
    return str(found.decode(logprobs, beam_width=beams, hotwords=_words(options.hotwords) or None))


def written_labels(
    tokens: Sequence[str], blank: int, delimiter: str | None, special: Sequence[str]
) -> tuple[str, ...]:
    """Labels as the search takes them: "" for the blank, " " for the delimiter of words.

    Args:
        tokens: of the tokenizer, by label.
        blank: its label.
        delimiter: the token between words; None where pieces begin with a mark.
        special: tokens that no text gets.
    """
    labels = []
    for label, token in enumerate(tokens):
        if label == blank:
            labels.append("")
        elif token == delimiter:
            labels.append(" ")
        elif token in special:
            labels.append(chr(_PRIVATE + label))
        else:
            labels.append(token)
    return tuple(labels)


def _words(hotwords: str | None) -> list[str]:
    return (hotwords or "").replace(",", " ").split()


@lru_cache(maxsize=2)
def _decoder(labels: tuple[str, ...], model: str | None, weight: float, bonus: float) -> Any:
    package = _package()
    if model is not None and not Path(model).is_file():
        raise ModelError(
            "no such language model", where=model, expected="an ARPA file or a binary one of KenLM"
        )
    try:
        return package.build_ctcdecoder(list(labels), model, alpha=weight, beta=bonus)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(
            "the language model cannot be read" if model else "the labels cannot be searched",
            where=model or "tokenizer",
            expected="an ARPA file or a binary one of KenLM" if model else None,
            found=(str(error) or type(error).__name__).splitlines()[0],
        ) from error


def _package() -> Any:
    for name in _PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ModelError(
        "searching for texts of a CTC model needs a package that is not installed", where="beam search",
        remedy='Install it: pip install "usmlite[lm]". Or leave out beams, language model and hotwords.',
    )  # fmt: skip
