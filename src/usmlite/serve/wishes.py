"""What a request asks for: the fields of OpenAI's audio API, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from usmlite.models import Options
from usmlite.models.options import FALLBACK_TEMPERATURES
from usmlite.serve.errors import ApiError, invalid

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
GRANULARITIES = ("segment", "word")
_ALIAS = "whisper-1"  # what clients send that know no other model
_LONGEST_TEXT = 4_000  # characters of a prompt; more than 224 tokens are never told anyway
# They would change the answer, and nothing here can do it.
_UNKNOWN = ("include", "known_speaker_names", "known_speaker_references")

Fields = dict[str, list[str]]


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        format: one of FORMATS.
        options: for the model.
        segments: whether verbose_json has segments.
        words: whether it has words.
        stream: whether results are sent as they come.
    """

    format: str
    options: Options
    segments: bool = True
    words: bool = False
    stream: bool = False


def parse_wish(fields: Fields, task: str, model: str, defaults: Options) -> Wish:
    """Reads a form's fields.

    Args:
        fields: by name; fields that nobody knows are left alone, as the OpenAI API does.
        task: "transcribe" or "translate".
        model: the name of the model that is served.
        defaults: what the server was started with.

    Raises:
        ApiError: 404 another model, 422 a wrong value.
    """
    given = _one(fields, "model")
    if given not in (None, "", model, _ALIAS):
        raise ApiError(
            404,
            f"The model {given[:100]!r} does not exist here; this server has {model!r}.",
            code="model_not_found",
            param="model",
        )
    for name in _UNKNOWN:
        if name in fields or f"{name}[]" in fields:
            raise invalid(f"{name} is not supported.", name, "unsupported_parameter")
    # An object comes as fields of its own: "chunking_strategy[type]".
    detailed = any(name.startswith("chunking_strategy[") for name in fields)
    if detailed or (_one(fields, "chunking_strategy") or "auto") != "auto":
        raise invalid("chunking_strategy can only be 'auto'.", "chunking_strategy", "unsupported_parameter")
    form = _choice(fields, "response_format", FORMATS) or "json"
    granularities = _granularities(fields, form)
    stream = (_choice(fields, "stream", ("true", "false", "1", "0")) or "false") in ("true", "1")
    if stream and form in ("srt", "vtt"):
        raise invalid("Subtitles cannot be streamed; ask for verbose_json.", "stream", "invalid_value")
    words = "word" in granularities
    options = replace(
        defaults,
        task=task,
        timestamps=True,
        word_timestamps=words,
        language=(_one(fields, "language") or None) if task == "transcribe" else None,
        initial_prompt=_told(fields, "prompt") or defaults.initial_prompt,
        hotwords=", ".join(fields.get("keywords[]", fields.get("keywords", []))) or defaults.hotwords,
        temperatures=_temperatures(fields, defaults),
    )
    return Wish(form, options, "segment" in granularities or not words, words, stream)


def _one(fields: Fields, name: str) -> str | None:
    values = fields.get(name, [])
    if len(values) > 1:
        raise invalid(f"{name} is given more than once.", name, "invalid_value")
    return values[0].strip() if values else None


def _choice(fields: Fields, name: str, known: tuple[str, ...]) -> str | None:
    value = (_one(fields, name) or "").lower() or None
    if value is not None and value not in known:
        raise invalid(
            f"{name} must be one of {', '.join(known)}, not {value[:100]!r}.", name, "invalid_value"
        )
    return value


def _told(fields: Fields, name: str) -> str | None:
    value = _one(fields, name)
    if value is not None and len(value) > _LONGEST_TEXT:
        raise invalid(f"{name} has more than {_LONGEST_TEXT} characters.", name, "invalid_value")
    return value


def _granularities(fields: Fields, form: str) -> set[str]:
    name = "timestamp_granularities"
    values = [value.strip() for value in fields.get(f"{name}[]", []) + fields.get(name, [])]
    for value in values:
        if value not in GRANULARITIES:
            raise invalid(f"{name} must be segment or word, not {value[:100]!r}.", name, "invalid_value")
    if values and form not in ("verbose_json", "vtt"):
        raise invalid(f"{name} needs response_format verbose_json (or vtt).", name, "invalid_value")
    return set(values)


def _temperatures(fields: Fields, defaults: Options) -> tuple[float, ...]:
    value = _one(fields, "temperature")
    if not value:
        return defaults.temperatures
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise invalid("temperature must be a number from 0 to 1.", "temperature", "invalid_value")
    # As the OpenAI API has it: 0 lets the temperature rise where a text is not trusted.
    return FALLBACK_TEMPERATURES if number == 0 and len(defaults.temperatures) > 1 else (number,)
