import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from small_whisper import small_teacher
from usmlite.compress import compress
from usmlite.errors import OutputError, RecipeError, SpecError, UsmliteError
from usmlite.evaluate import Evaluation
from usmlite.info import describe
from usmlite.load import load
from usmlite.models import load_teacher
from usmlite.recipe import Recipe, build_recipe, load_recipe
from usmlite.spec import CompressionSpec, LayerSpec, Rule
from usmlite.speech import Speech
from usmlite.start import check_trellis
from usmlite.target_size import candidates, expected_bytes
from usmlite.targets import training_targets

TEXTS = ["hello", "good day", "a tree", "the sea", "no", "yes we go"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    teacher, adapter = small_teacher()
    teacher.save_pretrained(folder)
    adapter.save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    lines = []
    for number, text in enumerate(TEXTS):
        samples = np.random.default_rng(number).normal(0, 0.1, 16000 * (2 + number)).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        row = {
            "audio_filepath": f"{number}.wav",
            "duration": len(samples) / 16000,
            "text": text,
            "id": str(number),
        }
        lines.append(json.dumps(row))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def recipe(model: Path, speech: Path, **changes: dict[str, object]) -> Recipe:
    tables: dict[str, dict[str, object]] = {
        "model": {"source": str(model)},
        "data": {"train": str(speech), "dev": str(speech), "targets": "text"},
        "student": {"calibration": 2},
        "training": {"steps": 2, "batch_size": 1, "eval_utterances": 2, "precision": "float32"},
    }
    for section, table in changes.items():
        tables.setdefault(section, {}).update(table)
    return build_recipe(tables)


@pytest.fixture(scope="module")
def run(
    model: Path, speech: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object], str]:
    output = tmp_path_factory.mktemp("runs") / "run"
    console = Console(record=True, width=120)
    with open("/dev/null", "w") as nowhere:
        console.file = nowhere
        report = compress(recipe(model, speech), output, console=console)
    return output, report, console.export_text()


def test_the_run_ends_with_a_page_and_a_curve(run):
    output, report, text = run
    assert "Report: " in text
    assert "<h1>Report of run</h1>" in (output / "report.html").read_text()
    assert "Loss " in text
    assert len(json.loads((output / "histograms.json").read_text())["weights"]) > 4
    assert report["data"]["train"]["utterances"] == len(TEXTS)
    assert report["data"]["dev"]["seconds"] > 0


def test_a_page_that_cannot_be_written_loses_nothing(model, speech, tmp_path, monkeypatch):
    def broken(paths):
        raise OutputError("cannot be written", where="report.html")

    monkeypatch.setattr(sys.modules["usmlite.compress"], "read_report", broken)
    console = Console(record=True, file=io.StringIO())
    quick = recipe(model, speech, student={"start": "magnitude"}, training={"steps": 0})
    compress(quick, tmp_path / "run", console=console)
    assert "No report.html: report.html: cannot be written" in console.export_text()
    assert (tmp_path / "run/report.json").is_file()


def test_the_run_prints_a_plan_and_a_table_and_writes_a_report(run):
    output, report, text = run
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["packed_bytes"] == (output / "packed" / "model.safetensors").stat().st_size
    assert set(report["evaluations"]) == {"dense", "packed"}
    assert "MB in float32" in text
    assert "% of float32" in text
    assert "real-time factor" in text


def test_expected_bytes_are_those_of_the_file_but_for_its_header(run, model, speech, tmp_path):
    output = tmp_path / "run"
    plain = recipe(model, speech, spec={"entropy_coding": False}, training={"steps": 0})
    report = compress(plain, output)
    expected = expected_bytes(plain.spec.build(), load_teacher(model))
    with (output / "packed" / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert report["packed_bytes"] == expected + header


def test_student_and_packed_model_are_the_same_model(run):
    output, _, _ = run
    packed, student = load(output, hold="float32"), load(output / "best")
    assert (packed.kind, student.kind) == ("packed", "student")
    features = torch.randn(1, 8, 3000)
    ids = torch.tensor([[257, 263, 40, 50]])
    with torch.inference_mode():
        ours = packed.model(input_features=features, decoder_input_ids=ids).logits
        theirs = student.model(input_features=features, decoder_input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    # The student counts tensors, the packed file has a header too.
    assert 0 < packed.weights_bytes - student.weights_bytes < 20_000


def test_the_same_command_again_only_repeats_what_is_not_kept(run, model, speech):
    output, report, _ = run
    before = (output / "packed" / "model.safetensors").read_bytes()
    again = compress(recipe(model, speech), output)
    assert (output / "packed" / "model.safetensors").read_bytes() == before
    assert again["training"]["steps"] == report["training"]["steps"]


def test_the_same_seed_gives_the_same_file(run, model, speech, tmp_path):
    output, _, _ = run
    compress(recipe(model, speech), tmp_path / "twin")
    ours = (output / "packed" / "model.safetensors").read_bytes()
    assert (tmp_path / "twin" / "packed" / "model.safetensors").read_bytes() == ours


def test_another_recipe_in_the_same_place_is_refused_and_named(run, model, speech):
    output, _, _ = run
    with pytest.raises(OutputError, match=r"training\.steps: 2 there, 3 now"):
        compress(recipe(model, speech, training={"steps": 3}), output)


def test_a_directory_that_is_not_ours_is_refused_and_left_alone(model, speech, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="not a run of usmlite"):
        compress(recipe(model, speech), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("start", ["magnitude", "activation", "hessian"])
def test_without_fine_tuning(model, speech, tmp_path, start):
    plan = recipe(model, speech, training={"steps": 0}, student={"start": start}, data={"dev": None})
    report = compress(plan, tmp_path / "run")
    assert report["training"] is None
    assert load(tmp_path / "run").kind == "packed"


def test_a_target_size_is_met_and_its_spec_kept(model, speech, tmp_path):
    plan = recipe(model, speech, spec={"target_size": "55kB"}, training={"steps": 1})
    report = compress(plan, tmp_path / "run")
    assert 44_000 < report["packed_bytes"] <= 55_000
    written = (tmp_path / "run" / "spec.toml").read_bytes()
    student, packed = load(tmp_path / "run" / "best"), load(tmp_path / "run", hold="float32")
    features = torch.randn(1, 8, 3000)
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[257, 263, 40]])}
    with torch.no_grad():
        assert torch.equal(student.model(**inputs).logits, packed.model(**inputs).logits)
    # The same command again takes the choice that was made; its spec given as a recipe makes it again.
    assert compress(plan, tmp_path / "run")["packed_bytes"] == report["packed_bytes"]
    assert (tmp_path / "run" / "spec.toml").read_bytes() == written
    spec = load_recipe(tmp_path / "run" / "spec.toml").spec
    again = recipe(model, speech, spec={"rules": list(spec.rules)}, training={"steps": 0})
    # But for the codes that the step of training moved.
    assert compress(again, tmp_path / "again")["packed_bytes"] == pytest.approx(
        report["packed_bytes"], rel=1e-3
    )


@pytest.mark.parametrize(("size", "steps"), [(46_000, 0), (48_000, 0), (48_000, 1)])
def test_a_target_size_is_used_up(model, speech, tmp_path, size, steps):
    spec = {"target_size": str(size)}
    report = compress(recipe(model, speech, spec=spec, training={"steps": steps}), tmp_path / "run")
    assert 0.9 * size < report["packed_bytes"] <= size
    found = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert found["counted"]
    # What was counted is what lies in the file, where no training came between.
    sizes = {row.name: row.bytes for row in describe(tmp_path / "run" / "packed", CompressionSpec()).rows}
    for row in found["weights"] if not steps else ():
        assert row["candidates"][row["chosen"]]["bytes"] == sizes[f"{row['name']}.weight"]


def test_a_learned_allocation_keeps_the_size_and_what_was_measured(model, speech, tmp_path, monkeypatch):
    spec = {"target_size": "48kB", "allocation": "learned", "allocation_steps": 3}
    plan = recipe(model, speech, spec=spec, training={"steps": 0})

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["usmlite.target_size"], "learn_allocation", killed)
        with pytest.raises(Killed):
            compress(plan, tmp_path / "run")
    measured = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert not (tmp_path / "run" / "spec.toml").exists()
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["usmlite.target_size"], "allocate", killed)  # nothing is measured again
        report = compress(plan, tmp_path / "run")
    assert 40_000 < report["packed_bytes"] <= 48_000
    state = json.loads((tmp_path / "run" / "allocation-mixture.json").read_text())
    assert state["step"] == 3
    learned = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert learned["counted"]
    assert not measured["counted"]
    for one, other in zip(measured["weights"], learned["weights"], strict=True):
        for before, after in zip(one["candidates"], other["candidates"], strict=True):
            assert before | {"bytes": 0} == after | {"bytes": 0}
    # It can be chosen from again, like any.
    again = {"target_size": "52kB", "measured": str(tmp_path / "run" / "allocation.json")}
    plan = recipe(model, speech, spec=again, training={"steps": 0})
    assert report["packed_bytes"] < compress(plan, tmp_path / "again")["packed_bytes"] <= 52_000


def test_a_student_on_its_way_is_loaded_with_the_bits_it_has(model, speech, tmp_path, monkeypatch):
    student = {"bits_schedule": "8", "mask_freeze": 1.0, "start": "hessian", "masks": "fixed"}
    spec = {"bits": 2, "sparsity": "dense"}
    steps = {"steps": 4, "learning_rate": 0.0, "scale_learning_rate": 0.0, "checkpoint_every": 1}
    plan = recipe(model, speech, student=student, spec=spec, training=steps)

    class Killed(BaseException):
        pass

    from usmlite.checkpoint import CheckpointFolder

    save = CheckpointFolder.save

    def killed(self, student, optimizer, state, step):
        save(self, student, optimizer, state, step)
        if step in (1, 2):
            raise Killed

    monkeypatch.setattr(CheckpointFolder, "save", killed)
    teacher, errors = load(model).model.state_dict(), []
    name = "model.decoder.layers.0.fc2.weight"
    for step in (1, 2):
        with pytest.raises(Killed):
            compress(plan, tmp_path / "run")
        found = load(tmp_path / "run" / "checkpoints" / f"step-00000{step}").model.state_dict()[name]
        errors.append(((found - teacher[name]).square().mean() / teacher[name].square().mean()).item())
    assert errors[0] < 1e-3  # eight bits
    assert 0.05 < errors[1] < 0.3  # two
    report = compress(plan, tmp_path / "run")
    assert report["training"]["best_step"] in (2, 4)


def test_a_target_size_beyond_reach_names_the_least(model, speech, tmp_path):
    with pytest.raises(UsmliteError, match=r"the budget cannot be reached.*at least"):
        compress(recipe(model, speech, spec={"target_size": "1%"}), tmp_path / "run")


def test_a_float_recipe_fine_tunes_the_dense_model(model, speech, tmp_path):
    plan = recipe(model, speech, spec={"bits": "float", "sparsity": "dense"}, student={"start": "magnitude"})
    report = compress(plan, tmp_path / "run")
    assert report["size"] <= 0.5


def test_speech_without_text_is_transcribed_by_the_teacher_once(model, speech, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.wav").write_bytes((speech / f"{number}.wav").read_bytes())
    kept = tmp_path / "transcripts.jsonl"
    plan = recipe(
        model,
        speech,
        data={"train": str(folder), "targets": "teacher", "dev": None, "transcripts": str(kept)},
    )
    compress(plan, tmp_path / "run")
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 3
    assert {row["teacher"] for row in rows} == {str(model)}


def test_runs_share_transcripts_and_the_dense_evaluation(model, speech, tmp_path):
    # Whatever the teacher says is good enough: it knows no English.
    plan = recipe(model, speech, data={"targets": "teacher", "max_wer": 1e6}, training={"steps": 1})
    compress(plan, tmp_path / "first", shared=tmp_path)
    assert len((tmp_path / "transcripts.jsonl").read_text().splitlines()) == len(TEXTS)
    kept = tmp_path / "first" / "evaluation-dense.json"
    dense = replace(Evaluation.from_json(json.loads(kept.read_text())), peak_memory_bytes=7)
    report = compress(plan, tmp_path / "second", shared=tmp_path, dense=dense)
    assert report["evaluations"]["dense"]["peak_memory_bytes"] == 7
    again = json.loads((tmp_path / "second" / "evaluation-dense.json").read_text())
    assert again == json.loads(kept.read_text()) | {"peak_memory_bytes": 7}
    assert not (tmp_path / "second" / "transcripts.jsonl").exists()


def test_no_speech_is_said_before_anything_is_done(model, tmp_path):
    plan = build_recipe({"model": {"source": str(model)}})
    with pytest.raises(RecipeError, match="no speech to work with"):
        compress(plan, tmp_path / "run")


def test_the_saved_recipe_repeats_the_run(run, model, speech):
    output, _, _ = run
    assert load_recipe(output / "recipe.toml") == recipe(model, speech)


def test_corpora_in_capitals_become_sentences(model, tmp_path, speech):
    folder = tmp_path / "loud"
    folder.mkdir()
    (folder / "a.wav").write_bytes((speech / "0.wav").read_bytes())
    (folder / "a.txt").write_text("HE WENT HOME")
    plan = recipe(model, folder, data={"dev": None})
    spoken = Speech.load(plan)
    targets, _ = training_targets(plan, load_teacher(model), spoken, tmp_path, Console(quiet=True))
    assert [u.text for u in targets] == ["He went home"]


def test_errors_are_usmlites_own(model, speech, tmp_path):
    with pytest.raises(UsmliteError):
        compress(recipe(model, tmp_path / "nothing"), tmp_path / "run")


def test_a_trellis_is_for_weights_that_are_not_trained() -> None:
    kinds = {"model.fc1": "linear", "model.embed_tokens": "embedding"}
    linear = CompressionSpec((Rule("*.fc1", LayerSpec.at_rate(2.0, 8)),))
    table = CompressionSpec((Rule("*.embed_tokens", LayerSpec.at_rate(2.0, 8)),))
    still, trained = ({"training": {"steps": steps}} for steps in (0, 10))
    check_trellis(build_recipe(still), linear, kinds)
    check_trellis(build_recipe(trained), table, kinds)
    with pytest.raises(SpecError, match=r"model\.fc1: a trained weight cannot follow.*--no-finetune"):
        check_trellis(build_recipe(trained), linear, kinds)
    learning = {"training": {"steps": 10, "embedding_learning_rate": 1e-5}}
    with pytest.raises(SpecError, match="trained weight cannot follow a trellis"):
        check_trellis(build_recipe(learning), table, kinds)
    with pytest.raises(SpecError, match="second-order rounding"):
        check_trellis(build_recipe({**still, "student": {"start": "magnitude"}}), table, kinds)


@pytest.mark.parametrize(
    ("settings", "along"),
    [
        ({"training": {"steps": 0}}, {"embedding"}),
        ({"training": {"steps": 5}}, {"embedding"}),
        ({"training": {"steps": 5, "embedding_learning_rate": 1e-5}}, set()),
        ({"training": {"steps": 0}, "student": {"start": "activation"}}, set()),
        ({"training": {"steps": 0}, "spec": {"entropy_coding": False}}, set()),
    ],
)
def test_trellis_candidates_are_for_what_stays(settings: dict[str, Any], along: set[str]) -> None:
    spec = {**settings.get("spec", {}), "candidates": "trellis"}
    offered = candidates(build_recipe({**settings, "spec": spec}))
    found = {kind for kind in ("linear", "embedding") if any(each.trellis for each in offered(kind))}
    assert found == along
