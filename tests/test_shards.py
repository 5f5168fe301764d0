"""Speech in tar files."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from usmlite import cli, shards
from usmlite.audio import audio_seconds, load_audio
from usmlite.data import load_corpus
from usmlite.errors import AudioError, DataError
from usmlite.training_windows import load_window, pack_windows

SPEECH = Path(__file__).parent / "speech"


def add(tar: tarfile.TarFile, name: str, data: bytes | str) -> None:
    data = data.encode() if isinstance(data, str) else data
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of two utterances each: with .txt, with .json, in folders, and without text."""
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        add(tar, "README", "no sample")
        add(tar, "a/0.opus", (SPEECH / "0.opus").read_bytes())
        add(tar, "a/0.txt", "My sister found\n a silver key.")
        add(tar, "1.opus", (SPEECH / "1.opus").read_bytes())
        add(tar, "1.json", json.dumps({"text": "one", "speaker": "s", "snr_db": 3, "other": [1]}))
    with tarfile.open(tmp_path / "train-000001.tar", "w") as tar:
        add(tar, "./2.opus", (SPEECH / "2.opus").read_bytes())
        add(tar, "./2.json", "{}")
        add(tar, "3.opus", (SPEECH / "3.opus").read_bytes())
    return tmp_path


def test_shards_are_a_corpus(folder: Path) -> None:
    found = load_corpus(folder)
    assert [each.id for each in found] == ["a/0", "1", "2", "3"]
    assert [each.text for each in found] == ["My sister found a silver key.", "one", None, None]
    assert (found[1].speaker, found[1].snr_db) == ("s", 3.0)
    for number, each in enumerate(found):
        file = SPEECH / f"{number}.opus"
        assert each.duration == audio_seconds(file)
        np.testing.assert_array_equal(load_audio(each.audio), load_audio(file))
    assert load_corpus(folder / "train-000001.tar") == found[2:]
    window = pack_windows(found, seed=0, epoch=0)[0]
    assert load_window(window).shape == (480_000,)


def test_every_utterance_is_in_an_epoch_once_however_many_processes_share_it(folder: Path) -> None:
    windows = pack_windows(load_corpus(folder), seed=1, epoch=3, single_fraction=1.0)
    shares = [windows[process::2] for process in range(2)]
    said = [u.id for share in shares for window in share for u in window.utterances]
    assert sorted(said) == ["1", "2", "3", "a/0"]


def test_a_manifest_may_lead_into_shards(folder: Path) -> None:
    manifest = folder / "list.jsonl"
    manifest.write_text('{"audio_filepath": "train-000001.tar/3.opus", "text": "three"}\n')
    (found,) = load_corpus(manifest)
    assert (found.id, found.text) == ("train-000001.tar/3", "three")
    manifest.write_text('{"audio_filepath": "train-000001.tar/none.opus"}\n')
    with pytest.raises(DataError, match="no such file in the shard"):
        load_corpus(manifest)


def test_without_text_there_is_nothing_to_evaluate(folder: Path) -> None:
    with pytest.raises(DataError, match=r"000001\.tar/2\.opus: the audio has no text.*2\.txt or 2\.json"):
        load_corpus(folder, require_text=True)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"x.txt": "text"}, r"bad\.tar/x: not a sample of speech.*found x\.txt"),
        ({"x.flac": b"", "x.wav": b""}, "not a sample of speech"),
        ({"x.wav": b"noise"}, r"the audio cannot be used"),
        ({"README": "nothing"}, "the shards hold no audio"),
        ({"0.opus": None, "0.json": "[1]"}, "not a JSON object"),
        ({"0.opus": None, "0.json": "{"}, "not valid JSON"),
        ({"0.opus": None, "0.txt": b"\xff"}, "not UTF-8 text"),
        ({"0.opus": None, "0.json": '{"duration": 9}'}, r"the duration is wrong for 0\.opus"),
        ({"0.opus": None, "0.json": '{"text": 3}'}, "text has the wrong type"),
    ],
)
def test_bad_samples(tmp_path: Path, files: dict[str, bytes | str | None], expected: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, data in files.items():
            add(tar, name, (SPEECH / "0.opus").read_bytes() if data is None else data)
    with pytest.raises(DataError, match=f"(?s){expected}"):
        load_corpus(tmp_path)


def test_bad_shards(folder: Path, tmp_path: Path) -> None:
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    shutil.copy(first, second)
    with pytest.raises(DataError, match="duplicate id 'a/0'"):
        load_corpus(folder)
    with tarfile.open(second, "w:gz") as tar:
        add(tar, "3.opus", (SPEECH / "3.opus").read_bytes())
    with pytest.raises(DataError, match="not an uncompressed tar file"):
        load_corpus(second)
    with tarfile.open(second, "w") as tar:
        add(tar, "3.opus", (SPEECH / "3.opus").read_bytes())
        add(tar, "3.opus", (SPEECH / "3.opus").read_bytes())
    with pytest.raises(DataError, match=r"3\.opus is in it twice"):
        load_corpus(second)


def test_a_shard_that_changed_is_read_anew(folder: Path) -> None:
    second = folder / "train-000001.tar"
    before = load_corpus(second)
    with tarfile.open(second, "w") as tar:
        add(tar, "4.opus", (SPEECH / "0.opus").read_bytes())
    assert [each.id for each in load_corpus(second)] == ["4"]
    with pytest.raises(AudioError, match="no such file in the shard"):
        load_audio(before[0].audio)
    assert shards.shard_of(SPEECH / "0.opus") is None


def test_evaluate_takes_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train-000001.tar").unlink()
    assert cli.main(["evaluate", "tiny.en-small", "--data", str(folder / "train-000000.tar")]) == 0
    assert "of 7; 0.1 minutes of speech" in capsys.readouterr().out  # words
