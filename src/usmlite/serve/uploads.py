"""A request's form, read within bounds and kept in memory.

The form's parser is python-multipart. Nothing is written to files, and the names and types that a client
gives its file are looked at by nobody.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from usmlite.serve.errors import ApiError, invalid
from usmlite.serve.limits import Limits

_MOST_PARTS = 64
_MOST_TEXT = 65_536  # bytes of all fields together that are not the file


@dataclass
class Upload:
    """What a form has.

    Attributes:
        file: the content of the field `file`.
        fields: all others, each with its values in order.
    """

    file: bytes
    fields: dict[str, list[str]]


def announced(request: Request, limits: Limits) -> int:
    """How long the body will be, at most.

    Raises:
        ApiError: 413 for more than is allowed.
    """
    given = request.headers.get("content-length", "")
    # Without a length a body may still come, in chunks.
    length = int(given) if given.isascii() and given.isdigit() else limits.upload_bytes
    if length > limits.upload_bytes:
        raise too_large(limits)
    return length


def too_large(limits: Limits) -> ApiError:
    """413: more bytes than are allowed."""
    return ApiError(
        413,
        f"The request is larger than {limits.upload_bytes / 1e6:g} MB, the most that this server takes.",
        code="request_too_large",
        param="file",
    )


async def read_upload(request: Request, limits: Limits) -> Upload:
    """Reads a form.

    Raises:
        ApiError: 408 too slow, 413 too large, 415 not a form, 422 damaged or without a file.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Compressed requests are not supported.", code="unsupported_encoding")
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise ApiError(
            415,
            "Send the audio as multipart/form-data, in a field named 'file'.",
            code="unsupported_media_type",
        )
    if not options.get(b"boundary"):
        raise invalid("The form has no boundary.", code="invalid_form")
    form = _Form()
    try:
        await asyncio.wait_for(_fill(form, options[b"boundary"], request, limits), limits.upload_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"The request did not arrive within {limits.upload_seconds:g} s.", code="upload_timeout"
        ) from None
    except FormParserError as error:
        raise invalid(f"The form is damaged: {error}.", code="invalid_form") from None
    if not form.whole:
        raise invalid("The form ends early.", code="invalid_form")
    if form.file is None:
        raise invalid("A field 'file' with the audio is required.", "file", "missing_required_parameter")
    if not form.file:
        raise invalid("The file is empty.", "file", "invalid_audio")
    return Upload(bytes(form.file), form.fields)


async def _fill(form: _Form, boundary: bytes, request: Request, limits: Limits) -> None:
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": form.begin,
            "on_header_field": form.header_name,
            "on_header_value": form.header_value,
            "on_header_end": form.header_end,
            "on_headers_finished": form.headers_end,
            "on_part_data": form.data,
            "on_part_end": form.end,
            "on_end": form.finish,
        },
    )
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limits.upload_bytes:
                raise too_large(limits)
            parser.write(chunk)
    except ClientDisconnect:
        # Nobody reads the answer; it is for the count.
        raise ApiError(499, "The client left.", code="client_left") from None
    parser.finalize()


@dataclass
class _Form:
    """What the parser has found so far."""

    file: bytearray | None = None
    fields: dict[str, list[str]] = field(default_factory=dict)
    whole: bool = False
    _parts: int = 0
    _text: int = 0
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _name: str = ""
    _value: bytearray = field(default_factory=bytearray)

    def begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise invalid(f"The form has more than {_MOST_PARTS} parts.", code="invalid_form")
        self._name, self._value = "", bytearray()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(value))
            self._name = _text(options.get(b"name", b""))
        name.clear()
        value.clear()

    def headers_end(self) -> None:
        if not self._name:
            raise invalid("A part of the form has no name.", code="invalid_form")
        if self._name == "file":
            if self.file is not None:
                raise invalid("The form has more than one file.", "file", "invalid_form")
            self.file = self._value

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._name != "file":
            self._text += end - start
            if self._text > _MOST_TEXT:
                raise invalid(f"The form's fields have more than {_MOST_TEXT} bytes.", code="invalid_form")
        self._value += data[start:end]

    def end(self) -> None:
        if self._name != "file":
            self.fields.setdefault(self._name, []).append(_text(bytes(self._value)))

    def finish(self) -> None:
        self.whole = True


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise invalid("A field of the form is not UTF-8.", code="invalid_form") from None
