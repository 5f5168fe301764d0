"""Console tables."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from usmlite.evaluate import Comparison, Evaluation
from usmlite.tables import (
    ComparisonRow,
    LayerRow,
    ResultRow,
    comparison_table,
    difference_line,
    latex_table,
    layer_table,
    markdown_table,
    measured_line,
    readable_bytes,
    sparkline,
)


def drawn(table: Table) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃ \n").replace("┃", "│").split("│")]


def test_comparison_table() -> None:
    rows = [
        ComparisonRow("tiny.en (dense)", 151_000_000, 151_000_000, 0.0571, (0.051, 0.0634), 0.0456),
        ComparisonRow("tiny.en int4 2:4 [best]", 14_190_000, 151_000_000),
    ]
    lines = drawn(comparison_table(rows, title="Results")).splitlines()
    found = [cells(line) for line in lines if "tiny.en" in line]
    assert found == [
        ["tiny.en (dense)", "151,000,000", "100.00", "5.71 (5.10 to 6.34)", "0.046"],
        ["tiny.en int4 2:4 [best]", "14,190,000", "9.40", "-", "-"],
    ]


def test_a_row_of_an_evaluation() -> None:
    result = Evaluation(
        "packed", 0.06, (0.05, 0.07), 6, 0, 0, 100, 10.0, 1.0, 0.1, 5, 1_000, {}, (), {"cpu": "x"}, {}
    )
    assert ComparisonRow.of(result, 10_000) == ComparisonRow("packed", 1_000, 10_000, 0.06, (0.05, 0.07), 0.1)


def test_layer_table_adds_up() -> None:
    rows = [
        LayerRow("model.encoder.layers.0.fc1.weight", (1536, 384), "linear", "int4 2:4", 49_152),
        LayerRow("model.decoder.embed_tokens.weight", (51864, 384), "embedding", "[kept]", 39_831_552),
        LayerRow("scale", (), "scalar", "float32", 4),
    ]
    lines = drawn(layer_table(rows)).splitlines()
    assert [cells(line) for line in lines if "fc1" in line] == [
        ["model.encoder.layers.0.fc1.weight", "1536 x 384", "linear", "int4 2:4", "49,152"]
    ]
    assert any("[kept]" in line and "39,831,552" in line for line in lines)
    assert cells(lines[-2])[0] == "3 weights"
    assert cells(lines[-2])[-1] == "39,880,708"


def test_difference_line() -> None:
    comparison = Comparison(
        "packed",
        "dense",
        0.062,
        0.057,
        0.005,
        (0.001, 0.009),
        0.0877,
        (0.02, 0.16),
        0.0123,
        0.75,
        520,
        10_000,
    )
    assert difference_line(comparison) == (
        "packed against dense: +0.50 points of WER (95 % interval +0.10 to +0.90, +8.8 % relative), "
        "p = 0.012; 75.0 % of 520 transcripts are the same"
    )
    assert "relative" not in difference_line(replace(comparison, relative_difference=None))


def test_markdown_table() -> None:
    evaluation = {"weights_bytes": 14_660_000, "wer": 0.0879, "ci95": [0.0795, 0.0966]}
    comparison = {"relative_difference": 0.5136, "relative_ci95": [0.392, 0.644], "p_value": 0.00019998}
    rows = [
        ResultRow("dense", 151_000_000, 151_000_000, wer=0.0581, ci95=(0.052, 0.0645)),
        ResultRow.of("int3|x", 151_000_000, evaluation, comparison, steps=320),
        ResultRow("unmeasured", 100_000, 151_000_000, steps=0),
    ]
    assert markdown_table(rows).splitlines() == [
        "| model | file, MB | % of float32 | steps | WER % (95 % interval) | against dense, relative | p |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        "| dense | 151.00 | 100.00 |  | 5.81 (5.20 to 6.45) |  |  |",
        "| int3\\|x | 14.66 | 9.71 | 320 | 8.79 (7.95 to 9.66) | +51.4 % (+39.2 to +64.4) | 0.0002 |",
        "| unmeasured | 0.10 | 0.07 | 0 |  |  |  |",
    ]
    more = markdown_table(
        [rows[0], replace(rows[1], seconds=90.0, equal="int2 (9.00 MB): 12.00")]
    ).splitlines()
    assert more[0].endswith("| p | minutes | dense of nearest bytes: WER % |")
    assert more[2].endswith("|  |  |  |  |")
    assert more[3].endswith("| 0.0002 | 1.5 | int2 (9.00 MB): 12.00 |")


def test_what_a_table_was_measured_on() -> None:
    evaluation = {"utterance_count": 520, "audio_seconds": 3960.0}
    line = measured_line(evaluation, {"cpu": "A", "gpu": None}, corpus="test-clean", precision="bf16")
    assert line.startswith("520 utterances, 1.10 h of test-clean; greedy, bf16; ")
    assert line.endswith(" Machine: A.")
    assert measured_line(evaluation, {"cpu": "A", "gpu": "B"}, corpus="x", precision="").endswith(": A, B.")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.0 kB"),
        (14_198_765, "14.2 MB"),
        (999_960, "1.0 MB"),
        (3_100_000_000, "3.1 GB"),
        (5_000_000_000_000, "5000.0 GB"),
    ],
)
def test_readable_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_latex_table() -> None:
    rows = [
        ResultRow("dense", 151_000_000, 151_000_000, wer=0.0581, ci95=(0.052, 0.0645)),
        ResultRow("50%_a&b\\{~^$#}", 100_000, None, steps=0),
    ]
    assert latex_table(rows).splitlines() == [
        "% needs \\usepackage{booktabs}",
        "\\begin{tabular}{lrrrrrr}",
        "\\toprule",
        "model & file, MB & \\% of float32 & steps & WER \\% (95 \\% interval) & against dense, relative"
        " & p \\\\",
        "\\midrule",
        "dense & 151.00 & 100.00 &  & 5.81 (5.20 to 6.45) &  &  \\\\",
        "50\\%\\_a\\&b\\textbackslash{}\\{\\textasciitilde{}\\textasciicircum{}\\$\\#\\}"
        " & 0.10 &  & 0 &  &  &  \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]


def test_a_row_of_unknown_dense_size() -> None:
    row = ComparisonRow.of_result(ResultRow("x", 1_000, None, wer=0.5))
    assert cells(next(line for line in drawn(comparison_table([row])).splitlines() if "1,000" in line)) == [
        "x", "1,000", "-", "50.00", "-",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([3.0], 8, "▁"),
        ([1.0, 1.0, 1.0], 8, "▁▁▁"),
        ([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8, "█▇▆▅▄▃▂▁"),
        ([0.0, 2.0, 10.0, 12.0, 4.0, 6.0], 3, "▁█▄"),
    ],
)
def test_sparkline(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line
    assert len(sparkline(range(1000), 24)) == 24
    assert sparkline([0.0, 1.0], ascii_only=True) == "_#"
