"""Many runs to one table, with a model too small to know any English."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from usmlite import cli
from usmlite import sweep as sweeps
from usmlite.errors import DataError, OutputError
from usmlite.evaluate import Evaluation, compare
from usmlite.grid import Run, expand
from usmlite.sweep import collect, remake_table, sweep

RECIPE = """
[model]
source = "{model}"
[data]
dev = "{speech}"
[student]
start = "magnitude"
[training]
steps = 0
[[grid]]
name = "small-{{spec.bits}}-{{spec.sparsity}}"
"spec.bits" = [8, 3]
"spec.sparsity" = "dense"
[[grid]]
name = "small-{{spec.bits}}-{{spec.sparsity}}"
"spec.bits, spec.sparsity" = [[4, "2:4"]]
[[grid]]
name = "broken"
"spec.target_size" = "1%"
"""
NAMES = ["small-int8-dense", "small-int3-dense", "small-int4-2of4"]


def talking() -> Console:
    """Keeps what it is told, and prints nowhere."""
    return Console(record=True, width=150, file=io.StringIO())


@pytest.fixture(scope="module")
def runs(dense_model: Path, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    path = tmp_path_factory.mktemp("recipes") / "study.toml"
    path.write_text(RECIPE.format(model=dense_model, speech=recordings / "manifest.jsonl"))
    return expand([path])


@pytest.fixture(scope="module")
def study(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], int, str]:
    """A sweep's directory, its errors, how often the dense model was measured, and what was told."""
    output = tmp_path_factory.mktemp("sweeps") / "study"
    flow, count = importlib.import_module("usmlite.compress"), 0
    original = flow.dense_recognizer

    def counting(teacher: Any) -> Any:
        nonlocal count
        count += 1
        return original(teacher)

    console = talking()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "dense_recognizer", counting)
        failed = sweep(runs, output, console=console)
        return output, failed, count, console.export_text()


@pytest.fixture
def copied(study: tuple[Path, dict[str, str], int, str], tmp_path: Path) -> Path:
    """A copy of the sweep that a test may change."""
    shutil.copytree(study[0], tmp_path / "study")
    return tmp_path / "study"


def figures(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "sweep.json").read_text())
    return found


def test_one_failing_run_does_not_stop_the_rest(study: tuple[Path, dict[str, str], int, str]) -> None:
    output, failed, _, told = study
    assert list(failed) == ["broken"]
    assert "a target size needs speech" in failed["broken"]
    assert json.loads((output / "broken" / "error.json").read_text()) == {"error": failed["broken"]}
    assert [row["name"] for row in figures(output)["finished"]] == NAMES
    assert figures(output)["failed"] == failed
    assert "[4/4] broken" in told
    assert "Failed: broken" in told


def test_the_table_has_what_the_runs_found(study: tuple[Path, dict[str, str], int, str]) -> None:
    output = study[0]
    found = figures(output)
    for row in found["finished"]:
        folder = output / row["name"]
        assert row["weights_bytes"] == (folder / "packed" / "model.safetensors").stat().st_size
        packed, dense = (
            Evaluation.from_json(json.loads((folder / f"evaluation-{kind}.json").read_text()))
            for kind in ("packed", "dense")
        )
        assert row["wer"] == packed.wer
        assert row["p_value"] == compare(packed, dense).p_value
        assert row["steps"] == 0
        assert row["seconds"] > 0
        assert row["recipe"]["data"]["dev"] == "manifest.jsonl"
        assert row["recipe"]["training"]["seed"] == 0
        assert {"machine", "versions"} <= row.keys()
    [dense_row] = found["dense"]
    assert dense_row["name"] == "dense"
    table = (output / "sweep.md").read_text()
    for text in (
        "| dense |",
        *(f"| {name} |" for name in NAMES),
        "Failed: broken",
        "Pareto front",
        "h of a part of",
    ):
        assert text in table
    # Nobody's business where the speech and the model lie.
    assert str(output.parent.parent) not in table + json.dumps(found)


def test_a_pruned_model_stands_beside_the_dense_one_of_equal_bytes(
    study: tuple[Path, dict[str, str], int, str],
) -> None:
    rows = {row["name"]: row for row in figures(study[0])["finished"]}
    nearest = rows["small-int3-dense"]
    assert rows["small-int4-2of4"]["equal"] == (
        f"small-int3-dense ({nearest['weights_bytes'] / 1e6:.2f} MB): {100 * nearest['wer']:.2f}"
    )
    assert nearest["equal"] is None
    assert rows["small-int4-2of4"]["sparsity"] == "2:4"


def test_the_dense_model_is_measured_once(study: tuple[Path, dict[str, str], int, str]) -> None:
    output, _, count, _ = study
    assert count == 1
    kept = {(output / name / "evaluation-dense.json").read_bytes() for name in NAMES}
    assert len(kept) == 1


def test_the_picture(study: tuple[Path, dict[str, str], int, str]) -> None:
    output = study[0]
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (output / "sweep.svg").read_bytes()[:1000]
    assert "](sweep.svg)" in (output / "sweep.md").read_text()


def test_the_table_is_remade_from_the_runs_alone(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.glob("sweep.*")}
    remake_table(copied)
    assert {path.name: path.read_bytes() for path in copied.glob("sweep.*")} == before
    for path in copied.glob("sweep.*"):
        path.unlink()
    remake_table(copied)
    assert figures(copied)["order"] == sorted([*NAMES, "broken"])
    assert {row["name"]: row for row in figures(copied)["finished"]} == {
        row["name"]: row for row in json.loads(before["sweep.json"])["finished"]
    }


def test_finished_runs_are_not_run_again(
    copied: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = []

    def fake(recipe: object, folder: Path, **more: Any) -> None:
        again.append((folder.name, more["shared"], more["dense"].name))
        raise ZeroDivisionError("a bug\nin two lines")

    monkeypatch.setattr(sweeps, "compress", fake)
    failed = sweep(runs, copied)
    assert again == [("broken", copied, "dense")]
    assert failed == {"broken": "ZeroDivisionError: a bug in two lines"}
    kept = json.loads((copied / "broken" / "error.json").read_text())
    assert "ZeroDivisionError" in "".join(kept["traceback"])


def test_a_cut_off_run_goes_on(copied: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    before = figures(copied)
    name = NAMES[1]
    (copied / name / "report.json").unlink()
    assert collect(copied).unfinished == (name,)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "compress", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep(runs, copied)
    assert not (copied / name / "error.json").exists()
    sweep(runs[:2], copied)
    rows = {row["name"]: row for row in figures(copied)["finished"]}
    assert list(rows) == NAMES
    assert rows[name]["wer"] == next(row for row in before["finished"] if row["name"] == name)["wer"]


def test_another_recipe_is_refused_before_anything_runs(
    copied: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "compress", lambda *_, **__: pytest.fail("it ran"))
    other = [Run("new", runs[0].recipe, "x"), Run(NAMES[0], runs[1].recipe, "x")]
    with pytest.raises(OutputError, match=r"spec\.bits: 8 there, 3 now"):
        sweep(other, copied)


def test_places_that_cannot_be_used(copied: Path, runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a single run"):
        sweep(runs, copied / NAMES[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the directory"):
        sweep(runs, tmp_path / "file")
    (copied / "other").mkdir()
    (copied / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="not a run of usmlite"):
        sweep([Run("other", runs[0].recipe, "x")], copied)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"training": 3}', '{"training": null, "seconds": 1}'])
def test_a_damaged_report_is_named(copied: Path, runs: list[Run], text: str) -> None:
    (copied / NAMES[0] / "report.json").write_text(text)
    with pytest.raises(DataError, match=r"small-int8-dense.report\.json"):
        remake_table(copied)
    with pytest.raises(DataError, match=r"small-int8-dense.report\.json"):
        sweep(runs, copied)


def test_without_the_extra_it_says_so_and_goes_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in copied.glob("sweep.*g"):
        path.unlink()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    console = talking()
    remake_table(copied, console=console)
    assert 'pip install "usmlite[plot]"' in console.export_text()
    assert not list(copied.glob("sweep.*g"))
    assert "sweep.svg" not in (copied / "sweep.md").read_text()


def test_without_test_speech_there_are_bytes_only(copied: Path) -> None:
    for name in NAMES:
        path = copied / name / "report.json"
        report = json.loads(path.read_text()) | {"evaluations": {}}
        del report["difference"]
        path.write_text(json.dumps(report))
    console = talking()
    found = remake_table(copied, console=console)
    assert "no WER was measured" in console.export_text()
    assert (found.dense, found.front) == ((), [])
    assert figures(copied)["finished"][0]["wer"] is None


def test_runs_on_other_speech_have_a_dense_row_of_their_own(copied: Path) -> None:
    marker = copied / NAMES[0] / "recipe.toml"
    marker.write_text(marker.read_text().replace("[data]", '[data]\ntest = "there/other.jsonl"'))
    found = remake_table(copied)
    assert [row.name for row in found.dense] == [
        "dense dense, other.jsonl",
        "dense dense, a part of manifest.jsonl",
    ]
    # The dense model of equal bytes is one that was measured on the same speech.
    (copied / NAMES[1] / "report.json").unlink()
    assert [result.row.equal for result in collect(copied).finished] == [None, None]


def test_the_command(
    copied: Path, runs: list[Run], dense_model: Path, recordings: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(["sweep", "--table", str(copied)]) == 0
    assert "Pareto front" in capsys.readouterr().out
    assert cli.main(["sweep", runs[0].origin, "--out", str(copied)]) == 2
    # Transformers shows bars of its own, unless it is told not to before it is loaded.
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("usmlite: ")]
    assert len(lines) == 2
    assert "broken: data.train" in lines[0]
    assert "1 of 4 runs failed" in lines[1]
    calls = []
    monkeypatch.setattr(sweeps, "compress", lambda recipe, *_, **__: calls.append(recipe))
    plain = tmp_path / "plain.toml"
    plain.write_text("[spec]\nbits = 5\n")
    with pytest.raises(DataError, match="there is no run"):
        sweep(expand([plain], {"training": {"steps": 4}}), tmp_path / "new")
    assert [(recipe.spec.bits, recipe.training.steps) for recipe in calls] == [(5, 4)]
