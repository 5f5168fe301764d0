"""What OpenAI's own client gets."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import numpy as np
import openai
import pytest

from serve.serving import GREEDY, Running, coded, hum
from usmlite.formats import to_srt, to_vtt
from usmlite.runtime import Recognizer

LONG = hum(38.0, 3)


def get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode(), answer.headers


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", None), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", "OPUS"), ("MP3", None)]
)
def test_every_format_of_audio(server: Running, form: str, subtype: str | None) -> None:
    found = server.ask(("a.bin", coded(hum(1.0), form, subtype)))
    assert found.usage.type == "duration"
    assert found.usage.seconds in (1, 2)  # lossy formats pad


def test_every_form_of_answer(server: Running, recognizer: Recognizer) -> None:
    file = coded(LONG, "WAV", "FLOAT")
    expected = recognizer.transcribe(LONG, GREEDY)
    timed = recognizer.transcribe(LONG, GREEDY, word_timestamps=True)
    assert len(expected.segments) > 1
    assert server.ask(file).text == expected.text
    assert server.ask(file, response_format="text") == f"{expected.text}\n"
    assert server.ask(file, response_format="srt") == to_srt(expected)
    assert server.ask(file, response_format="vtt") == to_vtt(expected)
    words = server.ask(file, response_format="vtt", timestamp_granularities=["word"])
    assert words == to_vtt(timed)
    found = server.ask(
        file, response_format="verbose_json", timestamp_granularities=["word", "segment"], temperature=0.0
    )
    assert (found.text, found.language, found.task) == (timed.text, "english", "transcribe")
    assert found.duration == pytest.approx(38.0)
    assert [(s.id, s.start, s.end, s.text) for s in found.segments] == [
        (number, s.start, s.end, s.text) for number, s in enumerate(timed.segments)
    ]
    spoken = [word for segment in timed.segments for word in segment.words or ()]
    assert [(w.word, w.start, w.end) for w in found.words] == [
        (w.word.strip(), w.start, w.end) for w in spoken
    ]
    assert spoken
    for segment in found.segments:
        assert segment.tokens
        assert segment.avg_logprob < 0
        assert segment.compression_ratio > 0
        assert 0 <= segment.no_speech_prob <= 1
        assert segment.seek <= 100 * segment.start + 1
    assert max(segment.seek for segment in found.segments) > 1000
    without = server.ask(file, response_format="verbose_json", timestamp_granularities=["word"])
    assert without.words == found.words
    assert without.segments is None


@pytest.mark.parametrize("form", ["json", "verbose_json"])
def test_results_as_they_come(server: Running, form: str) -> None:
    file = coded(LONG, "WAV", "FLOAT")
    whole = server.ask(file, response_format="verbose_json", timestamp_granularities=["word"])
    wanted: Any = {"timestamp_granularities": ["word"]} if form == "verbose_json" else {}
    events = server.ask(file, response_format=form, stream=True, **wanted)
    assert len(events) > 2  # a window at a time
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert events[-1].type == "transcript.text.done"
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == whole.text
    if form == "verbose_json":
        plain = [word for event in events[:-1] for word in event.words]
        assert plain == events[-1].words == [word.model_dump() for word in whole.words]


def test_silence_is_no_text(server: Running) -> None:
    found = server.ask(coded(np.zeros(16_000, np.float32)), response_format="verbose_json")
    assert (found.text, found.segments) == ("", [])
    assert server.ask(coded(np.zeros(16_000, np.float32)), stream=True)[-1].text == ""


def test_models(server: Running) -> None:
    with server.client() as client:
        assert [model.id for model in client.models.list()] == ["small"]
        assert client.models.retrieve("small").owned_by == "usmlite"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("../../etc/passwd")
        with pytest.raises(openai.NotFoundError, match="'small'") as caught:
            client.audio.transcriptions.create(model="gpt-4o", file=coded(hum(0.5)))
        assert caught.value.code == "model_not_found"
        # What clients are made for that know no other.
        assert client.audio.transcriptions.create(model="whisper-1", file=coded(hum(0.5))).text is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "xml"}, "response_format"),
        ({"temperature": 1.5}, "temperature"),
        ({"extra_body": {"temperature": "warm"}}, "temperature"),
        ({"language": "de"}, None),
        ({"language": "../en"}, None),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"response_format": "verbose_json", "timestamp_granularities": ["hour"]}, "timestamp_granularities"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"include": ["logprobs"]}, "include"),
        ({"stream": True, "response_format": "srt"}, "stream"),
        ({"extra_body": {"stream": "perhaps"}}, "stream"),
        ({"chunking_strategy": {"type": "server_vad"}}, "chunking_strategy"),
    ],
)
def test_wrong_values_are_named(server: Running, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        server.ask(coded(hum(0.5)), **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_and_a_temperature_are_heeded(server: Running, recognizer: Recognizer) -> None:
    file = coded(hum(2.0), "WAV", "FLOAT")
    told = recognizer.transcribe(hum(2.0), GREEDY, initial_prompt="Tintoretto", temperatures=(0.9,)).text
    assert server.ask(file, prompt="Tintoretto", temperature=0.9, language="en").text == told
    assert server.ask(file, temperature=0.9).text != told


def test_a_model_of_one_language_translates_nothing(server: Running) -> None:
    with server.client() as client, pytest.raises(openai.UnprocessableEntityError, match="one language"):
        client.post(
            "/audio/translations", cast_to=object, files={"file": coded(hum(0.5))}, body={},
            options={"headers": {"Content-Type": "multipart/form-data"}},
        )  # fmt: skip


def test_what_is_open_to_everybody(narrow: Running) -> None:
    health = json.loads(get(f"{narrow.url}/health")[0])
    assert (health["status"], health["model"], health["needs_key"]) == ("ok", "small", True)
    assert health["memory_bytes"] > 50e6
    page, headers = get(f"{narrow.url}/")
    assert "<html" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    figures, _ = get(f"{narrow.url}/metrics")
    assert "usmlite_requests_in_work 0.0" in figures
    paths = json.loads(get(f"{narrow.url}/openapi.json")[0])["paths"]
    assert "multipart/form-data" in paths["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]


def test_keys(narrow: Running) -> None:
    for key in ("none", "secre", "secret2", "SECRET"):
        with pytest.raises(openai.AuthenticationError, match="valid API key") as caught:
            narrow.ask(coded(hum(0.5)), key=key)
        assert caught.value.code == "invalid_api_key"
    assert narrow.ask(coded(hum(0.5)), key="secret").text is not None
    for path in ("models", "models/small"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{narrow.url}/v1/{path}")


def test_figures_count(server: Running) -> None:
    server.ask(coded(hum(0.5)))
    figures, _ = get(f"{server.url}/metrics")
    line = next(
        line for line in figures.splitlines()
        if line.startswith('usmlite_requests_total{endpoint="/v1/audio/transcriptions",status="200"}')
    )  # fmt: skip
    assert float(line.split()[-1]) >= 1
    assert "etc/passwd" not in figures
