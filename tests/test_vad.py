from __future__ import annotations

import sys

import numpy as np
import pytest

from usmlite import vad
from usmlite.errors import ModelError
from usmlite.vad import Pack, Stretch, packs, speech

RATE = 16_000


def seconds(*spans: tuple[float, float]) -> list[Stretch]:
    return [Stretch(round(start * RATE), round(end * RATE)) for start, end in spans]


def test_packs_are_as_full_as_they_get_without_a_cut() -> None:
    spans = seconds((0, 10), (12, 30), (40, 45), (50, 80), (90, 91))
    assert [pack.stretches for pack in packs(spans)] == [
        tuple(spans[:2]), tuple(spans[2:3]), tuple(spans[3:4]), tuple(spans[4:]),
    ]  # fmt: skip
    assert [pack.seconds for pack in packs(spans)] == [28.0, 5.0, 30.0, 1.0]
    assert packs([]) == []


def test_times_in_a_pack_are_those_of_the_recording() -> None:
    pack = Pack(tuple(seconds((5, 7), (20, 23), (40, 41))))
    assert [pack.original(t) for t in (0.0, 1.5, 2.0, 4.5, 5.0, 5.9, 9.0)] == [
        5.0,
        6.5,
        20.0,
        22.5,
        40.0,
        40.9,
        41.0,
    ]
    # What ends on a border ends before the silence.
    assert [pack.original(t, ends=True) for t in (2.0, 5.0, 6.0)] == [7.0, 23.0, 41.0]
    # A word lies on one side of a silence.
    assert pack.within(1.5, 1.75) == (6.5, 6.75)
    assert pack.within(1.0, 2.5) == (6.0, 7.0)
    assert pack.within(1.75, 3.0) == (20.0, 21.0)
    assert pack.within(5.5, 9.0) == (40.5, 41.0)
    recording = np.arange(45 * RATE, dtype=np.float32)
    assert pack.samples(recording)[[0, 2 * RATE, 5 * RATE]].tolist() == [5.0 * RATE, 20.0 * RATE, 40.0 * RATE]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    vad._silero.cache_clear()
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(ModelError, match=r'pip install "usmlite\[vad\]"'):
        speech(np.zeros(RATE, np.float32))
    vad._silero.cache_clear()


def test_speech_is_told_from_silence(sentences: list[tuple[np.ndarray, str]]) -> None:
    pytest.importorskip("silero_vad")
    pytest.importorskip("onnxruntime")
    quiet = np.random.default_rng(0).normal(0, 1e-3, 3 * RATE).astype(np.float32)
    samples = np.concatenate([part for each, _ in sentences for part in (quiet, each)])
    found = speech(samples)
    assert len(found) == len(sentences)
    start = 0
    for stretch, (audio, _) in zip(found, sentences, strict=True):
        start += len(quiet)
        assert abs(stretch.start - start) < 0.6 * RATE
        assert abs(stretch.end - start - len(audio)) < 0.6 * RATE
        start += len(audio)
    assert speech(quiet) == []
