"""Live audio over a WebSocket."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from serve.serving import GREEDY, Running, hum, until
from usmlite.runtime import Recognizer

KEY = {"Authorization": "Bearer secret"}


def sixteen_bits(samples: np.ndarray) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def opened(running: Running, query: str = "", **more: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{running.port}/v1/audio/live{query}", **more)


def rest(connection: ClientConnection) -> list[dict[str, Any]]:
    """All messages until the other side closes."""
    found = []
    try:
        while True:
            found.append(json.loads(connection.recv(timeout=30)))
    except ConnectionClosed:
        return found


def refused(connection: ClientConnection) -> dict[str, Any]:
    found = rest(connection)
    assert found[-1]["type"] == "error"
    error: dict[str, Any] = found[-1]["error"]
    return error


def test_text_comes_while_audio_does(server: Running, recognizer: Recognizer) -> None:
    sound = hum(3.5)
    data = sixteen_bits(sound)
    heard = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    with opened(server) as connection:
        connection.send(data[:32_000])
        first = json.loads(connection.recv(timeout=30))
        assert (first["type"], first["seconds"]) == ("update", 1.0)
        connection.send(data[32_000:])
        connection.send('{"type": "end"}')
        found = [first, *rest(connection)]
    expected = list(recognizer.stream([heard[:16_000], heard[16_000:]], GREEDY))
    assert [u["final"] for u in found[:-1]] == [u.final for u in expected]
    assert [u["partial"] for u in found[:-1]] == [u.partial for u in expected]
    assert found[-1]["type"] == "done"
    assert found[-1]["text"] == "".join(update["final"] for update in found[:-1]).strip() != ""
    assert found[-1]["seconds"] == 3.5
    words = [word for update in found[:-1] for word in update["words"]]
    assert [word["start"] for word in words] == sorted(word["start"] for word in words)
    assert server.service.live == set()


def test_another_rate(server: Running) -> None:
    with opened(server, "?sample_rate=48000&every=0.5") as connection:
        connection.send(sixteen_bits(np.repeat(hum(1.0), 3)))
        connection.send('{"type": "end"}')
        assert rest(connection)[-1]["seconds"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "query",
    ["?sample_rate=1", "?sample_rate=nan", "?every=0", "?task=sing", "?language=de", "?task=translate"],
)
def test_wrong_wishes(server: Running, query: str) -> None:
    with opened(server, query) as connection:
        assert refused(connection)["type"] == "invalid_request_error"


@pytest.mark.parametrize("message", [b"\x00\x01\x02", "hello", '{"type": ["end"]}', "[" * 2_000])
def test_wrong_messages(server: Running, message: str | bytes) -> None:
    with opened(server) as connection:
        connection.send(message)
        assert refused(connection)["code"] == "invalid_message"
    until(lambda: server.service.admission.live == 0)


def test_a_key(narrow: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with opened(narrow, additional_headers=headers) as connection:
            if not headers:
                connection.send('{"type": "authorize", "key": "wrong"}')
            assert refused(connection)["code"] == "invalid_api_key"
        until(lambda: narrow.service.admission.live == 0)
    with opened(narrow) as connection:
        connection.send('{"type": "authorize", "key": "öffne dich"}')
        connection.send('{"type": "end"}')
        assert rest(connection)[-1]["type"] == "done"


def test_other_sites_are_turned_away(server: Running) -> None:
    with opened(server, origin="https://elsewhere.example") as connection:
        assert refused(connection)["code"] == "origin_not_allowed"
    with opened(server, origin=server.url) as connection:
        connection.send('{"type": "end"}')
        assert rest(connection)[-1]["type"] == "done"


def test_bounds(narrow: Running) -> None:
    with opened(narrow, additional_headers=KEY) as connection:
        until(lambda: narrow.service.admission.live == 1)
        with opened(narrow, additional_headers=KEY) as second:
            assert refused(second)["code"] == "server_busy"
        assert refused(connection)["code"] == "idle"
    until(lambda: narrow.service.admission.live == 0)
    with opened(narrow, additional_headers=KEY) as connection:
        connection.send(sixteen_bits(hum(3.5)))
        assert refused(connection)["code"] == "audio_too_long"
    until(lambda: narrow.service.admission.live == 0)


def test_a_client_that_leaves(server: Running) -> None:
    with opened(server) as connection:
        connection.send(sixteen_bits(hum(2.0)))
    until(lambda: server.service.admission.live == 0)
