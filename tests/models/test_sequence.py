"""Recognizers with a decoder, other than Whisper: every class through the whole flow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn
from transformers import AutoModelForSpeechSeq2Seq, GenerationConfig

from small_runs import heard, logits, noise, short_recipe, write_speech
from small_sequence import CLASSES, CONFIGS, WITHOUT, save_model, small_model
from usmlite.cli import main
from usmlite.compress import compress
from usmlite.distill import Distillation, LossWeights
from usmlite.errors import AudioError, DataError, ModelError, PackedModelError
from usmlite.info import describe
from usmlite.load import load
from usmlite.models import SequenceAdapter, TimedText, load_teacher
from usmlite.moments import collect_moments
from usmlite.network import IGNORED
from usmlite.pack import pack
from usmlite.packed import HOLDS, load_packed
from usmlite.spec import CompressionSpec
from usmlite.student import compressed_layers, fake_quantized, make_student, round_kept, train_compression

MOONSHINE = "MoonshineForConditionalGeneration"


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
    report = compress(short_recipe(directories[name], speech, training={"attention": 0.1}), tmp_path / "run")
    assert set(report["evaluations"]) == {"dense", "packed"}
    log = [json.loads(line) for line in (tmp_path / "run/train.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert all(0 < row[term] < 1e4 for row in log for term in ("kl", "ce", "states", "layers", "attention"))

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
    theirs_model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "run/packed")
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
    assert size < 0.5 * load_teacher(directories[name]).float32_bytes


@pytest.mark.parametrize("name", CLASSES)
def test_loss_and_logits_are_those_of_transformers(name: str, directories: dict[str, Path]) -> None:
    plain, teacher = small_model(name), load_teacher(directories[name])
    adapter = teacher.adapter
    batch = heard(adapter)
    with torch.no_grad():
        out = plain(**{key: value for key, value in batch.items() if key != "lengths"})
        states = adapter.network.states(teacher.model, batch)
        found = adapter.network.logits(teacher.model, batch, states)
        loss = adapter.network.text_loss(found, batch)
    assert torch.allclose(found, out.logits[adapter.network.scored(batch)], atol=1e-5)
    assert float(loss) == pytest.approx(float(out.loss), rel=1e-5)
    mask = adapter.network.heard(batch)
    assert mask.shape == states.shape[:2]
    assert mask.sum(dim=1).tolist()[0] == states.shape[1] > mask.sum(dim=1).tolist()[1]
    # Tokens do not look at what pads the shorter recording.
    changed = torch.where(mask[..., None], states, states + 1.0)
    with torch.no_grad():
        assert torch.allclose(adapter.network.logits(teacher.model, batch, changed), found, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_a_text_is_what_transformers_generates_of_its_window_alone(
    name: str, directories: dict[str, Path]
) -> None:
    teacher = load_teacher(directories[name])
    adapter, audio = teacher.adapter, [torch.from_numpy(noise(s, i)) for i, s in enumerate((1.5, 0.9, 2.0))]
    together = adapter.transcribe(teacher.model, audio)
    for samples, found in zip(audio, together, strict=True):
        inputs = adapter.hear(samples[None], [len(samples) / 16_000])
        inputs.pop("lengths")
        tokens = small_model(name).generate(**inputs, max_new_tokens=len(found.tokens) + 1, do_sample=False)
        own = [token for token in tokens[0, 1:].tolist() if token != 2][: len(found.tokens)]
        assert list(found.tokens) == own
        assert found.text == adapter.decode_text(found.tokens)
        assert found.mean_logprob < 0
    assert len({found.tokens for found in together}) > 1  # it does hear something


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_has_its_rule(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_teacher(directories[name])
    adapter = teacher.adapter
    kinds = adapter.compressible(teacher.model)
    parameters = dict(teacher.model.named_parameters())
    assert "embedding" in kinds.values()
    for key, module in teacher.model.named_modules():
        if type(module) is nn.Linear and f"{key}.weight" in parameters:
            assert kinds[f"{key}.weight"] == "linear", key
        elif isinstance(module, nn.LSTM) or type(module).__name__.endswith("CausalConv1d"):
            assert not any(name.startswith(f"{key}.") for name in kinds)
    assert len(adapter.layers()) == 4 == adapter.depth(adapter.config)
    assert all(teacher.model.get_submodule(layer) is not None for layer in adapter.layers())
    assert {adapter.part(key) for key in parameters} == {"feature encoder", "encoder", "decoder"}
    spec = CompressionSpec.simple(3, "2:4")
    student = make_student(teacher.model, kinds, spec)
    round_kept(student)
    pack(student.eval(), adapter, tmp_path / "out", coded=False)
    promised, made = (
        {row.name: row.bytes for row in describe(source, spec).rows if row.kind != "embedding"}
        for source in (directories[name], tmp_path / "out")
    )
    assert promised == made  # tables are coded at a rate, and what that takes is not known before
    model, _ = load_packed(tmp_path / "out")
    for key, layer in compressed_layers(student):
        assert torch.equal(model.get_parameter(f"{key}.weight"), fake_quantized(layer)), key
    assert torch.allclose(logits(model, adapter), logits(student, adapter), atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_learns_and_nothing_is_drawn(name: str, directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories[name])
    adapter = teacher.adapter
    kinds = adapter.compressible(teacher.model)
    student = make_student(teacher.model, kinds, CompressionSpec.simple(4, "2:4"))
    train_compression(student)
    batch = heard(adapter)
    speech = batch.pop(adapter.main_input)
    distillation = Distillation(
        student, teacher.model, LossWeights(layers=1.0, attention=1.0), network=adapter.network,
        layers=adapter.layers(), attentions=adapter.attentions(),
    )  # fmt: skip
    one, two = (distillation(heard=speech, taught=speech, **batch) for _ in range(2))
    assert one.keys() == {"loss", "kl", "ce", "states", "layers", "attention"}
    assert all(torch.equal(one[key], two[key]) for key in one)
    one["loss"].backward()
    for key, layer in compressed_layers(student):
        if key != "model.decoder.pos_emb":  # only the rows of so many frames
            assert layer.weight.grad is not None, key
            assert float(layer.weight.grad.abs().max()) > 0, key


def test_padding_takes_no_part_in_calibration(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories[MOONSHINE])
    adapter = teacher.adapter
    batch = heard(adapter, (2.0, 0.8))
    names = ["model.encoder.layers.0.mlp.fc1", "model.decoder.layers.0.mlp.fc1"]
    names += ["model.decoder.layers.1.encoder_attn.k_proj"]
    moments, _ = collect_moments(teacher.model, names, [batch], network=adapter.network)
    frames = int(adapter.network.heard(batch).sum())
    tokens = int((batch["labels"] != IGNORED).sum())
    assert frames == sum(
        adapter.network.heard({"attention_mask": row[None]}).sum() for row in batch["attention_mask"]
    )
    for name, expected in zip(names, (frames, tokens, frames), strict=True):
        assert moments[name].count == pytest.approx(expected, rel=0.3)
        assert moments[name].count <= expected


def test_targets_are_a_start_a_text_and_an_end(directories: dict[str, Path]) -> None:
    adapter = load_teacher(directories[MOONSHINE]).adapter
    assert isinstance(adapter, SequenceAdapter)
    windows = [[TimedText(0.0, 1.0, "to"), TimedText(1.0, 2.0, "ten")], []]
    taught = adapter.teach(windows, timestamps=[True, False], language="en")
    text = adapter.encode_text("to ten")
    assert taught["decoder_input_ids"].tolist() == [[0, *text], [0, *[1] * len(text)]]
    assert taught["labels"].tolist() == [[*text, 2], [2, *[IGNORED] * len(text)]]
    assert adapter.words(taught["decoder_input_ids"]).tolist()[0] == [False, *[True] * len(text)]
    assert adapter.written("IT\u2019S TO, TEN!") == "it's to ten"
    adapter.generation.forced_bos_token_id = 5  # a language
    told = adapter.teach(windows[:1], timestamps=[False], language=None)
    assert told["decoder_input_ids"].tolist() == [[0, 5, *text]]
    assert told["labels"].tolist() == [[IGNORED, *text, 2]]


def test_the_settings_of_generate_that_others_chose_do_not_matter(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    plain = load(directories[MOONSHINE]).transcribe(noise(1.5), timestamps=False).text
    folder = shutil.copytree(directories[MOONSHINE], tmp_path / "model")
    config = GenerationConfig.from_pretrained(folder)
    config.update(num_beams=5, early_stopping=True, max_length=3, length_penalty=2.0, no_repeat_ngram_size=0)
    config.save_pretrained(folder)
    assert load(folder).transcribe(noise(1.5), timestamps=False).text == plain


@pytest.mark.parametrize("name", CLASSES)
def test_a_long_recording_is_cut_where_it_is_quiet(name: str, directories: dict[str, Path]) -> None:
    recognizer = load(directories[name])
    samples = noise(41.0)
    samples[25 * 16_000 : 26 * 16_000] *= 1e-3
    found = recognizer.transcribe(samples)
    first = found.segments[0]
    assert (first.start, first.end) == (0.0, pytest.approx(25.5, abs=0.4))
    cut = round(first.end * 16_000)
    texts = [recognizer.transcribe(part, timestamps=False).text for part in (samples[:cut], samples[cut:])]
    assert found.text == " ".join(text for text in texts if text)
    assert texts[0] == first.text


# Bad input


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"word_timestamps": True}, "does not say when it heard a word"),
        ({"initial_prompt": "names"}, "an initial prompt"),
        ({"hotwords": "names"}, "hotwords"),
        ({"language_model": "lm.arpa"}, "a word language model"),
        ({"beam_size": 5}, "beams"),
        ({"temperatures": (0.5,)}, "a temperature"),
        ({"task": "translate"}, "task 'translate'"),
    ],
)
def test_what_only_whisper_offers_is_refused(
    asked: dict[str, Any], said: str, directories: dict[str, Path]
) -> None:
    recognizer = load(directories[MOONSHINE])
    with pytest.raises(ModelError, match=said):
        recognizer.transcribe(noise(1.0), **asked)
    with pytest.raises(ModelError, match="does not tell languages"):
        recognizer.languages_heard(noise(1.0))


@pytest.mark.parametrize("name", CLASSES)
def test_the_shortest_audio_has_one_frame(name: str, directories: dict[str, Path]) -> None:
    recognizer = load(directories[name])
    count = round(recognizer.adapter.shortest * 16_000)
    recognizer.transcribe(noise(1.0)[:count])
    recognizer.adapter.transcribe(recognizer.model, [torch.zeros(16_000)])  # a pause of a long recording
    if name == MOONSHINE:
        assert count == max(895, count)
        with pytest.raises(AudioError, match="shorter than one frame"):
            recognizer.adapter.hear(torch.zeros(1, 16_000), [0.05])


def test_letters_and_texts_that_cannot_be_written(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    shutil.copytree(speech.parent, tmp_path / "speech")
    manifest = tmp_path / "speech/manifest.jsonl"
    good = manifest.read_text()
    manifest.write_text(good.replace("two", "2 Zo\u00eb"))
    with pytest.raises(DataError, match=r"u1.*lacks letters.*found 2 ë\)"):
        compress(short_recipe(directories[MOONSHINE], manifest), tmp_path / "letters")
    manifest.write_text(good.replace('"text": "', '"text": "' + "see " * 99))
    with pytest.raises(DataError, match="no text is short enough"):
        compress(short_recipe(directories[MOONSHINE], manifest), tmp_path / "long")


def test_a_processor_of_another_model_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", MOONSHINE, vocab_size=20)
    with pytest.raises(ModelError, match=r"does not fit the model.*below 20.*up to 34"):
        load_teacher(folder)
    folder = save_model(tmp_path / "end", MOONSHINE, eos_token_id=9)
    with pytest.raises(ModelError, match=r"does not fit the model.*the end 9.*the end 2"):
        load_teacher(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        load_teacher(folder)
    (folder / "generation_config.json").write_text("{")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="feature extractor cannot be read"):
        load_teacher(folder)


def test_a_config_that_contradicts_the_weights_is_refused_before_anything_is_made(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(directories[MOONSHINE], tmp_path / "model")
    good = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"hidden_size": 1 << 20}, "contradicts config.json"),
        ({"encoder_num_hidden_layers": 1 << 20}, "1048578 layers"),
        ({"vocab_size": 1 << 30}, "contradicts config.json"),
    ):
        (folder / "config.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(ModelError, match=said):
            load_teacher(folder)


def test_a_packed_model_that_claims_too_much_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_teacher(directories[MOONSHINE])
    kinds = teacher.adapter.compressible(teacher.model)
    student = make_student(teacher.model, kinds, CompressionSpec.simple(4))
    pack(student.eval(), teacher.adapter, tmp_path / "out")
    path = tmp_path / "out/config.json"
    good = json.loads(path.read_text())
    for changes in (
        {"encoder_num_hidden_layers": 1 << 30},
        {"max_position_embeddings": 1 << 40},
        {"decoder_num_attention_heads": 0},
        {"vocab_size": 7},
    ):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(PackedModelError):
            load_packed(tmp_path / "out")


def test_words_can_be_swapped(directories: dict[str, Path], speech: Path, tmp_path: Path) -> None:
    plan = short_recipe(directories[MOONSHINE], speech, data={"swapped": 0.5}, training={"steps": 1})
    report = compress(plan, tmp_path / "swapped")
    assert report["training"]["steps"] == 1
