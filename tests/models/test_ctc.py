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
from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2Processor

from small_ctc import CLASSES, CONFIGS, LETTERS, WITHOUT, save_letters, save_model, small_model
from small_runs import heard, logits, short_recipe, write_speech
from usmlite.compress import compress
from usmlite.distill import Distillation, LossWeights
from usmlite.errors import (
    AudioError,
    DataError,
    ModelError,
    PackedModelError,
    RecipeError,
    SpecError,
    TrainingError,
)
from usmlite.info import describe
from usmlite.load import load
from usmlite.models import load_teacher
from usmlite.models.ctc import CallingAttention
from usmlite.network import IGNORED, FrameNetwork
from usmlite.pack import pack
from usmlite.packed import HOLDS, load_packed
from usmlite.spec import NM, CompressionSpec, Int, LayerSpec
from usmlite.student import (
    compressed_layers,
    dense_equivalent,
    fake_quantized,
    make_student,
    round_kept,
    train_compression,
)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, name) for name in CONFIGS if name not in WITHOUT}


@pytest.mark.parametrize("name", CLASSES)
def test_the_whole_flow(name: str, directories: dict[str, Path], speech: Path, tmp_path: Path) -> None:
    plan = short_recipe(directories[name], speech)
    report = compress(plan, tmp_path)
    assert set(report["evaluations"]) == {"dense", "packed"}
    assert report["training"]["steps"] == 3
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(0 < row[term] < 1e4 for row in log for term in ("kl", "ce", "states", "layers"))

    student, packed = load(tmp_path / "best"), load(tmp_path / "packed", hold="float32")
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
        model, adapter = load_packed(tmp_path / "packed", hold=hold, activations="float32")
        assert torch.allclose(logits(model, adapter), expected, atol=1e-4), hold
    theirs_model = AutoModelForCTC.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(theirs_model, packed.adapter), found)


@pytest.mark.parametrize("name", CLASSES)
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


@pytest.mark.parametrize("name", CLASSES)
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
            assert kind == (("linear" if pointwise else "conv1d") if mixes else None), key
        elif type(module) is nn.Linear and module.out_features >= 16:
            assert kind == "linear", key
        else:
            assert kind is None, key
    # Nothing but the small rest stays in float16.
    rest = sum(
        parameters[key].numel() for key in parameters if key not in kinds and parameters[key].dim() > 1
    )
    assert rest < 0.08 * sum(parameter.numel() for parameter in parameters.values())
    layers = teacher.adapter.layers()
    assert len(layers) == 2
    assert all(teacher.model.get_submodule(layer) is not None for layer in layers)
    parts = {teacher.adapter.part(key) for key in parameters}
    assert parts == {"feature encoder", "encoder", "head"}


@pytest.mark.parametrize("name", CLASSES)
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


@pytest.mark.parametrize("name", CLASSES)
def test_info_says_what_packing_takes(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    spec = CompressionSpec.simple(4)
    teacher = load_teacher(directories[name])
    student = make_student(teacher.model, teacher.adapter.compressible(teacher.model), spec)
    packed = pack(student.eval(), teacher.adapter, tmp_path / "out", coded=False)
    found = describe(directories[name], spec)
    assert found.file_bytes == packed.weights_bytes
    assert sum(found.by_part().values()) + found.header_bytes == found.file_bytes
    assert set(found.by_part()) == {"feature encoder", "encoder", "head"}


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")  # Transformers' own attention
def test_preparing_changes_nothing_that_is_computed(directories: dict[str, Path]) -> None:
    for name in ("WavLMForCTC", "HubertForCTC"):
        plain, teacher = small_model(name), load_teacher(directories[name])
        if name == "WavLMForCTC":
            assert any(isinstance(module, CallingAttention) for module in teacher.model.modules())
        values = torch.randn(2, 8_000)
        mask = (torch.arange(8_000) < torch.tensor([[8_000], [5_000]])).long()
        for extra in ({}, {"attention_mask": mask}):
            with torch.no_grad():
                ours, theirs = (m(input_values=values, **extra).logits for m in (teacher.model, plain))
            seen = slice(0, 14 if extra else None)  # what follows the shorter audio is nobody's
            assert torch.allclose(ours[:, seen], theirs[:, seen], atol=1e-5)
        before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
        teacher.adapter.prepare(teacher.model)
        assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())


def test_the_network_trains_as_it_will_be_used(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories["LasrForCTC"])
    adapter = teacher.adapter
    student = make_student(
        teacher.model, adapter.compressible(teacher.model), CompressionSpec.simple(4, "2:4")
    )
    train_compression(student)
    statistics = {key: value.clone() for key, value in student.named_buffers() if "running" in key}
    assert len(statistics) == 4
    batch = heard(adapter)
    speech = batch.pop("input_features")
    distillation = Distillation(
        student, teacher.model, LossWeights(layers=1.0), network=adapter.network, layers=adapter.layers()
    )
    one, two = (distillation(heard=speech, taught=speech, **batch) for _ in range(2))
    assert one.keys() == {"loss", "kl", "ce", "states", "layers"}
    assert all(torch.equal(one[key], two[key]) for key in one)  # nothing is dropped or masked at random
    one["loss"].backward()
    assert all(torch.equal(value, dict(student.named_buffers())[key]) for key, value in statistics.items())
    for key, layer in compressed_layers(student):
        assert layer.weight.grad is not None, key
        assert float(layer.weight.grad.abs().max()) > 0, key
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_padding_takes_no_part_in_the_losses(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories["HubertForCTC"])
    adapter = teacher.adapter
    student = make_student(teacher.model, adapter.compressible(teacher.model), CompressionSpec.simple(3))
    student.eval()
    weights = LossWeights(kl=1.0, ce=1.0, states=1.0, layers=1.0)
    distillation = Distillation(
        student, teacher.model, weights, network=adapter.network, layers=adapter.layers()
    )
    batch = heard(adapter, (2.0, 0.8))
    rows = []
    for row, length in enumerate(batch["lengths"].tolist()):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        alone |= {key: alone[key][:, :length] for key in ("input_values", "attention_mask")}
        rows.append(alone)
    frames = [int(adapter.frames(each["lengths"])) for each in rows]
    labels = [int((each["labels"] != IGNORED).sum()) for each in rows]

    def losses(which: dict[str, torch.Tensor]) -> dict[str, float]:
        rest = {key: value for key, value in which.items() if key != "input_values"}
        speech = which["input_values"]
        return {k: v.item() for k, v in distillation(heard=speech, taught=speech, **rest).items()}

    together, (long, short) = losses(batch), (losses(each) for each in rows)
    for key, counts in (("kl", frames), ("ce", labels)):
        expected = (long[key] * counts[0] + short[key] * counts[1]) / sum(counts)
        assert together[key] == pytest.approx(expected, rel=1e-3)
    # Relative to the teacher's own size, which differs a little from row to row.
    low, high = sorted((long["states"], short["states"]))
    assert 0.99 * low <= together["states"] <= 1.01 * high


def network(frames: int) -> FrameNetwork:
    return FrameNetwork("encoder", "head", 0, lambda lengths: lengths.clamp(max=frames))


def test_texts_without_room_are_left_out_of_the_loss_and_never_infinite() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1, 2, IGNORED], [1, 1, 2], [IGNORED, IGNORED, IGNORED]])
    batch = {"x": torch.zeros(3, 4), "lengths": torch.tensor([4, 3, 4]), "labels": labels}
    logits = torch.randn(11, 5, generator=generator, requires_grad=True)
    loss = network(4).text_loss(logits, batch)  # the second needs four frames, and has three
    alone = {"x": torch.zeros(1, 4), "lengths": torch.tensor([4]), "labels": labels[:1]}
    assert loss.item() == pytest.approx(network(4).text_loss(logits[:4], alone).item())
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[4:].abs().max()) == 0.0
    none = {key: value[1:] for key, value in batch.items()}
    assert float(network(4).text_loss(torch.randn(7, 5), none)) == 0.0


def test_a_loss_that_is_not_finite_ends_the_run(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    plan = short_recipe(
        directories["Wav2Vec2ForCTC"], speech, training={"learning_rate": 1e30, "clip": 1e30, "steps": 8}
    )
    with pytest.raises(TrainingError, match=r"not finite.*learning_rate"):
        compress(plan, tmp_path)


def test_a_run_that_was_cut_off_ends_like_one_that_was_not(
    directories: dict[str, Path], speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usmlite.checkpoint import CheckpointFolder

    settings = {"steps": 4, "checkpoint_every": 1, "spec_augment": True}
    plan = short_recipe(
        directories["WavLMForCTC"], speech, training=settings, data={"noise": 0.5, "speed": 0.1}
    )
    compress(plan, tmp_path / "whole")
    save = CheckpointFolder.save

    def cut(self: CheckpointFolder, *args: Any) -> None:
        save(self, *args)
        if args[-1] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointFolder, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        compress(plan, tmp_path / "cut")
    monkeypatch.setattr(CheckpointFolder, "save", save)
    compress(plan, tmp_path / "cut")
    one, two = ((tmp_path / run / "packed/model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert one == two


def test_a_target_size_is_met_and_a_learned_allocation_too(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    spec = {"target_size": "30%", "allocation": "learned", "allocation_steps": 2}
    plan = short_recipe(directories["Wav2Vec2ConformerForCTC"], speech, spec=spec, training={"steps": 0})
    report = compress(plan, tmp_path)
    assert 0.2 < report["size"] <= 0.3
    rules = json.loads((tmp_path / "allocation.json").read_text())["weights"]
    assert {rule["kind"] for rule in rules} == {"linear", "conv1d"}


def test_the_teachers_own_transcripts_are_targets(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    plan = short_recipe(
        directories["HubertForCTC"],
        speech,
        data={"targets": "teacher", "max_wer": 1e9},
        training={"steps": 1},
    )
    compress(plan, tmp_path)
    teacher = load_teacher(directories["HubertForCTC"])
    for line in (tmp_path / "transcripts.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        assert teacher.adapter.written(text) == text
        assert teacher.adapter.unwritable(text) == ""


def test_a_processor_that_was_saved_as_a_whole_is_read(directories: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(directories["HubertForCTC"], tmp_path / "model")
    processor = Wav2Vec2Processor.from_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").unlink()
    processor.save_pretrained(tmp_path / "model")
    adapter = load_teacher(tmp_path / "model").adapter
    assert adapter.extractor.return_attention_mask
    assert adapter.decode_text(adapter.encode_text("to toll")) == "to toll"


# Bad input


def test_letters_that_the_tokenizer_lacks_are_listed(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    shutil.copytree(speech.parent, tmp_path / "speech")
    manifest = tmp_path / "speech/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("two", "2 Zo\u00eb\u2019s \u2013 no!"))
    plan = short_recipe(directories["LasrForCTC"], manifest)
    with pytest.raises(DataError, match=r"u1.*lacks letters.*found 2 ë\)"):
        compress(plan, tmp_path / "out")
    assert not (tmp_path / "out/calibration.json").exists()  # found before anything is computed
    adapter = load_teacher(directories["LasrForCTC"]).adapter
    # Capitals, quotes and dashes are written as the tokenizer has them, other punctuation is left out.
    assert adapter.written("It\u2019s A\u2013B, no!") == "it's a b no"


def test_texts_too_long_for_their_frames_are_skipped_counted_and_named(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    shutil.copytree(speech.parent, tmp_path / "speech")
    manifest = tmp_path / "speech/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("see me", "see me " * 30).replace("two", "tttwo" * 20))
    console = Console(file=io.StringIO(), width=200)
    plan = short_recipe(directories["Wav2Vec2ForCTC"], manifest, training={"steps": 1})
    compress(plan, tmp_path / "out", console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 utterances left out: their texts are too long for their audio or the model: u1, u3" in said
    manifest.write_text(manifest.read_text().replace('"text": "', '"text": "' + "to " * 99))
    with pytest.raises(DataError, match="no text is short enough"):
        compress(short_recipe(directories["Wav2Vec2ForCTC"], manifest), tmp_path / "none")


@pytest.mark.parametrize("name", CLASSES)
def test_the_shortest_audio_has_one_frame(name: str, directories: dict[str, Path]) -> None:
    recognizer = load(directories[name])
    adapter = recognizer.adapter
    count = round(adapter.shortest * 16_000)
    noise = np.random.default_rng(0).normal(0, 0.1, count).astype(np.float32)
    recognizer.transcribe(noise)
    if name == "LasrForCTC":
        assert adapter.shortest == pytest.approx(0.145)
        with pytest.raises(AudioError, match=r"audio 0: the audio is shorter than one frame.*0\.145 s"):
            recognizer.transcribe(noise[:-1])
        with pytest.raises(AudioError, match="shorter than one frame"):
            adapter.hear(torch.zeros(1, count), [0.1])


def test_speech_shorter_than_a_frame_is_not_trained_on(
    directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    shutil.copytree(speech.parent, tmp_path / "speech")
    samples = np.random.default_rng(0).normal(0, 0.1, 2_000).astype(np.float32)
    soundfile.write(tmp_path / "speech/0.wav", samples, 16_000)
    console = Console(file=io.StringIO(), width=200)
    plan = short_recipe(
        directories["LasrForCTC"],
        tmp_path / "speech/manifest.jsonl",
        training={"steps": 1},
        data={"dev": str(speech)},
    )
    compress(plan, tmp_path / "out", console=console)
    assert "1 longer than 30 s or shorter than a frame left out" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_spec_that_compresses_nothing_is_refused(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories["Data2VecAudioForCTC"])
    kinds = teacher.adapter.compressible(teacher.model)
    from usmlite.spec import Rule

    rules = (Rule("model.decoder.*", LayerSpec(Int(4), NM(2, 4))), Rule("*", LayerSpec()))
    with pytest.raises(SpecError, match=r"model\.decoder.*compresses no weight.*such as data2vec_audio"):
        make_student(teacher.model, kinds, CompressionSpec(rules))
    make_student(teacher.model, kinds, CompressionSpec.simple(None))  # to keep everything may be meant


def test_a_tokenizer_of_another_model_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(directories["Wav2Vec2ForCTC"], tmp_path / "model")
    save_letters(folder, "abcdefghijklmnopqrstuvwxyzäöüß'")
    with pytest.raises(ModelError, match=r"does not fit the model.*below 32.*up to 35"):
        load_teacher(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        load_teacher(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="feature extractor cannot be read"):
        load_teacher(folder)


def test_marks_that_the_head_does_not_know_are_no_labels(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(directories["Wav2Vec2ForCTC"], tmp_path / "model")
    tokens = ["<pad>", "|", *LETTERS, "<unk>", "x1", "x2", "<s>", "</s>"]  # 32 labels, then two marks
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    adapter = load_teacher(folder).adapter
    assert max(adapter.tokenizer.get_vocab().values()) >= 32
    assert adapter.decode_text(adapter.encode_text("to toll")) == "to toll"


@pytest.mark.parametrize("setting", [{"data": {"swapped": 0.1}}, {"training": {"attention": 1.0}}])
def test_settings_of_a_decoder_are_refused(
    setting: dict[str, dict[str, Any]], directories: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="the model has no decoder"):
        compress(short_recipe(directories["Wav2Vec2ForCTC"], speech, **setting), tmp_path / "out")


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    model = small_model("Wav2Vec2ForCTC")
    model.wav2vec2.save_pretrained(tmp_path)
    save_letters(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head.*saved as Wav2Vec2ForCTC"):
        load_teacher(tmp_path)


def test_a_config_that_contradicts_the_weights_is_refused_before_anything_is_made(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(directories["WavLMForCTC"], tmp_path / "model")
    good = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"hidden_size": 1 << 20}, "contradicts config.json"),
        ({"num_hidden_layers": 1 << 20}, "1048576 layers"),
        ({"vocab_size": 1 << 30}, "contradicts config.json"),
    ):
        (folder / "config.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(ModelError, match=said):
            load_teacher(folder)


def test_unknown_classes_get_the_steps(directories: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(directories["WavLMForCTC"], tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "unispeech-sat"}')
    with pytest.raises(ModelError, match=r"no adapter.*'wavlm'.*adding-a-model\.md.*UniSpeechSatForCTC"):
        load_teacher(folder)


def test_a_damaged_packed_model_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_teacher(directories["LasrForCTC"])
    student = make_student(
        teacher.model, teacher.adapter.compressible(teacher.model), CompressionSpec.simple(4)
    )
    pack(student.eval(), teacher.adapter, tmp_path / "out")
    path = tmp_path / "out/config.json"
    good = json.loads(path.read_text())
    for changes in (
        {"model_type": "whale"},
        {"model_type": None},
        {"encoder_config": {**good["encoder_config"], "num_hidden_layers": 1 << 30}},
        {"encoder_config": "many"},
        {"vocab_size": 7},
    ):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(PackedModelError):
            load_packed(tmp_path / "out")


def test_the_student_can_be_expanded(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories["WavLMForCTC"])
    student = make_student(
        teacher.model, teacher.adapter.compressible(teacher.model), CompressionSpec.simple(4, "2:4")
    )
    dense = dense_equivalent(student.eval(), teacher.model)
    assert torch.allclose(logits(dense, teacher.adapter), logits(student, teacher.adapter), atol=1e-4)
