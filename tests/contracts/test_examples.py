"""The notebooks in examples/ run as they stand, and show what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))


def cells(path: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_two() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"compare-methods", "domain-from-text"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_show_what_they_print(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in codes:
        assert bool(cell["outputs"]) == ("print(" in "".join(cell["source"]))
        assert {output.get("name") for output in cell["outputs"]} <= {"stdout"}, "a warning or an error"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(cells(path)):
        exec(compile(code, f"{path.name}, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "%" in printed
    assert list(tmp_path.glob("**/packed/model.safetensors"))
    assert list(tmp_path.glob("**/report.html"))
