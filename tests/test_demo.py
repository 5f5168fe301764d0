from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from rich.console import Console

from usmlite import demo
from usmlite.data import load_corpus
from usmlite.errors import ModelError, OutputError, RecipeError

COUNTS = {"train": 6, "dev": 2, "test": 3}


class Hum:
    """A voice for tests: as long as the text, and counts how often it spoke."""

    spoken = 0

    def __call__(self, text: str, speed: float = 1.0, seed: int | None = None) -> np.ndarray:
        type(self).spoken += 1
        seconds = len(text) / 50 / speed
        time = np.arange(int(demo.VOICE_RATE * seconds)) / demo.VOICE_RATE
        return (0.3 * np.sin(2 * np.pi * 220 * time)).astype(np.float32)


def speech(output: Path, **changes: Any) -> demo.DemoSpeech:
    return demo.make_speech(output, counts=COUNTS, voice=Hum, **changes)


def test_speech_is_a_corpus_in_three_parts(tmp_path: Path) -> None:
    made = speech(tmp_path / "demo")
    corpora = [load_corpus(path, require_text=True) for path in (made.train, made.dev, made.test)]
    assert [len(corpus) for corpus in corpora] == list(COUNTS.values())
    texts = [utterance.text for corpus in corpora for utterance in corpus]
    assert len(set(texts)) == len(texts)
    samples, rate = soundfile.read(corpora[0][0].audio)
    assert rate == demo.VOICE_RATE
    assert len(samples) / rate == pytest.approx(corpora[0][0].duration)


def test_speech_is_made_once_and_the_same(tmp_path: Path) -> None:
    made, again = speech(tmp_path / "a"), speech(tmp_path / "b")
    assert made.train.read_bytes() == again.train.read_bytes()
    wav = "train/0003.wav"
    assert (made.train.parent / wav).read_bytes() == (again.train.parent / wav).read_bytes()
    before = Hum.spoken
    speech(tmp_path / "a")
    assert Hum.spoken == before
    # Cut off before the end, it is made again.
    (tmp_path / "a/speech/speech.json").unlink()
    speech(tmp_path / "a")
    assert Hum.spoken == before + sum(COUNTS.values())


def test_degrade_stays_in_bounds() -> None:
    clean = Hum()("one sentence of some length", seed=0)
    levels = []
    for seed in range(20):
        noisy = demo.degrade(clean, np.random.default_rng(seed))
        added = (len(noisy) - len(clean)) / demo.VOICE_RATE
        assert 0.19 < added < 0.81
        assert noisy.dtype == np.float32
        levels.append(np.abs(noisy).max())
    assert 0.1 < min(levels) < 0.3
    assert 0.6 < max(levels) < 1.0
    assert np.array_equal(
        demo.degrade(clean, np.random.default_rng(1)), demo.degrade(clean, np.random.default_rng(1))
    )


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        speech(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError):
        speech(tmp_path / "thesis.txt")


def test_a_missing_voice_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **settings: Any) -> Any:
        if name == "hibari":
            raise ImportError(name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r'pip install "usmlite\[demo\]"'):
        demo.make_speech(tmp_path / "demo", counts=COUNTS)


def test_recipe() -> None:
    made = demo.DemoSpeech(Path("train.jsonl"), Path("dev.jsonl"), Path("test.jsonl"))
    recipe = demo.demo_recipe(made)
    assert (recipe.spec.bits, recipe.spec.sparsity, recipe.model.source) == (4, "2:4", "tiny.en")
    assert recipe.data.train == "train.jsonl"
    assert demo.demo_recipe(made, 3).training.steps == 3
    with pytest.raises(RecipeError):
        demo.demo_recipe(made, -1)


def test_it_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed_model: Path) -> None:
    """Everything around the compression itself, which `tests/test_compress.py` covers."""
    report = {
        "float32_bytes": 151_000_000, "packed_bytes": 13_000_000, "size": 13 / 151,
        "evaluations": {"dense": {"wer": 0.031}, "packed": {"wer": 0.094}},
    }  # fmt: skip

    def compressed(recipe: Any, output: Path, *, console: Any = None) -> dict[str, Any]:
        import shutil

        shutil.copytree(packed_model, output / "packed")
        return report

    monkeypatch.setattr(demo, "compress", compressed)
    monkeypatch.setattr(demo, "_hibari", Hum)
    monkeypatch.setattr(demo, "COUNTS", COUNTS)
    console = Console(record=True, width=200, quiet=False)
    assert demo.run_demo(tmp_path / "demo", console=console) is report
    shown = console.export_text()
    for part in ("synthetic", "LibriSpeech", "results/", "9.4 %", "model.safetensors", "and it heard"):
        assert part in shown
    for line in shown.splitlines():
        if line.startswith("  usmlite "):
            from usmlite.cli import build_parser

            arguments = build_parser().parse_args(line.split()[1:])
            for name in ("source", "data"):
                value = getattr(arguments, name, "tiny.en")
                assert value == "tiny.en" or Path(value).exists()


@pytest.mark.slow
def test_the_real_thing(tmp_path: Path) -> None:
    report = demo.run_demo(tmp_path / "demo")
    assert report["evaluations"]["packed"]["wer"] < 0.15
    assert report["size"] < 0.12
    assert report["seconds"] < 600
    assert (
        json.loads((tmp_path / "demo/run/report.json").read_text())["packed_bytes"] == report["packed_bytes"]
    )
    assert "hibari" in sys.modules
