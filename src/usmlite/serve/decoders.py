"""The processes that decode audio files, from the server's side: see `decoding`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process

import numpy as np

from usmlite.audio import SAMPLE_RATE
from usmlite.serve.decoding import ANSWER, REQUEST, SAMPLES, TOO_LONG, UNKNOWN_FORMAT, memory_bytes
from usmlite.serve.errors import ApiError, invalid, logger
from usmlite.serve.limits import Limits

_START = "from usmlite.serve.decoding import main; main()"
_LONGEST_ERROR = 10_000  # bytes
_STATUS = {UNKNOWN_FORMAT: 415, TOO_LONG: 413}
_CODE = {UNKNOWN_FORMAT: "unsupported_format", TOO_LONG: "audio_too_long"}


class BrokenDecoderError(Exception):
    """The process ended, or said something that is no answer."""


class Decoders:
    """Processes that decode files, a file in each at a time; those that break are replaced.

    Args:
        limits: how long audio may be, and decoding may take.
        count: how many processes.

    Attributes:
        broken: how many have been replaced.
    """

    def __init__(self, limits: Limits, count: int = 1) -> None:
        self._limits = limits
        self._count = count
        self._idle: asyncio.Queue[Process | None] = asyncio.Queue()
        self._all: set[Process] = set()
        self.broken = 0

    async def start(self) -> None:
        """Starts the processes."""
        for _ in range(self._count):
            self._idle.put_nowait(await self._started())

    async def decode(self, file: bytes) -> np.ndarray:
        """Decodes a file.

        Args:
            file: its content.

        Returns:
            float32 `[samples]`, mono, 16 kHz.

        Raises:
            ApiError: 413 too long, 415 not audio, 422 damaged, too short or too much for the process.
        """
        process = await self._idle.get()
        whole = False
        try:
            if process is None or process.returncode is not None:
                # It died while nobody looked at it, or could not be started: not this file's fault.
                process = await self._started()
            kind, content = await asyncio.wait_for(self._asked(process, file), self._limits.decode_seconds)
            whole = True
        except asyncio.TimeoutError:
            raise invalid("The audio takes too long to decode.", "file", "decoding_failed") from None
        except BrokenDecoderError:
            raise invalid(
                "The audio cannot be decoded: it breaks the decoder, or takes too much memory.",
                "file",
                "decoding_failed",
            ) from None
        finally:
            if not whole:
                await asyncio.shield(self._replace(process))
            else:
                self._idle.put_nowait(process)
        if kind == SAMPLES:
            return np.frombuffer(content, "<f4")
        code = _CODE.get(kind, "invalid_audio")
        raise ApiError(_STATUS.get(kind, 422), content.decode(errors="replace"), code=code, param="file")

    async def stop(self) -> None:
        """Ends the processes."""
        for process in list(self._all):
            await self._end(process)

    async def _started(self) -> Process:
        limits = self._limits
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _START, str(memory_bytes(limits.upload_bytes, limits.audio_seconds)),
            stdin=PIPE, stdout=PIPE, env={**os.environ, **_QUIET}, start_new_session=True,
        )  # fmt: skip
        self._all.add(process)
        return process

    async def _asked(self, process: Process, file: bytes) -> tuple[bytes, bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(REQUEST.pack(len(file), self._limits.audio_seconds))
            process.stdin.write(file)
            await process.stdin.drain()
            kind, length = ANSWER.unpack(await process.stdout.readexactly(ANSWER.size))
            # A tenth more: resampling may add some samples at the end.
            samples = SAMPLE_RATE * (1.1 * self._limits.audio_seconds + 1)
            if length > (4 * samples if kind == SAMPLES else _LONGEST_ERROR):
                raise BrokenDecoderError(f"an answer of {length} bytes")
            return kind, await process.stdout.readexactly(length)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise BrokenDecoderError(str(error)) from error

    async def _replace(self, process: Process | None) -> None:
        """Puts a new process where one broke, or was left in the middle of a file."""
        self.broken += 1
        if process is not None:
            await self._end(process)
        try:
            self._idle.put_nowait(await self._started())
        except OSError as error:
            logger.error("the decoding process cannot be started: %s", error)
            self._idle.put_nowait(None)

    async def _end(self, process: Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        self._all.discard(process)


# One thread: numpy's libraries otherwise reserve memory for as many as there are cores.
_QUIET = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
