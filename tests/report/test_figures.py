"""The figures: what they are made of, and their files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import altair as alt
import pytest

from usmlite.errors import ReportError
from usmlite.report import Report, read_report, write_figures
from usmlite.report.figures import Figure, draw
from usmlite.report.theme import DARK, LIGHT, config

KEYS = [
    "wer-bytes", "bytes", "parts", "training", "dev-wer", "allocation", "sensitivity", "mask-churn",
    "weights", "speakers", "by-length", "by-noise",
]  # fmt: skip


@pytest.fixture
def report(study: Path) -> Report:
    """Runs with everything that can be drawn."""
    for name in ("trained", "int8"):
        for kind in ("packed", "dense"):
            path = study / name / f"evaluation-{kind}.json"
            found = json.loads(path.read_text())
            for number, score in enumerate(found["utterances"]):
                score |= {"seconds": 4.0 * number + 1, "snr_db": 10.0 * (number % 2)}
            path.write_text(json.dumps(found))
    measured = {"fc1": 0.01, "fc2": 2.0}
    weights = [{"name": f"model.encoder.layers.0.{name}", "sensitivity": s} for name, s in measured.items()]
    (study / "trained/allocation.json").write_text(json.dumps({"weights": weights}))
    log = [json.loads(line) for line in (study / "trained/train.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"dev_wer": 0.5 - row["step"] / 100}) for row in log]
    (study / "trained/train.jsonl").write_text("\n".join(lines))
    return read_report([study])


def drawn(report: Report, *, paper: bool = False) -> dict[str, Figure]:
    return {figure.key: figure for figure in draw(report.records, report.recordings, paper=paper)}


def test_every_figure_is_there(report: Report) -> None:
    assert list(drawn(report)) == list(drawn(report, paper=True)) == KEYS
    for figure in drawn(report).values():
        assert figure.rows
        assert {column.key for column in figure.columns} <= {key for row in figure.rows for key in row}
        assert figure.spec["description"] == figure.summary


@pytest.mark.parametrize("paper", [False, True])
def test_figures_are_what_the_schema_allows(report: Report, paper: bool) -> None:
    for figure in drawn(report, paper=paper).values():
        for theme in (LIGHT, DARK):
            kind = alt.LayerChart if "layer" in figure.spec else alt.Chart
            kind.from_dict({**figure.spec, "config": config(theme)}, validate=True)


def test_their_data_are_those_of_the_runs(report: Report, study: Path) -> None:
    figures = drawn(report)
    found = {name: json.loads((study / name / "report.json").read_text()) for name in ("int8", "trained")}
    points = figures["wer-bytes"].spec["datasets"]["runs"]
    for point in points:
        run = found[point["run"]]
        evaluation = run["evaluations"]["packed"]
        assert point["mb"] == run["packed_bytes"] / 1e6
        assert point["wer"] == pytest.approx(100 * evaluation["wer"], rel=1e-3)
        assert [point["low"], point["high"]] == pytest.approx([100 * v for v in evaluation["ci95"]], rel=1e-3)
    [dense] = figures["wer-bytes"].spec["datasets"]["dense"]
    assert dense["wer"] == pytest.approx(100 * found["int8"]["evaluations"]["dense"]["wer"], rel=1e-3)
    log = [json.loads(line) for line in (study / "trained/train.jsonl").read_text().splitlines()]
    [loss] = [row for row in figures["training"].spec["datasets"]["curves"] if row["term"] == "loss"]
    assert loss["value"] == pytest.approx([row["loss"] for row in log], rel=1e-3)
    [churn] = figures["mask-churn"].spec["datasets"]["churn"]
    assert churn["churn"] == pytest.approx([100 * row["churn"] for row in log], rel=1e-3)
    assert [row["step"] for row in figures["dev-wer"].rows] == [0.0, 3.0, 6.0]
    cells = {(row["run"], row["name"]): row for row in figures["allocation"].rows}
    fc1 = cells["trained", "model.encoder.layers.0.fc1"]
    assert (fc1["pattern"], fc1["sensitivity"], fc1["block"], fc1["place"]) == (
        "2:4",
        0.01,
        "encoder 0",
        "fc1",
    )
    assert cells["int8", "model.encoder.layers.0.fc1"]["pattern"] is None
    speakers = {(row["run"], row["group"]): row for row in figures["speakers"].rows}
    assert {run for run, _ in speakers} == {"dense", "int8", "trained"}
    # Of r0 and r2, which speaker a says: "once two", "for for sick yes"; of r1, which b says, nothing.
    assert (speakers["trained", "a"]["wer"], speakers["trained", "b"]["wer"]) == (60.0, 50.0)
    assert speakers["dense", "b"]["wer"] == 0


def test_parameters_have_the_choices_of_the_page(report: Report) -> None:
    for figure in drawn(report).values():
        params = {param["name"]: param["value"] for param in figure.spec["params"]}
        assert params.pop("shown") == ["int8", "trained"]
        assert params == {name: choices[0] for name, (_, choices) in figure.selects.items()}


def test_files(report: Report, tmp_path: Path) -> None:
    shares: list[float] = []
    names = write_figures(report.figures(), tmp_path / "new/figures", progress=shares.append)
    assert shares[-1] == 1.0
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new/figures").iterdir())
    assert {"wer-bytes.svg", "wer-bytes.png", "allocation-int8.svg", "allocation-trained.svg"} <= set(names)
    text = (tmp_path / "new/figures/wer-bytes.svg").read_text()
    assert text.startswith("<svg")
    assert "trained" in text
    assert LIGHT.runs[0] in text
    assert (tmp_path / "new/figures/wer-bytes.png").read_bytes().startswith(b"\x89PNG")
    again = write_figures(report.figures()[:1], tmp_path / "again")
    for name in again:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new/figures" / name).read_bytes()


def test_files_need_their_package(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ReportError, match=r'pip install "usmlite\[plot\]"'):
        write_figures(report.figures(), tmp_path / "figures")


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colors_can_be_told_from_the_ground(theme: Any) -> None:
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for what must be seen to understand a figure (1.4.11)."""
    assert contrast(theme.ink, theme.ground) > 7
    assert contrast(theme.faint, theme.ground) > 4.5
    for color in theme.runs:
        assert contrast(color, theme.ground) > 3, color
    assert len(set(theme.runs)) == len(theme.runs)
    # What is written in the cells of a map.
    for color in (theme.ramp[0], theme.ramp[2]):
        assert contrast(color, theme.ink) > 4.5
    for color in theme.ramp[4:]:
        assert contrast(color, theme.ground) > 4.5
