"""Audio of any length to transcripts, with any model: dense, student or packed.

Long audio is read through 30-second windows. Each one is decoded with timestamps, and the next one
begins where the last complete segment ended (the seek rule of openai/whisper `transcribe.py`), so that
no word is cut in two. Windows of several files are decoded together; with voice activity detection, windows
of one file too.

Unlike openai/whisper, a window does not see the text before it unless that is asked for: files can then be
batched, and a mistake does not carry on into the next window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor, nn

from usmlite.audio import (
    SAMPLE_RATE,
    WINDOW_SAMPLES,
    WINDOW_SECONDS,
    audio_seconds,
    check_samples,
    load_audio,
)
from usmlite.errors import AudioError
from usmlite.models.fallback import is_silence
from usmlite.models.options import Options
from usmlite.streaming import Update, agreeing
from usmlite.vad import Pack, packs, speech

if TYPE_CHECKING:
    from usmlite.models import Adapter, Decoded, TimedText, Word
    from usmlite.models.adapter import Said

_SHORTEST = 0.1  # seconds; a rest shorter than this holds no word
_HELD_SECONDS = 3600.0  # of audio open at once, if it is more than one recording
# Above this temperature a text is too wild to be told to the next window (openai/whisper).
_MOST_REPEATED_TEMPERATURE = 0.5
_MOST_TOLD = 224  # segments, of a token at least: Whisper has room for fewer tokens

Audio: TypeAlias = str | Path | np.ndarray
DEFAULTS = Options()
GREEDY = Options(timestamps=False, beam_size=1, temperatures=(0.0,))
"""How word error rates are measured."""


@dataclass(frozen=True)
class Segment:
    """A piece of a transcript.

    Attributes:
        start: seconds from the start of the audio.
        end: seconds from the start of the audio.
        text: what is said.
        words: of it, with times from the start of the audio; None where nobody asked for them.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] | None = None


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


@dataclass(eq=False)
class _Part:
    """A recording on its way through the windows, or as much of it as is heard in one go.

    Attributes:
        recording: its number.
        samples: float32 `[samples]`.
        timestamps: whether it is decoded with them.
        language: code; None as long as it is a question.
        pack: where its speech was in the recording; None for all of it.
        position: samples that are done.
        segments: so far.
        said: what the next window is told was said before it.
    """

    recording: int
    samples: np.ndarray
    timestamps: bool
    language: str | None
    pack: Pack | None = None
    position: int = 0
    segments: list[Segment] = field(default_factory=list)
    said: Sequence[Said] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    def done(self, shortest: float) -> bool:
        """Whether nothing is left, or less than the shortest audio, in seconds, that holds a word."""
        rest = len(self.samples) - self.position
        return rest <= 0 or (self.position > 0 and rest < shortest * SAMPLE_RATE)

    def window(self) -> np.ndarray:
        return self.samples[self.position : self.position + WINDOW_SAMPLES]

    def take(self, decoded: Decoded, options: Options, *, conditioned: bool) -> None:
        """Keeps what was decoded from the window, and goes on to the next one."""
        offset = self.position / SAMPLE_RATE
        span = min(WINDOW_SECONDS, self.seconds - offset)
        self.language = self.language or decoded.language
        advance: float | None = None
        if not is_silence(decoded.no_speech, decoded.mean_logprob, options):
            advance = decoded.advance
            self.segments += [self._placed(piece, offset, span) for piece in decoded.segments]
            if conditioned and decoded.temperature <= _MOST_REPEATED_TEMPERATURE:
                self.said = [*self.said, *decoded.segments][-_MOST_TOLD:]
            elif conditioned:
                self.said = ()
        self.position += WINDOW_SAMPLES if advance is None else round(advance * SAMPLE_RATE)

    def _placed(self, piece: TimedText, offset: float, span: float) -> Segment:
        start, end = (offset + min(seconds, span) for seconds in (piece.start, piece.end))
        if self.pack is not None:
            start, end = self.pack.original(start), self.pack.original(end, ends=True)
        words = piece.words
        if words:
            words = tuple(self._placed_word(word, offset, span) for word in words)
            # Without the silence between the stretches, which a word cannot contain.
            if self.pack is not None:
                start, end = words[0].start, words[-1].end
        return Segment(round(start, 3), round(end, 3), piece.text, words)

    def _placed_word(self, word: Word, offset: float, span: float) -> Word:
        start, end = (offset + min(seconds, span) for seconds in (word.start, word.end))
        if self.pack is not None:
            start, end = self.pack.within(start, end)
        return replace(word, start=round(start, 3), end=round(end, 3))


@dataclass(frozen=True)
class Heard:
    """A segment, and the window that it was heard in.

    Attributes:
        segment: with times from the start of the audio.
        window: what was decoded from the window.
        offset: where the window begins, in seconds from the start of the audio.
    """

    segment: Segment
    window: Decoded
    offset: float


class Passage:
    """Audio on its way through the windows, for callers that decide what is decoded beside what.

    `Recognizer.begin` makes it, `Recognizer.advance` decodes its next window.

    Args:
        samples: float32 `[samples]`, mono, 16 kHz.
        options: what is asked for; its language is a code, or None as long as it is a question.
        shortest: seconds; a rest shorter than this holds no word.
        said: what was said before.
        conditioned: whether windows are told what was said in the ones before them.
    """

    def __init__(
        self, samples: np.ndarray, options: Options, *, shortest: float, said: str, conditioned: bool
    ) -> None:
        timed = options.timestamps or len(samples) > WINDOW_SAMPLES
        self.part = _Part(0, samples, timed, options.language, said=(said,) if said else ())
        self.heard: list[Heard] = []
        self._options = options
        self._shortest = shortest
        self._conditioned = conditioned

    @property
    def asked(self) -> Options:
        """What its next window is decoded with; windows that ask alike are decoded side by side."""
        return replace(self._options, timestamps=self.part.timestamps, language=self.part.language)

    @property
    def seconds(self) -> float:
        """The length of the audio."""
        return self.part.seconds

    @property
    def done(self) -> bool:
        """Whether all of it has been decoded."""
        return self.part.done(self._shortest)

    def take(self, window: Decoded) -> None:
        """Keeps what was decoded from the next window."""
        offset, before = self.part.position / SAMPLE_RATE, len(self.part.segments)
        self.part.take(window, self._options, conditioned=self._conditioned)
        self.heard += [Heard(segment, window, offset) for segment in self.part.segments[before:]]

    def transcript(self) -> Transcript:
        """What was said in as much of it as is decoded."""
        segments = tuple(self.part.segments)
        text = " ".join(segment.text for segment in segments)
        return Transcript(text, segments, self.part.seconds, self.part.language or "en")


@dataclass(eq=False)
class _Recording:
    """An open recording: its parts, and how many of them are left."""

    duration: float
    parts: list[_Part]
    left: int

    def transcript(self) -> Transcript:
        segments = tuple(segment for part in self.parts for segment in part.segments)
        language = next((part.language for part in self.parts if part.language), "en")
        return Transcript(" ".join(s.text for s in segments), segments, self.duration, language)

    def progress(self) -> float:
        """Seconds of the recording that are done."""
        total = sum(part.seconds for part in self.parts)
        done = sum(min(part.position / SAMPLE_RATE, part.seconds) for part in self.parts)
        return self.duration * done / total if total else self.duration


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
    def transcribe(
        self,
        audio: Audio,
        options: Options = ...,
        *,
        batch_size: int = ...,
        vad: bool = ...,
        condition_on_previous_text: bool = ...,
        progress: Callable[[float], None] | None = ...,
        **changes: Any,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Sequence[Audio],
        options: Options = ...,
        *,
        batch_size: int = ...,
        vad: bool = ...,
        condition_on_previous_text: bool = ...,
        progress: Callable[[float], None] | None = ...,
        **changes: Any,
    ) -> list[Transcript]: ...

    def transcribe(
        self, audio: Audio | Sequence[Audio], options: Options = DEFAULTS, **settings: Any
    ) -> Transcript | list[Transcript]:
        """Transcribes one recording or several, of any length.

        Args:
            audio: a file, or float32 mono samples at 16 kHz in -1 to 1, or a sequence of these.
            options: what is asked for, and how texts are searched for. Without timestamps, audio of up to
                30 s is decoded in one piece, as one segment; longer audio needs them to find its way.
            **settings: those of `transcribe_each`, and single options by their names: `beam_size=5`.

        Returns:
            One transcript, or a list of them in the order of `audio`.

        Raises:
            AudioError: a file or an array cannot be used.
            ModelError: the model does not know the language or the task, or cannot do what is asked.
        """
        single = isinstance(audio, (str, Path, np.ndarray))
        items: list[Audio] = [audio] if isinstance(audio, (str, Path, np.ndarray)) else list(audio)
        finished: dict[int, Transcript] = {}
        for index, result in self.transcribe_each(items, options, **settings):
            if isinstance(result, AudioError):
                raise result
            finished[index] = result
        transcripts = [finished[index] for index in range(len(items))]
        return transcripts[0] if single else transcripts

    def transcribe_each(
        self,
        audio: Sequence[Audio],
        options: Options = DEFAULTS,
        *,
        batch_size: int = 8,
        vad: bool = False,
        condition_on_previous_text: bool = False,
        progress: Callable[[float], None] | None = None,
        **changes: Any,
    ) -> Iterator[tuple[int, Transcript | AudioError]]:
        """Transcribes recordings side by side; each is there as soon as it is finished.

        Args:
            audio: files, or float32 mono samples at 16 kHz in -1 to 1. Files are opened in their turn.
            options: what is asked for, and how texts are searched for.
            batch_size: how many windows are decoded side by side.
            vad: hear only where somebody speaks, found by silero-vad (extra `vad`), stretches of one
                recording side by side. Silence then costs nothing, and no text is made up for it.
            condition_on_previous_text: tell each window what was said in the ones before it. Spelling is
                steadier; mistakes may carry on.
            progress: called with the fraction of the audio that is done, 0 to 1.
            **changes: single options by their names.

        Yields:
            The number of a recording, and its transcript or why there is none.

        Raises:
            ModelError: the model does not know the language or the task, or cannot do what is asked; or
                silero-vad is missing.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if vad and condition_on_previous_text:
            raise ValueError("with vad, stretches are heard side by side: nothing was said before them")
        options = replace(options, **changes)
        # Recordings of one language are decoded together: a language that is no question is not asked.
        language = self.adapter.language_code(options.language or self.adapter.only_language)
        options = replace(options, language=language)
        tracker = _Progress(audio, progress)
        waiting = self._opened(audio, options, vad=vad)
        recordings: dict[int, _Recording] = {}
        active: list[_Part] = []
        queue: list[_Part] = []
        more = True
        while True:
            while more and len(active) + len(queue) < batch_size and _held(recordings) < _HELD_SECONDS:
                index, opened = next(waiting, (-1, None))
                if opened is None:
                    more = False
                elif isinstance(opened, AudioError) or not opened.parts:
                    tracker.finish(index)
                    yield index, opened if isinstance(opened, AudioError) else opened.transcript()
                else:
                    recordings[index] = opened
                    queue += opened.parts
            while queue and len(active) < batch_size:
                active.append(queue.pop(0))
            if not active:
                return
            for part in self._advance(active, options, conditioned=condition_on_previous_text):
                active.remove(part)
                recordings[part.recording].left -= 1
                if not recordings[part.recording].left:
                    tracker.finish(part.recording)
                    yield part.recording, recordings.pop(part.recording).transcript()
            tracker.report(recordings)

    def stream(
        self,
        chunks: Iterable[np.ndarray],
        options: Options = DEFAULTS,
        *,
        every: float = 1.0,
        condition_on_previous_text: bool = False,
        **changes: Any,
    ) -> Iterator[Update]:
        """Transcribes audio while it arrives.

        Args:
            chunks: float32 mono samples at 16 kHz in -1 to 1, of any lengths, as they come.
            options: what is asked for, and how texts are searched for.
            every: seconds of new audio after which the text is made again.
            condition_on_previous_text: tell the model what was said before the audio that it hears again.
            **changes: single options by their names.

        Yields:
            What has become final since the last update, and what is likely to follow (see `Update`).

        Raises:
            ModelError: the model does not know the language or the task, or cannot do what is asked.
        """
        options = replace(options, **changes)
        language = self.adapter.language_code(options.language or self.adapter.only_language)
        options = replace(options, language=language, timestamps=True, word_timestamps=True)

        def hear(samples: np.ndarray, said: str) -> Sequence[TimedText]:
            part = _Part(0, samples, timestamps=True, language=language)
            part.said = (said,) if said and condition_on_previous_text else ()
            (found,) = self._decode([part], options)
            if is_silence(found.no_speech, found.mean_logprob, options):
                return ()
            return found.segments

        return agreeing(hear, chunks, every=every, shortest=self.adapter.shortest)

    def begin(
        self,
        samples: np.ndarray,
        options: Options = DEFAULTS,
        *,
        said: str = "",
        condition_on_previous_text: bool = False,
    ) -> Passage:
        """Audio whose windows are decoded one by one, by `advance`.

        Args:
            samples: float32 `[samples]`, mono, 16 kHz, in -1 to 1.
            options: what is asked for, and how texts are searched for.
            said: what the first window is told was said before it.
            condition_on_previous_text: tell each window what was said in the ones before it.

        Raises:
            AudioError: too short for the model to hear anything.
            ModelError: the model does not know the language.
        """
        self._check_length(samples, 0, samples)
        language = self.adapter.language_code(options.language or self.adapter.only_language)
        return Passage(
            samples,
            replace(options, language=language),
            shortest=max(_SHORTEST, self.adapter.shortest),
            said=said,
            conditioned=condition_on_previous_text,
        )

    def advance(self, passages: Sequence[Passage]) -> None:
        """Decodes the next window of each, side by side those that ask alike; none of them may be done.

        Raises:
            ModelError: the model cannot do what is asked. Passages that were not decoded are as before.
        """
        groups: dict[Options, list[Passage]] = {}
        for passage in passages:
            groups.setdefault(passage.asked, []).append(passage)
        for options, group in groups.items():
            for passage, window in zip(
                group, self._decode([each.part for each in group], options), strict=True
            ):
                passage.take(window)

    def languages_heard(self, audio: Audio) -> dict[str, float]:
        """The probability of every language that the model knows, from the first 30 seconds.

        Args:
            audio: a file, or float32 mono samples at 16 kHz in -1 to 1.

        Returns:
            Language code to probability, likeliest first.

        Raises:
            AudioError: the file or the array cannot be used.
            ModelError: the model does not tell languages.
        """
        return self.adapter.languages_heard(self.model, [self._tensor(_samples(0, audio)[:WINDOW_SAMPLES])])[
            0
        ]

    def transcribe_batch(self, audios: Sequence[np.ndarray], options: Options = GREEDY) -> list[str]:
        """Texts of recordings, the way word error rates are measured: greedily, once, if not told otherwise.

        Audio of up to 30 s is decoded in one piece without timestamps, longer audio window by window.

        Args:
            audios: float32 mono samples at 16 kHz, decoded side by side.
            options: what is asked for.

        Returns:
            One text for each of them, on one line.
        """
        transcripts = self.transcribe(list(audios), options, batch_size=max(1, len(audios)))
        return [transcript.text for transcript in transcripts]

    def _tensor(self, samples: np.ndarray) -> Tensor:
        return torch.tensor(samples, device=next(self.model.parameters()).device)

    def _opened(
        self, audio: Sequence[Audio], options: Options, *, vad: bool
    ) -> Iterator[tuple[int, _Recording | AudioError]]:
        """Opens recordings one after the other."""
        for index, item in enumerate(audio):
            try:
                samples = _samples(index, item)
                self._check_length(samples, index, item)
            except AudioError as error:
                yield index, error
                continue
            parts = self._packed(index, samples, options) if vad else [self._part(index, samples, options)]
            yield index, _Recording(len(samples) / SAMPLE_RATE, parts, len(parts))

    def _check_length(self, samples: np.ndarray, index: int, audio: Audio) -> None:
        shortest = self.adapter.shortest
        if len(samples) < shortest * SAMPLE_RATE:
            raise AudioError(
                "the audio is shorter than one frame of the model",
                where=f"audio {index}" if isinstance(audio, np.ndarray) else audio,
                expected=f"at least {shortest:.3f} s",
                found=f"{len(samples) / SAMPLE_RATE:.3f} s",
            )

    def _part(self, index: int, samples: np.ndarray, options: Options, pack: Pack | None = None) -> _Part:
        timed = options.timestamps or len(samples) > WINDOW_SAMPLES
        return _Part(index, samples, timed, options.language, pack)

    def _packed(self, index: int, samples: np.ndarray, options: Options) -> list[_Part]:
        found = [pack for pack in packs(speech(samples)) if pack.seconds >= self.adapter.shortest]
        parts = [self._part(index, pack.samples(samples), options, pack) for pack in found]
        if parts and options.language is None and self.adapter.tells_languages:
            # One language for all, as if they were heard one after the other.
            heard = self.adapter.languages_heard(self.model, [self._tensor(parts[0].samples)])[0]
            for part in parts:
                part.language = next(iter(heard))
        return parts

    def _advance(self, active: Sequence[_Part], options: Options, *, conditioned: bool) -> list[_Part]:
        """Decodes one window of every active part; returns those that are done."""
        groups: dict[tuple[bool, str | None], list[_Part]] = {}
        for part in active:
            groups.setdefault((part.timestamps, part.language), []).append(part)
        for group in groups.values():
            for part, decoded in zip(group, self._decode(group, options), strict=True):
                part.take(decoded, options, conditioned=conditioned)
        shortest = max(_SHORTEST, self.adapter.shortest)
        return [part for part in active if part.done(shortest)]

    def _decode(self, parts: Sequence[_Part], options: Options) -> list[Decoded]:
        """The next window of parts that are alike in language and timestamps."""
        return self.adapter.transcribe(
            self.model,
            [self._tensor(part.window()) for part in parts],
            replace(options, timestamps=parts[0].timestamps, language=parts[0].language),
            previous=[part.said for part in parts],
        )


def _held(recordings: dict[int, _Recording]) -> float:
    return sum(recording.duration for recording in recordings.values())


def _samples(index: int, audio: Audio) -> np.ndarray:
    if not isinstance(audio, np.ndarray):
        return load_audio(audio)
    check_samples(audio, f"audio {index}")
    return audio.astype(np.float32, copy=False)


class _Progress:
    """Counts finished audio; files are asked for their length only if somebody listens."""

    def __init__(self, items: Sequence[Audio], callback: Callable[[float], None] | None) -> None:
        self._callback = callback
        self._finished = 0.0
        self._seconds = [] if callback is None else [_seconds(item) for item in items]

    def finish(self, index: int) -> None:
        if self._callback is not None:
            self._finished += self._seconds[index]

    def report(self, recordings: dict[int, _Recording]) -> None:
        if self._callback is None:
            return
        running = sum(min(each.progress(), self._seconds[index]) for index, each in recordings.items())
        total = sum(self._seconds)
        self._callback(min(1.0, (self._finished + running) / total) if total else 1.0)


def _seconds(item: Audio) -> float:
    if isinstance(item, np.ndarray):
        return len(item) / SAMPLE_RATE
    try:
        return audio_seconds(item)
    except AudioError:
        return 0.0  # it is complained of when it is its turn
