"""`usmlite transcribe`: folders, bad files, interrupts, flags, and the microphone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from usmlite import cli
from usmlite.models import Options
from usmlite.models.options import FALLBACK_TEMPERATURES
from usmlite.runtime import Recognizer


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_transcribe_takes_folders(
    packed_model: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speech, out = tmp_path / "speech", tmp_path / "out"
    (speech / "deep").mkdir(parents=True)
    shutil.copy(recordings / "0.wav", speech / "a.wav")
    shutil.copy(recordings / "1.wav", speech / "deep" / "a.wav")
    (speech / "notes.txt").write_text("no audio")
    words = ["transcribe", "--model", str(packed_model), str(speech), "--format", "tsv"]
    assert cli.main([*words, "--output-dir", str(out)]) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == ["a.tsv", "deep/a.tsv"]
    # A folder is no model, if it has none in it.
    arguments, rest = cli.build_parser().parse_known_args(["transcribe", str(speech)])
    assert cli.transcribe.sort_out(arguments, rest) == []
    assert (arguments.source, arguments.files) == ("tiny.en-small", [speech])
    arguments, rest = cli.build_parser().parse_known_args(["transcribe", str(packed_model), str(speech)])
    assert cli.transcribe.sort_out(arguments, rest) == []
    assert (arguments.source, arguments.files) == (str(packed_model), [speech])
    (tmp_path / "empty").mkdir()
    assert "no audio in this folder" in fails(capsys, "transcribe", str(tmp_path / "empty"))


def test_one_bad_file_alone_is_an_error_like_any_other(
    packed_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none.wav" in fails(capsys, "transcribe", str(packed_model), str(tmp_path / "none.wav"))


@pytest.mark.parametrize("to_files", [True, False])
def test_ctrl_c_leaves_what_is_finished(
    to_files: bool,
    packed_model: Path,
    recordings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = Recognizer.transcribe_each

    def interrupted(self: Recognizer, *arguments: object, **settings: object) -> Iterator[object]:
        found = list(whole(self, *arguments, **settings))  # type: ignore[arg-type]
        yield found[2]
        yield found[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(Recognizer, "transcribe_each", interrupted)
    words = ["transcribe", str(packed_model), *(str(recordings / f"{n}.wav") for n in range(4))]
    out = ["--output-dir", str(tmp_path)] if to_files else []
    assert cli.main([*words, "--format", "json", *out]) == 130
    shown = capsys.readouterr()
    assert "2 of 4 transcripts are finished" in shown.err
    if to_files:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "2.json"]
    else:
        assert [line for line in shown.out.splitlines() if line.startswith("==>")] == [
            f"==> {recordings / name} <==" for name in ("0.wav", "2.wav")
        ]


def test_transcribe_says_how_to_search(
    packed_model: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Options, dict[str, Any]]] = []
    whole = Recognizer.transcribe_each

    def noted(self: Recognizer, audio: Any, options: Options, **settings: Any) -> Any:
        asked.append((options, settings))
        return whole(self, audio, options, **settings)

    monkeypatch.setattr(Recognizer, "transcribe_each", noted)
    words = ["transcribe", str(packed_model), str(recordings / "0.wav")]
    assert cli.main(words) == 0
    assert cli.main([
        *words, "--beam-size", "2", "--patience", "1.5", "--length-penalty", "0.5", "--temperature", "0.5",
        "--temperature-increment-on-fallback", "none", "--logprob-threshold", "none", "--best-of", "2",
        "--initial-prompt", "a", "--hotwords", "b", "--word-timestamps", "--condition-on-previous-text",
    ]) == 0  # fmt: skip
    (plain, _), (full, settings) = asked
    assert plain == Options(beam_size=5, temperatures=FALLBACK_TEMPERATURES)
    assert full == Options(
        word_timestamps=True, beam_size=2, patience=1.5, length_penalty=0.5, temperatures=(0.5,), best_of=2,
        logprob_threshold=None, initial_prompt="a", hotwords="b",
    )  # fmt: skip
    assert settings["condition_on_previous_text"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.wav", "--temperature", "warm"], ["--temperature", "from 0 to 10", "'warm'"]),
        (["a.wav", "--length-penalty", "2"], ["--length-penalty", "from 0 to 1"]),
        (["a.wav", "--logprob-threshold", "nan"], ["--logprob-threshold", "or none"]),
        (["a.wav", "--vad", "--condition-on-previous-text"], ["contradicts --vad"]),
        (["a.wav", "--mic"], ["a file and the microphone", "a.wav"]),
        (["--mic", "--vad"], ["contradicts --vad", "--mic"]),
    ],
)
def test_transcribe_refuses_what_makes_no_sense(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "transcribe", *words)
    assert all(part in message for part in expected), message


class Played:
    """A microphone that plays a recording."""

    def __init__(self, device: str | None, samples: np.ndarray) -> None:
        self.device, self.samples, self.stopped = device, samples, False

    def stop(self) -> None:
        self.stopped = True

    def __iter__(self) -> Iterator[np.ndarray]:
        for low in range(0, len(self.samples), 4_000):
            yield self.samples[low : low + 4_000]


@pytest.mark.parametrize("form", ["txt", "json"])
def test_the_microphone_writes_down_what_is_said(
    form: str,
    sentences: list[tuple[np.ndarray, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples, text = sentences[0]
    played: list[Played] = []

    def microphone(device: str | None) -> Played:
        played.append(Played(device, samples))
        return played[0]

    monkeypatch.setattr("usmlite.microphone.Microphone", microphone)
    words = ["transcribe", "--mic", "--mic-device", "desk", "--mic-every", "10"]
    assert cli.main([*words, "--format", form, "--word-timestamps"]) == 0
    out, err = capsys.readouterr()
    assert "listening" in err
    assert played[0].device == "desk"
    if form == "txt":
        assert out == f"{text}\n"
    else:
        found = json.loads(out)
        assert found["text"] == text
        assert len(found["segments"][0]["words"]) == len(text.split())
