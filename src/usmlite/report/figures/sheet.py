"""What all figures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from usmlite.report.measures import Rows
from usmlite.report.records import Record

SHOWN = "indexof(shown, datum.run) >= 0"
# Without it a hundred is written as 1e+2.
PLAIN = ".12~g"
_PAPER_WIDTH = 460
_WIDE = 4.0  # a ratio beyond which an axis is logarithmic

Selects = dict[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Column:
    """One column of the table beside a figure.

    Attributes:
        key: of the rows.
        title: its heading.
        form: how numbers are written, as d3 and Python have it: ".2f", ",d", ".3g", ".1%".
    """

    key: str
    title: str
    form: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        key: names its files and its place in the page.
        title: its heading.
        summary: what it shows and how to read it.
        spec: Vega-Lite, with its data.
        rows: the same data for a table.
        columns: of that table.
        selects: what is chosen beside it: name of the parameter to (label, choices).
    """

    key: str
    title: str
    summary: str
    spec: dict[str, Any]
    rows: Rows
    columns: tuple[Column, ...]
    selects: Selects


class Sheet:
    """What all figures of one report share.

    Attributes:
        names: of the runs, in order.
        sets: what the runs were measured on, in words; first what most were.
        paper: whether figures are of a fixed width and have legends, instead of as wide as the page.
    """

    def __init__(self, records: Sequence[Record], *, paper: bool) -> None:
        self.names = [record.name for record in records]
        found = [record.measured for record in records if record.measured]
        self.sets = tuple(sorted(dict.fromkeys(found), key=lambda name: -found.count(name)))
        self.paper = paper

    def color(self) -> alt.Color:
        """The runs' colors; in the page the table of runs is the legend."""
        shown = self.paper and len(self.names) > 1
        legend = alt.Legend(orient="bottom", columns=2, title=None) if shown else None
        return alt.Color("run:N", scale=alt.Scale(domain=self.names), legend=legend)

    def of_one_set(self, rows: Rows) -> Selects:
        """The choice of the test set, for figures of word error rates; empty where there is one."""
        found = tuple(name for name in self.sets if any(row["measured"] == name for row in rows))
        return {"measured": ("measured on", found)} if found else {}

    def build(
        self,
        key: str,
        title: str,
        summary: str,
        chart: Any,
        data: dict[str, Rows],
        columns: Sequence[Column],
        *,
        height: int,
        rows: Rows | None = None,
        selects: Selects | None = None,
    ) -> Figure:
        """A figure of a chart and its named data.

        Args:
            key: see `Figure`.
            title: see `Figure`.
            summary: see `Figure`.
            chart: of Altair, with data by their names.
            data: these data.
            columns: see `Figure`.
            height: of the plot, in pixels.
            rows: of the table; the first of the data if None.
            selects: see `Figure`; a parameter is made for each.
        """
        params = [alt.param(name="shown", value=self.names)]
        params += [alt.param(name=name, value=choices[0]) for name, (_, choices) in (selects or {}).items()]
        width = _PAPER_WIDTH if self.paper else "container"
        whole = chart.add_params(*params).properties(width=width, height=height, description=summary)
        # Checking against the schema takes longer than all the rest; a test does it.
        spec = whole.to_dict(validate=False)
        spec["datasets"] = data
        table = next(iter(data.values())) if rows is None else rows
        return Figure(key, title, summary, spec, table, tuple(columns), selects or {})


def rows_high(count: int, pixels: int = 30) -> int:
    """The height of so many rows."""
    return pixels * max(count, 2)


def step_axis() -> alt.X:
    """Optimizer steps, from left to right."""
    return alt.X("step:Q", title="optimizer step", axis=alt.Axis(format=PLAIN, tickCount=6))


def some(count: int) -> list[int]:
    """At most a dozen positions at equal distances, the first and the last among them."""
    return sorted({round(part * (count - 1) / 11) for part in range(12)}) if count else []


def is_wide(values: Sequence[float]) -> bool:
    """Whether values are so far apart that their axis should be logarithmic, and can be."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > _WIDE
