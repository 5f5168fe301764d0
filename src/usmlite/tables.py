"""Results for people: tables, on the console, in Markdown and in LaTeX; and curves in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.table import Table
from rich.text import Text

from usmlite.evaluate import Comparison, Evaluation

__all__ = [
    "ComparisonRow",
    "LayerRow",
    "ResultRow",
    "comparison_table",
    "difference_line",
    "latex_table",
    "layer_table",
    "markdown_table",
    "measured_line",
    "readable_bytes",
    "result_cells",
    "sparkline",
]


@dataclass(frozen=True)
class ComparisonRow:
    """One model in a comparison.

    Attributes:
        name: the model's.
        weights_bytes: size of its weights file.
        float32_bytes: size of the dense model in float32, the 100 % of the size column; None where unknown.
        wer: word error rate as a fraction; None where it was not measured.
        ci95: its 95 % confidence interval.
        real_time_factor: time to transcribe over length of the audio.
    """

    name: str
    weights_bytes: int
    float32_bytes: int | None
    wer: float | None = None
    ci95: tuple[float, float] | None = None
    real_time_factor: float | None = None

    @classmethod
    def of(cls, evaluation: Evaluation, float32_bytes: int | None) -> ComparisonRow:
        """Takes the row from an evaluation."""
        return cls(
            name=evaluation.name,
            weights_bytes=evaluation.weights_bytes,
            float32_bytes=float32_bytes,
            wer=evaluation.wer,
            ci95=evaluation.ci95,
            real_time_factor=evaluation.real_time_factor,
        )

    @classmethod
    def of_result(cls, row: ResultRow) -> ComparisonRow:
        """Takes the row from one of the results of many runs."""
        return cls(row.name, row.weights_bytes, row.float32_bytes, row.wer, row.ci95)


@dataclass(frozen=True)
class LayerRow:
    """One weight of a model.

    Attributes:
        name: the weight's, as in the state dict.
        shape: its dense shape.
        kind: "linear", "conv1d", "embedding", ...
        spec: what it is stored as, such as "int4 2:4" or "kept, float16".
        bytes: what it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    spec: str
    bytes: int


@dataclass(frozen=True)
class ResultRow:
    """One model among the results of many runs.

    Attributes:
        name: the run's; "dense" for the model that the runs start from.
        weights_bytes: size of its weights file.
        float32_bytes: size of the dense model in float32, the 100 % of the size column; None where unknown.
        steps: optimizer steps; None for the dense model.
        wer: word error rate as a fraction; None where it was not measured.
        ci95: its 95 % confidence interval.
        relative_difference: to the dense model's WER, as a share of that.
        relative_ci95: its 95 % confidence interval, paired.
        p_value: of the difference, two-sided.
        seconds: wall time of the run.
        equal: in words, the dense model of nearest bytes, these, and its WER; None where there is none.
    """

    name: str
    weights_bytes: int
    float32_bytes: int | None
    steps: int | None = None
    wer: float | None = None
    ci95: tuple[float, float] | None = None
    relative_difference: float | None = None
    relative_ci95: tuple[float, float] | None = None
    p_value: float | None = None
    seconds: float | None = None
    equal: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        float32_bytes: int | None,
        evaluation: Mapping[str, Any],
        comparison: Mapping[str, Any] | None = None,
        *,
        steps: int | None = None,
        seconds: float | None = None,
    ) -> ResultRow:
        """Takes the row from JSON: an `Evaluation` and, where there is one, its `Comparison` with dense."""
        other = comparison or {}
        return cls(
            name=name,
            weights_bytes=evaluation["weights_bytes"],
            float32_bytes=float32_bytes,
            steps=steps,
            wer=evaluation["wer"],
            ci95=_pair(evaluation["ci95"]),
            relative_difference=other.get("relative_difference"),
            relative_ci95=_pair(other.get("relative_ci95")),
            p_value=other.get("p_value"),
            seconds=seconds,
        )


def comparison_table(rows: Iterable[ComparisonRow], *, title: str | None = None) -> Table:
    """Draws models side by side: bytes, share of float32, WER with its interval, real-time factor.

    Args:
        rows: the models, the dense one first.
        title: above the table.

    Returns:
        A table for `rich.console.Console.print`.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for heading in ("bytes", "% of float32", "WER % (95 % interval)", "real-time factor"):
        table.add_column(heading, justify="right")
    for row in rows:
        wer = "-" if row.wer is None else f"{row.wer * 100:.2f}"
        if row.ci95 is not None:
            wer += f" ({row.ci95[0] * 100:.2f} to {row.ci95[1] * 100:.2f})"
        table.add_row(
            _plain(row.name),
            f"{row.weights_bytes:,}",
            "-" if row.float32_bytes is None else f"{row.weights_bytes / row.float32_bytes * 100:.2f}",
            wer,
            "-" if row.real_time_factor is None else f"{row.real_time_factor:.3f}",
        )
    return table


def layer_table(rows: Sequence[LayerRow], *, title: str | None = None) -> Table:
    """Draws a model's weights one by one, with the sum of their bytes below.

    Args:
        rows: the weights.
        title: above the table.

    Returns:
        A table for `rich.console.Console.print`.
    """
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("weight", footer=f"{len(rows)} weights", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("kind")
    table.add_column("stored as")
    table.add_column("bytes", justify="right", footer=f"{sum(row.bytes for row in rows):,}")
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        table.add_row(_plain(row.name), shape, row.kind, _plain(row.spec), f"{row.bytes:,}")
    return table


def difference_line(comparison: Comparison) -> str:
    """Says in one sentence how two models differ, with the interval and the p-value."""
    text = (
        f"{comparison.candidate} against {comparison.baseline}: "
        f"{comparison.difference * 100:+.2f} points of WER "
        f"(95 % interval {comparison.ci95[0] * 100:+.2f} to {comparison.ci95[1] * 100:+.2f}"
    )
    if comparison.relative_difference is not None:
        text += f", {comparison.relative_difference * 100:+.1f} % relative"
    return (
        f"{text}), p = {comparison.p_value:.2g}; "
        f"{comparison.same_transcripts * 100:.1f} % of {comparison.utterance_count} transcripts are the same"
    )


def result_cells(rows: Sequence[ResultRow]) -> tuple[list[str], list[list[str]]]:
    """The results of many runs as text.

    Args:
        rows: the models, the dense one first. The columns for the time and for the dense model of equal
            bytes are there if some row has one.

    Returns:
        The headings, and for each row its cells.
    """
    headings = [
        "model", "file, MB", "% of float32", "steps", "WER % (95 % interval)", "against dense, relative", "p",
    ]  # fmt: skip
    timed, equalled = any(row.seconds is not None for row in rows), any(row.equal for row in rows)
    headings += ["minutes"] * timed + ["dense of nearest bytes: WER %"] * equalled
    lines = []
    for row in rows:
        cells = [
            row.name,
            f"{row.weights_bytes / 1e6:.2f}",
            "" if row.float32_bytes is None else f"{100 * row.weights_bytes / row.float32_bytes:.2f}",
            "" if row.steps is None else str(row.steps),
            "" if row.wer is None else f"{100 * row.wer:.2f}{_percents(row.ci95, '.2f')}",
            "" if row.relative_difference is None
            else f"{100 * row.relative_difference:+.1f} %{_percents(row.relative_ci95, '+.1f')}",
            "" if row.p_value is None else f"{row.p_value:.2g}",
        ]  # fmt: skip
        cells += ["" if row.seconds is None else f"{row.seconds / 60:.1f}"] * timed
        lines.append(cells + [row.equal or ""] * equalled)
    return headings, lines


def markdown_table(rows: Sequence[ResultRow]) -> str:
    """Writes the results of many runs as a table in Markdown; see `result_cells`.

    Returns:
        Its lines, without a newline at the end.
    """
    headings, cells = result_cells(rows)
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)]]
    lines += [[line[0].replace("|", "\\|"), *line[1:]] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex_table(rows: Sequence[ResultRow]) -> str:
    """Writes the results of many runs as a table for LaTeX, with the rules of booktabs; see `result_cells`.

    Returns:
        Its lines, without a newline at the end.
    """
    headings, cells = result_cells(rows)
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        "\\toprule",
    ]
    written = [
        " & ".join(_LATEX.sub(_escaped, cell) for cell in line) + " \\\\" for line in (headings, *cells)
    ]
    return "\n".join([*lines, written[0], "\\midrule", *written[1:], "\\bottomrule", "\\end{tabular}"])


def sparkline(values: Sequence[float], width: int = 24, *, ascii_only: bool = False) -> str:
    """Draws a curve in one line of text, as means of equal parts if there are more values than places."""
    marks = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    edges = [len(values) * part // count for part in range(count + 1)] if count else [0]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    return "".join(marks[round((mean - low) * scale)] for mean in means)


def measured_line(
    evaluation: Mapping[str, Any], machine: Mapping[str, Any], *, corpus: str, precision: str
) -> str:
    """Says below a table what it was measured on, and how.

    Args:
        evaluation: one of the table's evaluations, as JSON; it may lack its utterances.
        machine: of `describe_machine`.
        corpus: the test speech, in a word.
        precision: of the weights and activations while they were measured, such as "float32".
    """
    processors = ", ".join(machine[key] for key in ("cpu", "gpu") if machine.get(key))
    hours = evaluation["audio_seconds"] / 3600
    return (
        f"{evaluation['utterance_count']} utterances, {hours:.2f} h of {corpus}; "
        f"greedy, {precision}; intervals by bootstrap over utterances, differences paired on the same "
        f"utterances. Machine: {processors}."
    )


def readable_bytes(count: int) -> str:
    """Writes a number of bytes in decimal units: 14,198,765 is "14.2 MB"."""
    if count < 1000:
        return f"{count} bytes"
    size = count / 1000
    for unit in ("kB", "MB"):
        if size < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


# What LaTeX takes for commands.
_LATEX = re.compile(r"[\\\\&%$#_{}~^]")
_LATEX_NAMES = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum"}


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return f"\\{_LATEX_NAMES[character]}{{}}" if character in _LATEX_NAMES else f"\\{character}"


def _plain(text: str) -> Text:
    # As a string, "[...]" in it would be read as markup.
    return Text(text)


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]))


def _percents(interval: tuple[float, float] | None, style: str) -> str:
    if interval is None:
        return ""
    low, high = (format(100 * value, style) for value in interval)
    return f" ({low} to {high})"
