"""SIGTERM: whatever was accepted is answered."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from websockets.sync.client import connect

from serve.serving import coded, hum, until
from usmlite.cli import main
from usmlite.cli.serve import API_KEY

COUNT = 10


@contextmanager
def started(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "usmlite", "serve", str(model), "--port", "0",
         "--temperature-increment-on-fallback", "none"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, API_KEY: "k"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving models"), line
        yield process, line.split(" on ")[1].split()[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_none_is_lost(packed_model: Path) -> None:
    with started(packed_model) as (process, address):
        # Some minutes of audio together: more than is decoded before the signal.
        file = coded(hum(58.0), "FLAC")
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0)
        key = {"Authorization": "Bearer k"}
        with connect(f"{address.replace('http', 'ws')}/v1/audio/live", additional_headers=key) as live:
            live.send((hum(1.5) * 32767).astype("<i2").tobytes())
            with ThreadPoolExecutor(COUNT) as pool:
                answers = [
                    pool.submit(client.audio.transcriptions.create, model="whisper-1", file=file)
                    for _ in range(COUNT)
                ]

                def accepted() -> bool:
                    health = httpx2.get(f"{address}/health").json()
                    return bool(health["requests"] + sum(answer.done() for answer in answers) == COUNT)

                until(accepted, 60)
                assert not all(answer.done() for answer in answers)
                process.send_signal(signal.SIGTERM)
                assert len({answer.result().text for answer in answers}) == 1
            messages = [json.loads(message) for message in live]
        assert messages[-1]["type"] == "done"
        assert messages[-1]["seconds"] == 1.5
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in complaints


def test_a_port_that_is_taken(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(packed_model), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: cannot listen there" in capsys.readouterr().err


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("usmlite.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert 'pip install "usmlite[serve]"' in capsys.readouterr().err


def test_keys_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n\n")
    for name in ("keys", "none"):
        assert main(["serve", "--api-key-file", str(tmp_path / name)]) == 2
        assert str(tmp_path / name) in capsys.readouterr().err
