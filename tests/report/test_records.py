"""What runs left, whole, in part and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from usmlite.errors import DataError
from usmlite.report import read_report
from usmlite.report.records import Recordings, read_records


def test_a_whole_run(study: Path) -> None:
    [record], unreadable = read_records([study / "trained"])
    assert (unreadable, record.missing) == ([], ())
    size = (study / "trained/packed/model.safetensors").stat().st_size
    assert sum(layer.bytes for layer in record.layers) + record.header_bytes == size
    assert sum(layer.dense_bytes for layer in record.layers) == record.row.float32_bytes
    layer = next(layer for layer in record.layers if layer.name == "model.encoder.layers.0.fc1.weight")
    assert layer.pattern == "2:4"
    assert layer.error is not None
    assert layer.bits == 8 * layer.bytes / (24 * 40)
    assert [row["step"] for row in record.log] == [1, 2, 3, 4, 5, 6]
    assert record.measured == "4 utterances, 4 words, 0.00 h"
    assert record.row.steps == 6
    assert record.evaluation is not None
    assert record.dense is not None
    assert [score.seconds for score in record.evaluation.utterances] == [0.5, 0.75, 1.0, 1.25]
    assert record.report is not None
    assert record.report["data"]["test"]["utterances"] == 4
    assert len(record.report["data"]["test"]["sha256"]) == 64


def test_a_recipe_names_no_places(study: Path) -> None:
    [record], _ = read_records([study / "trained"])
    assert record.recipe is not None
    assert record.recipe["data"]["test"] == "manifest.jsonl"
    assert "/" not in record.recipe["model"]["source"]
    assert str(study.parent) not in read_report([study]).page()


def test_a_directory_of_runs(study: Path) -> None:
    records, unreadable = read_records([study])
    assert ([record.name for record in records], unreadable) == (["int8", "trained"], [])
    assert read_records([study, study / "int8"])[0] == records


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train.jsonl", "train.jsonl: not there"),
        ("histograms.json", "histograms.json: not there"),
        ("packed", "packed: not there"),
        ("evaluation-packed.json", "evaluation-packed.json: not there"),
        ("evaluation-dense.json", "evaluation-dense.json: not there"),
        ("recipe.toml", "recipe.toml: .*cannot read"),
        ("calibration.json", None),
        ("allocation.json", None),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_drawn(study: Path, name: str, said: str | None) -> None:
    path = study / "trained" / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    report = read_report([study])
    page = report.page()
    assert [record.name for record in report.records] == ["int8", "trained"]
    if said is None:
        assert report.notes == []
    else:
        [note] = report.notes
        with pytest.raises(AssertionError, match=f"trained: {said}"):
            raise AssertionError(note)
        assert "What is missing" in page


@pytest.mark.parametrize("name", [
    "train.jsonl", "histograms.json", "evaluation-packed.json", "evaluation-dense.json", "calibration.json",
    "allocation.json", "recipe.toml", "packed/config.json", "packed/model.safetensors",
])  # fmt: skip
@pytest.mark.parametrize("text", ["{", "[]", "7", "{}", '{"weights": [{}], "layers": 3}', "\x00\xff"])
def test_what_is_damaged_is_named_and_the_rest_is_drawn(study: Path, name: str, text: str) -> None:
    (study / "trained" / name).write_text(text)
    report = read_report([study])
    assert len(report.page()) > 100_000
    assert len(report.records) == 2
    # An empty recipe is a recipe.
    if (name, text) not in {("recipe.toml", "[]")}:
        assert any(note.startswith("trained: ") for note in report.notes) or name == "recipe.toml"


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e999", '"0.1"', "null", "[]"])
def test_numbers_that_are_none_are_named(study: Path, bad: str) -> None:
    path = study / "trained" / "evaluation-packed.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain).replace(f'"wer": {plain["wer"]}', f'"wer": {bad}', 1))
    report = read_report([study])
    assert any("evaluation-packed.json" in note for note in report.notes)
    json.dumps(report.to_json(), allow_nan=False)
    report.page()


def test_a_log_that_breaks_off_is_drawn_so_far(study: Path) -> None:
    path = study / "trained" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "lo')
    [record], _ = read_records([study / "trained"])
    assert len(record.log) == 3
    assert record.missing == ("train.jsonl: line 4 is damaged; the curve ends before it",)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"training": 3}', '{"evaluations": {}, "packed_bytes": "x"}']
)
def test_a_run_without_results_is_named(study: Path, text: str) -> None:
    (study / "int8/report.json").write_text(text)
    report = read_report([study])
    assert [record.name for record in report.records] == ["trained"]
    assert len(report.unreadable) == 1
    assert "int8" in report.unreadable[0]
    (study / "trained/report.json").unlink()
    with pytest.raises(DataError, match="the run has not finished"):
        read_report([study / "trained"])


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match="there is no run to report on") as error:
        read_report([tmp_path / "away", tmp_path, tmp_path / "notes.json"])
    assert "away: not there" in str(error.value)
    assert "not an evaluation" in str(error.value)


def test_runs_of_earlier_versions(study: Path) -> None:
    folder = study / "trained"
    for name in ("histograms.json", "calibration.json"):
        (folder / name).unlink()
    for name in ("evaluation-packed.json", "evaluation-dense.json"):
        found = json.loads((folder / name).read_text())
        for score in found["utterances"]:
            del score["seconds"], score["snr_db"]
        (folder / name).write_text(json.dumps(found))
    report = json.loads((folder / "report.json").read_text())
    del report["data"]
    report["versions"]["usmlite"] = "0.0.1"
    (folder / "report.json").write_text(json.dumps(report))
    found = read_report([study])
    assert "trained: histograms.json: not there" in found.notes
    assert any(
        note.startswith("Different versions of usmlite: ") and "0.0.1 (trained)" in note
        for note in found.notes
    )
    [card, *_] = found.page().split("<article")[1:]
    assert "speaker" in card


def test_a_later_version_may_say_more(study: Path) -> None:
    path = study / "trained/evaluation-packed.json"
    found = json.loads(path.read_text()) | {"new": 1}
    for score in found["utterances"]:
        score["new"] = 1
    path.write_text(json.dumps(found))
    [record], _ = read_records([study / "trained"])
    assert (record.evaluation is not None, record.missing) == (True, ())


def test_measurements_alone(study: Path) -> None:
    """JSON of `usmlite evaluate` and of the benchmarks."""
    run = json.loads((study / "trained/report.json").read_text())
    packed, dense = (
        json.loads((study / f"trained/evaluation-{k}.json").read_text()) for k in ("packed", "dense")
    )
    size = run["float32_bytes"]
    (study / "bench.json").write_text(
        json.dumps({"evaluation": packed, "run": run, "float32_bytes": size, "comparison": run["difference"]})
    )
    (study / "dense.json").write_text(json.dumps({"evaluation": dense, "float32_bytes": size}))
    (study / "alone.json").write_text(json.dumps(packed))
    (study / "against.json").write_text(json.dumps({**packed, "float32_bytes": size, "against": dense}))
    report = read_report([study / f"{name}.json" for name in ("bench", "dense", "alone", "against")])
    assert [row.name for row in report.rows] == ["dense", "bench", "alone", "against"]
    assert [row.steps for row in report.rows] == [None, 6, None, None]
    assert report.rows[2].float32_bytes is None
    assert all(record.dense is not None for record in report.records)
    assert "100.00" in report.table("md").splitlines()[2]
    report.page()
    # The dense model by itself is a result too.
    assert [row.name for row in read_report([study / "dense.json"]).rows] == ["dense"]


def test_names_tell_runs_apart(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "again")
    records, _ = read_records([study / "int8", tmp_path / "again/int8", study / "trained"])
    assert [record.name for record in records] == ["study/int8", "again/int8", "trained"]


def test_different_speech_is_said_and_not_mixed(study: Path) -> None:
    path = study / "int8/report.json"
    found = json.loads(path.read_text())
    for evaluation in found["evaluations"].values():
        evaluation["reference_words"] = 9
    path.write_text(json.dumps(found))
    report = read_report([study])
    assert any(note.startswith("Not measured on the same speech") for note in report.notes)
    assert report.to_json()["results"][0]["name"] == "dense"
    assert [row["pareto"] for row in report.to_json()["results"][2:]] == [True, True]
    assert report.page().count("dense (4 utterances, ") >= 2


def test_recordings_are_found_by_name(study: Path, recordings: Path) -> None:
    records, _ = read_records([study])
    found = Recordings(records).find("r1")
    assert found is not None
    assert found.audio == recordings / "1.wav"
    assert Recordings([], [recordings]).find("r1") == found
    lost = Recordings([], [recordings / "away"])
    assert lost.find("r1") is None
    assert lost.missing[0].startswith("speech away: ")
