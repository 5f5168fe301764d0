"""The results on LibriSpeech: runs every recipe of recipes/librispeech, and measures it on test.

    python benchmarks/librispeech.py --data LIBRISPEECH --runs runs
    python benchmarks/librispeech.py --table

LIBRISPEECH holds train/, dev/ and test/, each a corpus as `usmlite` reads them. It is a
sweep (`usmlite.sweep`) and then the measurement: runs resume where they were cut off, and a result that is
there is not made again, so the first command may be repeated. Checkpoints
are chosen on dev; test is only measured. `--table` rewrites the README's table from results/librispeech.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pages import place
from usmlite.atomic import write_json
from usmlite.data import load_corpus
from usmlite.evaluate import Evaluation, compare, evaluate
from usmlite.grid import expand
from usmlite.load import ALLOCATION_FILE, load
from usmlite.models import load_teacher
from usmlite.packed import arithmetic
from usmlite.recipe import load_recipe
from usmlite.sweep import sweep
from usmlite.tables import ResultRow, markdown_table, measured_line

ROOT = Path(__file__).resolve().parent.parent
RECIPES, RESULTS, README = (
    ROOT / "recipes" / "librispeech",
    ROOT / "results" / "librispeech",
    ROOT / "README.md",
)
# The teachers, and what the names of their rows begin with; the longest prefix that fits decides.
TEACHERS = {"base-": "base", "": "tiny.en"}
DENSE = "dense"
# The run whose measurements the other target sizes choose from.
MEASURED = "9.4-percent-no-finetuning"
# The order of a teacher's rows in the table; what is not named comes after.
ORDER = (
    DENSE, "dense-finetuned", "int8", "12.6-percent-no-finetuning", "int4", "9.4-percent",
    "9.4-percent-no-finetuning", "6.3-percent", "6.3-percent-no-finetuning", "4.7-percent",
    "4.7-percent-no-finetuning", "int3", "int4-2of4", "int4-2of4-no-finetuning",
)  # fmt: skip


def parts(name: str) -> tuple[str, str]:
    """The teacher's prefix and what follows it: ("base-", "6.3-percent")."""
    prefix = next(prefix for prefix in TEACHERS if name.startswith(prefix))
    return prefix, name.removeprefix(prefix)


def measure(source: Path | str, corpus: Path, precision: str, console: Console) -> dict[str, Any]:
    """Evaluates one model on a corpus, in float32 or with weights and activations in bf16."""
    # Expanded: what is compared are weights, in the arithmetic of the dense model.
    recognizer = load(source, hold="float32")
    if precision == "bf16":
        recognizer.model.to(torch.bfloat16)
    utterances = load_corpus(corpus, require_text=True)

    def progress(done: int, total: int) -> None:
        console.print(f"{source}: {done} of {total}")

    found = evaluate(
        recognizer.transcribe_batch,
        utterances,
        name=str(source),
        weights_bytes=recognizer.weights_bytes,
        batch_size=32,
        arithmetic=arithmetic(recognizer.model),
        progress=progress,
    )
    return {**found.to_json(), "precision": precision}


def make(names: list[str], arguments: argparse.Namespace, console: Console) -> dict[str, str]:
    """Runs recipes and measures what they packed; "dense" is a teacher itself. The errors, by name."""
    wanted = [name for name in names if not (RESULTS / f"{name}.json").is_file()]
    failed: dict[str, str] = {}
    runs_first = [name for name in wanted if parts(name)[1] == MEASURED]
    runs_then = [name for name in wanted if parts(name)[1] not in (MEASURED, DENSE)]
    # What others choose from is measured before they start.
    for part in (runs_first, runs_then):
        recipes = [(name, places_of(name, arguments)) for name in part]
        runs = [run for name, places in recipes for run in expand([RECIPES / f"{name}.toml"], places)]
        failed |= sweep(runs, arguments.runs, console=console) if runs else {}
    for name in wanted:
        if name not in failed:
            record(name, arguments, console)
    return failed


def places_of(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The recipe keys that say where things are on this machine."""
    prefix, kind = parts(name)
    data = {"train": str(arguments.data / "train"), "dev": str(arguments.data / "dev")}
    places = {"data": {**data, "transcripts": str(arguments.runs / f"{prefix}transcripts.jsonl")}}
    measured = arguments.runs / f"{prefix}{MEASURED}" / ALLOCATION_FILE
    chosen = load_recipe(RECIPES / f"{name}.toml").spec.target_size is not None
    if chosen and kind != MEASURED and measured.is_file():
        places["spec"] = {"measured": str(measured)}
    return places


def record(name: str, arguments: argparse.Namespace, console: Console) -> None:
    """Measures one model on test, and keeps that with what its run says of itself."""
    prefix, kind = parts(name)
    teacher, run = TEACHERS[prefix], arguments.runs / name
    result: dict[str, Any] = {"name": name, "float32_bytes": load_teacher(teacher).float32_bytes}
    if kind != DENSE:
        report = read(run / "report.json")
        # The places on this machine are nobody's business.
        for section, table in places_of(name, arguments).items():
            for key in table:
                report["recipe"][section].pop(key, None)
        result["run"] = report
    source = teacher if kind == DENSE else run
    evaluation = measure(source, arguments.data / "test", arguments.precision, console)
    evaluation["name"] = name
    result["evaluation"] = evaluation
    result["command"] = "python benchmarks/librispeech.py --data LIBRISPEECH --runs runs"
    if kind != DENSE:
        other = read(RESULTS / f"{prefix}{DENSE}.json")["evaluation"]
        found = compare(Evaluation.from_json(evaluation), Evaluation.from_json(other))
        result["comparison"] = found.to_json()
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{name}.json", result)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table() -> str:
    """The README's tables, one for each teacher, in Markdown."""
    found = {path.stem: read(path) for path in RESULTS.glob("*.json")}
    texts = []
    for prefix, teacher in reversed(TEACHERS.items()):
        names = [name for name in found if parts(name)[0] == prefix]
        if names:
            texts.append(f"**{teacher}**\n\n{rows_of({parts(name)[1]: found[name] for name in names})}")
    dense = found[DENSE]["evaluation"]
    line = measured_line(dense, dense["machine"], corpus="test-clean", precision=dense["precision"])
    return "\n\n".join([*texts, line])


def rows_of(found: dict[str, dict[str, Any]]) -> str:
    """The table of one teacher's results, which go by their names without its prefix."""
    rows = []
    for name in sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        one, run = found[name], found[name].get("run")
        steps = None if run is None else run["training"]["steps"] if run["training"] else 0
        evaluation, comparison = one["evaluation"], one.get("comparison")
        rows.append(ResultRow.of(name, one["float32_bytes"], evaluation, comparison, steps=steps))
    return markdown_table(rows)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with train, dev and test")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--only", nargs="*", help="only these (dense, base-dense, or the name of a recipe)")
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of the evaluation"
    )
    parser.add_argument("--table", action="store_true", help="rewrite the README's table")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    failed: dict[str, str] = {}
    if arguments.data is not None:
        recipes = sorted(path.stem for path in RECIPES.glob("*.toml"))
        everything = [f"{prefix}{DENSE}" for prefix in TEACHERS] + recipes
        failed = make(arguments.only or everything, arguments, Console())
    if arguments.table:
        rows = table()
        place(README, "results", rows)
        print(rows)
    sys.exit("\n".join(f"{name} failed: {error}" for name, error in failed.items()) or 0)


if __name__ == "__main__":
    main()
