"""The worst utterances."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from usmlite.report.records import Recordings, read_records
from usmlite.report.speech import Piece, align, worst_cards


@pytest.mark.parametrize(
    ("reference", "hypothesis", "pieces"),
    [
        ("a b c", "a x c", [("equal", "a", "a"), ("substitute", "b", "x"), ("equal", "c", "c")]),
        ("a b", "a", [("equal", "a", "a"), ("delete", "b", "")]),
        ("a", "a b c", [("equal", "a", "a"), ("insert", "", "b c")]),
        ("a b", "", [("delete", "a b", "")]),
        ("", "a b", [("insert", "", "a b")]),
        ("", "", []),
    ],
)
def test_alignment(reference: str, hypothesis: str, pieces: list[tuple[str, str, str]]) -> None:
    assert align(reference, hypothesis) == tuple(Piece(*piece) for piece in pieces)


def test_cards(study: Path) -> None:
    records, _ = read_records([study])
    missing: list[str] = []
    cards = worst_cards(records, Recordings(records), count=2, players=1, missing=missing)
    assert missing == []
    # Two errors in three words, then one in one; one in two is not among the worst two.
    assert [card.id for card in cards] == ["r2", "r1"]
    first = cards[0]
    assert (first.speaker, first.seconds, first.worst_of) == ("a", 1.0, ("int8", "trained"))
    dense, both = first.readings
    assert (dense.runs, dense.errors) == (("dense",), 0)
    assert (both.runs, both.errors, both.words) == (("int8", "trained"), 2, 3)
    assert [card.audio is not None for card in cards] == [True, False]
    assert first.audio is not None
    kind, _, data = first.audio.partition(",")
    assert kind == "data:audio/mpeg;base64"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 16_000
    assert len(samples) / rate == pytest.approx(1.0, abs=0.15)


def test_no_players_and_no_cards(study: Path) -> None:
    records, _ = read_records([study])
    recordings = Recordings(records)
    cards = worst_cards(records, recordings, count=5, players=0, missing=[])
    assert {card.id for card in cards} == {"r0", "r1", "r2"}
    assert all(card.audio is None for card in cards)
    assert worst_cards(records, recordings, count=0, players=5, missing=[]) == []


def test_audio_that_is_gone_is_named(study: Path, tmp_path: Path) -> None:
    records, _ = read_records([study])
    missing: list[str] = []
    worst_cards(records, Recordings([]), count=5, players=5, missing=missing)
    assert missing == ["audio of 3 of 3 utterances: not found; name their corpus with --data"]
    soundfile.write(tmp_path / "0.wav", np.ones(16_000, np.float32) / 9, 16_000)
    row = {"id": "r2", "audio_filepath": "0.wav", "text": "x", "duration": 1.0}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    recordings = Recordings([], [tmp_path])
    (tmp_path / "0.wav").write_bytes(b"RIFF")
    missing = []
    cards = worst_cards(records, recordings, count=1, players=5, missing=missing)
    assert cards[0].audio is None
    assert missing[0].startswith("audio of r2: ")


def test_long_recordings_are_cut_and_there_is_a_limit_to_all(study: Path, tmp_path: Path) -> None:
    records, _ = read_records([study])
    rng = np.random.default_rng(0)
    lines = []
    for name, seconds in (("r0", 26.0), ("r1", 19.0), ("r2", 27.0)):
        samples = rng.normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
        row = {"id": name, "audio_filepath": f"{name}.wav", "text": "x", "duration": seconds}
        lines.append(json.dumps(row))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    recordings = Recordings([], [tmp_path])
    cards = worst_cards(records, recordings, count=5, players=9, missing=[])
    assert {card.id: card.cut for card in cards} == {"r0": True, "r1": False, "r2": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("usmlite.report.speech._AUDIO_BYTES", 100_000)
        bounded = worst_cards(records, recordings, count=5, players=9, missing=[])
    assert 0 < sum(len(card.audio or "") for card in bounded) <= 100_000
    assert sum(len(card.audio or "") for card in cards) > 100_000


def test_a_model_that_repeats_itself_does_not_fill_the_page(study: Path) -> None:
    path = study / "int8/evaluation-packed.json"
    found = json.loads(path.read_text())
    found["utterances"][2] |= {"hypothesis": "for " * 500, "insertions": 497}
    path.write_text(json.dumps(found))
    records, _ = read_records([study])
    card = worst_cards(records, Recordings(records), count=1, players=0, missing=[])[0]
    reading = next(reading for reading in card.readings if reading.runs == ("int8",))
    shown = sum(len(piece.hypothesis.split()) for piece in reading.pieces)
    assert shown <= 160
    assert shown + reading.more == 500
