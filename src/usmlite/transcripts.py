"""The teacher's own transcripts of the training speech, made once and kept in a file.

They are the better targets for distillation: the teacher's casing, punctuation and spelling of
numbers, where the corpus may be upper-case and bare; and speech without any text becomes usable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jiwer

from usmlite.audio import load_audio
from usmlite.data import Utterance
from usmlite.errors import DataError, OutputError
from usmlite.runtime import Recognizer
from usmlite.text import normalize


def transcribe_corpus(
    teacher: Recognizer,
    utterances: Sequence[Utterance],
    path: Path,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """The teacher's transcript of every utterance, from `path` where they are there already.

    Finished batches are appended to the file at once, so that a killed run goes on where it was.

    Args:
        teacher: the dense model.
        utterances: what to transcribe.
        path: JSONL file, one `{"id", "teacher", "text"}` a line.
        batch_size: utterances decoded together.
        progress: called with (done, total).

    Returns:
        Utterance id to text.

    Raises:
        DataError: the file holds another teacher's transcripts, or a bad line.
        OutputError: the file cannot be written.
    """
    texts = _read(path, teacher.name) if path.exists() else {}
    missing = sorted((u for u in utterances if u.id not in texts), key=lambda u: (u.duration, u.id))
    done = len(utterances) - len(missing)
    for low in range(0, len(missing), batch_size):
        batch = missing[low : low + batch_size]
        found = teacher.transcribe_batch([load_audio(u.audio) for u in batch])
        rows = [
            {"id": u.id, "teacher": teacher.name, "text": text} for u, text in zip(batch, found, strict=True)
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise OutputError("cannot write the transcripts", where=path, found=error.strerror) from None
        texts.update({row["id"]: row["text"] for row in rows})
        if progress is not None:
            progress(done + low + len(batch), len(utterances))
    return {u.id: texts[u.id] for u in utterances}


def _read(path: Path, teacher: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            owner, key, text = row["teacher"], row["id"], row["text"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                # A run killed while it wrote: the rest of this line never came.
                path.write_text("".join(lines[:-1]), encoding="utf-8")
                return texts
            raise DataError(
                "not a transcript",
                where=f"{path}:{number}",
                expected='{"id", "teacher", "text"}',
                remedy="Delete the file to have it made again.",
            ) from None
        if owner != teacher:
            raise DataError(
                "transcripts of another teacher",
                where=f"{path}:{number}",
                expected=teacher,
                found=owner,
                remedy="Name another file in data.transcripts, or delete this one.",
            )
        texts[key] = text
    return texts


def with_targets(
    utterances: Sequence[Utterance], transcripts: dict[str, str], *, max_wer: float
) -> tuple[list[Utterance], int]:
    """Utterances with the teacher's transcript as their text, less those the teacher got wrong.

    Args:
        utterances: with or without corpus text.
        transcripts: id to the teacher's text.
        max_wer: an utterance with corpus text is left out if the transcript's WER is higher.

    Returns:
        The utterances kept, and how many were left out (wrong or empty transcripts).
    """
    kept = []
    for utterance in utterances:
        text = transcripts[utterance.id].strip()
        if not text:
            continue
        if utterance.text is not None:
            reference = normalize(utterance.text)
            if not reference or jiwer.wer(reference, normalize(text)) > max_wer:
                continue
        kept.append(replace(utterance, text=text))
    return kept, len(utterances) - len(kept)
