"""What every HTTP request passes: it is counted, and a refused upload can still read why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from usmlite.serve.limits import Limits
from usmlite.serve.metrics import Metrics

_LINGER_SECONDS = 5.0
_LINGER_TIMES = 4  # the size of the largest upload


class Gate:
    """An ASGI middleware.

    Args:
        app: what answers.
        metrics: where requests are counted.
        limits: how large an upload may be.
        known: paths that are counted by name; a client's inventions are counted together.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits, known: Container[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._limits = limits
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500
        body = _Body(receive)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
                if status >= 400:
                    # A client that is still sending would see a broken connection instead of the answer.
                    await body.discard(_LINGER_TIMES * self._limits.upload_bytes, _LINGER_SECONDS)
            await send(message)

        try:
            await self._app(scope, body.receive, answer)
        finally:
            endpoint = scope["path"] if scope["path"] in self._known else "other"
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.request_seconds.labels(endpoint).observe(time.perf_counter() - start)


class _Body:
    """A request's body, as far as it has been read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._over = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._over = True
        return message

    async def discard(self, most: int, seconds: float) -> None:
        """Reads on and forgets, up to so many bytes and seconds."""

        async def read() -> None:
            left = most
            while not self._over and left > 0:
                left -= len((await self.receive()).get("body", b""))

        try:
            await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            return
