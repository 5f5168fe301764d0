"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from usmlite.report import measures, vega
from usmlite.report.figures import Figure
from usmlite.report.measures import Rows
from usmlite.report.records import DENSE, Record
from usmlite.report.speech import Card
from usmlite.report.theme import DARK, LIGHT, Theme, config
from usmlite.tables import readable_bytes, result_cells

_FOLDER = Path(__file__).parent
_SECTIONS = {
    "results": ("Results", ("wer-bytes",)),
    "bytes": ("Bytes", ("bytes", "parts")),
    "training": ("Training", ("training", "dev-wer")),
    "layers": ("Layers", ("allocation", "sensitivity")),
    "weights": ("Masks and weights", ("mask-churn", "weights")),
    "groups": ("Speakers, lengths, noise", ("speakers", "by-length", "by-noise")),
    "worst": ("Worst utterances", ()),
    "repeat": ("To repeat it", ()),
}
_MAPS = ("allocation", "sensitivity")
_WIDE = ("wer-bytes", *_MAPS)


def render(
    records: Sequence[Record],
    figures: Sequence[Figure],
    cards: Sequence[Card],
    notes: Sequence[str],
    *,
    version: str,
    command: str,
) -> str:
    """The page's text.

    Args:
        records: the runs.
        figures: what is drawn.
        cards: the worst utterances.
        notes: what is missing or does not compare.
        version: of usmlite.
        command: that makes this page again.
    """
    script = _file("page.js")
    data = _data(records, figures)
    drawn = {figure.key: figure for figure in figures}
    by_section = {
        key: [drawn[name] for name in names if name in drawn] for key, (_, names) in _SECTIONS.items()
    }
    by_section = {key: found for key, found in by_section.items() if found or key == "results"}
    sections = [
        {"key": key, "title": title}
        for key, (title, _) in _SECTIONS.items()
        if key in by_section or key == "repeat" or (key == "worst" and cards)
    ]
    front = measures.fronts(records)
    dense = measures.dense_results(records)
    headings, cells = result_cells([*(row for _, row in dense), *(record.row for record in records)])
    count = len(records)
    title = f"Report of {count} runs" if count != 1 else f"Report of {records[0].name}"
    return _environment().get_template("page.html").render(
        title=title,
        subtitle=_subtitle(records),
        sections=sections,
        by_section=by_section,
        wide=_WIDE,
        maps=_MAPS,
        headings=headings[1:],
        dense=[
            {"name": DENSE if len(dense) == 1 else f"{DENSE} ({measured})", "cells": line[1:]}
            for (measured, _), line in zip(dense, cells[: len(dense)], strict=True)
        ],
        rows=[
            {"name": record.name, "cells": line[1:], "front": record.name in front}
            for record, line in zip(records, cells[len(dense) :], strict=True)
        ],
        measured=_measured(records),
        how="Greedy decoding; intervals by bootstrap over utterances, differences and p-values paired on the "
        "same utterances.",
        notes=notes,
        cards=[_card(card) for card in cards],
        repeats=[_repeat(record) for record in records],
        version=version,
        made_by=command,
        policy=_policy(script),
        style=Markup(_file("page.css")),
        data=htmlsafe_json_dumps(data, allow_nan=False, separators=(",", ":")),
        vega=Markup(_script()),
        script=Markup(script),
    )  # fmt: skip


def _data(records: Sequence[Record], figures: Sequence[Figure]) -> dict[str, Any]:
    """What the script draws; rows that several figures and tables have stand there once, as do their keys."""
    rows: list[Any] = []
    places: dict[int, int] = {}

    def place(found: Rows) -> int:
        if id(found) not in places:
            places[id(found)] = len(rows)
            keys = list(found[0]) if found else []
            rows.append({"keys": keys, "values": [[row[key] for key in keys] for row in found]})
        return places[id(found)]

    drawn = [
        {
            "key": figure.key,
            "title": figure.title,
            "summary": figure.summary,
            "spec": {key: value for key, value in figure.spec.items() if key != "datasets"},
            "data": {name: place(found) for name, found in figure.spec["datasets"].items()},
            "rows": place(figure.rows),
            "columns": [asdict(column) for column in figure.columns],
        }
        for figure in figures
    ]
    return {
        "runs": [record.name for record in records],
        "figures": drawn,
        "rows": rows,
        "themes": {"light": _theme(LIGHT), "dark": _theme(DARK)},
    }


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


@cache
def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    return vega.source()


def _policy(script: str) -> str:
    """Nothing from elsewhere, and no script but the two of ours: not even one that a name smuggles in."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (_script(), script)
    )
    # Vega writes style elements and attributes.
    sources = "style-src 'unsafe-inline'; img-src data: blob:; media-src data:"
    return f"default-src 'none'; script-src {hashes}; {sources}"


def _theme(theme: Theme) -> dict[str, Any]:
    return {"config": config(theme), "colors": theme.runs}


def _subtitle(records: Sequence[Record]) -> str:
    models = dict.fromkeys(
        str(record.recipe["model"]["source"])
        for record in records
        if record.recipe and "source" in record.recipe.get("model", {})
    )
    sizes = [record.row.weights_bytes for record in records]
    spread = readable_bytes(min(sizes))
    if max(sizes) > min(sizes):
        spread += f" to {readable_bytes(max(sizes))}"
    return f"{', '.join(models)}: {spread}" if models else spread


def _measured(records: Sequence[Record]) -> str:
    found = list(dict.fromkeys(record.measured for record in records if record.measured))
    if not found:
        return "No speech was transcribed: there are bytes, but no word error rates."
    if len(found) > 1:
        return f"Measured on different speech: {'; '.join(found)}."
    return f"Measured on {found[0]} of speech."


def _card(card: Card) -> dict[str, Any]:
    facts = [] if card.speaker is None else [f"speaker {card.speaker}"]
    if card.seconds is not None:
        facts.append(f"{card.seconds:.1f} s")
    return {**vars(card), "facts": ", ".join(facts)}


def _repeat(record: Record) -> dict[str, Any]:
    report: Mapping[str, Any] = record.report or {}
    facts = [("read from", record.source.name)]
    recipe = record.recipe
    if recipe:
        facts.append(("seed", str(recipe.get("training", {}).get("seed", "that of the recipe"))))
    for name, described in _mapping(report.get("data")).items():
        described = _mapping(described)
        where = (recipe or {}).get("data", {}).get(name)
        facts.append((
            f"speech, {name}",
            f"{where or 'a part of dev'}: {described.get('utterances')} utterances, "
            f"{float(described.get('seconds') or 0) / 3600:.2f} h, SHA-256 {described.get('sha256')}",
        ))  # fmt: skip
    machine = _mapping(report.get("machine")) or (record.evaluation.machine if record.evaluation else {})
    versions = _mapping(report.get("versions")) or (record.evaluation.versions if record.evaluation else {})
    facts.append(("machine", ", ".join(f"{key} {value}" for key, value in machine.items() if value)))
    facts.append(("versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    training = _mapping(report.get("training"))
    if training:
        facts.append((
            "training",
            f"{training.get('steps')} steps, {training.get('windows')} windows of 30 s, "
            f"{float(training.get('seconds') or 0) / 60:.1f} minutes; "
            f"step {training.get('best_step')} was kept",
        ))  # fmt: skip
    facts += [("missing", text) for text in record.missing]
    name = shlex.quote(record.name.replace("/", "-"))
    return {
        "name": record.name,
        "command": f"usmlite compress --recipe recipe.toml --out {name}" if recipe else None,
        "facts": [(key, value) for key, value in facts if value],
        "recipe": tomli_w.dumps(recipe) if recipe else None,
    }


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
