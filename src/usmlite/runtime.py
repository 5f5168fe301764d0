"""Audio of any length to transcripts, with any model: dense, student or packed.

Long audio is read through 30-second windows. Each one is decoded with timestamps, and the next one
begins where the last complete segment ended (the seek rule of openai/whisper `transcribe.py`), so that
no word is cut in two. Windows of several files are decoded together.

Unlike openai/whisper, a window does not see the text before it: files can then be batched, and a mistake
does not carry on into the next window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np
import torch
from torch import nn

from usmlite.audio import (
    SAMPLE_RATE,
    WINDOW_SAMPLES,
    WINDOW_SECONDS,
    audio_seconds,
    check_samples,
    load_audio,
)
from usmlite.errors import AudioError

if TYPE_CHECKING:
    from usmlite.models import Adapter, Decoded

NO_SPEECH = 0.6
"""A window is silence where the model gives no speech more than this probability ..."""
NO_SPEECH_LOGPROB = -1.0
"""... unless its tokens have a higher mean log probability than this (openai/whisper's thresholds)."""

_SHORTEST = 0.1  # seconds; a rest shorter than this holds no word

Audio: TypeAlias = str | Path | np.ndarray


@dataclass(frozen=True)
class Segment:
    """A piece of a transcript: times in seconds from the start of the audio, and the text."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said in one recording.

    Attributes:
        text: all of it, on one line.
        segments: in order of time.
        duration: of the audio, in seconds.
        language: code, such as "en".
    """

    text: str
    segments: tuple[Segment, ...]
    duration: float
    language: str


@dataclass
class _Recording:
    """One recording on its way through the windows."""

    index: int
    samples: np.ndarray
    timestamps: bool
    language: str | None
    position: int = 0  # samples
    segments: list[Segment] = field(default_factory=list)

    @property
    def duration(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    def done(self, shortest: float) -> bool:
        """Whether nothing is left, or less than the shortest audio, in seconds, that holds a word."""
        rest = len(self.samples) - self.position
        return rest <= 0 or (self.position > 0 and rest < shortest * SAMPLE_RATE)

    def window(self) -> np.ndarray:
        return self.samples[self.position : self.position + WINDOW_SAMPLES]


class Recognizer:
    """Transcribes audio with one model.

    Args:
        model: a class of Transformers, its layers possibly replaced; it is put in eval mode.
        adapter: the adapter that goes with it.
        name: what results should call it.
        kind: "dense", "student" or "packed".
        weights_bytes: the size of its weights file, or what they would take.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, *, name: str, kind: str, weights_bytes: int
    ) -> None:
        self.model = model.eval()
        self.adapter = adapter
        self.name = name
        self.kind = kind
        self.weights_bytes = weights_bytes

    def __repr__(self) -> str:
        return f"Recognizer({self.name!r}, kind={self.kind!r}, weights_bytes={self.weights_bytes})"

    @overload
    def transcribe(  # type: ignore[overload-overlap]  # a str is a sequence of str, alas
        self,
        audio: Audio,
        *,
        timestamps: bool = ...,
        language: str | None = ...,
        task: str = ...,
        batch_size: int = ...,
        progress: Callable[[float], None] | None = ...,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Sequence[Audio],
        *,
        timestamps: bool = ...,
        language: str | None = ...,
        task: str = ...,
        batch_size: int = ...,
        progress: Callable[[float], None] | None = ...,
    ) -> list[Transcript]: ...

    def transcribe(
        self,
        audio: Audio | Sequence[Audio],
        *,
        timestamps: bool = True,
        language: str | None = None,
        task: str = "transcribe",
        batch_size: int = 8,
        progress: Callable[[float], None] | None = None,
    ) -> Transcript | list[Transcript]:
        """Transcribes one recording or several, of any length.

        Args:
            audio: a file, or float32 mono samples at 16 kHz in -1 to 1, or a sequence of these.
            timestamps: whether segments with times are wanted. Without them, audio of up to 30 s is
                decoded in one piece, as one segment; longer audio needs them to find its way.
            language: code or English name; None lets a multilingual model find out from the first window
                of each recording.
            task: "transcribe", or "translate" into English (multilingual models).
            batch_size: how many recordings are decoded side by side.
            progress: called with the fraction of the audio that is done, 0 to 1.

        Returns:
            One transcript, or a list of them in the order of `audio`.

        Raises:
            AudioError: a file or an array cannot be used.
            ModelError: the model does not know the language or the task.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        single = isinstance(audio, (str, Path, np.ndarray))
        items: list[Audio] = [audio] if isinstance(audio, (str, Path, np.ndarray)) else list(audio)
        # Recordings of one language are decoded together: a language that is no question is not asked.
        language = self.adapter.language_code(language or self.adapter.only_language)
        finished: dict[int, Transcript] = {}
        tracker = _Progress(items, progress)
        waiting = enumerate(items)
        active: list[_Recording] = []
        while True:
            room = batch_size - len(active)
            active += _fill(waiting, room, timestamps, language, self.adapter.shortest)
            if not active:
                break
            for recording in self._advance(active, task):
                active.remove(recording)
                finished[recording.index] = _transcript(recording)
                tracker.finish(recording.index)
            tracker.report({recording.index: recording.position / SAMPLE_RATE for recording in active})
        transcripts = [finished[index] for index in range(len(items))]
        return transcripts[0] if single else transcripts

    def transcribe_batch(self, audios: Sequence[np.ndarray]) -> list[str]:
        """Texts of recordings, the way word error rates are measured.

        Audio of up to 30 s is decoded in one piece without timestamps, longer audio window by window.

        Args:
            audios: float32 mono samples at 16 kHz, decoded side by side.

        Returns:
            One text for each of them, on one line.
        """
        transcripts = self.transcribe(list(audios), timestamps=False, batch_size=max(1, len(audios)))
        return [transcript.text for transcript in transcripts]

    def _advance(self, active: Sequence[_Recording], task: str) -> list[_Recording]:
        """Decodes one window of every active recording; returns those that are done."""
        groups: dict[tuple[bool, str | None], list[_Recording]] = {}
        for recording in active:
            groups.setdefault((recording.timestamps, recording.language), []).append(recording)
        for (timestamps, language), group in groups.items():
            device = next(self.model.parameters()).device
            decoded = self.adapter.transcribe(
                self.model,
                [torch.tensor(recording.window(), device=device) for recording in group],
                timestamps=timestamps,
                language=language,
                task=task,
            )
            for recording, result in zip(group, decoded, strict=True):
                self._take(recording, result)
        shortest = max(_SHORTEST, self.adapter.shortest)
        return [recording for recording in active if recording.done(shortest)]

    def _take(self, recording: _Recording, decoded: Decoded) -> None:
        offset = recording.position / SAMPLE_RATE
        span = min(WINDOW_SECONDS, recording.duration - offset)
        recording.language = recording.language or decoded.language
        advance: float | None = None
        if not (decoded.no_speech > NO_SPEECH and decoded.mean_logprob <= NO_SPEECH_LOGPROB):
            advance = decoded.advance
            for piece in decoded.segments:
                start, end = min(piece.start, span), min(piece.end, span)
                recording.segments.append(
                    Segment(round(offset + start, 3), round(offset + end, 3), piece.text)
                )
        recording.position += WINDOW_SAMPLES if advance is None else round(advance * SAMPLE_RATE)


def _fill(
    waiting: Iterator[tuple[int, Audio]],
    room: int,
    timestamps: bool,
    language: str | None,
    shortest: float,
) -> Iterator[_Recording]:
    """Opens the next recordings, no more than are decoded side by side: files are not all in memory."""
    for _ in range(room):
        item = next(waiting, None)
        if item is None:
            return
        index, audio = item
        samples = _samples(index, audio)
        if len(samples) < shortest * SAMPLE_RATE:
            raise AudioError(
                "the audio is shorter than one frame of the model",
                where=f"audio {index}" if isinstance(audio, np.ndarray) else audio,
                expected=f"at least {shortest:.3f} s",
                found=f"{len(samples) / SAMPLE_RATE:.3f} s",
            )
        yield _Recording(index, samples, timestamps or len(samples) > WINDOW_SAMPLES, language)


def _samples(index: int, audio: Audio) -> np.ndarray:
    if not isinstance(audio, np.ndarray):
        return load_audio(audio)
    check_samples(audio, f"audio {index}")
    return audio.astype(np.float32, copy=False)


def _transcript(recording: _Recording) -> Transcript:
    text = " ".join(segment.text for segment in recording.segments)
    return Transcript(text, tuple(recording.segments), recording.duration, recording.language or "en")


class _Progress:
    """Counts finished audio; files are asked for their length only if somebody listens."""

    def __init__(self, items: Sequence[Audio], callback: Callable[[float], None] | None) -> None:
        self._callback = callback
        self._seconds: list[float] = []
        self._finished = 0.0
        if callback is not None:
            self._seconds = [
                len(item) / SAMPLE_RATE if isinstance(item, np.ndarray) else audio_seconds(item)
                for item in items
            ]

    def finish(self, index: int) -> None:
        if self._callback is not None:
            self._finished += self._seconds[index]

    def report(self, positions: dict[int, float]) -> None:
        if self._callback is None:
            return
        running = sum(min(position, self._seconds[index]) for index, position in positions.items())
        total = sum(self._seconds)
        self._callback(min(1.0, (self._finished + running) / total) if total else 1.0)
