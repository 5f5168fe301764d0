import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from usmlite.data import Utterance
from usmlite.errors import DataError, OutputError
from usmlite.transcripts import transcribe_corpus, with_targets


class Teacher:
    """Says how long the audio was, and counts what it heard."""

    name = "teacher"

    def __init__(self) -> None:
        self.heard = 0

    def transcribe_batch(self, audios: list[np.ndarray]) -> list[str]:
        self.heard += len(audios)
        return [f"{len(audio) / 16000:.0f} seconds" for audio in audios]


@pytest.fixture
def speech(tmp_path: Path) -> list[Utterance]:
    out = []
    for number in range(1, 6):
        samples = np.random.default_rng(number).normal(0, 0.1, 16000 * number).astype(np.float32)
        soundfile.write(tmp_path / f"{number}.wav", samples, 16000)
        out.append(Utterance(str(number), tmp_path / f"{number}.wav", float(number)))
    return out


def test_every_utterance_is_transcribed_once(speech, tmp_path):
    teacher, path = Teacher(), tmp_path / "kept" / "transcripts.jsonl"
    done: list[tuple[int, int]] = []
    texts = transcribe_corpus(teacher, speech[:3], path, batch_size=2, progress=lambda *now: done.append(now))  # type: ignore[arg-type]
    assert texts == {"1": "1 seconds", "2": "2 seconds", "3": "3 seconds"}
    assert done == [(2, 3), (3, 3)]
    assert transcribe_corpus(teacher, speech, path)["5"] == "5 seconds"  # type: ignore[arg-type]
    assert teacher.heard == 5


def test_a_line_cut_off_by_a_kill_is_made_again(speech, tmp_path):
    teacher, path = Teacher(), tmp_path / "transcripts.jsonl"
    transcribe_corpus(teacher, speech, path)  # type: ignore[arg-type]
    whole = path.read_text()
    path.write_text(whole[:-10])
    texts = transcribe_corpus(teacher, speech, path)  # type: ignore[arg-type]
    assert teacher.heard == 6
    assert len(texts) == 5
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1", "teacher": "somebody", "text": "x"}', "transcripts of another teacher"),
        ('{"id": "1"}', "not a transcript"),
        ("gibberish", "not a transcript"),
        ("[1]", "not a transcript"),
    ],
)
def test_a_bad_line_is_named(speech, tmp_path, line, message):
    path = tmp_path / "transcripts.jsonl"
    good = json.dumps({"id": "2", "teacher": "teacher", "text": "x"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message) as caught:
        transcribe_corpus(Teacher(), speech, path)  # type: ignore[arg-type]
    assert f"{path}:2" in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(speech, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the transcripts"):
        transcribe_corpus(Teacher(), speech, tmp_path / "file" / "transcripts.jsonl")  # type: ignore[arg-type]


def test_targets_are_the_teachers_words_where_it_understood():
    utterances = [
        Utterance("right", Path("a"), 1.0, "MISTER SMITH WENT HOME"),
        Utterance("wrong", Path("b"), 1.0, "MISTER SMITH WENT HOME"),
        Utterance("empty", Path("c"), 1.0, None),
        Utterance("untold", Path("d"), 1.0, None),
    ]
    texts = {
        "right": "Mr. Smith went home.",
        "wrong": "Thank you for watching!",
        "empty": " ",
        "untold": "Hello.",
    }
    kept, left_out = with_targets(utterances, texts, max_wer=0.5)
    assert [(u.id, u.text) for u in kept] == [("right", "Mr. Smith went home."), ("untold", "Hello.")]
    assert left_out == 2
