"""Results for people: console tables. And for programs: JSON files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from usmlite.atomic import write_json
from usmlite.evaluate import Comparison, Evaluation

__all__ = [
    "ComparisonRow",
    "LayerRow",
    "comparison_table",
    "difference_line",
    "layer_table",
    "readable_bytes",
    "write_json",
]


@dataclass(frozen=True)
class ComparisonRow:
    """One model in a comparison.

    Attributes:
        name: the model's.
        weights_bytes: size of its weights file.
        float32_bytes: size of the dense model in float32, the 100 % of the size column.
        wer: word error rate as a fraction; None where it was not measured.
        ci95: its 95 % confidence interval.
        real_time_factor: time to transcribe over length of the audio.
    """

    name: str
    weights_bytes: int
    float32_bytes: int
    wer: float | None = None
    ci95: tuple[float, float] | None = None
    real_time_factor: float | None = None

    @classmethod
    def of(cls, evaluation: Evaluation, float32_bytes: int) -> ComparisonRow:
        """Takes the row from an evaluation."""
        return cls(
            name=evaluation.name,
            weights_bytes=evaluation.weights_bytes,
            float32_bytes=float32_bytes,
            wer=evaluation.wer,
            ci95=evaluation.ci95,
            real_time_factor=evaluation.real_time_factor,
        )


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
            f"{row.weights_bytes / row.float32_bytes * 100:.2f}",
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


def _plain(text: str) -> Text:
    # As a string, "[...]" in it would be read as markup.
    return Text(text)
