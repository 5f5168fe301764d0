"""Plot: WER against bytes, as a picture. Needs the extra `plot` (matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from usmlite.tables import ResultRow

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
_SIZE = (8.0, 5.5)  # inches
_DOTS = 150  # per inch, of the PNG
_WIDE = 4.0  # a ratio beyond which an axis is logarithmic
# Told apart by people who do not see all colors (Okabe & Ito), and by shape.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))


def pareto_front(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The models that no other one beats in both bytes and WER, the smallest first."""
    front: list[ResultRow] = []
    for row in sorted(rows, key=lambda row: (row.weights_bytes, row.wer or 0.0)):
        if row.wer is not None and (not front or row.wer < (front[-1].wer or 0.0)):
            front.append(row)
    return front


def wer_against_bytes(groups: Mapping[str, Sequence[ResultRow]], dense: Sequence[ResultRow]) -> Figure:
    """Draws every model with its interval, the dense model as a line, and the Pareto front.

    Args:
        groups: what the legend says to its models; those without a WER are left out.
        dense: the models that the runs start from; one of a float32 file would squeeze all others.

    Returns:
        A figure of its own, which no window and no pyplot knows of.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    shown = {name: [row for row in rows if row.wer is not None] for name, rows in groups.items()}
    for index, (name, rows) in enumerate(shown.items()):
        color, marker = _LOOKS[index % len(_LOOKS)]
        if rows:
            axes.errorbar(
                [row.weights_bytes / 1e6 for row in rows],
                [100 * (row.wer or 0.0) for row in rows],
                yerr=list(zip(*map(_error, rows), strict=True)),
                fmt=marker, color=color, markersize=5, elinewidth=1, capsize=2, label=name,
            )  # fmt: skip
    every = [row for rows in shown.values() for row in rows]
    for row in every:
        place = (row.weights_bytes / 1e6, 100 * (row.wer or 0.0))
        axes.annotate(row.name, place, xytext=(4, 4), textcoords="offset points", fontsize=6)
    front = pareto_front(every)
    axes.plot(
        [row.weights_bytes / 1e6 for row in front],
        [100 * (row.wer or 0.0) for row in front],
        color="0.5", linewidth=1, zorder=1, label="Pareto front",
    )  # fmt: skip
    for row in dense:
        if row.wer is not None:
            axes.axhline(
                100 * row.wer, color="black", linestyle="--", linewidth=1, label=f"{row.name}, float32"
            )
            if row.ci95 is not None:
                low, high = (100 * value for value in row.ci95)
                axes.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
    values = [row.wer or 0.0 for row in (*every, *dense) if row.wer is not None]
    # Bars that reach zero have no place on a logarithmic axis.
    lows = [row.ci95[0] if row.ci95 else 1.0 for row in every]
    if _is_wide([row.weights_bytes for row in every]):
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    if _is_wide(values) and min(lows, default=1.0) > 0:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    axes.set_xlabel("weights file, MB")
    axes.set_ylabel("WER, % (95 % interval)")
    axes.set_axisbelow(True)
    axes.grid(visible=True, which="both", color="0.92", linewidth=0.5)
    axes.legend(fontsize=7)
    return figure


def rendered(figure: Figure, ending: str) -> bytes:
    """The figure as a file of one of `FORMATS`; the same figure gives the same bytes."""
    import matplotlib

    target = io.BytesIO()
    # Otherwise the SVG holds the time and names drawn by chance.
    with matplotlib.rc_context({"svg.hashsalt": "usmlite"}):
        figure.savefig(target, format=ending, dpi=_DOTS, metadata={"Date": None} if ending == "svg" else None)
    return target.getvalue()


def _error(row: ResultRow) -> tuple[float, float]:
    """How far the interval reaches below and above the WER, in percent."""
    wer = row.wer or 0.0
    low, high = row.ci95 or (wer, wer)
    return 100 * max(0.0, wer - low), 100 * max(0.0, high - wer)


def _is_wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > _WIDE


def _plain_ticks(axis: Axis) -> None:
    """Marks a logarithmic axis with 5, 10, 20, 50 and not with powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
