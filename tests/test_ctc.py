"""`usmlite ctc`: from a Whisper model's directory to a dense CTC model, and on to a packed one."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from small_whisper import small_teacher
from usmlite.cli import main
from usmlite.compress import compress
from usmlite.ctc import train_ctc
from usmlite.errors import DataError, ModelError, OutputError, RecipeError
from usmlite.finetune import Progress
from usmlite.load import load
from usmlite.models.vocabulary import characters, labels_of, pieces, plain
from usmlite.recipe import DENSE_CTC, Recipe, build_recipe, merged

TEXTS = ("ONE TWO", "IT'S TWO", "TO TEN", "SEE ME", "ONE", "TEN TO TWO")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for number, text in enumerate(TEXTS):
        time = np.arange(int(16_000 * (1.5 + 0.25 * number))) / 16_000
        noise = np.random.default_rng(number).normal(0, 0.02, len(time))
        samples = 0.2 * np.sin(2 * np.pi * (200 + 90 * number) * time) + noise
        soundfile.write(folder / f"{number}.wav", samples.astype(np.float32), 16_000)
        rows.append({"id": f"u{number}", "audio_filepath": f"{number}.wav", "text": text})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    model, adapter = small_teacher(encoder_layers=2)
    for parameter in model.model.encoder.parameters():  # the usual start makes every frame the same
        if parameter.ndim == 2 and len(parameter) < 100:
            parameter.data *= 10.0
    model.save_pretrained(folder)
    adapter.save_processor(folder)
    return folder


def recipe(whisper: Path, speech: Path, **sections: dict[str, Any]) -> Recipe:
    ours: dict[str, dict[str, Any]] = {
        "model": {"source": str(whisper)},
        "data": {"train": str(speech), "dev": str(speech)},
        "training": {
            "steps": 4, "batch_size": 2, "eval_every": 100, "precision": "float32", "checkpoint_every": 1,
        },
    }  # fmt: skip
    return build_recipe(merged(merged(DENSE_CTC, ours), sections and merged(ours, sections)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vocabulary": "pieces", "vocabulary_size": 24, "chunk": 0.32, "left_chunks": 2},
        {"intermediate": "1", "time_reduction": 2},
    ],
    ids=["characters", "pieces in chunks", "conditioned"],
)
def test_a_dense_model_and_then_a_small_one(
    settings: dict[str, Any], whisper: Path, speech: Path, tmp_path: Path
) -> None:
    report = train_ctc(recipe(whisper, speech, ctc=settings), tmp_path / "dense")
    assert set(report["evaluations"]) == {"dense"}
    log = [json.loads(line) for line in (tmp_path / "dense/training/train.jsonl").read_text().splitlines()]
    assert len(log) == 4
    assert all(0 < row["ce"] < 1e3 and row["kl"] == 0 for row in log)
    # What is there is a model for everything else, without anything of the run.
    shutil.rmtree(tmp_path / "dense/training")
    dense = load(tmp_path / "dense")
    assert dense.kind == "dense"
    config = dense.adapter.config
    assert config.chunk_frames == (16 if "chunk" in settings else 0)
    assert list(config.intermediate_layers) == ([1] if "intermediate" in settings else [])
    values = {
        "model": {"source": str(tmp_path / "dense")},
        "data": {"train": str(speech), "dev": str(speech), "targets": "text"},
        "spec": {"bits": 4, "sparsity": "2:4"},
        "student": {"calibration": 2},
        "training": {"steps": 2, "batch_size": 2, "precision": "float32", "layers": 0.1},
    }
    small = compress(build_recipe(values), tmp_path / "small")
    assert set(small["evaluations"]) == {"dense", "packed"}
    log = [json.loads(line) for line in (tmp_path / "small/train.jsonl").read_text().splitlines()]
    assert all(row[term] > 0 for row in log for term in ("kl", "ce", "states", "layers"))
    student, packed = load(tmp_path / "small/best"), load(tmp_path / "small", hold="float32")
    audio = [np.asarray(soundfile.read(speech.parent / f"{i}.wav", dtype="float32")[0]) for i in range(6)]
    batch = packed.adapter.hear(torch.tensor(np.stack([a[:24_000] for a in audio])), [1.5] * 6)
    with torch.inference_mode():
        one, two = (
            each.adapter.network.logits(each.model, batch, each.adapter.network.states(each.model, batch))
            for each in (student, packed)
        )
    assert torch.allclose(one, two, atol=1e-4)
    assert packed.transcribe_batch(audio) == student.transcribe_batch(audio)


class _CutError(Exception):
    pass


def test_a_run_that_was_cut_off_ends_like_one_that_was_not(
    whisper: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(whisper, speech, ctc={"intermediate": "1", "dropout": 0.2})
    train_ctc(plan, tmp_path / "whole")
    from usmlite import ctc, finetune

    whole = finetune.finetune

    def cut(*arguments: Any, tell: Callable[[Progress], None], **settings: Any) -> Any:
        def once(now: Progress) -> None:
            if now.step == 2:
                raise _CutError

        return whole(*arguments, tell=once, **settings)

    monkeypatch.setattr(ctc.training, "finetune", cut)
    with pytest.raises(_CutError):
        train_ctc(plan, tmp_path / "cut")
    assert not (tmp_path / "cut/config.json").exists()
    monkeypatch.undo()
    train_ctc(plan, tmp_path / "cut")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_head_learns_first(whisper: Path, speech: Path, tmp_path: Path) -> None:
    plan = recipe(
        whisper, speech,
        training={
            "phases": [{"until": 1.0, "learning_rate": 0.0}], "steps": 2, "average": 0.0, "warmup": 0.0,
        },
    )  # fmt: skip
    train_ctc(plan, tmp_path / "out")
    start, end = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out/training/start", tmp_path / "out")
    )
    moved = {name for name in start if not torch.equal(start[name].half(), end[name].half())}
    assert moved == {"ctc_head.weight", "ctc_head.bias"}


def test_the_teachers_own_words(whisper: Path, speech: Path, tmp_path: Path) -> None:
    said = ["One, two.", "It\u2019s 2!", "To ten", "See me.", "", "Nobody said that."]
    rows = [{"id": f"u{i}", "teacher": str(whisper), "text": text} for i, text in enumerate(said)]
    path = tmp_path / "transcripts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = recipe(whisper, speech, data={"targets": "teacher", "transcripts": str(path)})
    console = Console(file=io.StringIO(), width=200)
    train_ctc(plan, tmp_path / "out", console=console)
    assert "2 utterances left out: the teacher got them wrong" in console.file.getvalue()  # type: ignore[attr-defined]
    tokenizer = load(tmp_path / "out").adapter.tokenizer  # type: ignore[attr-defined]
    assert labels_of(tokenizer) == 2 + len(set("one two it's 2 to ten see me") - {" "})


def test_texts_too_long_for_their_frames_are_left_out_and_counted(
    whisper: Path, speech: Path, tmp_path: Path
) -> None:
    shutil.copytree(speech.parent, tmp_path / "speech")
    manifest = tmp_path / "speech/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("SEE ME", "SEE ME " * 30))
    console = Console(file=io.StringIO(), width=200)
    train_ctc(recipe(whisper, manifest, training={"steps": 1}), tmp_path / "out", console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 utterances left out: their texts are too long for their audio or the model: u3" in said
    assert "5 utterances" in said


@pytest.mark.parametrize(
    ("sections", "kind", "said"),
    [
        ({"spec": {"bits": 4}}, RecipeError, "a dense model is not compressed"),
        ({"training": {"kl": 1.0}}, RecipeError, "a new head has no teacher"),
        ({"training": {"steps": 0}}, RecipeError, "must be trained"),
        ({"ctc": {"intermediate": "9"}}, RecipeError, "settings that do not fit the encoder.*from 1 to"),
        ({"ctc": {"time_reduction": 7}}, RecipeError, "must divide"),
        ({"ctc": {"vocabulary": "pieces", "vocabulary_size": 5}}, DataError, "too few word pieces"),
    ],
)
def test_settings_that_make_no_model(
    sections: dict[str, Any], kind: type[Exception], said: str, whisper: Path, speech: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        train_ctc(recipe(whisper, speech, **sections), tmp_path / "out")


def test_what_is_not_ours_is_left_alone(whisper: Path, speech: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not a run of `usmlite ctc`"):
        train_ctc(recipe(whisper, speech), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(RecipeError, match="a recipe for a dense CTC model"):
        compress(recipe(whisper, speech), tmp_path / "other")
    with pytest.raises(RecipeError, match="no section for a CTC model"):
        train_ctc(build_recipe({}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_only_whispers_have_an_encoder_for_it(
    whisper: Path, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(speech), "--steps", "1", "--batch-size", "2", "--precision", "float32"]
    assert main(["ctc", str(whisper), *flags, "--no-spec-augment", "--out", str(tmp_path / "one")]) == 0
    assert main(["ctc", str(tmp_path / "one"), *flags, "--out", str(tmp_path / "two")]) == 2
    assert "not a model whose encoder can get a head" in capsys.readouterr().err
    with pytest.raises(ModelError):
        load(tmp_path / "two")


def test_vocabularies(tmp_path: Path) -> None:
    assert plain(" It\u2019s  A\u2013B: N° 5! ") == "it's a b n 5"
    tokenizer = characters(["It's", "a 5"])
    assert labels_of(tokenizer) == 8
    assert tokenizer.convert_ids_to_tokens(list(range(8))) == ["<pad>", "|", "'", "5", "a", "i", "s", "t"]
    texts = ["hello there", "here we are", "there he is", "where were we"] * 5
    trained = pieces(texts, 40)
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert labels_of(again) <= 40
    labels = again("where are we", add_special_tokens=False).input_ids
    assert len(labels) < len("where are we")
    assert again.decode(labels, group_tokens=False) == "where are we"
    with pytest.raises(DataError, match="no letters"):
        characters(["...", ""])
