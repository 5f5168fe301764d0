"""Word error rate of anything that transcribes, and whether two of them differ.

Dense models, students and packed models are all scored by `evaluate`, through one callable, so that a
difference between two results is a difference between the models.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np
import torch

from usmlite import __version__, kernels
from usmlite.audio import SAMPLE_RATE, load_audio
from usmlite.data import Utterance
from usmlite.errors import DataError
from usmlite.memory import PeakMemory
from usmlite.text import normalize

BOOTSTRAP_SAMPLES = 10_000

_CHUNK = 2**22  # resampled utterances held at once: 32 MiB an array


@dataclass(frozen=True)
class UtteranceScore:
    """One utterance's words. Both texts are normalized; `words` counts the reference's.

    `seconds` and `snr_db` are those of `data.Utterance`; None where an earlier version did not keep them.
    """

    id: str
    speaker: str | None
    reference: str
    hypothesis: str
    substitutions: int
    deletions: int
    insertions: int
    words: int
    seconds: float | None = None
    snr_db: float | None = None

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on one set of utterances.

    Attributes:
        name: the model's.
        wer: word error rate as a fraction: errors over reference words.
        ci95: its 95 % confidence interval, by bootstrap over utterances.
        substitutions: words replaced.
        deletions: reference words missing.
        insertions: words that the reference does not have.
        reference_words: words in all normalized references.
        audio_seconds: length of all audio.
        wall_seconds: time spent in the model, without reading and decoding the audio files.
        real_time_factor: `wall_seconds` over `audio_seconds`; below 1 is faster than speech.
        peak_memory_bytes: highest resident memory of the whole process; since when, and how it was
            measured, stands in `machine["memory"]`.
        weights_bytes: size of the model's weights file.
        speakers: for each known speaker `wer` (None without words), `words`, `errors`, `utterances`.
        utterances: each utterance's score, in the given order.
        machine: processor, cores, threads, GPU, operating system, and the arithmetic if it was told.
        versions: of Python and the libraries that can change a result.
    """

    name: str
    wer: float
    ci95: tuple[float, float]
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    audio_seconds: float
    wall_seconds: float
    real_time_factor: float
    peak_memory_bytes: int
    weights_bytes: int
    speakers: dict[str, dict[str, float | int | None]]
    utterances: tuple[UtteranceScore, ...]
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def utterance_count(self) -> int:
        """How many utterances were scored."""
        return len(self.utterances)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`, with `utterance_count` added."""
        plain = dataclasses.asdict(self)
        plain["ci95"] = list(self.ci95)
        utterances = list(plain.pop("utterances"))
        return {**plain, "utterance_count": self.utterance_count, "utterances": utterances}

    @classmethod
    def from_json(cls, plain: Any, where: str = "evaluation") -> Evaluation:
        """Reads back what `to_json` returned.

        Args:
            plain: the parsed JSON.
            where: the file's name, for an error.

        Raises:
            DataError: it is not an evaluation.
        """
        try:
            values = {field.name: plain[field.name] for field in dataclasses.fields(cls)}
            low, high = values["ci95"]
            values["ci95"] = (float(low), float(high))
            known = {field.name for field in dataclasses.fields(UtteranceScore)}
            values["utterances"] = tuple(
                # A later version may have kept more.
                UtteranceScore(**{key: value for key, value in score.items() if key in known})
                for score in values["utterances"]
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                "not an evaluation",
                where=where,
                expected="the JSON that `usmlite evaluate` writes",
                found=f"{type(error).__name__}: {error}",
            ) from error
        return cls(**values)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same utterances; positive differences mean that the candidate is worse.

    Attributes:
        candidate: the name of the model in question.
        baseline: the name of the model it is held against.
        candidate_wer: as a fraction.
        baseline_wer: as a fraction.
        difference: candidate's WER less the baseline's, as a fraction.
        ci95: 95 % confidence interval of `difference`.
        relative_difference: `difference` over the baseline's WER; None where that is 0.
        relative_ci95: `ci95` over the baseline's WER; None where that is 0.
        p_value: two-sided; the chance of a difference at least so far from 0 if there were none.
        same_transcripts: share of utterances with the same normalized transcript.
        utterance_count: how many utterances were compared.
        samples: bootstrap resamples.
    """

    candidate: str
    baseline: str
    candidate_wer: float
    baseline_wer: float
    difference: float
    ci95: tuple[float, float]
    relative_difference: float | None
    relative_ci95: tuple[float, float] | None
    p_value: float
    same_transcripts: float
    utterance_count: int
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`."""
        return dataclasses.asdict(self)


def evaluate(
    transcribe: Callable[[Sequence[np.ndarray]], list[str]],
    utterances: Sequence[Utterance],
    *,
    name: str,
    weights_bytes: int,
    batch_size: int = 16,
    arithmetic: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Transcribes utterances and scores the words.

    Batches hold utterances of similar length, longest first: what does not fit into memory fails at
    once. One batch of audio is in memory at a time.

    Args:
        transcribe: takes a batch of audio (float32 `[samples]`, 16 kHz mono, any length) and returns
            its texts.
        utterances: all with text.
        name: the model's name in the result.
        weights_bytes: size of the model's weights file.
        batch_size: utterances handed to `transcribe` at a time.
        arithmetic: what the model computes with (`packed.arithmetic`), for the result's `machine`.
        progress: called with (utterances done, utterances in all) after each batch.

    Returns:
        The scores. The confidence interval comes from 10,000 resamples with a fixed seed.

    Raises:
        DataError: there are no utterances, some have no text, or no reference has a word.
        AudioError: an audio file cannot be used.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    references = _references(utterances)
    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration)
    texts = [""] * len(utterances)
    audio_samples = 0
    wall = 0.0
    memory = PeakMemory()
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        audio = [load_audio(utterances[i].audio) for i in batch]
        audio_samples += sum(map(len, audio))
        started = time.perf_counter()
        answers = transcribe(audio)
        wall += time.perf_counter() - started
        if len(answers) != len(batch):
            raise ValueError(f"transcribe returned {len(answers)} texts for {len(batch)} recordings")
        for i, answer in zip(batch, answers, strict=True):
            texts[i] = answer
        if progress is not None:
            progress(first + len(batch), len(order))
    peak, how = memory.read()
    scores = _score(utterances, references, [normalize(text) for text in texts])
    words = sum(score.words for score in scores)
    audio_seconds = audio_samples / SAMPLE_RATE
    return Evaluation(
        name=name,
        wer=sum(score.errors for score in scores) / words,
        ci95=_interval(_bootstrap([_counts(scores)], BOOTSTRAP_SAMPLES, seed=0)[0]),
        substitutions=sum(score.substitutions for score in scores),
        deletions=sum(score.deletions for score in scores),
        insertions=sum(score.insertions for score in scores),
        reference_words=words,
        audio_seconds=audio_seconds,
        wall_seconds=wall,
        real_time_factor=wall / audio_seconds,
        peak_memory_bytes=peak,
        weights_bytes=weights_bytes,
        speakers=_by_speaker(scores),
        utterances=tuple(scores),
        machine={**describe_machine(), "memory": how, "arithmetic": arithmetic},
        versions=describe_versions(),
    )


def compare(
    candidate: Evaluation,
    baseline: Evaluation,
    *,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compares two evaluations of the same utterances by a paired bootstrap.

    Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP
    2004: utterances are drawn with replacement, the same ones for both models, and the difference of
    the two WERs is taken each time. The interval is that of the middle 95 % of the differences. The
    two-sided p-value is twice the share (1 + count) / (1 + samples) of differences at or beyond 0 on the
    rarer side, at most 1; it is never smaller than so many resamples can tell.

    Args:
        candidate: the evaluation in question.
        baseline: the one it is held against.
        samples: how many resamples.
        seed: for the resamples.

    Raises:
        DataError: the two are not of the same utterances with the same reference texts.
    """
    ours, theirs = _paired(candidate, baseline)
    drawn_ours, drawn_theirs = _bootstrap([_counts(ours), _counts(theirs)], samples, seed)
    differences = drawn_ours - drawn_theirs
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    low, high = _interval(differences)
    difference = candidate.wer - baseline.wer
    base = baseline.wer
    same = sum(a.hypothesis == b.hypothesis for a, b in zip(ours, theirs, strict=True))
    return Comparison(
        candidate=candidate.name,
        baseline=baseline.name,
        candidate_wer=candidate.wer,
        baseline_wer=base,
        difference=difference,
        ci95=(low, high),
        relative_difference=difference / base if base else None,
        relative_ci95=(low / base, high / base) if base else None,
        p_value=min(1.0, 2 * (1 + rarer) / (1 + samples)),
        same_transcripts=same / len(ours),
        utterance_count=len(ours),
        samples=samples,
    )


def score_together(
    scores: Sequence[UtteranceScore], *, samples: int = 1_000, seed: int = 0
) -> tuple[float, tuple[float, float]] | None:
    """WER of some utterances, as a fraction, and its 95 % confidence interval by bootstrap over them.

    Args:
        scores: the utterances, at least one.
        samples: how many resamples.
        seed: for the resamples.

    Returns:
        None where no reference has a word.
    """
    words = sum(score.words for score in scores)
    if not words:
        return None
    drawn = _bootstrap([_counts(scores)], samples, seed)[0]
    return sum(score.errors for score in scores) / words, _interval(drawn)


def worst_scores(scores: Iterable[UtteranceScore], count: int) -> list[UtteranceScore]:
    """At most `count` utterances with the most errors, the worst first; those without errors are left out."""
    wrong = [score for score in scores if score.errors]
    return sorted(wrong, key=lambda score: (-score.errors, score.words, score.id))[:count]


def worst(evaluation: Evaluation, count: int) -> list[str]:
    """Shows the utterances with the most errors, each with its alignment.

    Args:
        evaluation: what `evaluate` returned.
        count: how many, at most; utterances without errors are left out.

    Returns:
        For each a few lines of text: id, counts, and reference over hypothesis.
    """
    return [_show(score) for score in worst_scores(evaluation.utterances, count)]


def describe_machine() -> dict[str, Any]:
    """Returns what a speed depends on: processor, cores, torch's threads, kernels, GPU, operating system."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        gpu = "Apple GPU (MPS)"
    return {
        "cpu": _processor(),
        "cores": usable,
        "torch_threads": torch.get_num_threads(),
        "kernels": kernels.implementation(),
        "gpu": gpu,
        "os": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that can change a result."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "jiwer", "numpy"):
        versions[package] = importlib.metadata.version(package)
    # Its metadata are not there where it runs from a checkout's src folder.
    versions["usmlite"] = __version__
    return versions


def _references(utterances: Sequence[Utterance]) -> list[str]:
    if not utterances:
        raise DataError("there is no utterance to evaluate on", where="corpus")
    references = []
    for utterance in utterances:
        if utterance.text is None:
            raise DataError(
                "the utterance has no text",
                where=utterance.id,
                remedy="Evaluation needs a reference text for every utterance.",
            )
        references.append(normalize(utterance.text))
    if not any(references):
        raise DataError(
            "no reference text has a word left after normalization",
            where="corpus",
            expected="transcripts of speech",
            found=repr(utterances[0].text),
        )
    return references


def _score(
    utterances: Sequence[Utterance], references: list[str], hypotheses: list[str]
) -> list[UtteranceScore]:
    scores = []
    for utterance, reference, hypothesis in zip(utterances, references, hypotheses, strict=True):
        # An empty reference is allowed: each word heard in it is an insertion.
        words = jiwer.process_words(reference, hypothesis)
        scores.append(
            UtteranceScore(
                id=utterance.id,
                speaker=utterance.speaker,
                reference=reference,
                hypothesis=hypothesis,
                substitutions=words.substitutions,
                deletions=words.deletions,
                insertions=words.insertions,
                words=len(reference.split()),
                seconds=round(utterance.duration, 3),
                snr_db=utterance.snr_db,
            )
        )
    return scores


def _by_speaker(scores: Sequence[UtteranceScore]) -> dict[str, dict[str, float | int | None]]:
    groups: dict[str, list[UtteranceScore]] = {}
    for score in scores:
        if score.speaker is not None:
            groups.setdefault(score.speaker, []).append(score)
    speakers: dict[str, dict[str, float | int | None]] = {}
    for speaker in sorted(groups):
        errors = sum(score.errors for score in groups[speaker])
        words = sum(score.words for score in groups[speaker])
        speakers[speaker] = {
            "wer": errors / words if words else None,
            "words": words,
            "errors": errors,
            "utterances": len(groups[speaker]),
        }
    return speakers


def _counts(scores: Sequence[UtteranceScore]) -> np.ndarray:
    """Errors and reference words, int64 `[2, utterances]`."""
    return np.array([[s.errors for s in scores], [s.words for s in scores]], dtype=np.int64)


def _bootstrap(counts: Sequence[np.ndarray], samples: int, seed: int) -> list[np.ndarray]:
    """WERs of resampled sets, float64 `[samples]` for each of `counts`, all drawn alike."""
    utterances = counts[0].shape[1]
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // utterances)
    drawn: list[list[np.ndarray]] = [[] for _ in counts]
    for first in range(0, samples, rows):
        picks = rng.integers(utterances, size=(min(rows, samples - first), utterances))
        for wers, (errors, words) in zip(drawn, counts, strict=True):
            # A draw of nothing but empty references has no WER; its errors then count as they are.
            wers.append(errors[picks].sum(axis=1) / np.maximum(words[picks].sum(axis=1), 1))
    return [np.concatenate(wers) for wers in drawn]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _paired(candidate: Evaluation, baseline: Evaluation) -> tuple[list[UtteranceScore], list[UtteranceScore]]:
    where = f"{candidate.name} against {baseline.name}"
    remedy = "Evaluate both on the same data."
    others = {score.id: score for score in baseline.utterances}
    ours = list(candidate.utterances)
    unmatched = sorted({score.id for score in ours} ^ others.keys())
    if unmatched:
        raise DataError(
            "the two were not evaluated on the same utterances",
            where=where,
            expected=f"the {len(others)} utterances of {baseline.name}",
            found=f"{len(ours)}; {len(unmatched)} in only one of the two, such as {unmatched[0]}",
            remedy=remedy,
        )
    for score in ours:
        if score.reference != others[score.id].reference:
            raise DataError(
                f"the two were evaluated on different texts of utterance {score.id}",
                where=where,
                expected=repr(others[score.id].reference),
                found=repr(score.reference),
                remedy=remedy,
            )
    return ours, [others[score.id] for score in ours]


def _show(score: UtteranceScore) -> str:
    title = (
        f"{score.id}: {score.errors} errors in {score.words} words ({score.substitutions} substituted, "
        f"{score.deletions} deleted, {score.insertions} inserted)"
    )
    words = jiwer.process_words(score.reference, score.hypothesis)
    drawn = jiwer.visualize_alignment(words, show_measures=False, line_width=100)
    lines = [line.rstrip() for line in drawn.splitlines() if line.strip()]
    return "\n".join([title, *lines[1:]])  # without "=== SENTENCE 1 ==="


def _processor() -> str:
    for line in _lines_of("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _lines_of(path: str) -> Iterator[str]:
    try:
        with open(path) as file:
            yield from file
    except OSError:
        return
