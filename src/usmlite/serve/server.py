"""The server as a process: it listens, and stops when nobody waits for an answer any more."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from usmlite.errors import OutputError
from usmlite.runtime import Recognizer
from usmlite.serve.app import create_app
from usmlite.serve.live import MOST_MESSAGE
from usmlite.serve.service import Service, Settings

_BACKLOG = 1024


def serve(
    recognizer: Recognizer,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    stop_seconds: int = 120,
    access_log: bool = False,
    ready: Callable[[str], None] = print,
) -> None:
    """Serves until SIGTERM or Ctrl-C, and answers what was accepted until then; a second signal ends it at once.

    Args:
        recognizer: the model.
        settings: what it offers.
        host: the address to listen on.
        port: 0 takes a free one.
        stop_seconds: how long to wait for answers after the signal.
        access_log: whether every request is logged.
        ready: is told the address once requests are taken.

    Raises:
        OutputError: the address cannot be listened on.
    """
    listener = _listener(host, port)
    service = Service(recognizer, settings)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=access_log,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=MOST_MESSAGE,
        limit_concurrency=settings.limits.connections,
        timeout_graceful_shutdown=stop_seconds,
        # Who is allowed is decided by a key, and never by an address that a header claims.
        proxy_headers=False,
    )
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if access_log else logging.WARNING)
    _Server(config, service, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await asyncio.wait_for(self._service.drain(), self.config.timeout_graceful_shutdown)
        except asyncio.TimeoutError:
            logging.getLogger("usmlite.serve").warning("live sessions did not end in time")
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn raises the signal once more at its end; a graceful stop is not a failure.
        self.force_exit = self.should_exit
        self.should_exit = True


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise OutputError(
            "cannot listen there", where=f"{host}:{port}", found=str(error), remedy="Choose another --port."
        ) from error
