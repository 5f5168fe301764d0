"""Encoders with a CTC head: every class through the whole flow, and what is particular to them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCTC, Wav2Vec2Processor

from small_ctc import CONFIGS, save_letters, save_model, small_model
from usmlite.compress import compress
from usmlite.distill import Distillation, LossWeights
from usmlite.errors import AudioError, DataError, ModelError, PackedModelError, SpecError, TrainingError
from usmlite.info import describe
from usmlite.load import load
from usmlite.models import IGNORED, CTCAdapter, FrameNetwork, TimedText, load_teacher
from usmlite.models.ctc import CallingAttention
from usmlite.pack import pack
from usmlite.packed import HOLDS, load_packed
from usmlite.recipe import build_recipe
from usmlite.spec import NM, CompressionSpec, Int, LayerSpec
from usmlite.student import (
    compressed_layers,
    dense_equivalent,
    fake_quantized,
    make_student,
    round_kept,
    train_compression,
)

TEXTS = ("one", "two", "to ten", "see me")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of four recordings of about two seconds: hums, no speech."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for number, text in enumerate(TEXTS):
        seconds = 1.9 + 0.25 * number
        time = np.arange(int(16_000 * seconds)) / 16_000
        noise = np.random.default_rng(number).normal(0, 0.02, len(time))
        samples = 0.2 * np.sin(2 * np.pi * (200 + 90 * number) * time) + noise
        soundfile.write(folder / f"{number}.wav", samples.astype(np.float32), 16_000)
        rows.append({"id": f"u{number}", "audio_filepath": f"{number}.wav", "text": text, "speaker": "ab"[number % 2]})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, name) for name in CONFIGS}


def recipe(source: Path, speech: Path, **sections: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "model": {"source": str(source)},
        "data": {"train": str(speech), "dev": str(speech), "targets": "text"},
        "student": {"calibration": 2},
        "training": {
            "steps": 3, "batch_size": 2, "eval_every": 100, "warmup": 0.0, "learning_rate": 1e-3,
            "precision": "float32", "layers": 0.1,
        },
    }  # fmt: skip
    for section, table in sections.items():
        values[section] = {**values.get(section, {}), **table}
    return build_recipe(values)


def heard(adapter: CTCAdapter, seconds: tuple[float, ...] = (2.0, 1.3), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = 0.1 * torch.randn(len(seconds), 32_000, generator=generator)
    texts = [[TimedText(0.0, 1.0, text)] for text in ("hello", "at all")]
    written = adapter.teach(texts, timestamps=[False, False], language=None)
    return {**adapter.hear(samples, seconds), **written}


def logits(model: nn.Module, adapter: CTCAdapter) -> torch.Tensor:
    batch = heard(adapter)
    with torch.inference_mode():
        return adapter.network.logits(model, batch, adapter.network.states(model, batch))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_flow(name: str, directories: dict[str, Path], speech: Path, tmp_path: Path) -> None:
    plan = recipe(directories[name], speech)
    report = compress(plan, tmp_path)
    assert set(report["evaluations"]) == {"dense", "packed"}
    assert report["training"]["steps"] == 3
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(0 < row[term] < 1e4 for row in log for term in ("kl", "ce", "states", "layers"))

    student, packed = load(tmp_path / "best"), load(tmp_path / "packed")
    assert type(packed.model) is type(student.model)
    assert (student.kind, packed.kind) == ("student", "packed")
    theirs = packed.model.state_dict()
    for key, value in student.model.state_dict().items():
        assert torch.equal(theirs[key], value), key
    found, expected = (logits(each.model, each.adapter) for each in (packed, student))
    assert torch.allclose(found, expected, atol=1e-4)
    audio = [np.asarray(soundfile.read(speech.parent / f"{i}.wav", dtype="float32")[0]) for i in range(4)]
    assert packed.transcribe_batch(audio) == student.transcribe_batch(audio)
    for hold in HOLDS:
        model, adapter = load_packed(tmp_path / "packed", hold=hold)
        assert torch.allclose(logits(model, adapter), expected, atol=1e-4), hold
    theirs_model = AutoModelForCTC.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(theirs_model, packed.adapter), found)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_logits_are_those_of_transformers(name: str, directories: dict[str, Path]) -> None:
    plain = small_model(name, ctc_loss_reduction="sum")
    teacher = load_teacher(directories[name])
    adapter = teacher.adapter
    batch = heard(adapter)
    inputs = {key: value for key, value in batch.items() if key != "lengths"}
    if "attention_mask" not in inputs:  # without one, Transformers takes padding for speech
        batch["lengths"] = torch.full_like(batch["lengths"], batch["input_values"].shape[1])
    with torch.no_grad():
        out = plain(**inputs)
        states = adapter.network.states(teacher.model, batch)
        found = adapter.network.logits(teacher.model, batch, states)
        loss = adapter.network.text_loss(found, batch)
    scored = adapter.network.scored(batch)
    assert scored.shape == out.logits.shape[:2]
    assert torch.allclose(found, out.logits[scored], atol=1e-5)
    assert float(loss) == pytest.approx(float(out.loss) / float((batch["labels"] != IGNORED).sum()), rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_its_rule(name: str, directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories[name])
    kinds = teacher.adapter.compressible(teacher.model)
    parameters = dict(teacher.model.named_parameters())
    assert not any("parametrizations" in key for key in parameters)
    assert {"linear"} <= set(kinds.values()) <= {"linear", "conv1d"}
    for key, module in teacher.model.named_modules():
        kind = kinds.get(f"{key}.weight")
        if isinstance(module, nn.Conv1d) and type(module) is nn.Conv1d:
            mixes = module.in_channels > module.groups
            pointwise = module.kernel_size == (1,) and module.groups == 1
            assert kind == ((("linear" if pointwise else "conv1d")) if mixes else None), key
        elif type(module) is nn.Linear and module.out_features >= 16:
            assert kind == "linear", key
        else:
            assert kind is None, key
    # Nothing but the small rest stays in float16.
    rest = sum(parameters[key].numel() for key in parameters if key not in kinds and parameters[key].dim() > 1)
    assert rest < 0.08 * sum(parameter.numel() for parameter in parameters.values())
    layers = teacher.adapter.layers()
    assert len(layers) == 2
    assert all(teacher.model.get_submodule(layer) is not None for layer in layers)
    parts = {teacher.adapter.part(key) for key in parameters}
    assert parts == {"feature encoder", "encoder", "head"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_trained_is_what_ships(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_teacher(directories[name])
    spec = CompressionSpec.simple(3, "2:4")
    student = make_student(teacher.model, teacher.adapter.compressible(teacher.model), spec)
    round_kept(student)
    packed = pack(student.eval(), teacher.adapter, tmp_path / "out")
    model, _ = load_packed(tmp_path / "out")
    for key, layer in compressed_layers(student):
        assert torch.equal(model.get_parameter(f"{key}.weight"), fake_quantized(layer)), key
    assert torch.allclose(logits(model, teacher.adapter), logits(student, teacher.adapter), atol=1e-4)
    assert describe(tmp_path / "out", spec).file_bytes == packed.weights_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_info_says_what_packing_takes(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    spec = CompressionSpec.simple(4)
    teacher = load_teacher(directories[name])
    student = make_student(teacher.model, teacher.adapter.compressible(teacher.model), spec)
    packed = pack(student.eval(), teacher.adapter, tmp_path / "out", coded=False)
    found = describe(directories[name], spec)
    assert found.file_bytes == packed.weights_bytes
    assert sum(found.by_part().values()) + found.header_bytes == found.file_bytes
    assert set(found.by_part()) == {"feature encoder", "encoder", "head"}
