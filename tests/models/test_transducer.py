"""Transducers: every class through the whole flow, and what is particular to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from small_runs import heard, logits, noise, short_recipe, write_speech
from small_transducer import BLANK, CLASSES, CONFIGS, WITHOUT, save_model, small_model
from usmlite.cli import main
from usmlite.compress import compress
from usmlite.distill import Distillation, LossWeights
from usmlite.errors import AudioError, DataError, ModelError, RecipeError
from usmlite.load import load
from usmlite.models import TransducerAdapter, load_teacher
from usmlite.moments import collect_moments
from usmlite.network import IGNORED
from usmlite.packed import HOLDS, load_packed
from usmlite.spec import CompressionSpec
from usmlite.student import compressed_layers, make_student, train_compression

TDT = "ParakeetForTDT"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, name) for name in CONFIGS if name not in WITHOUT}


@pytest.mark.parametrize("name", CLASSES)
def test_the_whole_flow(
    name: str,
    directories: dict[str, Path],
    speech: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # `usmlite report` writes where it is called
    report = compress(short_recipe(directories[name], speech), tmp_path / "run")
    assert set(report["evaluations"]) == {"dense", "packed"}
    log = [json.loads(line) for line in (tmp_path / "run/train.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert all(0 < row[term] < 1e4 for row in log for term in ("kl", "ce", "states", "layers"))

    student, packed = load(tmp_path / "run/best"), load(tmp_path / "run/packed", hold="float32")
    assert type(packed.model) is type(student.model)
    theirs = packed.model.state_dict()
    for key, value in student.model.state_dict().items():
        assert torch.equal(theirs[key], value), key
    found, expected = (logits(each.model, each.adapter) for each in (packed, student))
    assert torch.allclose(found, expected, atol=1e-4)
    audio = [np.asarray(soundfile.read(speech.parent / f"{i}.wav", dtype="float32")[0]) for i in range(4)]
    assert packed.transcribe_batch(audio) == student.transcribe_batch(audio)
    for hold in HOLDS:
        model, adapter = load_packed(tmp_path / "run/packed", hold=hold, activations="float32")
        assert torch.allclose(logits(model, adapter), expected, atol=1e-4), hold
        again = [each.text for each in adapter.transcribe(model, [torch.from_numpy(a) for a in audio])]
        assert again == packed.transcribe_batch(audio), hold
    theirs_model = getattr(transformers, name).from_pretrained(tmp_path / "run/packed")
    assert torch.allclose(logits(theirs_model, packed.adapter), found, atol=1e-5)

    commands = (
        [
            "transcribe",
            str(speech.parent / "0.wav"),
            "--model",
            str(tmp_path / "run/packed"),
            "--hold",
            "float32",
        ],
        ["evaluate", str(tmp_path / "run/packed"), "--data", str(speech)],
        ["info", str(tmp_path / "run/packed")],
        ["report", str(tmp_path / "run")],
    )
    for command in commands:
        assert main(command) == 0, command
        said = capsys.readouterr().out
        if command[0] == "transcribe":
            assert packed.transcribe(audio[0]).text in said


@pytest.mark.parametrize("name", CLASSES)
def test_without_training_from_the_command_line(
    name: str, directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    command = ["compress", str(directories[name]), "--data", str(speech), "--out", str(tmp_path / "run")]
    assert main([*command, "--no-finetune", "--dev", str(speech), "--test", str(speech)]) == 0
    size = (tmp_path / "run/packed/model.safetensors").stat().st_size
    assert size < 0.6 * load_teacher(directories[name]).float32_bytes


@pytest.mark.parametrize("name", CLASSES)
def test_logits_and_the_loss_are_those_of_transformers(name: str, directories: dict[str, Path]) -> None:
    plain, teacher = small_model(name), load_teacher(directories[name])
    adapter, batch = teacher.adapter, heard(teacher.adapter)
    given = {key: value for key, value in batch.items() if key not in ("labels", "lengths")}
    with torch.no_grad():
        whole = plain(**given).logits
        found = adapter.network.logits(teacher.model, batch, adapter.network.states(teacher.model, batch))
        loss = adapter.network.text_loss(found, batch)
    counts = (batch["labels"] != IGNORED).sum(dim=1)
    frames = adapter.frames(batch["lengths"])
    rows = [
        whole[row, :count, : said + 1] for row, (count, said) in enumerate(zip(frames, counts, strict=True))
    ]
    expected = torch.cat([row.flatten(0, 1) for row in rows])
    if name != TDT:
        # Its loss in Transformers needs torchaudio: tests/test_transducer_loss.py.
        assert torch.allclose(found, expected, atol=1e-5)
        return
    apart = [part.log_softmax(dim=-1) for part in (expected[:, : BLANK + 1], expected[:, BLANK + 1 :])]
    assert torch.allclose(found, torch.cat(apart, dim=1), atol=1e-5)
    labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, plain.config.pad_token_id)
    with torch.no_grad():
        theirs = plain(**given, labels=labels, reduction="mean_volume").loss
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_a_text_is_what_transformers_generates(name: str, directories: dict[str, Path]) -> None:
    recognizer, plain = load(directories[name]), small_model(name)
    adapter = recognizer.adapter
    audio = [torch.from_numpy(noise(seconds, i)) for i, seconds in enumerate((1.5, 0.9, 2.0))]
    together = adapter.transcribe(recognizer.model, audio)
    for samples, found in zip(audio, together, strict=True):
        inputs = adapter.hear(samples[None], [len(samples) / 16_000])
        frames = int(adapter.frames(inputs.pop("lengths")))
        out = plain.generate(
            **inputs, decoder_start_token_id=BLANK, max_new_tokens=3 * frames, pad_token_id=BLANK,
            suppress_tokens=list(range(BLANK + 1, plain.joint.head.out_features)),
        )  # fmt: skip
        own = [token for token in out.sequences[0].tolist() if token != BLANK]
        assert list(found.tokens) == own
        assert found.mean_logprob < 0
    assert len({found.tokens for found in together}) > 1
    timed = recognizer.transcribe(noise(2.0, 2), word_timestamps=True)
    words = [word for segment in timed.segments for word in segment.words]
    assert words
    assert all(0 <= word.start < word.end <= 2.0 and 0 < word.probability <= 1 for word in words)
    assert [word.start for word in words] == sorted(word.start for word in words)
    assert "".join(word.word for word in words).split() == timed.text.split()


def test_labels_are_where_the_steps_went(directories: dict[str, Path]) -> None:
    adapter = load_teacher(directories[TDT]).adapter
    assert isinstance(adapter, TransducerAdapter)
    t, o = (adapter.tokenizer.convert_tokens_to_ids(letter) for letter in ("▁t", "o"))
    steps = [(t, 2, -0.1), (BLANK, 1, -0.2), (o, 0, -0.3), (BLANK, 4, -0.4), (t, 9, -0.5), (t, 1, -9.0)]
    from usmlite.models import Options

    found = adapter._placed(steps, 10, 1.0, Options(word_timestamps=True))
    (segment,) = found.segments
    assert [(word.word, word.start, word.end) for word in segment.words] == [
        (" to", 0.0, 0.4),
        (" t", 0.7, 1.0),
    ]
    assert found.tokens == (t, o, t)
    assert found.mean_logprob == pytest.approx(-0.3)  # what came after the end was not said


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_has_its_rule_and_learns(name: str, directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories[name])
    adapter = teacher.adapter
    kinds = adapter.compressible(teacher.model)
    parameters = dict(teacher.model.named_parameters())
    assert kinds["decoder.embedding.weight"] == "embedding"
    for part in ("encoder_projector", "decoder.decoder_projector", "joint.head"):
        assert kinds[f"{part}.weight"] == "linear"
    assert not any("lstm" in key for key in kinds)
    assert {adapter.part(key) for key in parameters} == {
        "feature encoder", "encoder", "prediction network", "joint network",
    }  # fmt: skip
    assert len(adapter.layers()) == 2
    student = make_student(teacher.model, kinds, CompressionSpec.simple(4, "2:4"))
    train_compression(student)
    assert [name for name, module in student.named_modules() if module.training and "lstm" in name]  # cuDNN
    assert not student.get_submodule("encoder").training
    batch = heard(adapter)
    sound = batch.pop("input_features")
    distillation = Distillation(
        student, teacher.model, LossWeights(layers=1.0), network=adapter.network, layers=adapter.layers()
    )
    one, two = (distillation(heard=sound, taught=sound, **batch) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    one["loss"].backward()
    for key, layer in compressed_layers(student):
        assert layer.weight.grad is not None, key
        assert float(layer.weight.grad.abs().max()) > 0, key
    assert student.get_parameter("decoder.lstm.weight_hh_l1").grad is not None


@pytest.mark.parametrize("name", CLASSES)
def test_padding_takes_no_part(name: str, directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories[name])
    adapter, network = teacher.adapter, teacher.adapter.network
    batch = heard(adapter, (2.0, 0.8))
    frames, said = adapter.frames(batch["lengths"]), (batch["labels"] != IGNORED).sum(dim=1) + 1
    names = ["encoder_projector", "decoder.decoder_projector", "joint.head"]
    moments, _ = collect_moments(teacher.model, names, [batch], network=network)
    for key, expected in zip(names, (frames.sum(), said.sum(), (frames * said).sum()), strict=True):
        assert 0.7 * int(expected) <= moments[key].count <= int(expected), key
    with torch.no_grad():
        states = network.states(teacher.model, batch)
        found = network.logits(teacher.model, batch, states)
        alone = {key: value[1:] for key, value in batch.items()}
        second = network.logits(teacher.model, alone, states[1:])
    assert len(found) == int((frames * said).sum())
    assert torch.allclose(found[-len(second) :], second, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"initial_prompt": "names"}, "an initial prompt"),
        ({"hotwords": "names"}, "hotwords"),
        ({"language_model": "lm.arpa"}, "a word language model"),
        ({"beam_size": 5}, "beams"),
        ({"temperatures": (0.5,)}, "a temperature"),
        ({"task": "translate"}, "task 'translate'"),
    ],
)
def test_what_others_offer_is_refused(asked: dict[str, Any], said: str, directories: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=said):
        load(directories[TDT]).transcribe(noise(1.0), **asked)


def test_speech_and_texts_that_cannot_be_used(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    shutil.copytree(speech.parent, tmp_path / "speech")
    manifest = tmp_path / "speech/manifest.jsonl"
    good = manifest.read_text()
    manifest.write_text(good.replace("two", "2 Zo\u00eb"))
    with pytest.raises(DataError, match=r"u1.*lacks letters.*found 2 ë\)"):
        compress(short_recipe(directories[TDT], manifest), tmp_path / "letters")
    manifest.write_text(good.replace('"text": "', '"text": "' + "see " * 99))
    with pytest.raises(DataError, match="no text is short enough"):
        compress(short_recipe(directories[TDT], manifest), tmp_path / "long")
    with pytest.raises(RecipeError, match="the model has no decoder"):
        compress(short_recipe(directories[TDT], speech, data={"swapped": 0.1}), tmp_path / "swapped")
    with pytest.raises(AudioError, match="shorter than one frame"):
        load(directories[TDT]).adapter.hear(torch.zeros(1, 16_000), [0.01])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", TDT, vocab_size=20, blank_token_id=19)
    with pytest.raises(ModelError, match=r"does not fit the model.*below 20.*up to 31"):
        load_teacher(folder)
