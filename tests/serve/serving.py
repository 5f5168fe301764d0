"""A server inside the test's process, whose model can be made to wait."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openai
import soundfile

from usmlite.models.options import Options
from usmlite.runtime import Passage, Recognizer
from usmlite.serve.server import Server, configuration, listening
from usmlite.serve.service import Service, Settings

RATE = 16_000
GREEDY = Options(temperatures=(0.0,))


class Patient(Recognizer):
    """A recognizer that decodes nothing while its gate is closed, and counts what it decodes side by side."""

    gate: threading.Event
    steps: list[int]

    @classmethod
    def of(cls, recognizer: Recognizer) -> Patient:
        found = cls(
            recognizer.model, recognizer.adapter, name=recognizer.name, kind=recognizer.kind,
            weights_bytes=recognizer.weights_bytes,
        )  # fmt: skip
        found.gate = threading.Event()
        found.gate.set()
        found.steps = []
        return found

    def advance(self, passages: Sequence[Passage]) -> None:
        assert self.gate.wait(30)
        self.steps.append(len(passages))
        super().advance(passages)


class Running:
    """A server in a thread."""

    def __init__(self, recognizer: Recognizer, **settings: Any) -> None:
        self.model = Patient.of(recognizer)
        settings = {"name": "small", "options": GREEDY, **settings}
        self.service = Service(self.model, Settings(**settings))
        up = threading.Event()
        addresses: list[str] = []

        def ready(address: str) -> None:
            addresses.append(address)
            up.set()

        listener = listening("127.0.0.1", 0)
        self._server = Server(configuration(self.service), self.service, ready)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        assert up.wait(60)
        self.url = addresses[0]
        self.port = int(self.url.rpartition(":")[2])

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(self, file: Any, key: str = "none", **fields: Any) -> Any:
        """A transcription by OpenAI's client; a list of events where it is streamed."""
        with self.client(key) as client:
            found: Any = client.audio.transcriptions.create(model="small", file=file, **fields)
            return list(found) if fields.get("stream") is True else found

    def stop(self) -> None:
        self.model.gate.set()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for something to become true."""
    pause = threading.Event()
    for _ in range(round(seconds * 50)):
        if true():
            return
        pause.wait(0.02)
    raise AssertionError(f"it did not happen within {seconds} seconds")


def hum(seconds: float, seed: int = 0) -> np.ndarray:
    """Something to hear: float32 samples at 16 kHz."""
    time = np.arange(round(RATE * seconds)) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.02, len(time))
    return (0.2 * np.sin(2 * np.pi * (200 + 30 * seed) * time) + noise).astype(np.float32)


def coded(samples: np.ndarray, form: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=form, subtype=subtype)
    return file.getvalue()


def form(*parts: tuple[bytes, bytes], boundary: bytes = b"cut") -> bytes:
    """A form of headers and contents, as it goes over the wire."""
    body = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, head, content) for head, content in parts)
    return body + b"--%s--\r\n" % boundary


FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"'
FORM_TYPE = {"Content-Type": "multipart/form-data; boundary=cut"}
