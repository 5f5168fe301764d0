"""Corpora of speech, and the 30-second windows that training reads.

A corpus is a JSONL manifest, a LibriSpeech directory as it unpacks, or a plain folder of audio; each
becomes a list of `Utterance`. Nothing outside the given path is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from usmlite.atomic import write_bytes
from usmlite.audio import (
    MIN_SECONDS,
    SAMPLE_RATE,
    SUFFIXES,
    WINDOW_SAMPLES,
    WINDOW_SECONDS,
    audio_seconds,
    load_audio,
)
from usmlite.errors import AudioError, DataError

MANIFEST_NAME = "manifest.jsonl"

_ACCEPTED = "a .jsonl manifest, a LibriSpeech folder or a folder of audio"
_TOLERANCE = (0.1, 0.02)  # a stated duration may be wrong by 0.1 s or by 2 %, whichever is more
_OPEN_WINDOWS = 64
_LIBRISPEECH_ID = re.compile(r"(\d+)-\d+-\d+")


@dataclass(frozen=True)
class Utterance:
    """One recording of speech.

    Attributes:
        id: unique in its corpus.
        audio: the audio file.
        duration: its length in seconds.
        text: what is said; None where nobody wrote it down.
        speaker: who says it; None where unknown.
        speed: how many times as fast it is played; the duration is that of the speech as it is played.
        snr_db: power of the speech over that of the noise in the recording, in dB; None where unknown.
    """

    id: str
    audio: Path
    duration: float
    text: str | None = None
    speaker: str | None = None
    speed: float = 1.0
    snr_db: float | None = None


@dataclass(frozen=True)
class Window:
    """Utterances that share one 30-second window.

    Attributes:
        utterances: in order of time.
        starts: where each begins, in seconds within the window.
    """

    utterances: tuple[Utterance, ...]
    starts: tuple[float, ...]


def load_corpus(path: str | Path, *, require_text: bool = False, check_files: bool = True) -> list[Utterance]:
    """Reads the list of a corpus's utterances, without their audio.

    Args:
        path: one of
            a JSONL manifest (`audio_filepath` relative to the manifest, and optionally `duration` in
            seconds, `text`, `id`, `speaker`, `snr_db`; other keys are ignored);
            a folder that holds a `manifest.jsonl`;
            a LibriSpeech folder as it unpacks (SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt), or any
            folder above it;
            a folder of audio files at any depth, with or without a .txt beside each.
        require_text: refuse utterances without text.
        check_files: open every audio file's header: it must exist, and a manifest's duration must
            agree with it. Folders are always checked, for their durations come from the headers.

    Returns:
        The utterances, in the manifest's order or sorted by path. Audio paths are absolute.

    Raises:
        DataError: naming the file and, where there is one, the line (counted from 1).
    """
    path = Path(path)
    if os.path.isdir(path):
        if os.path.exists(path / MANIFEST_NAME):
            return _read_manifest(path / MANIFEST_NAME, require_text, check_files)
        return _read_folder(path, require_text)
    if not os.path.exists(path):
        raise DataError("no such file or folder", where=path, expected=_ACCEPTED)
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise DataError("not a corpus", where=path, expected=_ACCEPTED)
    return _read_manifest(path, require_text, check_files)


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Writes a JSONL manifest that `load_corpus` reads, atomically.

    Args:
        path: the manifest; the audio must lie in its folder or below.
        utterances: what to list.

    Raises:
        DataError: an utterance's audio lies outside the manifest's folder.
        OutputError: the manifest cannot be written.
    """
    root = Path(os.path.realpath(Path(path).parent))
    lines = []
    for utterance in utterances:
        audio = Path(os.path.realpath(utterance.audio))
        if not audio.is_relative_to(root):
            raise DataError(
                "the audio lies outside the manifest's folder",
                where=path,
                expected=f"a file under {root}",
                found=audio,
                remedy="Write the manifest to a folder that holds all the audio.",
            )
        row: dict[str, object] = {
            "id": utterance.id,
            "audio_filepath": audio.relative_to(root).as_posix(),
            "duration": utterance.duration,
        }
        if utterance.speaker is not None:
            row["speaker"] = utterance.speaker
        if utterance.text is not None:
            row["text"] = utterance.text
        if utterance.snr_db is not None:
            row["snr_db"] = utterance.snr_db
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    write_bytes(path, "".join(lines).encode())


def describe_corpus(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """What tells whether two runs had the same speech: how much of it, and a checksum.

    Returns:
        `utterances`, `seconds`, and `sha256` over ids, lengths, speakers and texts in the given order; the
        audio itself is not read.
    """
    rows = [[u.id, round(u.duration, 3), u.speaker, u.text] for u in utterances]
    return {
        "utterances": len(utterances),
        "seconds": round(sum(u.duration for u in utterances), 3),
        "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def usable_for_training(
    utterances: Iterable[Utterance],
) -> tuple[list[Utterance], list[Utterance]]:
    """Splits utterances into those that fit a 30-second window and those that are too long.

    Returns:
        `(kept, too_long)`, each in the given order.
    """
    kept: list[Utterance] = []
    too_long: list[Utterance] = []
    for utterance in utterances:
        (kept if utterance.duration <= WINDOW_SECONDS else too_long).append(utterance)
    return kept, too_long


def pack_windows(
    utterances: Sequence[Utterance],
    *,
    seed: int,
    epoch: int,
    single_fraction: float = 0.1,
    max_gap: float = 0.5,
) -> list[Window]:
    """Packs utterances into 30-second windows, each utterance once, in a random order.

    First fit over a shuffled list, so that hardly any of a training step is spent on padding. Some
    windows hold one utterance only: the student also has to hear short audio followed by padding, as at
    test time. The result depends on the arguments alone, on every machine.

    Args:
        utterances: none longer than 30 s (`usable_for_training` sorts those out).
        seed: the run's seed.
        epoch: packs differently in each epoch.
        single_fraction: share of the windows, about, that hold one utterance taken at random. (A long
            utterance that nothing fits beside has its window to itself as well.)
        max_gap: longest silence put between two utterances, in seconds; 0 to `max_gap`, as fits.

    Returns:
        The windows, in random order.

    Raises:
        DataError: there is no utterance, or some are too long.
    """
    if not 0.0 <= single_fraction <= 1.0 or max_gap < 0.0:
        raise ValueError(f"single_fraction must be 0 to 1 and max_gap >= 0: {single_fraction}, {max_gap}")
    if not utterances:
        raise DataError("there is no utterance to train on", where="corpus")
    _, too_long = usable_for_training(utterances)
    if too_long:
        named = ", ".join(f"{u.id} ({u.duration:.1f} s)" for u in too_long[:5])
        more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        raise DataError(
            "utterances are too long for a training window",
            where=named + more,
            expected=f"at most {WINDOW_SECONDS:g} s",
            remedy="Cut them at pauses into shorter files, or leave them out.",
        )
    # Seeded by a string: Python promises the same shuffle for it on every version and platform.
    rng = random.Random(f"{seed}/{epoch}")
    order = list(utterances)
    rng.shuffle(order)
    # With s singles among n utterances and p = windows per utterance when packed, there are
    # s + (n - s) p windows; s is the share `single_fraction` of them.
    per_utterance = len(_first_fit(order, max_gap, random.Random(0))) / len(order)
    share = single_fraction
    singles = round(share * per_utterance * len(order) / (1.0 - share + share * per_utterance))
    windows = [Window((utterance,), (0.0,)) for utterance in order[:singles]]
    windows += _first_fit(order[singles:], max_gap, rng)
    rng.shuffle(windows)
    return windows


def by_length(windows: Sequence[Window], batch: int, *, first: int, seed: str) -> list[Window]:
    """Orders windows so that those of a batch are of like length, and hardly any of it is padding.

    Args:
        windows: of one epoch.
        batch: windows of a batch.
        first: windows of the epochs before, of which the last batch may be begun.
        seed: the batches come in an order drawn from it.

    Returns:
        The same windows.
    """
    begun = -first % batch
    ordered = list(windows[:begun])
    rest = sorted(windows[begun:], key=lambda w: w.starts[-1] + w.utterances[-1].duration)
    batches = [rest[low : low + batch] for low in range(0, len(rest), batch)]
    # One that is not full goes last, else all that follow would be cut elsewhere.
    last = [batches.pop()] if batches and len(batches[-1]) < batch else []
    random.Random(seed).shuffle(batches)
    return ordered + [window for one in (*batches, *last) for window in one]


def _first_fit(order: Sequence[Utterance], max_gap: float, rng: random.Random) -> list[Window]:
    windows: list[tuple[list[Utterance], list[float]]] = []
    unfilled: list[int] = []  # indices into windows, oldest first
    ends: list[float] = []
    for utterance in order:
        gap = rng.uniform(0.0, max_gap)
        for index in unfilled:
            room = WINDOW_SECONDS - ends[index] - utterance.duration
            if room >= 0.0:
                start = ends[index] + min(gap, room)
                break
        else:
            index, start = len(windows), 0.0
            windows.append(([], []))
            ends.append(0.0)
            unfilled.append(index)
            # A large corpus would otherwise search through thousands of nearly full windows.
            if len(unfilled) > _OPEN_WINDOWS:
                unfilled.remove(max(unfilled[:-1], key=lambda i: ends[i]))
        windows[index][0].append(utterance)
        windows[index][1].append(start)
        ends[index] = start + utterance.duration
    return [Window(tuple(held), tuple(starts)) for held, starts in windows]


def load_window(window: Window) -> np.ndarray:
    """Reads a window's audio.

    Returns:
        float32 `[480000]`: 30 s at 16 kHz, silence between and after the utterances.

    Raises:
        AudioError: an utterance's audio cannot be used.
        DataError: an utterance is longer than its duration says, and so runs into the next.
    """
    samples = np.zeros(WINDOW_SAMPLES, np.float32)
    firsts = [round(start * SAMPLE_RATE) for start in window.starts]
    for utterance, first, end in zip(window.utterances, firsts, [*firsts[1:], WINDOW_SAMPLES], strict=True):
        longest = (WINDOW_SECONDS + 1.0) * utterance.speed
        audio = load_audio(utterance.audio, max_seconds=longest, speed=utterance.speed)
        excess = first + len(audio) - end
        if excess > MIN_SECONDS * SAMPLE_RATE:
            raise DataError(
                "the audio is longer than its utterance's duration",
                where=utterance.audio,
                expected=f"{utterance.duration:.2f} s",
                found=f"{len(audio) / SAMPLE_RATE:.2f} s",
                remedy="Correct the manifest's duration, or load the corpus with check_files=True.",
            )
        samples[first : min(first + len(audio), end)] = audio[: end - first]
    return samples


def _read_manifest(path: Path, require_text: bool, check_files: bool) -> list[Utterance]:
    root = Path(os.path.realpath(path.parent))
    utterances = []
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        utterance = _parse_row(line, where, root, check_files)
        if utterance.text is None and require_text:
            raise DataError(
                "the utterance has no text",
                where=where,
                expected='a "text" key',
                remedy="Evaluation needs reference texts; only training can do without.",
            )
        if utterance.id in lines:
            raise DataError(
                f"duplicate id {utterance.id!r}",
                where=where,
                expected="an id of its own",
                found=f"the id of line {lines[utterance.id]}",
            )
        lines[utterance.id] = number
        utterances.append(utterance)
    if not utterances:
        raise DataError(
            "the manifest is empty",
            where=path,
            expected='one {"audio_filepath": ..., "duration": ..., "text": ...} a line',
            found="no line with anything on it",
        )
    return utterances


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, with their numbers from 1."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(
                        "not UTF-8 text", where=f"{path}, line {number}", found=str(error)
                    ) from error
                if line:
                    yield number, line
    except OSError as error:
        raise DataError("cannot be read", where=path, found=error.strerror) from error


def _parse_row(line: str, where: str, root: Path, check_files: bool) -> Utterance:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "not valid JSON", where=where, expected="one JSON object on the line", found=error
        ) from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object", where=where, found=_kind(row))
    given = _typed(row, "audio_filepath", str, where)
    if given is None:
        raise DataError(
            "no audio_filepath",
            where=where,
            expected='a key "audio_filepath"',
            found=f"the keys {', '.join(row) or '(none)'}",
        )
    audio = _inside(root, given, where)
    if row.get("offset"):
        raise DataError(
            "offsets into a longer recording are not supported",
            where=where,
            found=f"offset {row['offset']}",
            remedy="Cut the recording into one file for each utterance.",
        )
    duration = _typed(row, "duration", float, where)
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise DataError(
            "the duration is not a length", where=where, expected="seconds, above 0", found=duration
        )
    snr_db = _typed(row, "snr_db", float, where)
    if snr_db is not None and not math.isfinite(snr_db):
        raise DataError("snr_db is not a ratio", where=where, expected="decibels", found=snr_db)
    if check_files or duration is None:
        measured = _measure(audio, where)
        if duration is not None:
            _compare_durations(duration, measured, where, given)
        duration = measured
    return Utterance(
        id=_typed(row, "id", str, where) or Path(given).with_suffix("").as_posix(),
        audio=audio,
        duration=duration,
        text=_typed(row, "text", str, where),
        speaker=_typed(row, "speaker", str, where),
        snr_db=snr_db,
    )


def _typed(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = row.get(key)
    if value is None:
        return None
    good = isinstance(value, str) if kind is str else type(value) in (int, float)
    if not good:
        raise DataError(
            f"{key} has the wrong type",
            where=where,
            expected="text in quotes" if kind is str else "a number",
            found=_kind(value),
        )
    if kind is not str:
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if "\0" in value or not _encodable(value):
        raise DataError(f"{key} holds characters that are not text", where=where, found=ascii(value[:60]))
    return value


def _encodable(text: str) -> bool:
    # JSON's \ud800 escapes make strings that no file can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "text", type(None): "null"}
    return f"{names.get(type(value), 'a number')}: {json.dumps(value)[:60]}"


def _inside(root: Path, given: str, where: str) -> Path:
    """Resolves a path of a manifest and refuses what leads out of the manifest's folder."""
    if Path(given).is_absolute() or PureWindowsPath(given).anchor:
        raise DataError(
            "audio_filepath is absolute",
            where=where,
            expected="a path relative to the manifest",
            found=given,
            remedy=f"Put the manifest in a folder above the audio and write the path from there, "
            f"such as audio/{PureWindowsPath(given).name}.",
        )
    audio = Path(os.path.realpath(root / given))
    if not audio.is_relative_to(root):
        raise DataError(
            "audio_filepath leads out of the manifest's folder",
            where=where,
            expected=f"a file under {root}",
            found=f"{given} -> {audio}",
            remedy="Move or copy the audio into the manifest's folder; links and '..' may not leave it.",
        )
    return audio


def _measure(audio: Path, where: str | Path) -> float:
    try:
        return audio_seconds(audio)
    except AudioError as error:
        what = "the audio file is missing" if not os.path.exists(audio) else "the audio cannot be used"
        raise DataError(what, where=where, found=error) from error


def _compare_durations(stated: float, measured: float, where: str, given: str) -> None:
    difference = abs(stated - measured)
    if difference > _TOLERANCE[0] and difference > _TOLERANCE[1] * measured:
        raise DataError(
            f"the duration is wrong for {given}",
            where=where,
            expected=f"{measured:.3f} s by the audio's header",
            found=f"{stated:g} s",
            remedy="Correct or leave out the duration.",
        )


def _read_folder(folder: Path, require_text: bool) -> list[Utterance]:
    transcripts: list[Path] = []
    audio: list[Path] = []
    for file in _files(folder):
        if file.name.endswith(".trans.txt"):
            transcripts.append(file)
        elif file.suffix.lower() in SUFFIXES:
            audio.append(file)
    if not audio:
        raise DataError(
            "the folder holds no audio",
            where=folder,
            expected=f"{MANIFEST_NAME}, or files that end in {', '.join(SUFFIXES)}",
        )
    root = Path(os.path.realpath(folder))
    if transcripts:
        utterances = _librispeech(root, transcripts, audio)
    else:
        utterances = [_beside(root, file) for file in audio]
    sources: dict[str, Path] = {}
    for utterance in utterances:
        if utterance.id in sources:
            raise DataError(
                f"duplicate id {utterance.id!r}",
                where=utterance.audio,
                expected="a name of its own",
                found=f"the name of {sources[utterance.id]}",
                remedy="Rename or remove one of the two files.",
            )
        sources[utterance.id] = utterance.audio
        if utterance.text is None and require_text:
            raise DataError(
                "the audio has no text",
                where=utterance.audio,
                expected="its line in the .trans.txt" if transcripts else "a .txt file beside it",
                remedy="Evaluation needs reference texts; only training can do without.",
            )
    return [replace(u, duration=_measure(u.audio, u.audio)) for u in utterances]


def _files(folder: Path) -> Iterator[Path]:
    """Yields the folder's files, sorted, at any depth; hidden ones are left out, links must stay inside."""
    root = Path(os.path.realpath(folder))

    def refuse(error: OSError) -> None:
        raise DataError("cannot be read", where=error.filename, found=error.strerror) from error

    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        for name in folders + names:
            entry = Path(parent, name)
            if not entry.is_symlink():
                continue
            if name in folders or not Path(os.path.realpath(entry)).is_relative_to(root):
                raise DataError(
                    "a link in the folder is not followed",
                    where=entry,
                    found=f"a link to {os.path.realpath(entry)}",
                    remedy="Copy what it points to, or remove it.",
                )
        yield from (Path(parent, name) for name in names)


def _beside(root: Path, audio: Path) -> Utterance:
    beside = audio.with_suffix(".txt")
    text = None
    if os.path.isfile(beside):
        text = " ".join(line for _, line in _lines(beside))
    name = audio.relative_to(root).with_suffix("").as_posix()
    return Utterance(name, audio, 0.0, text)


def _librispeech(root: Path, transcripts: list[Path], audio: list[Path]) -> list[Utterance]:
    texts: dict[str, tuple[str, str]] = {}  # id -> text, place
    for file in transcripts:
        for number, line in _lines(file):
            where = f"{file}, line {number}"
            name, _, text = line.partition(" ")
            if name in texts:
                raise DataError(f"duplicate id {name!r}", where=where, found=f"the id of {texts[name][1]}")
            if not _LIBRISPEECH_ID.fullmatch(name) or not text.strip():
                raise DataError(
                    "not a line of a LibriSpeech transcript",
                    where=where,
                    expected="SPEAKER-CHAPTER-NUMBER THE TEXT",
                    found=line[:60],
                )
            texts[name] = (text.strip(), where)
    found = {file.stem for file in audio}
    for name, (_, where) in texts.items():
        if name not in found:
            raise DataError("the audio file is missing", where=where, expected=f"{name}.flac under {root}")
    utterances = []
    for file in audio:
        speaker = _LIBRISPEECH_ID.fullmatch(file.stem)
        utterances.append(
            Utterance(
                id=file.stem,
                audio=file,
                duration=0.0,
                text=texts[file.stem][0] if file.stem in texts else None,
                speaker=speaker.group(1) if speaker else None,
            )
        )
    return utterances
