"""Word error rates and their comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from usmlite.audio import SAMPLE_RATE
from usmlite.data import Utterance
from usmlite.errors import AudioError, DataError
from usmlite.evaluate import (
    Evaluation,
    UtteranceScore,
    compare,
    evaluate,
    score_together,
    worst,
    worst_scores,
)

# The seconds of a recording say which it is: see Parrot.
TEXTS = [
    "The cat sat.",
    "A dog barked, twice!",
    "Hello",
    "Good morning to you all.",
    "(music)",
    "It's 5 o'clock",
]
SPEAKERS = ["x", "y", "x", None, "z", "y"]
LENGTHS = [1.0, 1.5, 0.5, 2.0, 0.25, 1.25]


@pytest.fixture
def utterances(tmp_path: Path) -> list[Utterance]:
    listed = []
    for i, (text, speaker, seconds) in enumerate(zip(TEXTS, SPEAKERS, LENGTHS, strict=True)):
        path = tmp_path / f"{i}.wav"
        times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * times), SAMPLE_RATE)
        listed.append(Utterance(f"u{i}", path, seconds, text, speaker))
    return listed


class Parrot:
    """Answers each recording with a text, and remembers the batches."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers
        self.batches: list[list[float]] = []

    def __call__(self, audio: Sequence[np.ndarray]) -> list[str]:
        lengths = [len(samples) / SAMPLE_RATE for samples in audio]
        self.batches.append(lengths)
        indices = [LENGTHS.index(seconds) for seconds in lengths]
        return [self.answers.get(f"u{i}", TEXTS[i]) for i in indices]


def run(
    utterances: Sequence[Utterance], parrot: Parrot, name: str = "parrot", **options: object
) -> Evaluation:
    return evaluate(parrot, utterances, name=name, weights_bytes=1_000, **options)  # type: ignore[arg-type]


def test_a_perfect_answer(utterances: list[Utterance]) -> None:
    result = run(utterances, Parrot())
    assert result.wer == 0.0
    assert result.ci95 == (0.0, 0.0)
    assert result.reference_words == 3 + 4 + 1 + 5 + 0 + 4
    assert result.utterance_count == 6
    assert [score.id for score in result.utterances] == [u.id for u in utterances]


def test_substitutions_deletions_and_insertions(utterances: list[Utterance]) -> None:
    result = run(utterances, Parrot(u0="the bat sat", u1="a dog", u2="hello hello you", u4="yes no"))
    assert (result.substitutions, result.deletions, result.insertions) == (1, 2, 4)
    assert result.wer == pytest.approx(7 / 17)
    by_id = {score.id: score for score in result.utterances}
    assert by_id["u0"].substitutions == 1
    assert by_id["u1"].deletions == 2
    assert by_id["u2"].insertions == 2
    # A reference without words: what was heard in it counts, and divides by nothing.
    assert (by_id["u4"].insertions, by_id["u4"].words, by_id["u4"].reference) == (2, 0, "")
    # Both texts are normalized (Whisper's normalizer reads "o" as a zero).
    assert by_id["u5"].reference == "it is 50 clock"
    assert result.ci95[0] < result.wer < result.ci95[1]


def test_speakers(utterances: list[Utterance]) -> None:
    result = run(utterances, Parrot(u0="the bat sat", u4="yes no", u3="silence"))
    assert result.speakers == {
        "x": {"wer": 1 / 4, "words": 4, "errors": 1, "utterances": 2},
        "y": {"wer": 0.0, "words": 8, "errors": 0, "utterances": 2},
        "z": {"wer": None, "words": 0, "errors": 2, "utterances": 1},
    }


def test_batches_are_sorted_and_loaded_one_at_a_time(utterances: list[Utterance]) -> None:
    parrot = Parrot()
    seen: list[tuple[int, int]] = []
    run(utterances, parrot, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert parrot.batches == [[2.0, 1.5, 1.25, 1.0], [0.5, 0.25]]
    assert seen == [(4, 6), (6, 6)]

    # The second batch's audio is not touched before the first is transcribed.
    utterances[4].audio.unlink()
    again = Parrot()
    with pytest.raises(AudioError, match=r"4\.wav: no such audio file"):
        run(utterances, again, batch_size=4)
    assert len(again.batches) == 1


def test_times_sizes_and_the_machine(utterances: list[Utterance]) -> None:
    result = run(utterances, Parrot())
    assert result.audio_seconds == pytest.approx(sum(LENGTHS))
    assert 0 < result.wall_seconds < 5
    assert result.real_time_factor == pytest.approx(result.wall_seconds / result.audio_seconds)
    assert 20e6 < result.peak_memory_bytes < 100e9
    assert result.weights_bytes == 1_000
    assert set(result.machine) == {
        "cpu",
        "cores",
        "torch_threads",
        "kernels",
        "gpu",
        "os",
        "memory",
        "arithmetic",
    }
    assert result.machine["cores"] >= 1
    assert set(result.versions) == {"python", "torch", "transformers", "jiwer", "numpy", "usmlite"}


def test_json_there_and_back(utterances: list[Utterance]) -> None:
    result = run(utterances, Parrot(u0="the bat sat"))
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["utterance_count"] == 6
    assert Evaluation.from_json(plain) == result


@pytest.mark.parametrize(
    "plain",
    [[], {}, None, {"name": "x"}, "text", {"ci95": 1}],
    ids=["list", "empty", "null", "part", "text", "ci"],
)
def test_json_that_is_no_evaluation(plain: object) -> None:
    with pytest.raises(DataError, match=r"other\.json: not an evaluation"):
        Evaluation.from_json(plain, where="other.json")


def test_json_with_a_damaged_field(utterances: list[Utterance]) -> None:
    good = run(utterances, Parrot()).to_json()
    for damage in ({"ci95": [1]}, {"utterances": [{"id": "u0"}]}, {"utterances": 3}, {"ci95": ["a", "b"]}):
        with pytest.raises(DataError, match="not an evaluation"):
            Evaluation.from_json({**good, **damage})


def test_what_cannot_be_evaluated(utterances: list[Utterance]) -> None:
    with pytest.raises(DataError, match="no utterance to evaluate on"):
        run([], Parrot())
    with pytest.raises(DataError, match="u0: the utterance has no text"):
        run([dataclasses.replace(utterances[0], text=None)], Parrot())
    with pytest.raises(DataError, match="no reference text has a word"):
        run([utterances[4]], Parrot())
    with pytest.raises(ValueError, match="batch_size"):
        run(utterances, Parrot(), batch_size=0)
    with pytest.raises(ValueError, match="returned 1 texts for 6"):
        evaluate(lambda audio: ["hello"], utterances, name="x", weights_bytes=1)


def scored(name: str, errors: Sequence[int], words: int = 10) -> Evaluation:
    """An evaluation with the given number of substitutions in each utterance."""
    scores = tuple(
        UtteranceScore(
            f"u{i}", None, "word " * words, f"{name} {count}" if count else "same", count, 0, 0, words
        )
        for i, count in enumerate(errors)
    )
    total = words * len(scores)
    return Evaluation(
        name,
        sum(errors) / total,
        (0.0, 1.0),
        sum(errors),
        0,
        0,
        total,
        1.0,
        1.0,
        1.0,
        1,
        1,
        {},
        scores,
        {},
        {},
    )


def test_groups_have_a_wer_and_an_interval() -> None:
    scores = scored("a", [0, 2, 4, 2]).utterances
    wer, (low, high) = score_together(scores) or (None, (None, None))
    assert (wer, low, high) == (0.2, pytest.approx(0.05, abs=0.06), pytest.approx(0.35, abs=0.06))
    assert score_together(scores) == score_together(scores)
    assert score_together([dataclasses.replace(scores[0], words=0)]) is None
    assert [score.id for score in worst_scores(scores, 2)] == ["u2", "u1"]
    assert len(worst_scores(scores, 9)) == 3


def test_lengths_and_noise_levels_are_kept(utterances: list[Utterance]) -> None:
    loud = [dataclasses.replace(utterances[0], snr_db=5.0), *utterances[1:]]
    found = Evaluation.from_json(json.loads(json.dumps(run(loud, Parrot()).to_json())))
    assert [score.seconds for score in found.utterances] == [u.duration for u in loud]
    assert [score.snr_db for score in found.utterances][:2] == [5.0, None]


def test_comparing_with_itself() -> None:
    result = scored("a", [1, 0, 2, 3])
    same = compare(result, result)
    assert (same.difference, same.ci95, same.relative_difference) == (0.0, (0.0, 0.0), 0.0)
    assert same.p_value == 1.0
    assert same.same_transcripts == 1.0


def test_a_clear_difference() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 3, 300)
    result = compare(scored("worse", [int(n) + 1 for n in base]), scored("base", [int(n) for n in base]))
    assert result.difference == pytest.approx(0.1)
    assert result.ci95 == pytest.approx((0.1, 0.1))  # every utterance has one more
    assert result.relative_difference == pytest.approx(0.1 / (base.sum() / 3000))
    assert result.p_value == pytest.approx(2 / 10_001)
    assert result.same_transcripts == 0.0


def test_the_interval_is_the_normal_one_for_many_utterances() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 6, 2_000), rng.integers(0, 6, 2_000)
    result = compare(scored("a", ours.tolist()), scored("b", theirs.tolist()))
    error = np.std((ours - theirs) / 10) / np.sqrt(2_000)
    assert result.ci95[1] - result.ci95[0] == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert result.ci95[0] < result.difference < result.ci95[1]


def test_p_values_are_fair() -> None:
    """Of two models of the same quality, about one comparison in twenty has p < 0.05."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(200):
        ours, theirs = rng.poisson(1.0, 100).tolist(), rng.poisson(1.0, 100).tolist()
        found.append(compare(scored("a", ours), scored("b", theirs), samples=400).p_value)
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.11
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.12)


def test_comparison_is_the_same_each_time_and_antisymmetric() -> None:
    a, b = scored("a", [0, 2, 1, 4, 0, 1]), scored("b", [1, 1, 1, 2, 0, 0])
    assert compare(a, b) == compare(a, b)
    assert compare(a, b, seed=1) != compare(a, b)
    one, other = compare(a, b), compare(b, a)
    assert one.p_value == other.p_value
    assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]))
    json.dumps(one.to_json(), allow_nan=False)


def test_a_baseline_without_errors() -> None:
    result = compare(scored("a", [1, 0]), scored("b", [0, 0]))
    assert result.relative_difference is None
    assert result.relative_ci95 is None


def test_order_does_not_matter() -> None:
    a, b = scored("a", [3, 0, 1]), scored("b", [0, 2, 2])
    turned = dataclasses.replace(b, utterances=b.utterances[::-1])
    assert compare(a, turned) == compare(a, b)


def test_only_the_same_utterances_can_be_compared() -> None:
    with pytest.raises(DataError, match=r"a against b: .*not evaluated on the same utterances.*such as u2"):
        compare(scored("a", [0, 1, 2]), scored("b", [0, 1]))
    with pytest.raises(DataError, match="different texts of utterance u0"):
        compare(scored("a", [0, 1], words=5), scored("b", [0, 1], words=6))


def test_resampling_many_utterances_stays_small() -> None:
    # 10,000 resamples of 20,000 utterances at once would be 1.6 GB.
    result = compare(scored("a", [1] * 20_000), scored("b", [1] * 20_000), samples=500)
    assert result.ci95 == (0.0, 0.0)


def test_worst_shows_alignments(utterances: list[Utterance]) -> None:
    result = run(utterances, Parrot(u0="the bat sat", u3="good morning", u4="yes no no no"))
    shown = worst(result, 2)
    assert shown[0].splitlines()[0] == "u4: 4 errors in 0 words (0 substituted, 0 deleted, 4 inserted)"
    title, reference, hypothesis, marks = shown[1].splitlines()
    assert title.startswith("u3: 3 errors in 5 words")
    assert reference == "REF: good morning to you all"
    assert hypothesis.split() == ["HYP:", "good", "morning", "**", "***", "***"]
    assert marks.split() == ["D", "D", "D"]
    assert len(worst(result, 99)) == 3
    assert worst(run(utterances, Parrot()), 5) == []
