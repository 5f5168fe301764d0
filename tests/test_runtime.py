from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from small_whisper import small_teacher
from usmlite.errors import AudioError, ModelError
from usmlite.models import Decoded, Options, TimedText, WhisperAdapter, Word
from usmlite.models.adapter import WITHOUT_TIMES, Said
from usmlite.runtime import Recognizer, Segment, Transcript
from usmlite.vad import Stretch


def noise(seconds: float, level: float = 0.1) -> np.ndarray:
    samples = np.random.default_rng(0).normal(0, level, round(seconds * 16_000))
    return samples.clip(-1, 1).astype(np.float32)


class Scripted(WhisperAdapter):
    """Says what it is told to, window by window, and notes what it was asked."""

    temperature = 0.0
    words: tuple[Word, ...] | None = None

    def script(
        self, *windows: Sequence[object], no_speech: float = 0.0, mean_logprob: float = -0.2
    ) -> Scripted:
        """Windows as texts and times: `[0.0, "a", 2.0]`."""
        self.windows = list(windows)
        self.no_speech_probability, self.mean_logprob = no_speech, mean_logprob
        self.asked: list[tuple[int, bool, str | None]] = []
        self.heard: list[float] = []
        self.told: list[list[Said]] = []
        self.options: list[Options] = []
        return self

    def features(self, samples: torch.Tensor) -> torch.Tensor:
        self.heard += [float((row != 0).sum()) / 16_000 for row in samples]
        return samples

    def decode(
        self, model: object, features: torch.Tensor, options: Options = WITHOUT_TIMES, **others: Any
    ) -> list[Decoded]:
        self.asked.append((len(features), options.timestamps, options.language))
        self.told += [list(said) for said in others["previous"]]
        self.options.append(options)
        found = []
        for _ in features:
            tokens: list[int] = []
            for item in self.windows.pop(0):
                if isinstance(item, float):
                    tokens.append(self.timestamp_begin + round(item / 0.02))
                else:
                    tokens += self.encode_text(f" {item}")
            row = self.no_speech_probability, self.mean_logprob
            text = self.decode_text(tokens)
            segments = tuple(replace(each, words=self.words) for each in self.segments(tokens)[0])
            found.append(Decoded(tuple(tokens), text, segments, "en", *row, temperature=self.temperature))
        return found


def scripted(*windows: Sequence[object], **options: float) -> tuple[Recognizer, Scripted]:
    model, plain = small_teacher()
    adapter = Scripted(plain.config, plain.tokenizer, plain.generation).script(*windows, **options)
    return Recognizer(model, adapter, name="scripted", kind="dense", weights_bytes=1), adapter


def test_windows_follow_the_timestamps() -> None:
    recognizer, adapter = scripted(
        [0.0, "one", 12.0, 12.0, "two", 25.0, 25.0, "cut"],
        [0.0, "three", 20.0, 20.0, "cut", 25.0, 25.0],
        [0.0, "four", 14.0],
    )
    found = recognizer.transcribe(noise(65))
    assert found.segments == (
        Segment(0.0, 12.0, "one"),
        Segment(12.0, 25.0, "two"),
        Segment(25.0, 45.0, "three"),
        Segment(45.0, 50.0, "cut"),
        Segment(50.0, 64.0, "four"),
    )
    assert found.text == "one two three cut four"
    assert found.duration == 65.0
    assert adapter.heard == pytest.approx([30.0, 30.0, 15.0], abs=0.01)


def test_a_window_without_an_open_segment_is_used_up() -> None:
    recognizer, adapter = scripted([0.0, "one", 8.0], [0.0, "two", 29.0])
    found = recognizer.transcribe(noise(40))
    # The second window is only 10 s long: no time lies beyond the audio.
    assert found.segments == (Segment(0.0, 8.0, "one"), Segment(30.0, 40.0, "two"))
    assert adapter.heard == pytest.approx([30.0, 10.0], abs=0.01)


def test_a_model_that_does_not_get_on_still_ends() -> None:
    recognizer, adapter = scripted(*[[0.0, "a", 0.02, 0.02, "b"]] * 3)
    found = recognizer.transcribe(noise(90))
    assert len(adapter.heard) == 3
    assert found.text == "a b a b a b"


def test_a_rest_too_short_for_a_word_is_not_decoded() -> None:
    recognizer, adapter = scripted([0.0, "a", 29.0, 29.0, "b"], [0.0, "b", 1.0])
    recognizer.transcribe(noise(30.05))
    assert len(adapter.heard) == 2
    recognizer, adapter = scripted([0.0, "a", 29.96, 29.96, "b"])
    recognizer.transcribe(noise(30.0))
    assert len(adapter.heard) == 1


@pytest.mark.parametrize(
    ("no_speech", "mean_logprob", "text"), [(0.7, -1.2, ""), (0.7, -0.8, "a"), (0.5, -1.2, "a")]
)
def test_silence_is_skipped(no_speech: float, mean_logprob: float, text: str) -> None:
    recognizer, _ = scripted([0.0, "a", 5.0], no_speech=no_speech, mean_logprob=mean_logprob)
    assert recognizer.transcribe(noise(10)).text == text


def test_recordings_are_decoded_side_by_side_and_stay_in_order() -> None:
    recognizer, adapter = scripted(
        [0.0, "a1", 30.0], [0.0, "b1", 5.0],  # a and b together
        [0.0, "a2", 10.0], [0.0, "c1", 5.0],  # b is done, c takes its place
        [0.0, "d1", 5.0],
    )  # fmt: skip
    found = recognizer.transcribe([noise(40), noise(10), noise(11), noise(12)], batch_size=2)
    assert [transcript.text for transcript in found] == ["a1 a2", "b1", "c1", "d1"]
    assert [batch for batch, _, _ in adapter.asked] == [2, 2, 1]


def test_short_audio_without_timestamps_is_one_piece_and_long_audio_is_not() -> None:
    recognizer, adapter = scripted(["short"], [0.0, "long", 30.0], [0.0, "end", 5.0])
    texts = recognizer.transcribe_batch([noise(30), noise(31)])
    assert texts == ["short", "long end"]
    assert adapter.asked == [(1, False, "en"), (1, True, "en"), (1, True, "en")]


def test_word_error_rates_are_measured_greedily() -> None:
    recognizer, adapter = scripted(["short"])
    recognizer.transcribe_batch([noise(3)])
    (options,) = adapter.options
    assert (options.beam_size, options.temperatures, options.word_timestamps) == (1, (0.0,), False)
    assert (options.initial_prompt, options.hotwords, adapter.told) == (None, None, [[]])


def test_options_are_given_by_name_too() -> None:
    recognizer, adapter = scripted(["a"], ["b"])
    recognizer.transcribe(noise(3), Options(beam_size=3), timestamps=False, hotwords="Anna")
    assert adapter.options[0] == Options(beam_size=3, timestamps=False, hotwords="Anna", language="en")
    with pytest.raises(TypeError, match="beamsize"):
        recognizer.transcribe(noise(3), beamsize=5)


def test_windows_are_told_what_was_said_if_that_is_asked_for() -> None:
    windows = [0.0, "one", 12.0, 12.0, "cut"], [0.0, "two", 18.0, 18.0, "cut"], [0.0, "three", 5.0]
    recognizer, adapter = scripted(*windows)
    recognizer.transcribe(noise(36), condition_on_previous_text=True)
    one, two = TimedText(0.0, 12.0, "one"), TimedText(0.0, 18.0, "two")
    assert adapter.told == [[], [one], [one, two]]
    recognizer, adapter = scripted(*windows)
    recognizer.transcribe(noise(36))
    assert adapter.told == [[], [], []]


def test_a_wild_text_is_not_told_on() -> None:
    recognizer, adapter = scripted([0.0, "one", 12.0, 12.0, "cut"], [0.0, "two", 18.0])
    adapter.temperature = 0.8
    recognizer.transcribe(noise(30), condition_on_previous_text=True)
    assert adapter.told == [[], []]


def test_words_have_times_of_the_recording() -> None:
    recognizer, adapter = scripted([0.0, "one", 12.0, 12.0, "cut"], [0.0, "two", 5.0])
    adapter.words = (Word(" x", 1.0, 2.0, 0.5), Word(" y", 29.0, 31.0, 0.25))
    found = recognizer.transcribe(noise(30))
    assert found.segments[1].words == (Word(" x", 13.0, 14.0, 0.5), Word(" y", 30.0, 30.0, 0.25))


def test_each_recording_is_there_as_soon_as_it_is_finished(tmp_path: Path) -> None:
    recognizer, adapter = scripted([0.0, "a1", 30.0], [0.0, "b", 5.0], [0.0, "a2", 10.0], [0.0, "d", 5.0])
    (tmp_path / "bad.wav").write_bytes(b"this is no audio")
    seen: list[float] = []
    audio = [noise(40), noise(10), tmp_path / "bad.wav", noise(5)]
    each = recognizer.transcribe_each(audio, batch_size=2, progress=seen.append)
    index, found = next(each)
    assert (index, found.text if isinstance(found, Transcript) else None) == (1, "b")
    assert len(adapter.heard) == 2
    rest = dict(each)
    assert isinstance(rest[2], AudioError)
    assert [rest[n].text for n in (0, 3) if isinstance(rest[n], Transcript)] == ["a1 a2", "d"]
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_speech_is_heard_side_by_side_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # 25 s of speech, 25 s of silence, 6 s and, after a second, 5 s of speech.
    stretches = [Stretch(0, 400_000), Stretch(800_000, 896_000), Stretch(912_000, 992_000)]
    monkeypatch.setattr("usmlite.runtime.speech", lambda samples: stretches)
    recognizer, adapter = scripted([0.0, "one", 25.0], [1.0, "two", 6.0, 6.0, "three", 11.0])
    seen: list[float] = []
    found = recognizer.transcribe(noise(70), vad=True, progress=seen.append)
    assert adapter.heard == pytest.approx([25.0, 11.0], abs=0.01)
    assert [batch for batch, _, _ in adapter.asked] == [2]
    assert found.segments == (
        Segment(0.0, 25.0, "one"), Segment(51.0, 56.0, "two"), Segment(57.0, 62.0, "three"),
    )  # fmt: skip
    assert found.duration == 70.0
    assert seen == [1.0]
    # The first stretch takes another window, after the second is done.
    recognizer, adapter = scripted([0.0, "one", 20.0, 20.0, "cut"], [1.0, "three", 11.0], [0.0, "two", 5.0])
    found = recognizer.transcribe(noise(70), vad=True, progress=seen.append)
    assert found.text == "one two three"
    assert seen == pytest.approx([1.0, 31 / 36, 1.0])
    with pytest.raises(ValueError, match="side by side"):
        recognizer.transcribe(noise(3), vad=True, condition_on_previous_text=True)


def test_a_recording_without_speech_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usmlite.runtime.speech", lambda samples: [])
    recognizer, adapter = scripted()
    assert recognizer.transcribe([noise(3), noise(4)], vad=True)[1] == Transcript("", (), 4.0, "en")
    assert adapter.asked == []


def test_progress_runs_to_the_end() -> None:
    recognizer, _ = scripted([0.0, "a", 20.0, 20.0, "b"], [0.0, "c", 5.0], [0.0, "b", 20.0])
    seen: list[float] = []
    recognizer.transcribe([noise(40), noise(10)], progress=seen.append)
    assert seen == pytest.approx([(20 + 10) / 50, 1.0])


def test_files_and_arrays_give_the_same(tmp_path: Path) -> None:
    model, adapter = small_teacher()
    recognizer = Recognizer(model, adapter, name="small", kind="dense", weights_bytes=1)
    samples = noise(2)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    one = recognizer.transcribe(samples, timestamps=False)
    assert recognizer.transcribe(tmp_path / "a.wav", timestamps=False) == one
    assert recognizer.transcribe(str(tmp_path / "a.wav"), timestamps=False) == one
    assert isinstance(one, Transcript)
    assert one.language == "en"
    assert one.duration == 2.0


def test_a_batch_says_what_each_recording_says_alone() -> None:
    model, adapter = small_teacher()
    recognizer = Recognizer(model, adapter, name="small", kind="dense", weights_bytes=1)
    recordings = [noise(1 + index, 0.02 * (index + 1)) for index in range(3)]
    together = recognizer.transcribe(recordings)
    assert together == [recognizer.transcribe(samples) for samples in recordings]
    assert recognizer.transcribe(recordings) == together


def test_bad_audio_and_bad_options() -> None:
    model, adapter = small_teacher()
    recognizer = Recognizer(model, adapter, name="small", kind="dense", weights_bytes=1)
    with pytest.raises(AudioError):
        recognizer.transcribe(np.full(16_000, np.nan, dtype=np.float32))
    with pytest.raises(AudioError, match=r"none\.wav"):
        recognizer.transcribe(["none.wav"])
    with pytest.raises(ModelError, match="klingon"):
        recognizer.transcribe(noise(1), language="klingon")
    with pytest.raises(ValueError, match="batch_size"):
        recognizer.transcribe(noise(1), batch_size=0)
    assert recognizer.transcribe([]) == []
    assert recognizer.transcribe_batch([]) == []


def test_the_model_is_put_in_eval_mode() -> None:
    model, adapter = small_teacher()
    recognizer = Recognizer(model.train(), adapter, name="small", kind="packed", weights_bytes=7)
    assert not model.training
    assert repr(recognizer) == "Recognizer('small', kind='packed', weights_bytes=7)"
