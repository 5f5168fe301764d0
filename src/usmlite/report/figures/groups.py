"""WER of groups of utterances."""

from __future__ import annotations

from statistics import median
from typing import Any

import altair as alt

from usmlite.report.figures.sheet import PLAIN, SHOWN, Column, Figure, Sheet, rows_high
from usmlite.report.measures import Rows, group_order
from usmlite.report.records import DENSE

# Beside each other in every group, with their intervals; more would be a thicket.
_MOST_INTERVALS = 4
# Times the middle of all values.
_FAR = 8.0
_COLUMNS = (
    Column("run", "model"), Column("group", "group"), Column("wer", "WER, %", ".2f"),
    Column("low", "from", ".2f"), Column("high", "to", ".2f"), Column("words", "words", ",d"),
    Column("utterances", "utterances", ",d"),
)  # fmt: skip
_TITLES = {
    "length": ("WER by length of the utterance", "length of the utterance"),
    "noise": ("WER by noise level", "power of speech over noise"),
}


def by_speaker(sheet: Sheet, rows: Rows) -> Figure | None:
    """Every speaker, the worst of the dense model first."""
    if not rows:
        return None
    order = group_order("speaker", rows)
    y = alt.Y("group:N", sort=order, title="speaker")
    x = alt.X("wer:Q", title="WER, %", scale=_scale(rows), axis=alt.Axis(format=PLAIN, tickCount=6))
    chart, words = _points(sheet, rows, "y", y, x)
    height = rows_high(len(order), 40 if len(sheet.names) < _MOST_INTERVALS else 26)
    return sheet.build(
        "speakers", "WER by speaker", f"The worst speakers of the dense model first. {words}",
        chart, {"groups": rows}, _COLUMNS, height=height, selects=sheet.of_one_set(rows),
    )  # fmt: skip


def by_step(sheet: Sheet, kind: str, rows: Rows) -> Figure | None:
    """Groups that follow from each other: "length" or "noise"."""
    if not rows:
        return None
    title, axis = _TITLES[kind]
    order = group_order(kind, rows)
    x = alt.X("group:N", sort=order, title=axis, axis=alt.Axis(labelAngle=-30 if len(order) > 4 else 0))
    y = alt.Y("wer:Q", title="WER, %", scale=_scale(rows), axis=alt.Axis(format=PLAIN, tickCount=6))
    chart, words = _points(sheet, rows, "x", x, y)
    return sheet.build(
        f"by-{kind}", title, words, chart, {"groups": rows}, _COLUMNS,
        height=260, selects=sheet.of_one_set(rows),
    )  # fmt: skip


def _scale(rows: Rows) -> alt.Scale:
    """Stretched near zero where one model is far worse than the others."""
    # Not logarithmic: a group may have no errors.
    values = [row["wer"] for row in rows if row["wer"] is not None]
    return alt.Scale(type="sqrt" if max(values) > _FAR * median(values) else "linear")


def _points(sheet: Sheet, rows: Rows, across: str, groups: Any, wer: Any) -> tuple[Any, str]:
    """Points of all models in every group, side by side with their intervals unless they are many."""
    models = [name for name in (DENSE, *sheet.names) if any(row["run"] == name for row in rows)]
    base = alt.Chart(alt.NamedData("groups")).transform_filter("datum.measured == measured")
    other = {"x": "y", "y": "x"}[across]
    apart = len(models) <= _MOST_INTERVALS
    place: dict[str, Any] = {across: groups}
    if apart:
        offset = {"x": alt.XOffset, "y": alt.YOffset}[across]
        place[f"{across}Offset"] = offset("run:N", sort=models, scale=alt.Scale(domain=models))
    tip = [
        alt.Tooltip("run:N", title="model"), alt.Tooltip("group:N"),
        alt.Tooltip("wer:Q", title="WER, %", format=".2f"), alt.Tooltip("low:Q", title="from", format=".2f"),
        alt.Tooltip("high:Q", title="to", format=".2f"), alt.Tooltip("words:Q", format=",d"),
        alt.Tooltip("utterances:Q", format=",d"),
    ]  # fmt: skip
    layers = []
    looks: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (f"datum.run == '{DENSE}'", {"style": "dense", "shape": "square"}, {}),
        (SHOWN, {}, {"color": sheet.color()}),
    ]
    for rule, look, color in looks:
        some = base.transform_filter(rule)
        if apart:
            bar = {key: value for key, value in look.items() if key != "shape"}
            layers.append(
                some.mark_rule(aria=False, opacity=0.6, **bar).encode(
                    **place, **color, **{other: "low:Q", f"{other}2": "high:Q"}
                )
            )
        layers.append(
            some.mark_point(filled=True, size=60, opacity=1, **look).encode(
                **place, **color, **{other: wer}, tooltip=tip
            )
        )
    words = "The square is the dense model, the points are the runs"
    return alt.layer(
        *layers
    ), f"{words}{', with 95 % intervals' if apart else '; intervals are in the table'}."
