"""Recordings, folders of them, or a microphone, to transcripts on the console or in files."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from usmlite.atomic import write_bytes
from usmlite.audio import SUFFIXES
from usmlite.errors import AudioError, OutputError
from usmlite.formats import FORMATS, HIGHLIGHTED
from usmlite.models import Options, Word
from usmlite.runtime import Recognizer, Segment, Transcript
from usmlite.streaming import Update

_PAUSE = 1.0  # seconds without a word after which the microphone's text goes on in a new line


def recordings(paths: Sequence[Path]) -> dict[Path, Path]:
    """Audio files, those of folders too, each with the name that its transcript has in an output folder.

    Args:
        paths: files, which need not exist, and folders, which are searched with all that is in them.

    Returns:
        File to relative name without ending.

    Raises:
        AudioError: a folder holds no audio.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            found.setdefault(path, Path(path.name.removesuffix(path.suffix)))
            continue
        inside = sorted(
            each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file()
        )
        if not inside:
            raise AudioError("no audio in this folder", where=path, expected=", ".join(SUFFIXES))
        for each in inside:
            name = each.relative_to(path)
            found.setdefault(each, name.parent / name.name.removesuffix(name.suffix))
    return found


@dataclass
class Output:
    """Where transcripts go.

    Attributes:
        formats: endings of `FORMATS`.
        folder: where files go; None for the console.
        highlight: whether subtitles underline the word that is spoken.
        headings: whether the console says which recording a text is of.
    """

    formats: Sequence[str]
    folder: Path | None = None
    highlight: bool = False
    headings: bool = False

    def prepare(self, names: dict[Path, Path]) -> None:
        """Makes the folder.

        Raises:
            OutputError: it cannot be made, or two recordings would share one transcript.
        """
        if self.folder is None:
            return
        taken: dict[Path, Path] = {}
        for path, name in names.items():
            if name in taken:
                raise OutputError(
                    "two recordings would share one transcript",
                    where=f"{self.folder / name}.{self.formats[0]}",
                    found=f"{taken[name]} and {path}",
                    remedy="Rename one, or give them different directories.",
                )
            taken[name] = path
        try:
            for name in names.values():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError("cannot make the directory", where=self.folder, found=error.strerror) from None

    def deliver(self, transcript: Transcript, path: Path | str, name: Path) -> None:
        """Writes or prints one transcript."""
        for ending in self.formats:
            text = self.text(transcript, ending)
            if self.folder is not None:
                write_bytes(f"{self.folder / name}.{ending}", text.encode())
            elif self.headings:
                print(f"==> {path} <==\n{text}", flush=True)
            else:
                print(text, end="", flush=True)

    def text(self, transcript: Transcript, ending: str) -> str:
        """A transcript in one format."""
        writer = HIGHLIGHTED.get(ending) if self.highlight else None
        return (writer or FORMATS[ending])(transcript)


@dataclass
class Outcome:
    """What became of several recordings: how many have their transcript, and why the others have none."""

    written: int = 0
    bad: list[AudioError] = field(default_factory=list)


def transcribe_files(
    recognizer: Recognizer,
    names: dict[Path, Path],
    output: Output,
    outcome: Outcome,
    options: Options,
    **settings: Any,
) -> None:
    """Transcribes files, and goes on past those that cannot be read.

    Transcripts are written to files as soon as they are there, and printed in order. Whatever ends this,
    Ctrl-C too, those that are finished are delivered.

    Args:
        recognizer: the model.
        names: files, see `recordings`.
        output: where transcripts go.
        outcome: told what became of them, also if this is interrupted.
        options: what is asked for.
        **settings: see `Recognizer.transcribe_each`.

    Raises:
        OutputError: a place cannot be written.
        ModelError: the model cannot do what is asked.
    """
    paths = list(names)
    waiting: dict[int, Transcript | AudioError] = {}
    next_up = 0

    def deliver(index: int, result: Transcript | AudioError) -> None:
        if isinstance(result, AudioError):
            outcome.bad.append(result)
            return
        output.deliver(result, paths[index], names[paths[index]])
        outcome.written += 1

    try:
        for index, result in recognizer.transcribe_each(paths, options, **settings):
            waiting[index] = result
            while next_up in waiting and output.folder is None:
                deliver(next_up, waiting.pop(next_up))
                next_up += 1
            if output.folder is not None:
                deliver(index, waiting.pop(index))
    finally:
        for index in sorted(waiting):
            deliver(index, waiting.pop(index))


class Source(Protocol):
    """Audio that comes until it is stopped."""

    def stop(self) -> None:
        """Lets it end."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Chunks of float32 mono samples at 16 kHz."""


def transcribe_live(
    recognizer: Recognizer,
    source: Source,
    options: Options,
    show: Callable[[Update], None],
    *,
    every: float = 1.0,
) -> Transcript:
    """Transcribes audio while it comes, until Ctrl-C; a second Ctrl-C does not wait for the last words.

    Args:
        recognizer: the model.
        source: such as a `Microphone`.
        options: what is asked for.
        show: given every update.
        every: see `Recognizer.stream`.

    Returns:
        All of it; a segment ends where a second passed without a word.
    """
    words: list[Word] = []
    seconds = 0.0
    with _stopping(source):
        for update in recognizer.stream(source, options, every=every):
            show(update)
            words += update.words
            seconds = update.seconds
    segments = tuple(_segments(words, keep=options.word_timestamps))
    language = recognizer.adapter.language_code(options.language or recognizer.adapter.only_language)
    return Transcript(" ".join(each.text for each in segments), segments, seconds, language or "und")


@contextmanager
def _stopping(source: Source) -> Iterator[None]:
    """Ctrl-C stops the source; once more, and it is an interrupt again."""

    def stop(number: int, frame: FrameType | None) -> None:
        source.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _segments(words: Iterable[Word], *, keep: bool) -> Iterator[Segment]:
    """Words to segments, cut at pauses and at the ends of sentences."""
    group: list[Word] = []

    def segment() -> Segment:
        text = "".join(word.word for word in group).strip()
        return Segment(group[0].start, group[-1].end, text, tuple(group) if keep else None)

    for word in words:
        if group and (word.start - group[-1].end >= _PAUSE or group[-1].word.endswith((".", "?", "!"))):
            yield segment()
            group = []
        group.append(word)
    if group:
        yield segment()


class LiveText:
    """Text on a console while it comes: what is final stays, what may change is shown after it, dim.

    Where standard output is no terminal, only what is final is written.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._shown = 0
        self._ended = 0.0
        self._begun = False

    def __call__(self, update: Update) -> None:
        """Shows an update."""
        self._clear()
        for word in update.words:
            if self._begun and word.start - self._ended >= _PAUSE:
                print()
                self._begun = False
            print(word.word if self._begun else word.word.lstrip(), end="")
            self._begun, self._ended = True, word.end
        if self._terminal and update.partial:
            # Only as much as the eye needs: a line that wraps could not be taken back.
            partial = update.partial[-60:]
            print(f"\x1b7\x1b[2m{partial}\x1b[0m\x1b8", end="")
            self._shown = len(partial)
        sys.stdout.flush()

    def close(self) -> None:
        """Ends the line."""
        self._clear()
        if self._begun:
            print(flush=True)

    def _clear(self) -> None:
        if self._shown:
            print("\x1b[0J", end="")
            self._shown = 0
