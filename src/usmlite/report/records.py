"""What runs left on disk, read so that a missing or damaged part never hides the rest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from usmlite.data import Utterance, load_corpus
from usmlite.errors import DataError, UsmliteError
from usmlite.evaluate import Evaluation
from usmlite.info import describe
from usmlite.load import (
    ALLOCATION_FILE,
    CALIBRATION_FILE,
    DENSE_FILE,
    EVALUATION_FILE,
    HISTOGRAMS_FILE,
    LOG_FILE,
    PACKED_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
)
from usmlite.recipe import read_tables, without_places
from usmlite.spec import CompressionSpec
from usmlite.tables import ResultRow

DENSE, PACKED = "dense", "packed"
# Files of the user's: whatever is wrong with them is said, and the rest is drawn.
_TROUBLE = (UsmliteError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_PATTERN = re.compile(r"\b\d+:\d+\b")
# A packed model is smaller by far more.
_NEARLY_ALL = 0.9

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """One tensor of a packed model.

    Attributes:
        name: as in the dense model's state dict.
        kind: "linear", "conv1d", "embedding", ...
        shape: its dense shape.
        spec: what it is stored as.
        bytes: what it takes in the file.
        dense_bytes: what it takes in float32.
        sensitivity: rise of the loss, nats a token, per unit of relative output error; None where it
            was not measured.
        error: relative output error after calibration; None where it was not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: str
    bytes: int
    dense_bytes: int
    sensitivity: float | None = None
    error: float | None = None

    @property
    def bits(self) -> float:
        """Bits in the file for each weight of the dense model."""
        return 32 * self.bytes / self.dense_bytes

    @property
    def pattern(self) -> str | None:
        """N:M; None where dense."""
        found = _PATTERN.search(self.spec)
        return found[0] if found else None


@dataclass(frozen=True)
class Record:
    """One run, or one model's measurement.

    Attributes:
        name: of its own among all records.
        source: the folder or file it was read from.
        row: its line of the table.
        measured: the test speech, told apart by its size, in words; None where nothing was measured.
        evaluation: the packed model's scores; None where only their sum, or nothing, was kept.
        dense: the scores of the dense model on the same speech, or None.
        dense_row: the dense model's line, or None.
        recipe: the run's settings without places on a machine.
        report: what `report.json` says, in the form of that version.
        log: one row for each optimizer step.
        layers: every tensor of the packed file.
        header_bytes: what the packed file takes beside them.
        histograms: of `histograms.weight_histograms`, or None.
        corpora: where the test speech was on the machine of the run.
        missing: what could not be read, in words.
    """

    name: str
    source: Path
    row: ResultRow
    measured: str | None = None
    evaluation: Evaluation | None = None
    dense: Evaluation | None = None
    dense_row: ResultRow | None = None
    recipe: Mapping[str, Mapping[str, Any]] | None = None
    report: Mapping[str, Any] | None = None
    log: tuple[Mapping[str, float], ...] = ()
    layers: tuple[Layer, ...] = ()
    header_bytes: int = 0
    histograms: Mapping[str, Any] | None = None
    corpora: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()


def read_records(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Reads runs.

    Args:
        paths: a run's directory, a directory of runs, or a JSON file of `usmlite evaluate --json` or of
            the benchmarks.

    Returns:
        The records, under names that tell them apart, and what could not be read at all, in words.
    """
    records: list[Record] = []
    unreadable: list[str] = []
    for path in dict.fromkeys(place for given in paths for place in _places(given)):
        found = attempt(unreadable, str(path), partial(_read, path))
        if found is not None:
            records.append(found)
    records = _with_dense(records)
    names = [record.name for record in records]
    for number, record in enumerate(records):
        if names.count(record.name) > 1:
            name = f"{record.source.parent.name}/{record.name}"
            taken = {other.name for other in records}
            records[number] = replace(record, name=name if name not in taken else str(record.source))
    return [replace(each, row=replace(each.row, name=each.name)) for each in records], unreadable


def attempt(missing: list[str], what: str, read: Callable[[], T]) -> T | None:
    """What `read` returns; or None, after a line about it in `missing`."""
    try:
        return read()
    except FileNotFoundError:
        missing.append(f"{what}: not there")
    except _TROUBLE as error:
        text = str(error) if isinstance(error, UsmliteError) else f"{type(error).__name__}: {error}"
        missing.append(f"{what}: {' '.join(text.split())}")
    return None


def _with_dense(records: list[Record]) -> list[Record]:
    """Measurements of dense models become what the runs on the same speech are held against."""
    dense = {record.measured: record for record in records if record.report is None and _is_dense(record.row)}
    others = [record for record in records if record not in dense.values()]
    out = []
    for record in others or records:
        model = dense.get(record.measured)
        if model is not None and model is not record and record.dense is None:
            row = replace(model.row, name=DENSE)
            record = replace(record, dense=model.evaluation, dense_row=row)
        out.append(record)
    return out


def _is_dense(row: ResultRow) -> bool:
    return row.float32_bytes is not None and row.weights_bytes > _NEARLY_ALL * row.float32_bytes


class Recordings:
    """The test speech of runs, as far as it is on this machine."""

    def __init__(self, records: Iterable[Record], corpora: Sequence[Path] = ()) -> None:
        self.missing: list[str] = []
        self._found: dict[str, Utterance] = {}
        others = [place for record in records for place in record.corpora]
        for path in dict.fromkeys((*corpora, *others)):
            found = attempt(self.missing, f"speech {path.name}", partial(_corpus, path))
            for utterance in found or ():
                self._found.setdefault(utterance.id, utterance)

    def find(self, name: str) -> Utterance | None:
        """The utterance with this id."""
        return self._found.get(name)


def _corpus(path: Path) -> list[Utterance]:
    return load_corpus(path, check_files=False)


def _places(path: Path) -> list[Path]:
    if path.is_dir() and not (path / RECIPE_FILE).is_file() and not (path / REPORT_FILE).is_file():
        inside = {found.parent for name in (RECIPE_FILE, REPORT_FILE) for found in path.glob(f"*/{name}")}
        return sorted(inside) or [path]
    return [path]


def _read(path: Path) -> Record:
    if path.is_dir():
        return _read_run(path)
    return _read_measurement(path)


def _read_run(folder: Path) -> Record:
    if not (folder / RECIPE_FILE).is_file() and not (folder / REPORT_FILE).is_file():
        raise DataError("not a run", where=folder, expected=f"{RECIPE_FILE} and {REPORT_FILE}")
    missing: list[str] = []
    recipe = attempt(missing, RECIPE_FILE, lambda: read_tables(folder / RECIPE_FILE))
    # Without it there is no line of the table; whoever asked must know that first.
    report = _object(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
    if report is None:
        raise DataError(
            "the run has not finished",
            where=folder,
            expected=REPORT_FILE,
            remedy="The command that made it goes on from where it stopped.",
        )
    record = _of_report(folder.name, folder, report, recipe)
    evaluations = {}
    if record.measured is not None:
        for name, file in ((PACKED, EVALUATION_FILE), (DENSE, DENSE_FILE)):
            evaluations[name] = attempt(missing, file, partial(_evaluation_in, folder / file))
    log: tuple[Mapping[str, float], ...] | None = ()
    if record.row.steps:
        log = attempt(missing, LOG_FILE, lambda: _log(folder / LOG_FILE, missing))
    found = attempt(missing, PACKED_FOLDER, lambda: _layers(folder, missing))
    return replace(
        record,
        evaluation=evaluations.get(PACKED),
        dense=evaluations.get(DENSE),
        log=log or (),
        layers=found[0] if found else (),
        header_bytes=found[1] if found else 0,
        histograms=attempt(missing, HISTOGRAMS_FILE, lambda: _histograms(folder / HISTOGRAMS_FILE)),
        corpora=_speech_of(recipe or {}),
        missing=tuple(missing),
    )


def _read_measurement(path: Path) -> Record:
    """A JSON file with an evaluation, alone or with the report of the run that it is of."""
    whole = _object(path)
    evaluation = _evaluation(whole.get("evaluation", whole))
    missing = ["only its measurements were given: no training curve, layers or histograms"]
    report = whole.get("run") if isinstance(whole.get("run"), dict) else None
    against = whole.get("against")
    dense = None if against is None else attempt(missing, "against", lambda: _evaluation(against))
    size = whole.get("float32_bytes")
    comparison = whole.get("comparison")
    steps = None if report is None else attempt(missing, "training", partial(_steps, report))
    recipe = (report or {}).get("recipe")
    row = ResultRow.of(
        path.stem,
        size if isinstance(size, int) and size > 0 else None,
        evaluation.to_json(),
        comparison if isinstance(comparison, dict) else None,
        steps=steps,
        seconds=_number((report or {}).get("seconds")),
    )
    dense_row = None
    if dense is not None and dense.weights_bytes > _NEARLY_ALL * (row.float32_bytes or dense.weights_bytes):
        dense_row = ResultRow.of(DENSE, row.float32_bytes, dense.to_json())
    return Record(
        path.stem,
        path,
        row,
        measured=_measured(evaluation.to_json()),
        evaluation=evaluation,
        dense=dense if dense_row is not None else None,
        dense_row=dense_row,
        recipe=without_places(recipe) if isinstance(recipe, dict) else None,
        report=report,
        missing=tuple(missing) if report is not None else (),
    )


def _of_report(
    name: str, folder: Path, report: Mapping[str, Any], recipe: Mapping[str, Any] | None
) -> Record:
    """A record with what `report.json` alone has.

    Raises:
        DataError: it lacks what the table needs.
    """
    try:
        summary = report["evaluations"].get(PACKED)
        dense = report["evaluations"].get(DENSE)
        empty = {"weights_bytes": int(report["packed_bytes"]), "wer": None, "ci95": None}
        training = report.get("training") or {}
        row = ResultRow.of(
            name,
            int(report["float32_bytes"]),
            summary or empty,
            report.get("difference"),
            steps=_steps(report),
            # A run that was cut off counts the seconds of its last part, but the training's seconds of all.
            seconds=max(float(report.get("seconds", 0.0)), float(training.get("seconds", 0.0))),
        )
        settings = recipe or report.get("recipe")
        return Record(
            name,
            folder,
            row,
            measured=_measured(summary) if summary else None,
            dense_row=ResultRow.of(DENSE, row.float32_bytes, dense) if dense else None,
            recipe=without_places(settings) if isinstance(settings, Mapping) else None,
            report=report,
        )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            "not a run's report", where=folder / REPORT_FILE, found=f"{type(error).__name__}: {error}"
        ) from error


def _steps(report: Mapping[str, Any]) -> int:
    return int((report.get("training") or {"steps": 0})["steps"])


def _measured(evaluation: Mapping[str, Any]) -> str:
    hours = float(evaluation["audio_seconds"]) / 3600
    count, words = int(evaluation["utterance_count"]), int(evaluation["reference_words"])
    return f"{count:,} utterances, {words:,} words, {hours:.2f} h"


def _speech_of(recipe: Mapping[str, Any]) -> tuple[Path, ...]:
    data = recipe.get("data")
    named = [data.get(key) for key in ("test", "dev")] if isinstance(data, dict) else []
    return tuple(Path(place) for place in named if isinstance(place, str))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number that can be drawn")
    return value


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; numbers in it are finite, so that they can be drawn."""
    found = _parsed(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise DataError("not a JSON object", where=path, found=type(found).__name__)
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _evaluation_in(path: Path) -> Evaluation:
    return _evaluation(_object(path))


def _evaluation(plain: object) -> Evaluation:
    """An evaluation whose values have the types that everything else relies on."""
    found = Evaluation.from_json(plain)
    numbers: list[object] = [
        found.wer, found.audio_seconds, found.wall_seconds, found.weights_bytes, found.reference_words,
        *(value for score in found.utterances for value in (score.errors, score.words)),
        *(score.seconds for score in found.utterances if score.seconds is not None),
        *(score.snr_db for score in found.utterances if score.snr_db is not None),
    ]  # fmt: skip
    texts: list[object] = [
        text for score in found.utterances
        for text in (score.id, score.reference, score.hypothesis, score.speaker or "")
    ]  # fmt: skip
    wrong: list[object] = [value for value in numbers if _number(value) is None]
    wrong += [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise DataError("not an evaluation", where=found.name, found=repr(wrong[0])[:60])
    return found


def _log(path: Path, missing: list[str]) -> tuple[Mapping[str, float], ...]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = {str(key): float(value) for key, value in _parsed(line).items()}
            row["step"], row["loss"] = row["step"], row["loss"]
        except (ValueError, TypeError, KeyError, AttributeError):
            missing.append(f"{LOG_FILE}: line {number} is damaged; the curve ends before it")
            break
        rows.append(row)
    return tuple(rows)


def _layers(folder: Path, missing: list[str]) -> tuple[tuple[Layer, ...], int]:
    if not (folder / PACKED_FOLDER).is_dir():
        raise FileNotFoundError(PACKED_FOLDER)
    found = describe(folder / PACKED_FOLDER, CompressionSpec(()))
    sensitivity: dict[str, float] = {}
    if (folder / ALLOCATION_FILE).is_file():
        sensitivity = attempt(missing, ALLOCATION_FILE, lambda: _sensitivities(folder)) or {}
    errors: dict[str, float] = {}
    if (folder / CALIBRATION_FILE).is_file():
        errors = attempt(missing, CALIBRATION_FILE, lambda: _errors(folder)) or {}
    layers = []
    for row in found.rows:
        count, module = 1, row.name.removesuffix(".weight")
        for size in row.shape:
            count *= size
        known = sensitivity.get(module), errors.get(module)
        dense = 4 * max(1, count)
        layers.append(Layer(row.name, row.kind, row.shape, row.spec, row.bytes, dense, *known))
    return tuple(layers), found.header_bytes


def _sensitivities(folder: Path) -> dict[str, float]:
    weights = _object(folder / ALLOCATION_FILE)["weights"]
    return {str(weight["name"]): float(weight["sensitivity"]) for weight in weights}


def _errors(folder: Path) -> dict[str, float]:
    layers = _object(folder / CALIBRATION_FILE)["layers"]
    return {str(layer["name"]): float(layer["error_after"]) for layer in layers}


def _histograms(path: Path) -> dict[str, Any]:
    found = _object(path)
    bins, reach = int(found["bins"]), float(found["reach"])
    weights = []
    for weight in found["weights"]:
        dense, packed = ([int(count) for count in weight[key]] for key in ("dense", "packed"))
        if len(dense) != bins or len(packed) != bins:
            raise DataError("a histogram of another length", where=path, expected=bins, found=len(dense))
        pruned = weight["pruned"]
        weights.append({
            "name": str(weight["name"]), "dense": dense, "packed": packed, "zero": float(weight["zero"]),
            "pruned": None if pruned is None else float(pruned),
        })  # fmt: skip
    return {"bins": bins, "reach": reach, "weights": weights}
