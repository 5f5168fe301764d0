"""Sweep: many runs, one after another, to one table and one picture of WER against bytes."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from usmlite import tables
from usmlite.atomic import write_bytes, write_json
from usmlite.compress import claim, compress, tell_page
from usmlite.errors import DataError, OutputError, ReportError, UsmliteError
from usmlite.evaluate import Evaluation
from usmlite.grid import Run
from usmlite.load import DENSE_FILE, RECIPE_FILE, REPORT_FILE, run_spec
from usmlite.processes import this_process
from usmlite.recipe import Recipe, load_recipe, recipe_to_dict, without_places
from usmlite.report import pareto_front, read_report, write_figures
from usmlite.tables import ComparisonRow, ResultRow

JSON_FILE, TABLE_FILE, PICTURE = "sweep.json", "sweep.md", "sweep"
ERROR_FILE = "error.json"
DENSE, PACKED = "dense", "packed"


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        row: its line of the table.
        recipe: what it did.
        report: its `report.json`.
        sparsity: "dense", the N:M of its weights, or "mixed".
        dense: the line of the model it started from; None without test speech.
        measured: on what the two were measured and how, in words.
    """

    row: ResultRow
    recipe: Recipe
    report: Mapping[str, Any]
    sparsity: str
    dense: ResultRow | None = None
    measured: str | None = None


@dataclass(frozen=True)
class Results:
    """What a sweep's directory holds.

    Attributes:
        order: every run's name, in the order of the table.
        dense: the models that the runs start from; one, unless the runs differ in model or test speech.
        finished: the finished runs.
        failed: name to error.
        unfinished: names of runs that were cut off.
    """

    order: tuple[str, ...]
    dense: tuple[ResultRow, ...]
    finished: tuple[Result, ...]
    failed: dict[str, str]
    unfinished: tuple[str, ...]

    @property
    def front(self) -> list[ResultRow]:
        """The runs that no other one beats in both bytes and WER, the smallest first."""
        return pareto_front([result.row for result in self.finished])


def sweep(runs: Sequence[Run], output: Path, *, console: Console | None = None) -> dict[str, str]:
    """Runs recipes one after another; finished ones are not run again, a failing one stops no other.

    The teacher's transcripts are made once for all runs whose recipe names no file of its own, and the
    dense model is evaluated once for all runs with the same model and test speech.

    Args:
        runs: see `grid.expand`.
        output: gets a run's directory for each (see `compress`; `error.json` where it failed), and
            `report.html`, `sweep.json`, `sweep.md`, `sweep.svg` and `sweep.png`; what else is there stays.
        console: where the runs tell what they do, and the table goes; None for none.

    Returns:
        The errors of those that failed, by name.

    Raises:
        OutputError: the directory cannot be used, or holds a run of one of these names and another
            recipe; nothing was run then.
        DataError: a damaged file of an earlier run.
        KeyboardInterrupt: Ctrl-C; the same call goes on from there.
    """
    processes = this_process()  # see `compress`
    if console is None or not processes.is_main_process:
        console = Console(quiet=True)
    _prepare(runs, output)
    names = [run.name for run in runs]
    failed: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        folder = output / run.name
        title = f"[{number}/{len(runs)}] {run.name}"
        if (folder / REPORT_FILE).is_file():
            console.print(f"{title}: finished before", markup=False)
            continue
        console.print(f"\n{title}", markup=False)
        with suppress(OSError):
            (folder / ERROR_FILE).unlink()
        try:
            compress(run.recipe, folder, console=console, shared=output, dense=_dense_for(run, runs, output))
        except Exception as error:
            failed[run.name] = _one_line(error)
            if processes.is_main_process:
                _keep_error(folder, error)
            console.print(f"{run.name} failed: {failed[run.name]}", markup=False)
            if processes.num_processes > 1:
                # The other processes may wait for this one within the run, and would for ever.
                raise
        if processes.is_main_process:
            # Whoever looks in between, or stops the sweep, finds a table of what there is.
            _write_table(collect(output, names), output)
    if processes.is_main_process:
        remake_table(output, names=names, console=console)
    return failed


def remake_table(output: Path, *, names: Sequence[str] = (), console: Console | None = None) -> Results:
    """Makes the table and the picture from what the runs left, without running anything.

    Args:
        output: a sweep's directory, or any with runs of `usmlite compress` in it.
        names: the order of the runs that no earlier table has; the others among these come by name.
        console: where the table goes; None for none.

    Raises:
        DataError: there is no run, or a damaged file.
        OutputError: the directory cannot be written.
    """
    console = console or Console(quiet=True)
    found = collect(output, names)
    if not found.order:
        raise DataError(
            "there is no run",
            where=output,
            expected=f"directories with {RECIPE_FILE}",
            remedy="Name the --out of a sweep.",
        )
    pictures = _draw(found, output, console)
    _write_table(found, output, pictures)
    rows = (*found.dense, *(result.row for result in found.finished))
    console.print(tables.comparison_table(map(ComparisonRow.of_result, rows)))
    for line in _remarks(found):
        console.print(line, markup=False)
    written = ", ".join([TABLE_FILE, JSON_FILE, *pictures])
    console.print(f"In {output}: {written}", markup=False)
    if found.finished:
        tell_page(output, [output / result.row.name for result in found.finished], console)
    return found


def collect(output: Path, names: Sequence[str] = ()) -> Results:
    """Reads what the runs in a directory left; see `remake_table`."""
    there = {path.parent.name for file in (RECIPE_FILE, ERROR_FILE) for path in output.glob(f"*/{file}")}
    earlier = _earlier_order(output / JSON_FILE)
    order = [name for name in dict.fromkeys([*earlier, *names, *sorted(there)]) if name in there]
    finished, failed, unfinished = [], {}, []
    for name in order:
        folder = output / name
        if (folder / REPORT_FILE).is_file():
            finished.append(_result(folder))
        elif (folder / ERROR_FILE).is_file():
            failed[name] = str(_read(folder / ERROR_FILE).get("error"))
        else:
            unfinished.append(name)
    rows = [replace(result, row=replace(result.row, equal=_equal(result, finished))) for result in finished]
    return Results(tuple(order), _dense_rows(finished), tuple(rows), failed, tuple(unfinished))


def _prepare(runs: Iterable[Run], output: Path) -> None:
    """Makes the directory, and checks that what is in it fits the runs, before any of them starts."""
    if (output / RECIPE_FILE).is_file():
        raise OutputError(
            "the output is a single run", where=output, remedy="Name another directory, or the one above it."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError("cannot make the directory", where=output, found=error.strerror) from None
    collect(output)  # a damaged file is better told now than after the first run
    for run in runs:
        folder = output / run.name
        if folder.is_dir() and {path.name for path in folder.iterdir()} - {ERROR_FILE}:
            claim(folder, run.recipe)


def _measured_on(recipe: Recipe) -> tuple[object, ...]:
    """What the dense model's evaluation depends on."""
    data = recipe.data
    return (recipe.model.source, data.test or (data.dev, recipe.training.eval_utterances))


def _dense_for(run: Run, runs: Iterable[Run], output: Path) -> Evaluation | None:
    """The dense model's evaluation, if a finished run holds the one that this run would make."""
    for other in runs:
        path = output / other.name / DENSE_FILE
        if _measured_on(other.recipe) == _measured_on(run.recipe) and path.is_file():
            return Evaluation.from_json(_read(path), where=str(path))
    return None


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, UsmliteError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _keep_error(folder: Path, error: Exception) -> None:
    kept: dict[str, Any] = {"error": _one_line(error)}
    if not isinstance(error, UsmliteError):
        kept["traceback"] = traceback.format_exception(error)
    # Where the directory cannot be written, that is the error, and it has been said.
    with suppress(OSError, OutputError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ERROR_FILE, kept)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("not a readable JSON file", where=path, found=str(error)) from None
    if not isinstance(found, dict):
        raise DataError("not a JSON object", where=path, found=type(found).__name__)
    return found


def _earlier_order(path: Path) -> list[str]:
    if not path.is_file():
        return []
    order = _read(path).get("order")
    return [str(name) for name in order] if isinstance(order, list) else []


def _result(folder: Path) -> Result:
    path = folder / REPORT_FILE
    found, recipe = _read(path), load_recipe(folder / RECIPE_FILE)
    try:
        training = found["training"] or {"steps": 0, "seconds": 0.0}
        # A run that was cut off counts the seconds of its last part, but the training's seconds of all.
        seconds = max(found["seconds"], training["seconds"])
        size = {"weights_bytes": found["packed_bytes"], "wer": None, "ci95": None}
        row = ResultRow.of(
            folder.name,
            found["float32_bytes"],
            found["evaluations"].get(PACKED, size),
            found.get("difference"),
            steps=training["steps"],
            seconds=seconds,
        )
        dense, measured = found["evaluations"].get(DENSE), None
        if dense is not None:
            measured = tables.measured_line(
                dense, found["machine"], corpus=_corpus(recipe), precision="float32"
            )
            dense = ResultRow.of(DENSE, found["float32_bytes"], dense)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            "not a run's report",
            where=path,
            found=f"{type(error).__name__}: {error}",
            remedy="Delete it to have the run finish again.",
        ) from error
    return Result(row, recipe, found, _sparsity(folder, recipe), dense, measured)


def _sparsity(folder: Path, recipe: Recipe) -> str:
    patterns = {str(rule.spec.sparsity) for rule in run_spec(folder, recipe).rules if rule.spec.sparsity}
    if not patterns:
        return DENSE
    return "mixed" if recipe.spec.target_size is not None or len(patterns) > 1 else patterns.pop()


def _equal(result: Result, finished: Iterable[Result]) -> str | None:
    """For a pruned model: the dense one of nearest bytes, of the same method if there is one."""
    others = [
        other
        for other in finished
        if other.sparsity == DENSE
        and other.row.wer is not None
        and _measured_on(other.recipe) == _measured_on(result.recipe)
    ]
    if result.sparsity == DENSE or not others:
        return None
    alike = [other for other in others if other.recipe.student == result.recipe.student] or others
    size = result.row.weights_bytes
    row = min((other.row for other in alike), key=lambda row: abs(math.log(row.weights_bytes / size)))
    return f"{row.name} ({row.weights_bytes / 1e6:.2f} MB): {100 * (row.wer or 0.0):.2f}"


def _dense_rows(finished: Iterable[Result]) -> tuple[ResultRow, ...]:
    rows = {_measured_on(r.recipe): (r.dense, r.recipe) for r in finished if r.dense is not None}
    if len(rows) == 1:
        return tuple(row for row, _ in rows.values())
    return tuple(
        replace(row, name=f"{DENSE} {_model(recipe)}, {_corpus(recipe)}") for row, recipe in rows.values()
    )


def _model(recipe: Recipe) -> str:
    """The model's name, without its place on this machine."""
    source = Path(recipe.model.source)
    return source.name if source.is_absolute() or source.is_dir() else recipe.model.source


def _corpus(recipe: Recipe) -> str:
    if recipe.data.test is not None:
        return Path(recipe.data.test).name
    return f"a part of {Path(recipe.data.dev or 'dev').name}"


def _write_table(found: Results, output: Path, pictures: Sequence[str] = ()) -> None:
    front = {row.name for row in found.front}
    write_json(
        output / JSON_FILE,
        {
            "order": list(found.order),
            "dense": [asdict(row) for row in found.dense],
            "finished": [
                {
                    **asdict(result.row),
                    "size": result.report["size"],
                    "sparsity": result.sparsity,
                    "pareto": result.row.name in front,
                    "recipe": without_places(recipe_to_dict(result.recipe)),
                    "training": result.report["training"],
                    "evaluation": result.report["evaluations"].get(PACKED),
                    "difference": result.report.get("difference"),
                    "machine": result.report.get("machine"),
                    "versions": result.report.get("versions"),
                }
                for result in found.finished
            ],
            "failed": found.failed,
            "unfinished": list(found.unfinished),
        },
    )
    lines = [tables.markdown_table([*found.dense, *(result.row for result in found.finished)]), ""]
    for text in dict.fromkeys(result.measured for result in found.finished):
        lines += [text, ""] if text else []
    for line in _remarks(found):
        lines += [line, ""]
    if pictures:
        lines += [f"![WER against bytes]({pictures[0]})", ""]
    write_bytes(output / TABLE_FILE, "\n".join(lines).encode())


def _remarks(found: Results) -> list[str]:
    """What stands below the table."""
    lines = []
    if found.front:
        lines.append(f"Pareto front, from the smallest: {', '.join(row.name for row in found.front)}.")
    if found.unfinished:
        lines.append(f"Not finished: {', '.join(found.unfinished)}.")
    return lines + [f"Failed: {name}: {error}" for name, error in found.failed.items()]


def _draw(found: Results, output: Path, console: Console) -> list[str]:
    """Draws the picture if it can be drawn; the files' names."""
    if not found.front:
        console.print("No picture: no WER was measured. Name speech with text as --test or --dev.")
        return []
    names = [result.row.name for result in found.finished]
    pictures = [f for f in read_report([output / name for name in names]).figures() if f.key == "wer-bytes"]
    try:
        return write_figures([replace(figure, key=PICTURE) for figure in pictures], output)
    except ReportError as error:
        console.print(f"No picture: {error}", markup=False)
        return []
