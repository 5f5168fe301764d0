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
    """Serves until SIGTERM or Ctrl-C, and answers what was accepted until then; a second one ends it at once.

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
    listener = listening(host, port)
    service = Service(recognizer, settings)
    if access_log:
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    config = configuration(service, stop_seconds=stop_seconds, access_log=access_log)
    Server(config, service, ready).run(sockets=[listener])


def configuration(
    service: Service, *, stop_seconds: int | None = None, access_log: bool = False
) -> uvicorn.Config:
    """How uvicorn runs a service."""
    return uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=access_log,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=MOST_MESSAGE,
        limit_concurrency=service.limits.connections,
        timeout_graceful_shutdown=stop_seconds,
        # Who is allowed is decided by a key, and never by an address that a header claims.
        proxy_headers=False,
    )


class Server(uvicorn.Server):
    """uvicorn, which lets live sessions end first.

    Args:
        config: see `configuration`.
        service: what it serves.
        ready: is told the address once requests are taken.
    """

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets nobody in any more, and waits for those who are."""
        try:
            await asyncio.wait_for(self._service.drain(), self.config.timeout_graceful_shutdown)
        except asyncio.TimeoutError:
            logging.getLogger("usmlite.serve").warning("live sessions did not end in time")
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop; the second one ends all."""
        # uvicorn raises the signal once more at its end; a graceful stop is not a failure.
        self.force_exit = self.should_exit
        self.should_exit = True


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OutputError: the address cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise OutputError(
            "cannot listen there", where=f"{host}:{port}", found=str(error), remedy="Choose another --port."
        ) from error
