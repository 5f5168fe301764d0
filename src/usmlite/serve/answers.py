"""Transcripts in the shapes of OpenAI's audio API."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from usmlite.formats import to_srt, to_vtt
from usmlite.models import Word
from usmlite.models.fallback import compression_ratio
from usmlite.runtime import Heard, Passage
from usmlite.serve.wishes import Wish

Tokens = Callable[[str], list[int]]
"""A text's token ids."""


def answer(passage: Passage, wish: Wish, tokens: Tokens) -> Response:
    """The whole answer of a request that is not streamed."""
    transcript = passage.transcript()
    if wish.format == "json":
        return JSONResponse({"text": transcript.text, "usage": usage(passage)})
    if wish.format == "verbose_json":
        return JSONResponse(verbose(passage, wish, tokens))
    if wish.format == "srt":
        return PlainTextResponse(to_srt(transcript), media_type="application/x-subrip")
    if wish.format == "vtt":
        return PlainTextResponse(to_vtt(transcript), media_type="text/vtt")
    return PlainTextResponse(f"{transcript.text}\n")


def usage(passage: Passage) -> dict[str, Any]:
    """Whole seconds of audio, as OpenAI counts them."""
    return {"type": "duration", "seconds": math.ceil(passage.seconds)}


def verbose(passage: Passage, wish: Wish, tokens: Tokens) -> dict[str, Any]:
    """The object of verbose_json; `probability` of words is our own."""
    transcript = passage.transcript()
    language = "en" if wish.options.task == "translate" else transcript.language
    found: dict[str, Any] = {
        "task": wish.options.task,
        "language": LANGUAGES.get(language, language),
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "usage": usage(passage),
    }
    if wish.segments:
        found["segments"] = segments(passage.heard, tokens)
    if wish.words:
        found["words"] = [word for heard in passage.heard for word in words(heard.segment.words)]
    return found


def segments(heard: Sequence[Heard], tokens: Tokens, *, first: int = 0) -> list[dict[str, Any]]:
    """Segments with the window's figures that OpenAI's have.

    Args:
        heard: in order.
        tokens: of a text.
        first: the number of the first one.
    """
    return [
        {
            "id": first + number,
            "seek": round(100 * each.offset),  # in frames of 10 ms
            "start": each.segment.start,
            "end": each.segment.end,
            "text": each.segment.text,
            "tokens": tokens(each.segment.text),
            "temperature": each.window.temperature,
            "avg_logprob": _finite(each.window.mean_logprob),
            "compression_ratio": compression_ratio(each.window.text) if each.window.text else 0.0,
            "no_speech_prob": _finite(each.window.no_speech),
        }
        for number, each in enumerate(heard)
    ]


def words(given: Sequence[Word] | None) -> list[dict[str, Any]]:
    """Words without the space before them."""
    return [
        {
            "word": word.word.strip(),
            "start": word.start,
            "end": word.end,
            "probability": round(word.probability, 4),
        }
        for word in given or ()
    ]


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def delta(heard: Sequence[Heard], wish: Wish, tokens: Tokens, *, first: int) -> str:
    """The event of new segments; with verbose_json it has them too, which is our own.

    Args:
        heard: what is new.
        wish: what was asked for.
        tokens: of a text.
        first: how many segments there were before.
    """
    text = " ".join(each.segment.text for each in heard)
    content: dict[str, Any] = {"type": "transcript.text.delta", "delta": text if not first else f" {text}"}
    if wish.format == "verbose_json":
        content["segments"] = segments(heard, tokens, first=first)
        if wish.words:
            content["words"] = [word for each in heard for word in words(each.segment.words)]
    return event(content)


def done(passage: Passage, wish: Wish, tokens: Tokens) -> str:
    """The last event."""
    content: dict[str, Any] = {"type": "transcript.text.done", "text": passage.transcript().text}
    if wish.format == "verbose_json":
        content |= verbose(passage, wish, tokens)
    return event(content)


def _finite(number: float) -> float:
    # JSON has no NaN and no infinity.
    return round(number, 6) if math.isfinite(number) else 0.0
