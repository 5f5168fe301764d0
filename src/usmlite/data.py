"""Corpora of speech.

A corpus is a JSONL manifest, a LibriSpeech directory as it unpacks, a plain folder of audio, or shards (tar
files); each becomes a list of `Utterance`. Nothing outside the given path is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from usmlite import shards
from usmlite.atomic import write_bytes
from usmlite.audio import (
    SUFFIXES,
    WINDOW_SECONDS,
    audio_seconds,
)
from usmlite.errors import AudioError, DataError

MANIFEST_NAME = "manifest.jsonl"

_ACCEPTED = "a .jsonl manifest, a LibriSpeech folder, a folder of audio, or .tar shards"
_TOLERANCE = (0.1, 0.02)  # a stated duration may be wrong by 0.1 s or by 2 %, whichever is more
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


def load_corpus(path: str | Path, *, require_text: bool = False, check_files: bool = True) -> list[Utterance]:
    """Reads the list of a corpus's utterances, without their audio.

    Args:
        path: one of
            a JSONL manifest (`audio_filepath` relative to the manifest, and optionally `duration` in
            seconds, `text`, `id`, `speaker`, `snr_db`; other keys are ignored);
            a folder that holds a `manifest.jsonl`;
            a LibriSpeech folder as it unpacks (SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt), or any
            folder above it;
            a folder of audio files at any depth, with or without a .txt beside each;
            a .tar file, or a folder of them, as WebDataset packs them: NAME.flac (or .wav, ...) with
            NAME.txt or NAME.json (keys as in a manifest), nothing compressed.
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
        files = list(_files(path))
        tars = [file for file in files if file.suffix == shards.SUFFIX]
        if tars and not any(file.suffix.lower() in SUFFIXES for file in files):
            return _read_shards(tars, require_text, check_files)
        return _read_folder(path, files, require_text)
    if not os.path.exists(path):
        raise DataError("no such file or folder", where=path, expected=_ACCEPTED)
    if path.suffix == shards.SUFFIX:
        return _read_shards([Path(os.path.realpath(path))], require_text, check_files)
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
    return _utterance(row, audio, given, where, check_files)


def _utterance(row: dict[str, Any], audio: Path, given: str, where: str, check_files: bool) -> Utterance:
    """One line of a manifest, or what a shard says of a sample, whose audio is there."""
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
        there = os.path.exists(audio) or shards.shard_of(audio) is not None
        what = "the audio cannot be used" if there else "the audio file is missing"
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


def _read_folder(folder: Path, files: Sequence[Path], require_text: bool) -> list[Utterance]:
    transcripts: list[Path] = []
    audio: list[Path] = []
    for file in files:
        if file.name.endswith(".trans.txt"):
            transcripts.append(file)
        elif file.suffix.lower() in SUFFIXES:
            audio.append(file)
    if not audio:
        raise DataError(
            "the folder holds no audio",
            where=folder,
            expected=f"{MANIFEST_NAME}, or files that end in {', '.join(SUFFIXES)} or {shards.SUFFIX}",
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


def _read_shards(tars: Sequence[Path], require_text: bool, check_files: bool) -> list[Utterance]:
    utterances: dict[str, Utterance] = {}
    for tar in tars:
        with _reading(tar):
            found = shards.samples(tar)
        for name, parts in found.items():
            utterance = _sample(f"{tar}/{name}", name, parts, check_files)
            if utterance.id in utterances:
                raise DataError(
                    f"duplicate id {utterance.id!r}", where=utterance.audio, expected="a name of its own",
                    found=f"the name of {utterances[utterance.id].audio}",
                )  # fmt: skip
            if utterance.text is None and require_text:
                raise DataError(
                    "the audio has no text", where=utterance.audio,
                    expected=f"{name}.txt or {name}.json beside it",
                    remedy="Evaluation needs reference texts; only training can do without.",
                )  # fmt: skip
            utterances[utterance.id] = utterance
    if not utterances:
        raise DataError(
            "the shards hold no audio", where=tars[0], expected="NAME.flac and NAME.txt or NAME.json"
        )
    return list(utterances.values())


@contextmanager
def _reading(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            "the shard cannot be read", where=where, found=error, remedy="Pack it again, without compression."
        ) from error


def _sample(where: str, name: str, parts: Mapping[str, Path], check_files: bool) -> Utterance:
    """One utterance of a shard, from its files by their endings."""
    audio = [path for suffix, path in parts.items() if f".{suffix}" in SUFFIXES]
    if len(audio) != 1:
        raise DataError(
            "not a sample of speech", where=where, expected="one audio file",
            found=", ".join(path.name for path in parts.values()),
        )  # fmt: skip
    row: Any = {}
    if "json" in parts:
        try:
            with _reading(parts["json"]):
                row = json.loads(shards.read_member(parts["json"]))
        except (ValueError, RecursionError) as error:
            raise DataError("not valid JSON", where=parts["json"], found=error) from error
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=parts["json"], found=_kind(row))
    if "txt" in parts:
        try:
            with _reading(parts["txt"]):
                row["text"] = " ".join(shards.read_member(parts["txt"]).decode("utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text", where=parts["txt"], found=str(error)) from error
    return _utterance(row, audio[0], f"{name}{audio[0].suffix}", where, check_files)


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
