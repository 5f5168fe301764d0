"""The course of training."""

from __future__ import annotations

import altair as alt

from usmlite.report.figures.sheet import SHOWN, Column, Figure, Sheet, some, step_axis
from usmlite.report.measures import Rows, rounded

# To both sides of a step, for the thick line.
_AROUND = 12
_TERMS = {
    "loss": "loss",
    "kl": "KL to the teacher",
    "ce": "cross-entropy",
    "states": "states of the encoder",
    "layers": "outputs of layers",
    "attention": "cross-attention",
    "lr": "learning rate",
    "norm": "norm of the gradient",
}


def course(sheet: Sheet, log: Rows) -> Figure | None:
    """The loss or another quantity, step by step, and its running mean."""
    if not log:
        return None
    found = {term for row in log for term in row if term not in ("run", "step", "churn")}
    terms = [term for term in _TERMS if term in found] + sorted(found - _TERMS.keys())
    titles = {term: _TERMS.get(term, term) for term in terms}
    data = [
        {"run": row["run"], "term": titles[term], "step": row["step"], "value": row[term]}
        for row in log
        for term in (terms[:1] if sheet.paper else terms)
        if term in row
    ]
    base = (
        alt.Chart(alt.NamedData("curves"))
        .transform_filter(f"{SHOWN} && datum.term == term")
        .transform_flatten(["step", "value"])
        .transform_window(
            mean="mean(value)",
            frame=[-_AROUND, _AROUND],
            groupby=["run"],
            sort=[alt.SortField("step")],
        )
    )
    scale = alt.Scale(zero=False)
    title = titles["loss"] if sheet.paper else None
    tip = [
        alt.Tooltip("run:N"), alt.Tooltip("step:Q", format=".0f"), alt.Tooltip("mean:Q", format=".4g"),
    ]  # fmt: skip
    chart = alt.layer(
        base.mark_line(strokeWidth=1, opacity=0.3, aria=False).encode(
            x=step_axis(), y=alt.Y("value:Q", title=title, scale=scale), color=sheet.color()
        ),
        base.mark_line(strokeWidth=2.5).encode(
            x=step_axis(), y=alt.Y("mean:Q", scale=scale), color=sheet.color(), tooltip=tip
        ),
    )
    table = [
        {"run": row["run"], "step": row["step"][at], **{t: row[t][at] for t in terms if t in row}}
        for row in log
        for at in some(len(row["step"]))
    ]
    return sheet.build(
        "training", "Training",
        "The course of fine-tuning, step by step (thin), and the mean of the steps around (thick).",
        chart, {"curves": data},
        (Column("run", "run"), Column("step", "step", ".0f"),
         *(Column(term, titles[term], ".4g") for term in terms)),
        rows=table, height=250, selects={"term": ("quantity", tuple(titles.values()))},
    )  # fmt: skip


def dev_wer(sheet: Sheet, rows: Rows) -> Figure | None:
    """WER on a part of dev while training, with the student that was kept."""
    if not rows:
        return None
    base = alt.Chart(alt.NamedData("dev")).transform_filter(SHOWN)
    y = alt.Y("wer:Q", title="WER on dev, %", scale=alt.Scale(zero=False))
    tip = [
        alt.Tooltip("run:N"), alt.Tooltip("step:Q", format=".0f"),
        alt.Tooltip("wer:Q", title="WER, %", format=".2f"), alt.Tooltip("best:N", title="kept"),
    ]  # fmt: skip
    chart = alt.layer(
        base.mark_line(strokeWidth=2, aria=False).encode(x=step_axis(), y=y, color=sheet.color()),
        base.mark_point(size=70, filled=True, opacity=1).encode(
            x=step_axis(), y=y, color=sheet.color(), tooltip=tip
        ),
        base.transform_filter("datum.best")
        .mark_point(size=230, strokeWidth=2, aria=False)
        .encode(x=step_axis(), y=y, color=sheet.color()),
    )
    return sheet.build(
        "dev-wer", "WER while training",
        "The student's word error rate on a part of dev; the ringed one was kept.",
        chart, {"dev": rows},
        (Column("run", "run"), Column("step", "step", ".0f"), Column("wer", "WER, %", ".2f"),
         Column("best", "kept")),
        height=250,
    )  # fmt: skip


def churn(sheet: Sheet, log: Rows) -> Figure | None:
    """How much of the masks every update changed."""
    data = [
        {"run": row["run"], "step": row["step"], "churn": [rounded(100 * value) for value in row["churn"]]}
        for row in log
        if any(row.get("churn", []))
    ]
    if not data:
        return None
    chart = (
        alt.Chart(alt.NamedData("churn"))
        .transform_filter(SHOWN)
        .transform_flatten(["step", "churn"])
        .mark_line(interpolate="step-after", strokeWidth=1.5)
        .encode(
            x=step_axis(),
            y=alt.Y("churn:Q", title="mask entries changed, %"),
            color=sheet.color(),
            tooltip=[
                alt.Tooltip("run:N"), alt.Tooltip("step:Q", format=".0f"),
                alt.Tooltip("churn:Q", title="changed, %", format=".3f"),
            ],
        )
    )  # fmt: skip
    table = [
        {"run": row["run"], "step": row["step"][at], "churn": row["churn"][at]}
        for row in data
        for at in some(len(row["step"]))
    ]
    return sheet.build(
        "mask-churn", "Mask churn",
        "The share of mask entries that the last update of the masks changed, until they are frozen.",
        chart, {"churn": data},
        (Column("run", "run"), Column("step", "step", ".0f"), Column("churn", "changed, %", ".3f")),
        rows=table, height=250,
    )  # fmt: skip
