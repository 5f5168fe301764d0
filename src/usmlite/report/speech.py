"""The worst utterances: where the words differ, and how it sounds."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import jiwer
import soundfile

from usmlite.audio import SAMPLE_RATE, audio_seconds, load_audio
from usmlite.evaluate import UtteranceScore, worst_scores
from usmlite.report.records import DENSE, Record, Recordings, attempt

# Whole cards, and in each the words of one model: a model that repeats itself writes hundreds.
_MOST_CARDS, _MOST_WORDS = 16, 160
# What all players together may add to the page, as base64; and the longest that one plays.
_AUDIO_BYTES, _AUDIO_SECONDS = 600_000, 20.0
# Of 0 (best) to 1 (smallest): 24 kbit/s at 16 kHz, which every browser plays.
_COMPRESSION = 0.9


@dataclass(frozen=True)
class Piece:
    """Some words in a row that are right, or wrong in one way.

    Attributes:
        kind: "equal", "substitute", "delete" or "insert", as jiwer names them.
        reference: the words of the reference.
        hypothesis: the words that were written instead.
    """

    kind: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Reading:
    """What some models wrote down for an utterance, all of them the same.

    Attributes:
        runs: their names; "dense" for the dense model.
        errors: wrong words.
        words: words of the reference.
        pieces: its alignment with the reference.
        more: words left out at the end.
    """

    runs: tuple[str, ...]
    errors: int
    words: int
    pieces: tuple[Piece, ...]
    more: int = 0


@dataclass(frozen=True)
class Card:
    """One utterance that some model got wrong.

    Attributes:
        id: the utterance's.
        speaker: who says it, or None.
        seconds: its length, or None.
        reference: what is said, normalized.
        readings: what they wrote, the dense model first.
        worst_of: the runs that it is among the worst of.
        audio: an MP3 as a data URI; None where it is not there or would be too much.
        cut: whether the audio is only the beginning.
    """

    id: str
    speaker: str | None
    seconds: float | None
    reference: str
    readings: tuple[Reading, ...]
    worst_of: tuple[str, ...]
    audio: str | None = None
    cut: bool = False


def align(reference: str, hypothesis: str) -> tuple[Piece, ...]:
    """The words of two texts side by side, in the order of the reference."""
    if not reference.split() or not hypothesis.split():
        kind = "delete" if reference.split() else "insert"
        return (Piece(kind, reference, hypothesis),) if reference.split() or hypothesis.split() else ()
    found = jiwer.process_words(reference, hypothesis)
    left, right = found.references[0], found.hypotheses[0]
    return tuple(
        Piece(
            chunk.type,
            " ".join(left[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(right[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in found.alignments[0]
    )


def worst_cards(
    records: Sequence[Record], recordings: Recordings, *, count: int, players: int, missing: list[str]
) -> list[Card]:
    """The utterances that the runs got worst, the worst of each run first.

    Args:
        records: the runs.
        recordings: where the audio may be.
        count: how many of each run, at most.
        players: how many get their audio, at most.
        missing: gets lines about what is not there.
    """
    measured = [record for record in records if record.evaluation is not None]
    worst = {r.name: worst_scores(r.evaluation.utterances, count) for r in measured if r.evaluation}
    owners: dict[tuple[str, str], list[str]] = {}
    # Every run's worst comes before any run's second.
    for rank in zip_longest(*([(name, score) for score in scores] for name, scores in worst.items())):
        for name, score in filter(None, rank):
            owners.setdefault((score.id, score.reference), []).append(name)
    cards = [_card(key, names, measured, recordings) for key, names in list(owners.items())[:_MOST_CARDS]]
    return _with_audio(cards, recordings, players, missing)


def _card(key: tuple[str, str], owners: list[str], records: Sequence[Record], recordings: Recordings) -> Card:
    name, _ = key
    scores: dict[str, UtteranceScore] = {}
    for record in records:
        for model, evaluation in ((DENSE, record.dense), (record.name, record.evaluation)):
            if evaluation is not None and model not in scores:
                found = [score for score in evaluation.utterances if (score.id, score.reference) == key]
                scores |= {model: found[0]} if found else {}
    first = next(iter(scores.values()))
    alike: dict[str, list[str]] = {}
    for model, score in scores.items():
        alike.setdefault(score.hypothesis, []).append(model)
    known = recordings.find(name)
    return Card(
        name,
        first.speaker,
        first.seconds if first.seconds is not None else known.duration if known else None,
        first.reference,
        tuple(_reading(models, scores[models[0]]) for models in alike.values()),
        tuple(owners),
    )


def _reading(models: Sequence[str], score: UtteranceScore) -> Reading:
    kept: list[Piece] = []
    room = _MOST_WORDS
    pieces = align(score.reference, score.hypothesis)
    for piece in pieces:
        if room <= 0:
            break
        left, right = piece.reference.split()[:room], piece.hypothesis.split()[:room]
        kept.append(Piece(piece.kind, " ".join(left), " ".join(right)))
        room -= max(len(left), len(right))
    shown = sum(len(piece.hypothesis.split()) for piece in kept)
    more = len(score.hypothesis.split()) - shown
    return Reading(tuple(models), score.errors, score.words, tuple(kept), more)


def _with_audio(cards: list[Card], recordings: Recordings, players: int, missing: list[str]) -> list[Card]:
    out, room, absent = [], _AUDIO_BYTES, 0
    for card in cards:
        utterance = recordings.find(card.id)
        if utterance is None:
            absent += 1
        elif players > 0:
            clip = attempt(missing, f"audio of {card.id}", partial(_mp3, utterance.audio))
            if clip is not None and len(clip[0]) <= room:
                players, room = players - 1, room - len(clip[0])
                card = replace(card, audio=clip[0], cut=clip[1])
        out.append(card)
    if absent:
        missing.append(
            f"audio of {absent} of {len(cards)} utterances: not found; name their corpus with --data"
        )
    return out


def _mp3(path: Path) -> tuple[str, bool]:
    """The beginning of a recording as a data URI, and whether more would follow."""
    cut = audio_seconds(path) > _AUDIO_SECONDS
    samples = load_audio(path, seconds=_AUDIO_SECONDS if cut else None)
    target = io.BytesIO()
    soundfile.write(
        target, samples, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III",
        compression_level=_COMPRESSION, bitrate_mode="CONSTANT",
    )  # fmt: skip
    return f"data:audio/mpeg;base64,{base64.b64encode(target.getvalue()).decode()}", cut
