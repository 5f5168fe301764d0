"""Audio from a microphone, as it comes (extra `mic`: sounddevice)."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import soxr

from usmlite.audio import SAMPLE_RATE
from usmlite.errors import AudioError

_BLOCK_SECONDS = 0.1
_PATIENCE = 0.2  # seconds between looks at whether to stop


class Microphone:
    """A microphone, opened when it is iterated over: chunks of what has been said since the last one.

    A slow consumer gets longer chunks, and loses nothing.

    Args:
        device: number or part of the name; None for the system's default.

    Raises:
        AudioError: sounddevice is not installed, or there is no such microphone.
    """

    def __init__(self, device: str | None = None) -> None:
        self._sounddevice = _sounddevice()
        self._stopped = False
        # A number is a device's number, not a part of its name.
        self._device: int | str | None = int(device) if device and device.isdigit() else device
        try:
            self._rate = self._working_rate()
        except (self._sounddevice.PortAudioError, ValueError) as error:
            raise self._unusable(error) from error

    def stop(self) -> None:
        """Lets the iteration end after what has been said so far."""
        self._stopped = True

    def __iter__(self) -> Iterator[np.ndarray]:
        """Float32 mono samples at 16 kHz, until `stop`."""
        blocks: queue.Queue[np.ndarray] = queue.Queue()

        def keep(data: np.ndarray, frames: int, time: object, status: object) -> None:
            blocks.put(data[:, 0].copy())

        resampler = None
        if self._rate != SAMPLE_RATE:
            resampler = soxr.ResampleStream(self._rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        try:
            with self._sounddevice.InputStream(
                samplerate=self._rate, channels=1, dtype="float32", device=self._device,
                blocksize=round(self._rate * _BLOCK_SECONDS), callback=keep,
            ):  # fmt: skip
                while True:
                    stopped = self._stopped
                    heard = _all_of(blocks)
                    if len(heard):
                        yield heard if resampler is None else resampler.resample_chunk(heard)
                    if stopped:
                        return
        except self._sounddevice.PortAudioError as error:
            raise self._unusable(error) from error

    def _working_rate(self) -> int:
        """16 kHz, or the device's own rate where it knows no other."""
        sounddevice = self._sounddevice
        try:
            sounddevice.check_input_settings(
                device=self._device, channels=1, dtype="float32", samplerate=SAMPLE_RATE
            )
        except sounddevice.PortAudioError:
            return int(sounddevice.query_devices(self._device, "input")["default_samplerate"])
        return SAMPLE_RATE

    def _unusable(self, error: Exception) -> AudioError:
        return AudioError(
            "the microphone cannot be used",
            where="microphone" if self._device is None else f"microphone {self._device}",
            found=str(error).splitlines()[0],
            remedy="`python -m sounddevice` lists what there is; choose with --mic-device.",
        )


def _all_of(blocks: queue.Queue[np.ndarray]) -> np.ndarray:
    """What is waiting, or what comes within a moment."""
    found: list[np.ndarray] = []
    try:
        found.append(blocks.get(timeout=_PATIENCE))
        while True:
            found.append(blocks.get_nowait())
    except queue.Empty:
        return np.concatenate(found) if found else np.zeros(0, np.float32)


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise AudioError(
            "a microphone needs sounddevice", where="microphone", found=str(error),
            remedy='pip install "usmlite[mic]"',
        ) from error  # fmt: skip
    except OSError as error:
        # The package has no PortAudio of its own on Linux.
        raise AudioError(
            "a microphone needs PortAudio", where="microphone", found=str(error),
            remedy="Install it: apt install libportaudio2, or your system's package of that name.",
        ) from error  # fmt: skip
    return sounddevice
