"""The process that decodes audio files: what a bad one breaks is this and nothing else.

It reads files from standard input and writes samples to standard output, one after the other, until its input
ends. It opens no file, holds no model, and has a bound on its memory where the system knows one.

    request   8 bytes: length of the file; 8 bytes: float64, the most seconds; the file
    answer    1 byte: b"S" or an error's kind; 8 bytes: length; float32 samples at 16 kHz, or the error's text

Integers are little-endian.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import sys
from typing import BinaryIO

from usmlite.audio import SAMPLE_RATE, load_audio
from usmlite.errors import AudioError, AudioFormatError, AudioTooLongError

REQUEST = struct.Struct("<Qd")
ANSWER = struct.Struct("<cQ")
SAMPLES, BAD, UNKNOWN_FORMAT, TOO_LONG = b"S", b"B", b"F", b"L"
SPARE_BYTES = 256 * 2**20
"""Memory for the file's decoder, on top of the samples and the file."""


def memory_bytes(upload_bytes: int, audio_seconds: float) -> int:
    """How much the process may take on top of itself for the largest file that is allowed."""
    # Blocks are joined, and the whole is made bytes: twice of it is there for a moment.
    return 2 * upload_bytes + round(3 * 4 * SAMPLE_RATE * audio_seconds) + SPARE_BYTES


def decode(file: bytes, most_seconds: float) -> tuple[bytes, bytes]:
    """Decodes one file.

    Args:
        file: its content.
        most_seconds: the longest audio that is allowed.

    Returns:
        SAMPLES and float32 samples, or another kind of answer and what is wrong, in UTF-8.
    """
    try:
        # `seconds` bounds what is really read, whatever the header says, and lets silence pass.
        samples = load_audio(io.BytesIO(file), max_seconds=most_seconds, seconds=most_seconds)
        return SAMPLES, samples.astype("<f4", copy=False).tobytes()
    except AudioTooLongError as error:
        return TOO_LONG, _said(error)
    except AudioFormatError as error:
        return UNKNOWN_FORMAT, _said(error)
    except AudioError as error:
        return BAD, _said(error)
    except MemoryError:
        return BAD, b"The audio takes too much memory to decode."


def _said(error: AudioError) -> bytes:
    text = error.what[0].upper() + error.what[1:]
    parts = [
        f"{label} {value}"
        for label, value in (("expected", error.expected), ("found", error.found))
        if value is not None
    ]
    return (f"{text} ({', '.join(parts)})." if parts else f"{text}.").encode()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        head = requests.read(REQUEST.size)
        if len(head) < REQUEST.size:
            return
        length, most_seconds = REQUEST.unpack(head)
        file = requests.read(length)
        if len(file) < length:
            return
        kind, content = decode(file, most_seconds)
        del file
        answers.write(ANSWER.pack(kind, len(content)))
        answers.write(content)
        answers.flush()


def _confine(spare: int) -> None:
    """Bounds memory, and forbids to write files; does nothing where the system cannot."""
    try:
        import resource
    except ImportError:
        return
    try:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        held = 2**30
    for what, bound in (
        (resource.RLIMIT_AS, held + spare),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (bound, bound))


def main() -> None:
    """Serves the process that started this one; the argument is the memory to spare, in bytes."""
    # The server decides when this ends, also where a signal goes to all processes of a group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _confine(int(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
