"""What a client did that cannot be served, in the shape of the OpenAI API."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from usmlite.errors import UsmliteError

logger = logging.getLogger("usmlite.serve")
RETRY_SECONDS = 1


class ApiError(Exception):
    """An error that is the answer to a request.

    Args:
        status: of HTTP.
        message: what is wrong and what to do, for people.
        code: the same for programs.
        param: the field of the request that it is about.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`, as the OpenAI API has it."""
        return {
            "error": {
                "message": self.message,
                "type": _kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def unauthorized() -> ApiError:
    """401: no API key, or not one of ours."""
    return ApiError(
        401,
        "A valid API key is required: send it as 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """422: the request is understood, and something in it is wrong."""
    return ApiError(422, message, code=code, param=param)


def busy(message: str) -> ApiError:
    """429: as many requests as may wait are waiting."""
    return ApiError(
        429,
        f"{message} Try again in a moment.",
        code="server_busy",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


def unavailable(message: str, code: str) -> ApiError:
    """503: the server cannot do it now."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def of_model(error: UsmliteError) -> ApiError:
    """422 for what the model cannot do; where it lies is nobody's business."""
    text = error.what
    if error.expected is not None:
        text += f" (expected {error.expected})"
    return invalid(text[0].upper() + text[1:] + ".", code="unsupported")


def install(app: FastAPI) -> None:
    """Lets every error of an application be answered in this shape."""

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def others(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return internal(error).response()


def internal(error: BaseException) -> ApiError:
    """500: a defect of the server; what it was is logged and not told."""
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed at this request.", code="internal_error")


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
