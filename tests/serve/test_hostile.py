"""What a server does with uploads that are wrong, huge, slow or meant to do harm: it says so, and goes on."""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from serve.serving import FILE, FORM_TYPE, Running, coded, form, hum, until

SOUND = coded(hum(0.5))
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(autouse=True)
def nothing_is_held(narrow: Running) -> Iterator[None]:
    yield
    until(lambda: narrow.service.admission.requests == 0)
    assert narrow.service.admission._bytes == narrow.service.admission._seconds == 0


@pytest.fixture(autouse=True, scope="module")
def it_goes_on(narrow: Running) -> Iterator[None]:
    yield
    assert narrow.ask(SOUND, key="secret").usage.seconds == 1
    assert narrow.service.decoders.broken == 0


def post(running: Running, content: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and error of a request."""
    answer = httpx2.post(
        f"{running.url}/v1/audio/transcriptions",
        content=content,
        headers={**KEY, **FORM_TYPE, **(headers or {})},
        timeout=30,
    )
    found: dict[str, Any] = answer.json()
    if answer.status_code >= 400:
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        for place in (str(Path.cwd()), tempfile.gettempdir(), "BytesIO", "Traceback"):
            assert place not in found["error"]["message"]
    return answer.status_code, found.get("error", found)


def bomb(kind: str) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(10_000_000))
    riff = bytearray(SOUND)
    return {
        "nothing": b"",
        "noise": np.random.default_rng(0).bytes(5_000),
        "archive": file.getvalue(),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "page": b"<html><script>alert(1)</script></html>",
        "list": b"#EXTM3U\nfile:///etc/passwd\n",
        "head only": SOUND[:20],
        "cut short": coded(hum(2.0), "FLAC")[:9_000],
        "too short": coded(hum(0.05)),
        "not a number": coded(np.full(16_000, np.nan, np.float32), "WAV", "FLOAT"),
        "mad rate": bytes(riff[:24]) + struct.pack("<I", 4_000_000_000) + bytes(riff[28:]),
        "too long": coded(hum(6.0), "FLAC"),
        # 400 times as long as it is large, of zeros.
        "flac bomb": coded(np.zeros(3_600 * 16_000, np.float32), "FLAC"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("nothing", 422), ("noise", 415), ("archive", 415), ("picture", 415), ("page", 415), ("list", 415),
        ("head only", 415), ("cut short", 422), ("too short", 422), ("not a number", 422), ("mad rate", 415),
        ("too long", 413), ("flac bomb", 413),
    ],
)  # fmt: skip
def test_bad_audio(narrow: Running, kind: str, status: int) -> None:
    found, error = post(narrow, form((FILE, bomb(kind))))
    assert found == status, error
    assert error["param"] == "file"


def test_a_header_that_claims_hours_is_not_believed(narrow: Running) -> None:
    claims = bytearray(coded(hum(0.5)))
    claims[40:44] = struct.pack("<I", 2**31)
    status, error = post(narrow, form((FILE, bytes(claims))))
    assert status in (200, 413, 422), error
    assert narrow.service.decoders.broken == 0


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd", "/etc/passwd", "a\0b.wav", "%00%2e%2e%2f", "{{7*7}}.wav", "$(touch hacked)",
        "C:\\\\windows\\\\x.wav", "x" * 3_000,
    ],
)  # fmt: skip
def test_names_reach_no_file(
    narrow: Running, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open

    def watched(path: Any, *rest: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", watched)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    head = b'Content-Disposition: form-data; name="file"; filename="' + name.encode() + b'"'
    status, _ = post(narrow, form((head, SOUND), (b'Content-Disposition: form-data; name="../x"', b"1")))
    assert status == 200
    assert opened == []
    assert list(tmp_path.iterdir()) == []


def text(name: str, value: bytes) -> tuple[bytes, bytes]:
    return f'Content-Disposition: form-data; name="{name}"'.encode(), value


DAMAGED = {
    "no file": (form(text("model", b"small")), 422),
    "no name": (form((b"X-A: 1", b"2"), (FILE, SOUND)), 422),
    "two files": (form((FILE, SOUND), (FILE, SOUND)), 422),
    "two models": (form((FILE, SOUND), text("model", b"small"), text("model", b"small")), 422),
    "a large field": (form((FILE, SOUND), text("prompt", b"x" * 70_000)), 422),
    "many parts": (form(*[text(f"a{n}", b"") for n in range(100)], (FILE, SOUND)), 422),
    "not UTF-8": (form((FILE, SOUND), text("prompt", b"\xff\xfe\x80")), 422),
    "cut off": (form((FILE, SOUND))[:-8], 422),
    "another boundary": (form((FILE, SOUND), boundary=b"other"), 422),
    "binary headers": (form((FILE + b"\r\n\x00\xff\x01: \x80", SOUND)), 422),
    "a large header": (form((FILE + b"\r\nX-A: " + b"x" * 100_000, SOUND)), 422),
    "nothing": (b"", 422),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_forms(narrow: Running, kind: str) -> None:
    content, status = DAMAGED[kind]
    found, error = post(narrow, content)
    assert found == status, error


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "multipart/form-data"}, 422),
        ({"Content-Type": "multipart/form-data; boundary=" + "x" * 5_000}, 422),
        ({"Content-Type": "multipart/form-data; charset=../../etc/passwd; boundary=cut"}, 200),
        ({"Content-Encoding": "gzip"}, 415),
        ({"X-Forwarded-For": "127.0.0.1", "X-Original-URL": "/etc/passwd", "Range": "bytes=0-"}, 200),
    ],
)
def test_headers(narrow: Running, headers: dict[str, str], status: int) -> None:
    found, error = post(narrow, form((FILE, SOUND)), headers)
    assert found == status, error


def test_huge_uploads_are_refused_and_can_read_why(narrow: Running) -> None:
    huge = form((FILE, bytes(1_500_000)))
    assert post(narrow, huge)[0] == 413  # by its length

    def chunks() -> Iterator[bytes]:
        for low in range(0, len(huge), 50_000):
            yield huge[low : low + 50_000]

    status, error = post(narrow, chunks())  # no length
    assert (status, error["code"]) == (413, "request_too_large")
    assert post(narrow, huge, {"Authorization": "Bearer wrong"})[0] == 401


def raw(running: Running, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    connection.sendall(data)
    return connection


def head(length: int, *more: bytes) -> bytes:
    lines = (
        b"POST /v1/audio/transcriptions HTTP/1.1", b"Host: x", b"Authorization: Bearer secret",
        b"Content-Type: multipart/form-data; boundary=cut", b"Content-Length: %d" % length, *more, b"", b"",
    )  # fmt: skip
    return b"\r\n".join(lines)


def test_a_slow_upload_is_given_up(narrow: Running) -> None:
    body = form((FILE, SOUND))
    start = time.monotonic()
    with raw(narrow, head(len(body)) + body[:100]) as connection:
        # Its second request may come in between, as long as there is a place.
        assert narrow.ask(SOUND, key="secret").text is not None
        answer = connection.makefile("rb").readline()
    assert b"408" in answer
    assert 0.9 < time.monotonic() - start < 15


def test_a_client_that_leaves_in_the_middle_is_forgotten(narrow: Running) -> None:
    body = form((FILE, SOUND))
    for _ in range(5):
        raw(narrow, head(len(body)) + body[:1000]).close()
        until(lambda: narrow.service.admission.requests == 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\xfe\x80" * 100,
        b"GET / HTTP/1.1\r\n\xff\x00: \x80\r\n\r\n",
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_requests_that_are_no_http(narrow: Running, data: bytes) -> None:
    with raw(narrow, data) as connection:
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("path", ["/..%2f..%2fetc/passwd", "/page.html", "/docs", "/static/../cli.py", "//x"])
def test_there_are_no_other_files(narrow: Running, path: str) -> None:
    answer = httpx2.get(f"{narrow.url}{path}")
    assert answer.status_code == 404
    assert json.loads(answer.text)["error"]["type"] == "invalid_request_error"
    assert httpx2.get(f"{narrow.url}/v1/audio/transcriptions").status_code == 405
