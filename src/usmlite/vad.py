"""Voice activity: where speech is, and speech packed into windows (extra `vad`: silero-vad).

silero-vad hears 32 ms at a time with a small recurrent network. Stretches of speech are put one behind the
other until a window is full, so that silence costs nothing; times are mapped back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from usmlite.audio import SAMPLE_RATE, WINDOW_SECONDS
from usmlite.errors import ModelError

THRESHOLD = 0.5
"""Probability above which 32 ms are speech."""

_PADDING_MS = 200  # kept on both sides of speech, so that no soft sound is cut off
_SILENCE_MS = 500  # shorter pauses are part of the speech


@dataclass(frozen=True)
class Stretch:
    """A piece of a recording, in samples from its beginning."""

    start: int
    end: int


@dataclass(frozen=True)
class Pack:
    """Stretches of speech that are heard as one window of at most 30 seconds."""

    stretches: tuple[Stretch, ...]

    @property
    def seconds(self) -> float:
        """Seconds of speech."""
        return sum(each.end - each.start for each in self.stretches) / SAMPLE_RATE

    def samples(self, recording: np.ndarray) -> np.ndarray:
        """The speech alone, float32 `[samples]`."""
        return np.concatenate([recording[each.start : each.end] for each in self.stretches])

    def original(self, seconds: float, *, ends: bool = False) -> float:
        """A time in the pack to the time in the recording.

        Args:
            seconds: from the pack's beginning.
            ends: whether something ends there: on a border it belongs to the stretch before.
        """
        left = seconds * SAMPLE_RATE
        for each in self.stretches:
            length = each.end - each.start
            if left < length or (ends and left == length) or each is self.stretches[-1]:
                return (each.start + min(left, length)) / SAMPLE_RATE
            left -= length
        raise ValueError("a pack has at least one stretch")

    def within(self, start: float, end: float) -> tuple[float, float]:
        """Times in the pack to times in the recording, of something that cannot go on over a silence.

        Args:
            start: seconds from the pack's beginning.
            end: the same. What lies beyond the stretch that holds the middle is cut off.
        """
        middle = (start + end) / 2 * SAMPLE_RATE
        first = 0
        for each in self.stretches:
            last = first + each.end - each.start
            if middle < last or each is self.stretches[-1]:
                low, high = (min(max(t * SAMPLE_RATE, first), last) - first for t in (start, end))
                return (each.start + low) / SAMPLE_RATE, (each.start + high) / SAMPLE_RATE
            first = last
        raise ValueError("a pack has at least one stretch")


def speech(samples: np.ndarray, *, threshold: float = THRESHOLD) -> list[Stretch]:
    """Where somebody speaks.

    Args:
        samples: float32 `[samples]`, mono, 16 kHz.
        threshold: probability above which 32 ms count as speech.

    Returns:
        Stretches in order, at most 30 seconds each.

    Raises:
        ModelError: silero-vad is not installed.
    """
    silero, network = _silero()
    found = silero.get_speech_timestamps_sequence(
        samples,
        network,
        threshold=threshold,
        sampling_rate=SAMPLE_RATE,
        max_speech_duration_s=WINDOW_SECONDS - 2 * _PADDING_MS / 1000,
        min_silence_duration_ms=_SILENCE_MS,
        speech_pad_ms=_PADDING_MS,
    )
    return [Stretch(int(each["start"]), int(each["end"])) for each in found]


def packs(stretches: list[Stretch]) -> list[Pack]:
    """Stretches in order to windows, each as full as they allow without being cut."""
    found: list[list[Stretch]] = []
    held = 0
    limit = round(WINDOW_SECONDS * SAMPLE_RATE)
    for each in stretches:
        length = each.end - each.start
        if not found or held + length > limit:
            found.append([])
            held = 0
        found[-1].append(each)
        held += length
    return [Pack(tuple(group)) for group in found]


@lru_cache(maxsize=1)
def _silero() -> tuple[Any, Any]:
    """The package and its network, in the form that hears many frames at a call, seven times as fast."""
    try:
        import silero_vad

        return silero_vad, silero_vad.load_silero_vad(sequence=True)
    except (ImportError, TypeError) as error:
        raise ModelError(
            "voice activity detection needs silero-vad 6.2.3 and onnxruntime", where="vad", found=str(error),
            remedy='pip install "usmlite[vad]"',
        ) from error  # fmt: skip
