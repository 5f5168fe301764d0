"""Runs as something to look at: one page, figures for a paper, tables, and JSON.

    report = read_report([Path("small"), Path("study")])
    report.write_page(Path("report.html"))

Whatever is missing or damaged in a run is named in `Report.notes`, and the rest is drawn.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from usmlite import __version__
from usmlite.atomic import write_bytes
from usmlite.errors import DataError, OutputError, ReportError
from usmlite.report import measures, vega
from usmlite.report.figures import Figure, draw
from usmlite.report.measures import pareto_front
from usmlite.report.page import render
from usmlite.report.records import Record, Recordings, read_records
from usmlite.report.speech import worst_cards
from usmlite.report.theme import LIGHT, PAPER_FONT, config
from usmlite.tables import ResultRow, latex_table, markdown_table

__all__ = ["FIGURE_FORMATS", "Report", "pareto_front", "read_report", "write_figures"]
FIGURE_FORMATS = ("svg", "png")
WORST, PLAYERS = 5, 12
"""How many utterances of each run are shown, and how many of all have a player, unless told otherwise."""
_SCALE = 3  # pixels of a PNG for each of the figure's


@dataclass(frozen=True)
class Report:
    """What was read of some runs.

    Attributes:
        paths: what was asked for.
        records: the runs that could be read.
        recordings: the test speech, as far as it is here.
        unreadable: what was asked for and could not be read at all, in words.
    """

    paths: tuple[Path, ...]
    records: tuple[Record, ...]
    recordings: Recordings
    unreadable: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What is missing, or does not compare, in words."""
        lines = [f"Not read: {text}" for text in self.unreadable]
        lines += _different(self.records)
        lines += [f"{record.name}: {text}" for record in self.records for text in record.missing]
        return [*lines, *self.recordings.missing]

    @property
    def rows(self) -> list[ResultRow]:
        """The table: dense models first."""
        dense = [row for _, row in measures.dense_results(self.records)]
        return [*dense, *(record.row for record in self.records)]

    def page(self, *, worst: int = WORST, players: int = PLAYERS) -> str:
        """The report as an HTML page that needs nothing else.

        Args:
            worst: how many utterances of each run are shown, aligned.
            players: how many of these have an audio player, at most.
        """
        missing: list[str] = []
        cards = worst_cards(self.records, self.recordings, count=worst, players=players, missing=missing)
        command = shlex.join(["usmlite", "report", *(path.name for path in self.paths)])
        figures = draw(self.records, self.recordings)
        notes = [self._without_places(text) for text in (*self.notes, *missing)]
        return render(self.records, figures, cards, notes, version=__version__, command=command)

    def _without_places(self, text: str) -> str:
        """A note for others, who need not know where things are on this machine."""
        corpora = [place for record in self.records for place in record.corpora]
        for path in (*self.paths, *(record.source for record in self.records), *corpora):
            if path.parent != Path():
                text = text.replace(f"{path.parent}/", "")
        return text

    def write_page(self, path: Path, *, worst: int = WORST, players: int = PLAYERS) -> None:
        """Writes `page` to a file.

        Raises:
            OutputError: it cannot be written.
        """
        write_bytes(path, self.page(worst=worst, players=players).encode())

    def table(self, form: str) -> str:
        """The table of results as "md" or "latex"."""
        return {"md": markdown_table, "latex": latex_table}[form](self.rows)

    def figures(self) -> list[Figure]:
        """The figures of the page, for a paper."""
        return draw(self.records, self.recordings, paper=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`: the table, what the figures show, and the notes."""
        front = measures.fronts(self.records)
        return {
            "version": __version__,
            "results": [{**asdict(row), "pareto": row.name in front} for row in self.rows],
            "figures": {figure.key: figure.rows for figure in draw(self.records, self.recordings)},
            "recipes": {record.name: record.recipe for record in self.records},
            "machines": {r.name: (r.report or {}).get("machine") for r in self.records},
            "versions": {r.name: (r.report or {}).get("versions") for r in self.records},
            "notes": self.notes,
        }


def read_report(paths: Sequence[Path], corpora: Sequence[Path] = ()) -> Report:
    """Reads runs.

    Args:
        paths: runs' directories, directories of runs, or JSON files of `usmlite evaluate --json`.
        corpora: test speech, where it is not in the place that the recipes name.

    Raises:
        DataError: none of them can be read.
    """
    records, unreadable = read_records(paths)
    if not records:
        raise DataError(
            "there is no run to report on",
            where=", ".join(map(str, paths)),
            expected="directories that `usmlite compress` or `sweep` wrote, or .json of `usmlite evaluate`",
            found="; ".join(unreadable) or "none",
        )
    return Report(tuple(paths), tuple(records), Recordings(records, corpora), tuple(unreadable))


def write_figures(
    figures: Sequence[Figure], folder: Path, *, progress: Callable[[float], None] | None = None
) -> list[str]:
    """Writes figures as SVG and PNG; where a figure is of one run, one for every run.

    Args:
        figures: of `Report.figures`.
        folder: is made if it is not there.
        progress: called with the share that is done.

    Returns:
        The files' names.

    Raises:
        ReportError: vl-convert-python is not installed.
        OutputError: a file cannot be written.
    """
    try:
        import vl_convert
    except ImportError:
        raise ReportError(
            "figures in files need vl-convert-python", where=folder, remedy='pip install "usmlite[plot]"'
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError("cannot make the directory", where=folder, found=error.strerror) from None
    settings: Mapping[str, Any] = {
        "vl_version": vega.converter_version(), "config": config(LIGHT, font=PAPER_FONT),
    }  # fmt: skip
    variants = [variant for figure in figures for variant in _variants(figure)]
    written: list[str] = []
    for name, spec in variants:
        contents = {
            "svg": vl_convert.vegalite_to_svg(spec, **settings).encode(),
            "png": vl_convert.vegalite_to_png(spec, scale=_SCALE, **settings),
        }
        for ending in FIGURE_FORMATS:
            write_bytes(folder / f"{name}.{ending}", contents[ending])
            written.append(f"{name}.{ending}")
        if progress is not None:
            progress(len(written) / (len(variants) * len(FIGURE_FORMATS)))
    return written


def _variants(figure: Figure) -> list[tuple[str, dict[str, Any]]]:
    """The figure for each run or test set that it can be of; other choices stay as they are first."""
    kind = next(
        (name for name in ("run", "measured") if len(figure.selects.get(name, ("", ()))[1]) > 1), None
    )
    if kind is None:
        return [(figure.key, figure.spec)]
    out = []
    for choice in figure.selects[kind][1]:
        params = [
            {**param, "value": choice} if param.get("name") == kind else param
            for param in figure.spec["params"]
        ]
        name = f"{figure.key}-{re.sub(r'[^A-Za-z0-9._-]+', '-', choice)}"
        out.append((name, {**figure.spec, "params": params}))
    return out


def _different(records: Sequence[Record]) -> list[str]:
    """What keeps the runs from being compared."""
    lines = []
    sets: dict[str, list[str]] = {}
    for record in records:
        if record.measured is not None:
            sets.setdefault(record.measured, []).append(record.name)
    if len(sets) > 1:
        which = "; ".join(f"{measured}: {', '.join(names)}" for measured, names in sets.items())
        lines.append(f"Not measured on the same speech, so that word error rates do not compare: {which}")
    for key in ("versions", "machine"):
        found: dict[str, dict[str, list[str]]] = {}
        for record in records:
            values = (record.report or {}).get(key)
            for name, value in (values if isinstance(values, dict) else {}).items():
                found.setdefault(name, {}).setdefault(str(value), []).append(record.name)
        for name, values in found.items():
            if len(values) > 1 and name != "memory":
                which = "; ".join(f"{value} ({', '.join(runs)})" for value, runs in values.items())
                lines.append(f"Different {key if key == 'machine' else 'versions of'} {name}: {which}")
    return lines
