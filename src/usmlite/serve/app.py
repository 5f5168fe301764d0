"""The addresses of the server, as a FastAPI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from usmlite import __version__
from usmlite.audio import SAMPLE_RATE
from usmlite.memory import resident_memory
from usmlite.serve import errors
from usmlite.serve.errors import ApiError, internal, invalid, unauthorized
from usmlite.serve.gate import Gate
from usmlite.serve.live import RATES, LiveSession
from usmlite.serve.page import page
from usmlite.serve.service import Service
from usmlite.serve.wishes import FORMATS, GRANULARITIES

LIVE = "/v1/audio/live"
_TRANSCRIPTIONS, _TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
_COUNTED = frozenset({"/", "/health", "/metrics", "/v1/models", _TRANSCRIPTIONS, _TRANSLATIONS})
_KEY_SECONDS = 5.0  # in which a browser must have sent its key
_EVERY = (0.2, 10.0)  # seconds
# Close codes of WebSockets (RFC 6455 and the registry of IANA).
_CLOSED, _REFUSED, _FAILED, _LATER = 1000, 1008, 1011, 1013


def create_app(service: Service) -> FastAPI:
    """The application of one service, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # FastAPI's own pages load their scripts from elsewhere; /openapi.json is there.
    app = FastAPI(title="usmlite", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    app.include_router(_open_routes(service))
    app.include_router(_api_routes(service))

    @app.websocket(LIVE)
    async def live(socket: WebSocket) -> None:
        await _live(service, socket)

    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.settings.origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Gate, metrics=service.metrics, limits=service.limits, known=_COUNTED)
    return app


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return page()

    @router.get("/health")
    async def health() -> Response:
        """Whether requests are taken, and what they meet."""
        stopping = service.admission.stopping
        content = {
            "status": "stopping" if stopping else "ok",
            "model": service.settings.name,
            "version": __version__,
            "requests": service.admission.requests,
            "live_sessions": service.admission.live,
            "memory_bytes": resident_memory(),
            "weights_bytes": service.recognizer.weights_bytes,
            "needs_key": service.needs_key,
        }
        return JSONResponse(content, 503 if stopping else 200)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return service.metrics.response()

    return router


def _api_routes(service: Service) -> APIRouter:
    # What depends on a key is decided before the body is read.
    async def check_key(request: Request) -> None:
        service.check_key(_bearer(request.headers.get("authorization")))

    router = APIRouter(dependencies=[Depends(check_key)])
    card = {"id": service.settings.name, "object": "model", "created": service.started, "owned_by": "usmlite"}

    @router.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [card]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model, by its name."""
        if name != service.settings.name:
            raise ApiError(404, "There is no such model here.", code="model_not_found", param="model")
        return JSONResponse(card)

    @router.post(_TRANSCRIPTIONS, openapi_extra=_form("transcribe"))
    async def transcriptions(request: Request) -> Response:
        """Audio to text."""
        return await service.transcribe(request, "transcribe")

    @router.post(_TRANSLATIONS, openapi_extra=_form("translate"))
    async def translations(request: Request) -> Response:
        """Audio to English text."""
        return await service.transcribe(request, "translate")

    return router


async def _live(service: Service, socket: WebSocket) -> None:
    """A session of live audio, see `live`."""
    await socket.accept()
    code = _CLOSED
    try:
        with service.admission.session():
            await _authorize(service, socket)
            session = _session(service, socket)
            with service.booked(session):
                await session.run()
    except WebSocketDisconnect:
        return
    except ApiError as error:
        code = {429: _LATER, 503: _LATER, 500: _FAILED}.get(error.status, _REFUSED)
        await _tell(socket, error)
    except Exception as error:
        code = _FAILED
        await _tell(socket, internal(error))
    try:
        await socket.close(code)
    except (RuntimeError, WebSocketDisconnect):
        return  # it has left


async def _tell(socket: WebSocket, error: ApiError) -> None:
    try:
        await socket.send_json({"type": "error", **error.body()})
    except (RuntimeError, WebSocketDisconnect):
        return


async def _authorize(service: Service, socket: WebSocket) -> None:
    """Browsers ask every site's sockets for anybody, and cannot send a header."""
    origin = socket.headers.get("origin")
    # The host alone is compared: a proxy may speak another protocol than its clients.
    foreign = origin is not None and urlsplit(origin).netloc != socket.headers.get("host")
    if foreign and origin not in service.settings.origins:
        raise ApiError(403, "This site may not use this server.", code="origin_not_allowed")
    if not service.needs_key:
        return
    given = socket.headers.get("authorization")
    if given is not None:
        service.check_key(_bearer(given))
        return
    try:
        message = await asyncio.wait_for(socket.receive_text(), _KEY_SECONDS)
        found = json.loads(message)
        key = found["key"] if found["type"] == "authorize" else None
    except (asyncio.TimeoutError, ValueError, KeyError, TypeError, RecursionError):
        raise unauthorized() from None
    service.check_key(key if isinstance(key, str) else None)


def _session(service: Service, socket: WebSocket) -> LiveSession:
    query = socket.query_params
    task = query.get("task", "transcribe")
    if task not in ("transcribe", "translate"):
        raise invalid("task must be transcribe or translate.", "task", "invalid_value")
    return LiveSession(
        socket,
        service.batcher,
        service.live_options(query.get("language") or None, task),
        service.limits,
        rate=round(_number(query.get("sample_rate"), "sample_rate", RATES, SAMPLE_RATE)),
        every=_number(query.get("every"), "every", _EVERY, 1.0),
        shortest=service.recognizer.adapter.shortest,
    )


def _number(text: str | None, name: str, bounds: tuple[float, float], default: float) -> float:
    try:
        number = default if text is None else float(text)
    except ValueError:
        number = -1.0
    if not bounds[0] <= number <= bounds[1]:
        raise invalid(f"{name} must be {bounds[0]:g} to {bounds[1]:g}.", name, "invalid_value")
    return number


def _bearer(header: str | None) -> str | None:
    scheme, _, key = (header or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _form(task: str) -> dict[str, Any]:
    """What /openapi.json says about a request's body, which we read ourselves."""
    text = {"type": "string"}
    fields: dict[str, Any] = {
        "file": {"type": "string", "format": "binary", "description": "WAV, FLAC, OGG, Opus or MP3."},
        "model": text,
        "prompt": text,
        "response_format": {"type": "string", "enum": list(FORMATS), "default": "json"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "timestamp_granularities[]": {
            "type": "array", "items": {"type": "string", "enum": list(GRANULARITIES)},
        },
        "stream": {"type": "boolean", "default": False},
    }  # fmt: skip
    if task == "transcribe":
        fields["language"] = text
    schema = {"type": "object", "required": ["file"], "properties": fields}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
