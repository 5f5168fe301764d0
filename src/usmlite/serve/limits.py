"""What a server takes on: sizes, times and how much at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from usmlite.serve.errors import busy, unavailable

MEGABYTE = 10**6


@dataclass(frozen=True)
class Limits:
    """The bounds of a server; all of them hold at once.

    Attributes:
        upload_bytes: of one request's body.
        audio_seconds: of one recording.
        requests: that are in work or wait, uploads included.
        held_bytes: of the bodies of all requests in work, as far as they are announced.
        held_seconds: of the decoded audio of all requests in work.
        upload_seconds: in which a body must have arrived.
        decode_seconds: in which an audio file must be decoded.
        request_seconds: in which a request must be answered, upload aside.
        live: sessions of live audio at once.
        live_seconds: of audio in one live session.
        live_idle_seconds: after which a live session that brings no audio ends.
        connections: at once; further ones are turned away by uvicorn.
    """

    upload_bytes: int = 25 * MEGABYTE
    audio_seconds: float = 3600.0
    requests: int = 64
    held_bytes: int = 250 * MEGABYTE
    held_seconds: float = 4 * 3600.0
    upload_seconds: float = 60.0
    decode_seconds: float = 60.0
    request_seconds: float = 600.0
    live: int = 4
    live_seconds: float = 4 * 3600.0
    live_idle_seconds: float = 60.0
    connections: int = 512


class Admission:
    """Who is let in. Lives in the event loop's thread alone.

    Args:
        limits: the bounds.

    Attributes:
        stopping: whether nobody is let in any more.
        requests: in work or waiting.
        live: sessions of live audio.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.stopping = False
        self.requests = 0
        self.live = 0
        self._bytes = 0
        self._seconds = 0.0

    @contextmanager
    def request(self, announced: int) -> Iterator[None]:
        """A place for one request.

        Args:
            announced: bytes of its body.

        Raises:
            ApiError: 429 where there is no place, 503 while the server stops.
        """
        self._check_running()
        if self.requests >= self.limits.requests or self._bytes + announced > self.limits.held_bytes:
            raise busy(f"{self.requests} requests are in work, as many as this server takes.")
        self.requests += 1
        self._bytes += announced
        try:
            yield
        finally:
            self.requests -= 1
            self._bytes -= announced

    @contextmanager
    def audio(self, seconds: float) -> Iterator[None]:
        """Room for decoded audio.

        Raises:
            ApiError: 429 where there is none.
        """
        if self._seconds + seconds > max(self.limits.held_seconds, self.limits.audio_seconds):
            raise busy("Too much audio is waiting.")
        self._seconds += seconds
        try:
            yield
        finally:
            self._seconds -= seconds

    @contextmanager
    def session(self) -> Iterator[None]:
        """A place for one session of live audio.

        Raises:
            ApiError: 429 where there is none, 503 while the server stops.
        """
        self._check_running()
        if self.live >= self.limits.live:
            raise busy(f"{self.live} live sessions are open, as many as this server takes.")
        self.live += 1
        try:
            yield
        finally:
            self.live -= 1

    def _check_running(self) -> None:
        if self.stopping:
            raise unavailable("The server is stopping.", "stopping")
