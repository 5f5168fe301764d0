"""`usmlite serve`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command, whole
from usmlite.cli.console import complain, settle_libraries
from usmlite.cli.recognizer_flags import add_hold, add_search, options_from
from usmlite.errors import UsmliteError
from usmlite.shipped import DEFAULT

API_KEY = "USMLITE_API_KEY"

EPILOG = """\
It needs the extra: pip install "usmlite[serve]". The API is OpenAI's: POST /v1/audio/transcriptions and
/v1/audio/translations, GET /v1/models; live audio at ws://HOST:PORT/v1/audio/live; a page at /; /health, and
/metrics for Prometheus. See docs/serving.md.

Requests are decoded side by side. SIGTERM or Ctrl-C ends the server once what it has accepted is answered, a
second one at once. A server that others can reach should have a key, and a proxy for HTTPS in front of it.

examples:
  usmlite serve
  usmlite serve small/packed --port 9000 --beam-size 5
  USMLITE_API_KEY=secret usmlite serve small/ --host 0.0.0.0
"""

_LIMITS = (
    ("--max-upload", "MB", 25, "size of a request"),
    ("--max-audio", "S", 3600, "seconds of one recording"),
    ("--max-requests", "N", 64, "requests in work or waiting"),
    ("--max-live", "N", 4, "sessions of live audio"),
    ("--upload-timeout", "S", 60, "seconds in which a request must have arrived"),
    ("--timeout", "S", 600, "seconds in which it must be answered"),
    ("--stop-timeout", "S", 120, "seconds to wait for answers after SIGTERM"),
)


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands, "serve", "transcribe for others: OpenAI's audio API, live audio, a page", EPILOG,
        run,
    )  # fmt: skip
    parser.add_argument(
        "source", nargs="?", default=DEFAULT, metavar="MODEL",
        help=f"dense, student checkpoint or packed model (default: {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=whole(0), default=8000, metavar="N", help="0 takes a free one (default: 8000)"
    )
    parser.add_argument("--name", help="what clients call the model (default: as it is called here)")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help=f"keys, one a line, of which clients must send one (or one key in the variable {API_KEY})",
    )  # fmt: skip
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="a web site that may use the server from a browser; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=8,
        metavar="N",
        help="windows decoded side by side (default: 8)",
    )
    parser.add_argument("--access-log", action="store_true", help="log every request")
    group = parser.add_argument_group("limits")
    for flag, metavar, default, text in _LIMITS:
        group.add_argument(
            flag, type=whole(1), default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    add_search(parser)
    add_hold(parser)


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    keys = _api_keys(arguments.api_key_file)
    settle_libraries()
    try:
        from usmlite.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("usmlite"):
            raise
        raise UsmliteError(
            "the server needs packages that are not installed", where="usmlite serve", found=str(error),
            remedy='pip install "usmlite[serve]"',
        ) from error  # fmt: skip
    from usmlite.load import load
    from usmlite.serve.limits import MEGABYTE, Limits
    from usmlite.serve.service import Settings

    limits = Limits(
        upload_bytes=arguments.max_upload * MEGABYTE,
        # Room for ten of the largest.
        held_bytes=10 * arguments.max_upload * MEGABYTE,
        audio_seconds=arguments.max_audio,
        held_seconds=4 * arguments.max_audio,
        requests=arguments.max_requests,
        live=arguments.max_live,
        upload_seconds=arguments.upload_timeout,
        request_seconds=arguments.timeout,
    )
    recognizer = load(arguments.source, hold=arguments.hold, activations=arguments.activations)
    settings = Settings(
        name=arguments.name or _served_name(arguments.source),
        options=options_from(arguments, recognizer),
        limits=limits,
        keys=keys,
        batch_size=arguments.batch_size,
        conditioned=arguments.condition_on_previous_text,
        origins=tuple(arguments.allow_origin),
    )
    if not keys and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        complain(f"warning: without an API key, whoever reaches {arguments.host} can use this server")
    serve(
        recognizer, settings, host=arguments.host, port=arguments.port,
        stop_seconds=arguments.stop_timeout, access_log=arguments.access_log,
        ready=lambda address: print(f"Serving {settings.name} on {address} (Ctrl-C stops)", flush=True),
    )  # fmt: skip
    return 0


def _api_keys(file: Path | None) -> tuple[str, ...]:
    """Keys from the file and from the environment; the command line would show them to everybody."""
    keys = [os.environ[API_KEY]] if os.environ.get(API_KEY) else []
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UsmliteError("the API keys cannot be read", where=file, found=str(error)) from None
        keys += [line for line in found if line]
        if not any(found):
            raise UsmliteError("there is no API key in the file", where=file, expected="one a line")
    return tuple(keys)


def _served_name(source: str) -> str:
    """What a model is called where its directory is nobody's business."""
    path = Path(source)
    if not path.exists():
        return source
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "packed" else resolved.name
