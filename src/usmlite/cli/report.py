"""`usmlite report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmlite.cli.arguments import add_command, whole
from usmlite.cli.console import bar, check_folder, complain, make_console, settle_libraries
from usmlite.errors import UsmliteError

if TYPE_CHECKING:
    from usmlite.report import Report

REPORTS = ("html", "md", "json", "latex")

EPILOG = """\
RUN is what `usmlite compress` or `usmlite sweep` wrote, or a .json of `usmlite evaluate --json`. The page is
one file: it opens without a network, and may be sent to others. It names no places on this machine, but it
has the words of test speech, and with players some seconds of recordings: --audio 0 leaves these out.

What is missing or damaged in a run is named, and the rest is drawn. A RUN that cannot be read at all ends
with exit code 2, after the others were drawn.

examples:
  usmlite report small/
  usmlite report study/ small/ --out report.html --figures figures/
  usmlite report results/*.json --data LibriSpeech/test-clean --out report.html
  usmlite report study/ --format latex --out table.tex
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands, "report", "look at runs: one page with figures, alignments and recipes; or tables",
        EPILOG, run,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directories or .json files")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="where it goes (default: report.html; tables and JSON go to the console)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=REPORTS, default="html",
        help="a page, a table in Markdown or LaTeX, or all figures as JSON (default: html)",
    )  # fmt: skip
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help='the figures as SVG and PNG too (pip install "usmlite[plot]")',
    )
    parser.add_argument(
        "--data", type=Path, action="append", default=[], metavar="D",
        help="the test speech, where it is not in the place that the recipe names; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--worst", type=whole(0), default=5, metavar="N", help="utterances of each run, aligned (default: 5)"
    )
    parser.add_argument(
        "--audio",
        type=whole(0),
        default=12,
        metavar="N",
        help="of these with a player, at most (default: 12)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    out: Path | None = arguments.out
    if out is None and arguments.format == "html":
        out = Path("report.html")
    if out is not None:
        check_folder(out.parent, out)
    settle_libraries()
    from usmlite.report import read_report, write_figures
    from usmlite.tables import ComparisonRow, comparison_table

    found = read_report(arguments.runs, arguments.data)
    # Beside a table on standard output, words would be taken for a part of it.
    console = make_console(stderr=out is None)
    if arguments.format == "html" and out is not None:
        with console.status("Writing the report"):
            found.write_page(out, worst=arguments.worst, players=arguments.audio)
    else:
        _deliver_table(found, arguments.format, out)
    if out is not None:
        console.print(comparison_table([ComparisonRow.of_result(row) for row in found.rows]))
    for line in found.notes:
        console.print(line, markup=False)
    if arguments.figures is not None:
        with bar("Drawing") as progress:
            names = write_figures(found.figures(), arguments.figures, progress=progress)
        console.print(f"In {arguments.figures}: {len(names)} files", markup=False)
    if out is not None:
        console.print(f"Report: {out}", markup=False)
    for text in found.unreadable:
        complain(f"error: {text}")
    return UsmliteError.exit_code if found.unreadable else 0


def _deliver_table(found: Report, form: str, out: Path | None) -> None:
    import json

    from usmlite.atomic import write_bytes

    if form == "json":
        text = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    else:
        text = found.table(form)
    if out is None:
        print(text, flush=True)
    else:
        write_bytes(out, f"{text}\n".encode())
