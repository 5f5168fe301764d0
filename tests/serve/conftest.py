from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from usmlite.load import load
from usmlite.runtime import Recognizer

pytest.importorskip("fastapi", reason='pip install "usmlite[serve]"')
pytest.importorskip("openai", reason="pip install openai")

from serve.serving import Running
from usmlite.serve.limits import Limits

NARROW = Limits(
    upload_bytes=400_000, audio_seconds=5.0, requests=2, upload_seconds=1.0, request_seconds=2.0, live=1,
    live_seconds=3.0, live_idle_seconds=1.0,
)  # fmt: skip


@pytest.fixture(scope="session")
def recognizer(packed_model: Path) -> Recognizer:
    return load(packed_model)


@pytest.fixture(scope="session")
def server(recognizer: Recognizer) -> Iterator[Running]:
    """A server with room for everything."""
    running = Running(recognizer)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def narrow(recognizer: Recognizer) -> Iterator[Running]:
    """A server with narrow limits, and keys."""
    running = Running(recognizer, limits=NARROW, keys=("öffne dich", "secret"))
    yield running
    running.stop()
