"""Live audio over a WebSocket: 16-bit samples in, partial and final text out.

A client sends binary messages of little-endian 16-bit mono samples, at 16 kHz or at the `sample_rate` of the
address, and `{"type": "end"}` at the end. It gets, as JSON:

    {"type": "update", "final": " text that stays", "partial": " text that may change",
     "seconds": 3.2, "words": [{"word", "start", "end", "probability"}]}      words of "final"
    {"type": "done", "text": "all that became final", "seconds": 12.0}        then the connection closes
    {"type": "error", "error": {"message", "type", "param", "code"}}          then the connection closes
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import soxr
from starlette.websockets import WebSocket, WebSocketDisconnect

from usmlite.audio import SAMPLE_RATE
from usmlite.errors import UsmliteError
from usmlite.models import Options, TimedText
from usmlite.serve.answers import words
from usmlite.serve.batching import Batcher
from usmlite.serve.errors import ApiError, internal, invalid, of_model
from usmlite.serve.limits import Limits
from usmlite.streaming import Update, agreeing

RATES = (8_000, 96_000)  # Hz
_AHEAD_SECONDS = 60.0  # of audio that may wait for the model; then the client is kept waiting
MOST_MESSAGE = 2**20  # bytes
_POLL_SECONDS = 0.05


class LiveSession:
    """One client's live audio.

    Args:
        socket: accepted.
        batcher: hears windows.
        options: what is asked for.
        limits: how much audio, and how long nothing may come.
        rate: of the client's samples, in Hz.
        every: seconds of new audio after which the text is made again.
        shortest: seconds without which the model cannot hear.
    """

    def __init__(
        self,
        socket: WebSocket,
        batcher: Batcher,
        options: Options,
        limits: Limits,
        *,
        rate: int = SAMPLE_RATE,
        every: float = 1.0,
        shortest: float = 0.0,
    ) -> None:
        self._socket = socket
        self._batcher = batcher
        self._options = options
        self._limits = limits
        self._every = every
        self._shortest = shortest
        self._audio = _Audio(rate)
        self._updates: asyncio.Queue[Update | BaseException | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.seconds = 0.0

    def stop(self) -> None:
        """Lets the session end with what was said so far."""
        self._stop.set()

    async def run(self) -> None:
        """Serves the client until it or somebody else ends it; the socket is left to be closed.

        Raises:
            ApiError: the client did something wrong, or too much.
            WebSocketDisconnect: it left.
        """
        thread = threading.Thread(target=self._listen, name="live", daemon=True)
        thread.start()
        receiving = asyncio.create_task(self._receive())
        sending = asyncio.create_task(self._send())
        try:
            await asyncio.wait((receiving, sending), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                problem = receiving.exception()
                if problem is not None:
                    raise problem
                await sending
            else:
                await sending
        finally:
            self._audio.end()
            for task in (receiving, sending):
                task.cancel()
            await asyncio.gather(receiving, sending, return_exceptions=True)

    def _listen(self) -> None:
        """In a thread of its own: `agreeing` asks for audio when it wants some."""
        try:
            for update in agreeing(self._hear, self._audio, every=self._every, shortest=self._shortest):
                self._tell(update)
            self._tell(None)
        except BaseException as error:
            self._tell(error)

    def _tell(self, what: Update | BaseException | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._updates.put_nowait, what)

    def _hear(self, samples: np.ndarray, said: str) -> Sequence[TimedText]:
        heard = self._batcher.hear(samples, self._options, said)
        return [TimedText(h.segment.start, h.segment.end, h.segment.text, h.segment.words) for h in heard]

    async def _receive(self) -> None:
        """Takes audio until the client, or the server, says that it is over."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while True:
                message = asyncio.create_task(self._socket.receive())
                await asyncio.wait(
                    (message, stopping),
                    timeout=self._limits.live_idle_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not message.done():
                    message.cancel()
                    if stopping.done():
                        break
                    raise ApiError(408, "No audio has come for too long.", code="idle")
                if not await self._take(message.result()):
                    break
        finally:
            stopping.cancel()
            self._audio.end()

    async def _take(self, message: Any) -> bool:
        """Whether more is expected after a message."""
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        data = message.get("bytes")
        if data is None:
            if _command(message.get("text")) == "end":
                return False
            raise invalid('Messages are binary, or {"type": "end"}.', code="invalid_message")
        if len(data) % 2 or len(data) > MOST_MESSAGE:
            raise invalid(
                f"Audio comes in whole 16-bit samples, at most {MOST_MESSAGE} bytes at once.",
                code="invalid_message",
            )
        while self._audio.waiting > _AHEAD_SECONDS:
            await asyncio.sleep(_POLL_SECONDS)
        self.seconds = self._audio.put(data)
        if self.seconds > self._limits.live_seconds:
            raise ApiError(413, "The session has had all the audio that it may have.", code="audio_too_long")
        return True

    async def _send(self) -> None:
        text = ""
        seconds = 0.0
        while True:
            update = await self._updates.get()
            if update is None:
                await self._socket.send_json({"type": "done", "text": text.strip(), "seconds": seconds})
                return
            if isinstance(update, UsmliteError):
                raise of_model(update)
            if isinstance(update, CancelledError):
                raise ApiError(503, "The server is stopping.", code="stopping")
            if isinstance(update, BaseException):
                raise internal(update)
            text += update.final
            seconds = update.seconds
            await self._socket.send_json(
                {
                    "type": "update",
                    "final": update.final,
                    "partial": update.partial,
                    "seconds": seconds,
                    "words": words(update.words),
                }
            )


class _Audio:
    """Samples on their way from the event loop to the session's thread."""

    def __init__(self, rate: int) -> None:
        self._blocks: queue.Queue[np.ndarray | None] = queue.Queue()
        self._put = self._taken = 0.0
        self._rate = rate
        self._resampler = None
        if rate != SAMPLE_RATE:
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")

    @property
    def waiting(self) -> float:
        """Seconds of audio that nobody has taken yet."""
        return self._put - self._taken

    def put(self, data: bytes) -> float:
        """Adds 16-bit samples; returns the seconds so far."""
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        self._put += len(samples) / self._rate
        self._blocks.put(samples)
        return self._put

    def end(self) -> None:
        self._blocks.put(None)

    def __iter__(self) -> Iterator[np.ndarray]:
        """All that is waiting, whenever there is something: a model that is late hears it at once."""
        over = False
        while not over:
            blocks = [self._blocks.get()]
            while not self._blocks.empty():
                blocks.append(self._blocks.get())
            over = any(block is None for block in blocks)
            samples = np.concatenate([np.zeros(0, np.float32), *(b for b in blocks if b is not None)])
            self._taken += len(samples) / self._rate
            yield samples if self._resampler is None else self._resampler.resample_chunk(samples, last=over)


def _command(text: str | None) -> str | None:
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    kind = found.get("type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None
