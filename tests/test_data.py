"""Manifests, LibriSpeech folders, plain folders, and training windows."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite.audio import SAMPLE_RATE, WINDOW_SAMPLES
from usmlite.data import (
    Utterance,
    describe_corpus,
    load_corpus,
    usable_for_training,
    write_manifest,
)
from usmlite.errors import AudioError, DataError
from usmlite.training_windows import Window, by_length, load_window, pack_windows


def speak(path: Path, seconds: float = 1.0, level: float = 0.3, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    soundfile.write(path, level * np.sin(2 * np.pi * 300 * times), SAMPLE_RATE, **options)
    return path


def manifest(folder: Path, *rows: object) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A manifest of three utterances, in a folder of its own."""
    folder = tmp_path / "corpus"
    for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        speak(folder / "audio" / f"{name}.wav", seconds)
    return manifest(
        folder,
        {"id": "a", "audio_filepath": "audio/a.wav", "duration": 1.0, "text": "one", "speaker": "x"},
        {"audio_filepath": "audio/b.wav", "duration": 2, "text": "two", "license": "a key we do not know"},
        {"audio_filepath": "audio/c.wav"},
    )


# --- manifests


def test_a_manifest(corpus: Path) -> None:
    audio = corpus.parent.resolve() / "audio"
    assert load_corpus(corpus) == [
        Utterance("a", audio / "a.wav", 1.0, "one", "x"),
        Utterance("audio/b", audio / "b.wav", 2.0, "two"),
        Utterance("audio/c", audio / "c.wav", 3.0),
    ]


def test_a_folder_with_a_manifest(corpus: Path) -> None:
    assert load_corpus(corpus.parent) == load_corpus(str(corpus))


def test_paths_are_relative_to_the_manifest(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_corpus(corpus)
    monkeypatch.chdir(corpus.parent)
    assert load_corpus("manifest.jsonl") == expected
    monkeypatch.chdir(corpus.parent / "audio")
    assert load_corpus("..") == expected


def test_blank_lines_and_a_byte_order_mark(corpus: Path) -> None:
    expected = load_corpus(corpus)
    corpus.write_text("\ufeff" + corpus.read_text().replace("\n", "\r\n\r\n"), encoding="utf-8")
    assert load_corpus(corpus) == expected


def test_the_duration_is_the_audio_s_own(corpus: Path) -> None:
    # 2.04 s is within the tolerance; windows need the exact length.
    manifest(corpus.parent, {"audio_filepath": "audio/b.wav", "duration": 2.04})
    assert load_corpus(corpus)[0].duration == 2.0


def test_without_check_files_no_audio_is_opened(corpus: Path) -> None:
    manifest(corpus.parent, {"audio_filepath": "audio/none.wav", "duration": 4.5, "text": "four"})
    assert load_corpus(corpus, check_files=False)[0].duration == 4.5


def absolute(folder: Path) -> dict[str, object]:
    return {"audio_filepath": str(folder.resolve() / "audio" / "a.wav")}


BAD_LINES: dict[str, tuple[object, str]] = {
    "json": ('{"audio_filepath": "audio/b.wav"', "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "digits": ('{"audio_filepath": "audio/b.wav", "duration": ' + "9" * 5_000 + "}", "not valid JSON"),
    "list": (["audio/b.wav"], "not a JSON object"),
    "no path": ({"text": "two"}, "no audio_filepath .*found the keys text"),
    "null path": ({"audio_filepath": None}, "no audio_filepath"),
    "path type": ({"audio_filepath": 5}, "audio_filepath has the wrong type"),
    "text type": ({"audio_filepath": "audio/b.wav", "text": ["two"]}, "text has the wrong type"),
    "id type": ({"audio_filepath": "audio/b.wav", "id": 7}, "id has the wrong type .*text in quotes"),
    "speaker type": ({"audio_filepath": "audio/b.wav", "speaker": True}, "speaker has the wrong type"),
    "duration type": ({"audio_filepath": "audio/b.wav", "duration": "2.0"}, "duration has the wrong type"),
    "duration bool": ({"audio_filepath": "audio/b.wav", "duration": True}, "duration has the wrong type"),
    "duration zero": ({"audio_filepath": "audio/b.wav", "duration": 0}, "not a length"),
    "duration negative": ({"audio_filepath": "audio/b.wav", "duration": -2.0}, "not a length"),
    "duration nan": ('{"audio_filepath": "audio/b.wav", "duration": NaN}', "not a length"),
    "duration huge": ('{"audio_filepath": "audio/b.wav", "duration": 1e999}', "not a length"),
    "duration int": ('{"audio_filepath": "audio/b.wav", "duration": 1' + "0" * 400 + "}", "not a length"),
    "duration wrong": (
        {"audio_filepath": "audio/b.wav", "duration": 2.2},
        r"duration is wrong for audio/b\.wav .*2\.000 s by the audio's header, found 2\.2 s",
    ),
    "offset": ({"audio_filepath": "audio/b.wav", "offset": 1.5}, "offsets .* are not supported"),
    "missing": ({"audio_filepath": "audio/none.wav", "duration": 1.0}, r"audio file is missing .*none\.wav"),
    "not audio": ({"audio_filepath": "manifest.jsonl"}, "audio cannot be used .*cannot be read as audio"),
    "folder": ({"audio_filepath": "audio"}, "audio cannot be used .*not a file"),
    "absolute": (absolute, r"is absolute .*write the path from there, such as audio/a\.wav"),
    "windows": ({"audio_filepath": "C:\\speech\\a.wav"}, "is absolute"),
    "share": ({"audio_filepath": "\\\\server\\speech\\a.wav"}, "is absolute"),
    "outside": ({"audio_filepath": "../outside.wav"}, "leads out of the manifest's folder"),
    "outside and back": ({"audio_filepath": "../corpus2/a.wav"}, "leads out of the manifest's folder"),
    "nul": ({"audio_filepath": "audio/b.wav\0.txt"}, "characters that are not text"),
    "surrogate": ('{"audio_filepath": "audio/b.wav", "text": "\\ud800"}', "characters that are not text"),
    "duplicate": ({"audio_filepath": "audio/b.wav", "id": "a"}, "duplicate id 'a' .*the id of line 1"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(corpus: Path, case: str) -> None:
    row, message = BAD_LINES[case]
    speak(corpus.parent.parent / "outside.wav")
    first = {"id": "a", "audio_filepath": "audio/a.wav", "duration": 1.0}
    manifest(corpus.parent, first, "", row(corpus.parent) if callable(row) else row)
    with pytest.raises(DataError, match=rf"manifest\.jsonl, line 3: .*{message}"):
        load_corpus(corpus)


def test_bytes_that_are_not_text(corpus: Path) -> None:
    corpus.write_bytes(corpus.read_bytes() + b'{"audio_filepath": "\xff"}\n')
    with pytest.raises(DataError, match="line 4: not UTF-8 text"):
        load_corpus(corpus)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_manifest(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: the manifest is empty"):
        load_corpus(path)


def test_text_may_be_required(corpus: Path) -> None:
    with pytest.raises(DataError, match="line 3: the utterance has no text"):
        load_corpus(corpus, require_text=True)


@pytest.mark.parametrize("link", ["audio/link.wav", "linked/outside.wav"])
def test_a_link_may_not_leave_the_folder(corpus: Path, link: str) -> None:
    folder = corpus.parent
    outside = speak(folder.parent / "elsewhere" / "outside.wav")
    (folder / "audio" / "link.wav").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent, target_is_directory=True)
    manifest(folder, {"audio_filepath": link, "duration": 1.0})
    for check_files in (True, False):
        with pytest.raises(DataError, match="line 1: audio_filepath leads out of the manifest's folder"):
            load_corpus(corpus, check_files=check_files)


def test_a_link_inside_the_folder_is_fine(corpus: Path) -> None:
    (corpus.parent / "link.wav").symlink_to("audio/b.wav")
    manifest(corpus.parent, {"audio_filepath": "link.wav"})
    assert load_corpus(corpus)[0].duration == 2.0


def test_the_corpus_itself_may_be_a_link(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus.parent, target_is_directory=True)
    assert load_corpus(tmp_path / "data") == load_corpus(corpus)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder .*jsonl manifest, a LibriSpeech folder"),
        (lambda path: path.write_text("a.wav"), "not a corpus"),
        (lambda path: path.mkdir(), "the folder holds no audio"),
    ],
)
def test_a_path_that_is_no_corpus(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "speech.txt")
    with pytest.raises(DataError, match=rf"speech\.txt: {message}"):
        load_corpus(tmp_path / "speech.txt")


def test_noise_levels(tmp_path: Path) -> None:
    speak(tmp_path / "a.wav")
    row = {"id": "a", "audio_filepath": "a.wav", "duration": 1.0, "snr_db": -2}
    [utterance] = load_corpus(manifest(tmp_path, row))
    assert utterance.snr_db == -2.0
    write_manifest(tmp_path / "again.jsonl", [utterance])
    assert load_corpus(tmp_path / "again.jsonl") == [utterance]
    for bad in ("loud", True, 1e999):
        with pytest.raises(DataError, match=r"line 1: snr_db"):
            load_corpus(manifest(tmp_path, row | {"snr_db": bad}))


def test_corpora_can_be_told_apart(corpus: Path) -> None:
    utterances = load_corpus(corpus)
    found = describe_corpus(utterances)
    assert (found["utterances"], found["seconds"]) == (3, 6.0)
    assert describe_corpus(load_corpus(corpus)) == found
    others = [utterances[::-1], utterances[:2], [replace(utterances[0], text="x"), *utterances[1:]]]
    assert len({describe_corpus(other)["sha256"] for other in (utterances, *others)}) == 4
    # Where the audio lies does not matter.
    assert describe_corpus([replace(u, audio=Path("x")) for u in utterances]) == found


def test_write_manifest_is_read_back(corpus: Path) -> None:
    utterances = load_corpus(corpus)
    again = corpus.parent / "again.jsonl"
    write_manifest(again, utterances)
    assert load_corpus(again) == utterances
    assert "audio/a.wav" in again.read_text()


def test_write_manifest_refuses_audio_elsewhere(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="outside the manifest's folder"):
        write_manifest(tmp_path / "other" / "m.jsonl", load_corpus(corpus))
    assert not list((tmp_path / "other").iterdir())


# --- folders


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech" / "dev-clean"
    for chapter, texts in (("84/121123", ["GO DO YOU HEAR", "BUT IN LESS"]), ("174/50561", ["FORGOTTEN"])):
        name = chapter.replace("/", "-")
        for number in range(len(texts)):
            speak(root / chapter / f"{name}-{number:04}.flac", 1.0 + number)
        lines = [f"{name}-{number:04} {text}\n" for number, text in enumerate(texts)]
        (root / chapter / f"{name}.trans.txt").write_text("".join(lines))
    (root.parent / "SPEAKERS.TXT").write_text("; not a transcript\n")
    return root


def test_librispeech_as_it_unpacks(librispeech: Path) -> None:
    root = librispeech.resolve()
    expected = [
        Utterance("174-50561-0000", root / "174/50561/174-50561-0000.flac", 1.0, "FORGOTTEN", "174"),
        Utterance("84-121123-0000", root / "84/121123/84-121123-0000.flac", 1.0, "GO DO YOU HEAR", "84"),
        Utterance("84-121123-0001", root / "84/121123/84-121123-0001.flac", 2.0, "BUT IN LESS", "84"),
    ]
    assert load_corpus(librispeech, require_text=True) == expected
    assert load_corpus(librispeech.parent) == expected
    assert load_corpus(librispeech / "84" / "121123") == expected[1:]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("84-121123-0002 A TEXT", r"line 3: the audio file is missing .*84-121123-0002\.flac"),
        ("84-121123-0001 AGAIN", r"line 3: duplicate id '84-121123-0001' .*line 2"),
        ("84-121123-0001", "line 3: duplicate id"),
        ("84-121123-0005", "line 3: not a line of a LibriSpeech transcript"),
        ("HELLO THERE", "line 3: not a line of a LibriSpeech transcript"),
    ],
)
def test_a_bad_transcript_line(librispeech: Path, line: str, message: str) -> None:
    path = librispeech / "84" / "121123" / "84-121123.trans.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"84-121123\.trans\.txt, {message}"):
        load_corpus(librispeech)


def test_librispeech_audio_without_a_line(librispeech: Path) -> None:
    speak(librispeech / "84" / "121123" / "84-121123-0009.flac")
    assert load_corpus(librispeech)[-1].text is None
    with pytest.raises(DataError, match=r"84-121123-0009\.flac: the audio has no text .*trans\.txt"):
        load_corpus(librispeech, require_text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "speech"
    speak(root / "b.wav", 1.0)
    speak(root / "deep" / "a.FLAC", 2.0, format="FLAC")
    speak(root / "deep" / "c.opus", 3.0, format="OGG", subtype="OPUS")
    speak(root / "d.mp3", 1.0, format="MP3")
    (root / "b.txt").write_text("Hello\n  there. \n")
    (root / "notes.md").write_text("no speech")
    speak(root / ".trash" / "old.wav")
    (root / "._b.wav").write_bytes(b"what macOS leaves behind")
    return root


def test_a_plain_folder(folder: Path) -> None:
    utterances = load_corpus(folder)
    assert [(u.id, u.text, u.speaker) for u in utterances] == [
        ("b", "Hello there.", None),
        ("d", None, None),
        ("deep/a", None, None),
        ("deep/c", None, None),
    ]
    assert [u.duration for u in utterances] == pytest.approx([1.0, 1.0, 2.0, 3.0], abs=0.1)
    with pytest.raises(DataError, match=r"d\.mp3: the audio has no text .*\.txt file beside it"):
        load_corpus(folder, require_text=True)


def test_a_folder_with_a_broken_file(folder: Path) -> None:
    (folder / "e.wav").write_text("not audio")
    with pytest.raises(DataError, match=r"e\.wav: the audio cannot be used"):
        load_corpus(folder)


def test_two_files_of_one_name(folder: Path) -> None:
    speak(folder / "b.flac")
    with pytest.raises(DataError, match=r"b\.wav: duplicate id 'b' .*b\.flac.* Rename or remove"):
        load_corpus(folder)


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_folder_s_links_are_not_followed(folder: Path, is_folder: bool) -> None:
    outside = speak(folder.parent / "elsewhere" / "x.wav")
    (folder / "link.wav").symlink_to(outside.parent if is_folder else outside)
    with pytest.raises(DataError, match=r"link\.wav: a link in the folder is not followed"):
        load_corpus(folder)


def test_a_link_from_file_to_file_within_the_folder(folder: Path) -> None:
    (folder / "e.wav").symlink_to("b.wav")
    assert "e" in [utterance.id for utterance in load_corpus(folder)]


# --- windows


def utterance(number: int, duration: float) -> Utterance:
    return Utterance(f"u{number}", Path(f"u{number}.wav"), duration)


@given(
    durations=st.lists(st.floats(0.1, 30.0), min_size=1, max_size=80),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 100),
    single_fraction=st.floats(0.0, 1.0),
    max_gap=st.floats(0.0, 3.0),
)
@settings(max_examples=150, deadline=None)
def test_windows_hold_each_utterance_once_and_nothing_overlaps(
    durations: list[float], seed: int, epoch: int, single_fraction: float, max_gap: float
) -> None:
    utterances = [utterance(i, seconds) for i, seconds in enumerate(durations)]
    windows = pack_windows(
        utterances, seed=seed, epoch=epoch, single_fraction=single_fraction, max_gap=max_gap
    )
    held = [u for window in windows for u in window.utterances]
    assert sorted(u.id for u in held) == sorted(u.id for u in utterances)
    for window in windows:
        assert window.starts[0] == 0.0
        ends = [start + u.duration for start, u in zip(window.starts, window.utterances, strict=True)]
        assert ends[-1] <= 30.0 + 1e-9
        gaps = [start - end for start, end in zip(window.starts[1:], ends, strict=False)]
        assert all(-1e-9 <= gap <= max_gap + 1e-9 for gap in gaps)


def typical(count: int) -> list[Utterance]:
    rng = np.random.default_rng(0)
    return [utterance(i, float(np.clip(rng.normal(12, 4), 1.5, 24))) for i in range(count)]


def test_windows_are_the_same_for_the_same_seed_and_epoch() -> None:
    utterances = typical(300)
    first = pack_windows(utterances, seed=3, epoch=1)
    assert pack_windows(utterances, seed=3, epoch=1) == first
    assert pack_windows(utterances, seed=3, epoch=2) != first
    assert pack_windows(utterances, seed=4, epoch=1) != first


def test_windows_are_the_same_on_every_machine() -> None:
    # Written down, for a run that is resumed elsewhere or under another Python must go on as it began.
    windows = pack_windows([utterance(i, 5.0 + i) for i in range(6)], seed=1, epoch=2, max_gap=0.0)
    held = [[u.id for u in window.utterances] for window in windows]
    assert held == [["u2", "u3"], ["u5", "u4", "u1", "u0"]]


def test_little_of_a_window_is_padding() -> None:
    utterances = typical(1_500)
    windows = pack_windows(utterances, seed=0, epoch=0, single_fraction=0.0)
    assert sum(u.duration for u in utterances) / (30 * len(windows)) > 0.9


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6, 1.0])
def test_the_share_of_windows_with_one_utterance(fraction: float) -> None:
    windows = pack_windows(typical(1_000), seed=0, epoch=0, single_fraction=fraction)
    single = [window for window in windows if len(window.utterances) == 1]
    assert len(single) / len(windows) == pytest.approx(fraction, abs=0.03)
    # Taken at random, not the long ones that nothing fits beside.
    assert np.mean([window.utterances[0].duration for window in single]) == pytest.approx(12.0, abs=1.5)


def test_singles_are_spread_over_the_epoch() -> None:
    windows = pack_windows(typical(1_000), seed=0, epoch=0, single_fraction=0.3)
    half = [len(window.utterances) == 1 for window in windows[: len(windows) // 2]]
    assert np.mean(half) == pytest.approx(0.3, abs=0.08)


def test_too_long_utterances_are_named_or_sorted_out() -> None:
    utterances = [utterance(0, 4.0), utterance(1, 30.5), utterance(2, 30.0)]
    with pytest.raises(DataError, match=r"u1 \(30\.5 s\): .*too long .*Cut them"):
        pack_windows(utterances, seed=0, epoch=0)
    kept, too_long = usable_for_training(utterances)
    assert ([u.id for u in kept], [u.id for u in too_long]) == (["u0", "u2"], ["u1"])
    many = [utterance(i, 40.0) for i in range(9)]
    with pytest.raises(DataError, match=r"u4 .* and 4 more: "):
        pack_windows(many, seed=0, epoch=0)


def test_no_utterances() -> None:
    with pytest.raises(DataError, match="no utterance to train on"):
        pack_windows([], seed=0, epoch=0)


@pytest.mark.parametrize("options", [{"single_fraction": 1.5}, {"max_gap": -0.1}])
def test_options_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="single_fraction must be"):
        pack_windows([utterance(0, 4.0)], seed=0, epoch=0, **options)


def test_load_window_places_the_audio(corpus: Path) -> None:
    a, b, _ = load_corpus(corpus)
    samples = load_window(Window((b, a), (0.0, 2.5)))
    assert samples.dtype == np.float32
    assert samples.shape == (WINDOW_SAMPLES,)
    heard = np.flatnonzero(np.abs(samples) > 0.01)
    assert heard[0] < 20
    assert not samples[32_000:40_000].any()
    assert samples[40_000:56_000].any()
    assert not samples[56_000:].any()


def test_load_window_cuts_a_rounding_error(corpus: Path) -> None:
    a, b, _ = load_corpus(corpus)
    samples = load_window(Window((b, a), (0.0, 1.95)))
    assert abs(samples[31_200]) < 1e-3  # the second one's sine begins at 0


def test_load_window_refuses_audio_that_runs_into_the_next(corpus: Path) -> None:
    a, b, _ = load_corpus(corpus)
    with pytest.raises(DataError, match=r"b\.wav: the audio is longer than its utterance's duration"):
        load_window(Window((b, a), (0.0, 1.0)))


def test_load_window_names_bad_audio(corpus: Path) -> None:
    a, _, _ = load_corpus(corpus)
    os.truncate(a.audio, 0)
    with pytest.raises(AudioError, match=r"a\.wav: the file is empty"):
        load_window(Window((a,), (0.0,)))


@given(
    lengths=st.lists(st.floats(0.5, 30.0), max_size=40),
    batch=st.integers(1, 6),
    first=st.integers(0, 50),
)
def test_batches_are_of_like_length(lengths: list[float], batch: int, first: int) -> None:
    windows = [
        Window((Utterance(id=str(i), audio=Path(f"{i}.wav"), duration=seconds),), (0.0,))
        for i, seconds in enumerate(lengths)
    ]
    found = by_length(windows, batch, first=first, seed="some")
    assert sorted(w.utterances[0].id for w in found) == sorted(w.utterances[0].id for w in windows)
    assert found == by_length(windows, batch, first=first, seed="some")
    # What completes the batch that the epoch before began comes first, as it was.
    begun = min(-first % batch, len(windows))
    assert found[:begun] == windows[:begun]
    # No batch reaches into another's lengths: sorted by their shortest, the longest of each is at most that.
    groups = [found[low : low + batch] for low in range(begun, len(found), batch)]
    assert all(len(group) == batch for group in groups[:-1])
    spans = sorted(
        (min(w.utterances[0].duration for w in group), max(w.utterances[0].duration for w in group))
        for group in groups
    )
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))
