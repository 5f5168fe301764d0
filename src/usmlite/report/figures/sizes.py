"""WER against bytes, and where the bytes are."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from usmlite.report import measures
from usmlite.report.figures.sheet import PLAIN, SHOWN, Column, Figure, Sheet, is_wide, rows_high
from usmlite.report.records import DENSE, Record

# Of points with their names beside them; if there are more, only those on the front.
_MOST_NAMES = 8


def wer_against_bytes(sheet: Sheet, records: Sequence[Record]) -> Figure | None:
    """Every run with its interval, the Pareto front, and the dense model as a line."""
    rows, dense = measures.results(records), measures.dense_results(records)
    if not rows:
        return None
    lines = [{"run": DENSE, **measures.percents(row), "measured": words} for words, row in dense]
    for line in lines:
        line["label"] = f"dense, float32: {line['wer']:.2f} %"
    points = alt.Chart(alt.NamedData("runs")).transform_filter("datum.measured == measured")
    model = alt.Chart(alt.NamedData("dense")).transform_filter("datum.measured == measured")
    x, y = _size_axis(rows), _wer_axis([*rows, *lines])
    seen = alt.condition(SHOWN, alt.value(1.0), alt.value(0.15))
    tip = [
        alt.Tooltip("run:N"), alt.Tooltip("mb:Q", title="MB", format=".2f"),
        alt.Tooltip("wer:Q", title="WER, %", format=".2f"), alt.Tooltip("low:Q", title="from", format=".2f"),
        alt.Tooltip("high:Q", title="to", format=".2f"), alt.Tooltip("front:N", title="on the front"),
    ]  # fmt: skip
    shape = alt.Scale(domain=[True, False], range=["circle", "diamond"])
    names = points.transform_filter("datum.named").mark_text(
        style="note", baseline="middle", fontSize=11, aria=False,
        align=alt.ExprRef("datum.left ? 'right' : 'left'"), dx=alt.ExprRef("datum.left ? -8 : 8"),
        dy=alt.ExprRef("datum.below ? 12 : -10"), limit=200,
    )  # fmt: skip
    chart = alt.layer(
        model.mark_rect(style="dense-band", aria=False).encode(y="low:Q", y2="high:Q"),
        model.mark_rule(style="dense", strokeDash=[5, 4]).encode(y="wer:Q"),
        model.mark_text(style="note", align="right", baseline="bottom", dx=-4, dy=-3).encode(
            y="wer:Q", x=alt.value("width"), text="label:N"
        ),
        points.transform_filter("datum.front")
        .mark_line(style="front", interpolate="step-after", strokeWidth=1.5, aria=False)
        .encode(x="mb:Q", y="wer:Q", order="mb:Q"),
        points.mark_rule(aria=False, strokeWidth=1.5).encode(
            x=x, y="low:Q", y2="high:Q", color=sheet.color(), opacity=seen
        ),
        points.mark_point(filled=True, size=90).encode(
            x=x, y=y, color=sheet.color(), opacity=seen, tooltip=tip,
            shape=alt.Shape("front:N", legend=None, scale=shape),
        ),
        names.encode(x=x, y=y, text="run:N", opacity=seen),
    )  # fmt: skip
    _place_names(rows)
    return sheet.build(
        "wer-bytes", "WER against bytes",
        "Every run at the size of its weights file and its word error rate, with the 95 % interval "
        "(bootstrap over utterances). Circles, joined by a line, are on the Pareto front: no other run is "
        "both smaller and better. The dashed line is the dense model, the band its interval.",
        chart, {"runs": rows, "dense": lines},
        (Column("run", "run"), Column("mb", "MB", ".2f"), Column("wer", "WER, %", ".2f"),
         Column("low", "from", ".2f"), Column("high", "to", ".2f"), Column("front", "on the front")),
        height=380, selects=sheet.of_one_set(rows),
    )  # fmt: skip


def _place_names(rows: measures.Rows) -> None:
    """Says which points have their names beside them, and on which side there is room."""
    sizes = [row["mb"] for row in rows]
    middle = (min(sizes) * max(sizes)) ** 0.5 if is_wide(sizes) else (min(sizes) + max(sizes)) / 2
    for number, row in enumerate(sorted(rows, key=lambda row: row["mb"])):
        row["named"] = row["front"] or len(rows) <= _MOST_NAMES
        row["left"] = row["mb"] > middle
        # Neighbors would write across each other.
        row["below"] = number % 2 == 1


def _size_axis(rows: measures.Rows) -> alt.X:
    sizes = [row["mb"] for row in rows]
    # The same for all test sets, and of one run too.
    domain = [0.93 * min(sizes), 1.07 * max(sizes)]
    scale = alt.Scale(type="log" if is_wide(sizes) else "linear", domain=domain, nice=False)
    return alt.X("mb:Q", title="weights file, MB", scale=scale, axis=alt.Axis(format=PLAIN, tickCount=6))


def _wer_axis(rows: measures.Rows) -> alt.Y:
    # Bars that reach zero have no place on a logarithmic axis.
    values = [row["wer"] for row in rows if row["wer"] is not None]
    wide = is_wide(values) and min(row["low"] or 0.0 for row in rows) > 0
    scale = alt.Scale(type="log", nice=False, padding=12) if wide else alt.Scale(zero=False, padding=12)
    return alt.Y("wer:Q", title="WER, %", scale=scale, axis=alt.Axis(format=PLAIN, tickCount=6))


def part_shares(sheet: Sheet, records: Sequence[Record]) -> Figure | None:
    """The packed file of every run, divided among the parts of the network."""
    rows = [row for row in measures.parts(records) if row["packed"]]
    if not rows:
        return None
    totals = {name: sum(row["packed"] for row in rows if row["run"] == name) for name in sheet.names}
    data = [
        {
            "run": row["run"], "part": row["part"], "mb": measures.rounded(row["packed"] / 1e6),
            "share": measures.rounded(row["packed"] / totals[row["run"]]),
            "rank": measures.PARTS.index(row["part"]),
        }
        for row in rows
    ]  # fmt: skip
    there = [part for part in measures.PARTS if any(row["part"] == part for row in data)]
    legend = alt.Legend(
        orient="bottom",
        title=None,
        values=there,
        symbolType="square",
        columns=3 if sheet.paper else alt.ExprRef("width < 260 ? 1 : 2"),
    )
    chart = (
        alt.Chart(alt.NamedData("parts"))
        .mark_bar()
        .encode(
            opacity=alt.condition(SHOWN, alt.value(1.0), alt.value(0.15)),
            x=alt.X("mb:Q", title="packed file, MB", stack="zero", axis=alt.Axis(format=PLAIN, tickCount=6)),
            y=alt.Y("run:N", title=None, sort=sheet.names, axis=alt.Axis(labelLimit=170)),
            color=alt.Color(
                "part:N", scale=alt.Scale(domain=list(measures.PARTS), range="ordinal"), legend=legend
            ),
            order=alt.Order("rank:Q"),
            tooltip=[
                alt.Tooltip("run:N"), alt.Tooltip("part:N"), alt.Tooltip("mb:Q", title="MB", format=".3f"),
                alt.Tooltip("share:Q", title="of the file", format=".1%"),
            ],
        )
    )  # fmt: skip
    return sheet.build(
        "bytes", "Where the bytes of the packed file are",
        "The packed file of every run, divided among the parts of the network.",
        chart, {"parts": data},
        (Column("run", "run"), Column("part", "part"), Column("mb", "MB", ".3f"),
         Column("share", "of the file", ".1%")),
        height=rows_high(len({row["run"] for row in data})),
    )  # fmt: skip


def parts(sheet: Sheet, records: Sequence[Record]) -> Figure | None:
    """Every part of the network, dense against packed, on a logarithmic axis."""
    data = [
        {
            "run": row["run"], "part": row["part"], "dense": measures.rounded(row["dense"] / 1e6),
            "packed": measures.rounded(row["packed"] / 1e6),
            "share": measures.rounded(row["packed"] / row["dense"]),
        }
        for row in measures.parts(records) if row["dense"] and row["packed"]
    ]  # fmt: skip
    if not data:
        return None
    order = list(dict.fromkeys(row["part"] for row in data))
    y = alt.Y("part:N", sort=order, title=None)
    domain = [0.8 * min(row["packed"] for row in data), 1.25 * max(row["dense"] for row in data)]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    axis = alt.Axis(format=PLAIN, values=[10.0**power for power in range(-4, 6)])
    x = alt.X("least:Q", scale=scale, axis=axis, title="MB")
    tip = [
        alt.Tooltip("run:N"), alt.Tooltip("part:N"), alt.Tooltip("dense:Q", title="dense, MB", format=".3f"),
        alt.Tooltip("packed:Q", title="packed, MB", format=".3f"),
        alt.Tooltip("share:Q", title="packed / dense", format=".1%"),
    ]  # fmt: skip
    base = alt.Chart(alt.NamedData("parts")).transform_filter(SHOWN)
    chart = alt.layer(
        base.transform_aggregate(least="min(packed)", most="max(dense)", groupby=["part"])
        .mark_rule(style="front", aria=False)
        .encode(y=y, x=x, x2="most:Q"),
        base.mark_tick(style="dense", thickness=3, size=18).encode(
            y=y, x=alt.X("dense:Q", scale=scale), tooltip=tip
        ),
        base.mark_point(filled=True, size=80, opacity=1).encode(
            y=y, x=alt.X("packed:Q", scale=scale), color=sheet.color(), tooltip=tip
        ),
    )
    return sheet.build(
        "parts", "Bytes by part of the network, dense against packed",
        "For every part, the bar is the dense model in float32 and the points are the packed runs. The axis "
        "is logarithmic: equal distances are equal ratios.",
        chart, {"parts": data},
        (Column("run", "run"), Column("part", "part"), Column("dense", "dense, MB", ".3f"),
         Column("packed", "packed, MB", ".3f"), Column("share", "packed / dense", ".1%")),
        height=rows_high(len(order)),
    )  # fmt: skip
