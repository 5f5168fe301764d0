"""The network as a map, and the values of its weights."""

from __future__ import annotations

from typing import Any

import altair as alt

from usmlite.report.figures.sheet import PLAIN, Column, Figure, Selects, Sheet, rows_high
from usmlite.report.measures import Rows

# In the order of the forward pass, as `measures.place_of` names them; others come after.
_PLACES = [
    f"{kind} {name}" for kind in ("self", "cross") for name in ("q", "k", "v", "out")
] + ["fc1", "fc2"]  # fmt: skip
# Of a ramp: from there on what is written on it has the color of the ground.
_HIGH = 0.65
_COLUMNS = (
    Column("run", "run"), Column("name", "weight"), Column("spec", "stored as"),
    Column("bytes", "bytes", ",d"), Column("bits", "bits a weight", ".2f"),
    Column("sensitivity", "sensitivity", ".3g"), Column("error", "output error", ".2g"),
)  # fmt: skip


def allocation(sheet: Sheet, rows: Rows) -> Figure | None:
    """Bits and N:M of every weight of a run."""
    if not rows:
        return None
    most = max(row["bits"] for row in rows)
    color = alt.Color(
        "bits:Q",
        scale=alt.Scale(domain=[0.0, most]),
        legend=alt.Legend(orient="bottom", gradientLength=180, tickCount=4, title="bits a weight"),
    )
    return sheet.build(
        "allocation", "Allocation: bits and N:M of every weight",
        "Bits in the packed file for each weight of the dense model, scales included; N:M below where the "
        "weight is pruned. One run at a time.",
        _map(rows, color, f"datum.bits > {_HIGH * most}", ("bits", ".1f"), below="pattern"),
        {"layers": rows}, _COLUMNS, height=_height(rows), selects=_runs(sheet, rows),
    )  # fmt: skip


def sensitivity(sheet: Sheet, rows: Rows) -> Figure | None:
    """How much every weight of a run matters."""
    measured = [row for row in rows if row["sensitivity"]]
    if not measured:
        return None
    values = [row["sensitivity"] for row in measured]
    least, most = min(values), max(values)
    middle = least * (most / least) ** _HIGH
    legend = alt.Legend(
        orient="bottom", gradientLength=180, format=PLAIN, title="nats a token",
        values=[10.0**power for power in range(-8, 6) if least <= 10.0**power <= most],
    )  # fmt: skip
    color = alt.Color("sensitivity:Q", scale=alt.Scale(type="log", domain=[least, most]), legend=legend)
    return sheet.build(
        "sensitivity", "Sensitivity of every weight",
        "How much the loss rises for each unit of relative error of the layer's output, as it was measured "
        "before bits were shared out. Colors are logarithmic. One run at a time.",
        _map(measured, color, f"datum.sensitivity > {middle}", ("sensitivity", ".2~g")),
        {"layers": rows}, _COLUMNS, height=_height(measured), selects=_runs(sheet, measured),
    )  # fmt: skip


def _height(rows: Rows) -> int:
    return rows_high(len({row["block"] for row in rows}), 34)


def _runs(sheet: Sheet, rows: Rows) -> Selects:
    return {"run": ("run", tuple(name for name in sheet.names if any(row["run"] == name for row in rows)))}


def _map(rows: Rows, color: alt.Color, high: str, text: tuple[str, str], below: str | None = None) -> Any:
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    there = list(dict.fromkeys(row["place"] for row in rows))
    places = [place for place in _PLACES if place in there]
    # What stands alone, such as convolutions and embeddings, goes to the right.
    places += sorted((p for p in there if p not in places), key=lambda p: _alone(rows, p))
    bare: dict[str, Any] = {"grid": False, "domain": False, "ticks": False}
    base = (
        alt.Chart(alt.NamedData("layers"))
        .transform_filter(f"datum.run == run && isValid(datum.{text[0]})")
        .encode(
            x=alt.X(
                "place:N", sort=places, title=None, scale=alt.Scale(domain=places),
                axis=alt.Axis(labelAngle=-40, orient="top", **bare),
            ),
            y=alt.Y(
                "block:N", sort=blocks, title=None, scale=alt.Scale(domain=blocks), axis=alt.Axis(**bare)
            ),
        )
    )  # fmt: skip
    cell = base.mark_rect(cornerRadius=2).encode(
        color=color,
        tooltip=[
            alt.Tooltip("name:N", title="weight"), alt.Tooltip("spec:N", title="stored as"),
            alt.Tooltip("bytes:Q", format=",d"), alt.Tooltip("bits:Q", title="bits a weight", format=".2f"),
            alt.Tooltip("sensitivity:Q", format=".3g"),
            alt.Tooltip("error:Q", title="output error", format=".2g"),
        ],
    )  # fmt: skip
    layers = [cell]
    # The ramp of either theme ends in what the ground's color can be read on.
    for style, rule in (("on-high", high), ("on-low", f"!({high})")):
        words = base.transform_filter(rule)
        where: dict[str, Any] = {"dy": {"expr": f"datum.{below} ? -6 : 0"}} if below else {}
        layers.append(
            words.mark_text(style=style, fontSize=11, aria=False, **where).encode(
                text=alt.Text(f"{text[0]}:Q", format=text[1])
            )
        )
        if below is not None:
            layers.append(
                words.transform_filter(f"datum.{below} != null")
                .mark_text(style=style, fontSize=10, aria=False, dy=7)
                .encode(text=f"{below}:N")
            )
    return alt.layer(*layers)


def _alone(rows: Rows, place: str) -> bool:
    return not any(row["place"] == place and row["block"].split()[-1].isdigit() for row in rows)


def weights(sheet: Sheet, rows: Rows, dense: Rows) -> Figure | None:
    """How values of the weights are spread, before and after."""
    if not rows:
        return None
    names = tuple(dict.fromkeys(row["layer"] for row in rows))
    width = 2 * rows[0]["reach"] / len(rows[0]["packed"])
    first = width / 2 - rows[0]["reach"]
    base = (
        alt.Chart(alt.NamedData("weights"))
        .transform_filter("datum.run == run && datum.layer == layer")
        .transform_lookup(
            lookup="before", from_=alt.LookupData(data=alt.NamedData("dense"), key="key", fields=["dense"])
        )
        .transform_flatten(["dense", "packed"])
        .transform_window(bin="row_number()")
        .transform_calculate(x=f"{first} + {width} * (datum.bin - 1)")
    )
    x = alt.X(
        "start:Q",
        title="value, in standard deviations of the dense weight",
        axis=alt.Axis(format=PLAIN),
    )
    tip = [
        alt.Tooltip("x:Q", title="value", format=".2f"), alt.Tooltip("dense:Q", title="dense, %"),
        alt.Tooltip("packed:Q", title="packed, %"),
    ]  # fmt: skip
    bars = base.transform_calculate(start=f"datum.x - {width / 2}", end=f"datum.x + {width / 2}")
    chart = alt.layer(
        bars.mark_rect(aria=False).encode(
            x=x, x2="end:Q", color=sheet.color(), tooltip=tip,
            y=alt.Y("packed:Q", title="share of the weights, %"), y2=alt.datum(0),
        ),
        base.mark_line(style="dense", interpolate="step", strokeWidth=1.5).encode(
            x="x:Q", y="dense:Q", order="x:Q"
        ),
    )  # fmt: skip
    return sheet.build(
        "weights", "Values of the weights, before and after",
        "Bars are the packed weights, the line is the dense ones, in equal bins. A tall bar in the middle is "
        "weights that became zero.",
        chart, {"weights": rows, "dense": dense},
        (Column("run", "run"), Column("layer", "weight"), Column("zero", "zeros, %", ".1f"),
         Column("pruned", "pruned, %", ".1f")),
        rows=[{key: row[key] for key in ("run", "layer", "zero", "pruned")} for row in rows],
        height=250, selects={**_runs(sheet, rows), "layer": ("weight", names)},
    )  # fmt: skip
