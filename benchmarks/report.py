"""A report of 20 runs: its bytes, and how long Chromium takes to draw it.

    python benchmarks/report.py RUN... [--count 20] [--data SPEECH] [--json results/report.json]

The runs are taken as often as it needs for the count, under names of their own. The time is from opening the
file to the last figure, as the page itself says; the least of some, because other work only ever adds
to it. Needs Chromium and pip install "usmlite[browser]".
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from usmlite.atomic import write_json
from usmlite.evaluate import describe_machine, describe_versions
from usmlite.report import read_report

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = {"width": 1280, "height": 800}


def copies(runs: list[Path], count: int, folder: Path) -> list[Path]:
    """As many runs as asked for: links to the same files in folders of their own."""
    out = []
    for number in range(count):
        run = runs[number % len(runs)]
        target = folder / f"{run.name}-{number + 1}"
        target.mkdir()
        for path in run.iterdir():
            (target / path.name).symlink_to(path.resolve())
        out.append(target)
    return out


def seconds_to_draw(file: Path, tries: int) -> list[float]:
    """What the page says of every time that it is opened, in a browser that is started anew."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    found = []
    with sync_playwright() as playwright:
        for _ in range(tries):
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            page.goto(file.resolve().as_uri())
            page.wait_for_selector("html[data-drawn]", timeout=300_000)
            found.append(float(page.get_attribute("html", "data-drawn") or "nan") / 1000)
            browser.close()
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories that usmlite compress wrote")
    parser.add_argument("--count", type=int, default=20, help="runs in the report (default: 20)")
    parser.add_argument("--data", type=Path, action="append", default=[], help="the test speech")
    parser.add_argument("--tries", type=int, default=5, help="times to draw it (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="usmlite-") as name:
        folder = Path(name)
        file = folder / "report.html"
        started = time.process_time()
        report = read_report(copies(arguments.runs, arguments.count, folder), arguments.data)
        report.write_page(file)
        made = time.process_time() - started
        drawn = seconds_to_draw(file, arguments.tries)
        result = {
            "runs": len(report.records),
            "bytes": file.stat().st_size,
            "seconds_to_draw": min(drawn),
            "seconds_of_all_tries": drawn,
            "processor_seconds_to_make": round(made, 2),
            "notes": report.notes,
            "command": "python benchmarks/report.py RUN...",
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
    print(f"{result['runs']} runs: {result['bytes']:,} bytes, drawn in {result['seconds_to_draw']:.2f} s")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
