"""The whole flow on one page: recipe in, packed model and report out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from usmlite import finetune as training
from usmlite import student as students
from usmlite import tables
from usmlite.atomic import write_bytes, write_json
from usmlite.checkpoint import load_student, save_student
from usmlite.data import Utterance
from usmlite.errors import OutputError, RecipeError, UsmliteError
from usmlite.evaluate import Evaluation, compare, describe_machine, describe_versions, evaluate
from usmlite.fill import start_full
from usmlite.histograms import weight_histograms
from usmlite.load import (
    DENSE_FILE,
    HISTOGRAMS_FILE,
    PACKED_FOLDER,
    PAGE_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    dense_recognizer,
    load,
    student_options,
)
from usmlite.memory import PeakMemory
from usmlite.models import Adapter, Teacher, load_teacher
from usmlite.pack import pack
from usmlite.packed import arithmetic
from usmlite.packfile import WEIGHTS_NAME
from usmlite.processes import this_process
from usmlite.progress import stage_bar, training_bar
from usmlite.recipe import Recipe, load_recipe, recipe_to_dict, recipe_to_toml
from usmlite.report import read_report
from usmlite.runtime import Recognizer
from usmlite.spec import CompressionSpec
from usmlite.speech import Speech
from usmlite.start import check_trellis
from usmlite.streamed import DenseFiles, pack_streamed
from usmlite.target_size import choose_spec, expected_bytes, weight_kinds
from usmlite.targets import as_written, check_letters, training_targets
from usmlite.validation import dev_wer

# Rules that the plan shows one by one.
_MOST_RULES = 12


def compress(
    recipe: Recipe,
    output: Path,
    *,
    console: Console | None = None,
    shared: Path | None = None,
    dense: Evaluation | None = None,
) -> dict[str, Any]:
    """Compresses a model by fine-tuning; resumes where an earlier call with the same recipe stopped.

    Args:
        recipe: see `recipe.Recipe`.
        output: the run's directory; gets `packed/` (what ships), `best/` (the student), `report.json`,
            `report.html`, `recipe.toml`, `train.jsonl` and, while it lasts, `checkpoints/`.
        console: where the plan, the progress and the table go; None for none.
        shared: the directory that keeps the teacher's transcripts, for runs that share them; the output if
            None. A file that the recipe names comes first.
        dense: the dense model's evaluation on the same test speech, if there is one; else it is made.

    Returns:
        The report that is also in `report.json`; nothing in processes but the first.

    Raises:
        UsmliteError: see `errors`; nothing half-written stays, and finished stages are kept.
        KeyboardInterrupt: Ctrl-C; the step at hand was finished and saved.
    """
    if recipe.ctc is not None:
        raise RecipeError(
            "a recipe for a dense CTC model",
            where="ctc",
            remedy="Give it to `usmlite ctc`, and the model that comes out to `usmlite compress`.",
        )
    processes = this_process()  # more than one under `accelerate launch`; the first one talks and writes
    if console is None or not processes.is_main_process:
        console = Console(quiet=True)
    started = time.perf_counter()
    if recipe.model.streamed:
        return compress_streamed(recipe, output, console)
    with processes.main_process_first():
        claim(output, recipe)
    teacher = load_teacher(recipe.model.source)
    check_decoder(recipe, teacher.adapter)
    teacher.adapter.centre(teacher.model)
    speech = Speech.load(recipe, shortest=teacher.adapter.shortest)
    if recipe.training.steps and recipe.data.targets == "text":
        check_letters(as_written(speech.train, teacher.adapter), teacher.adapter)  # not after an hour's work
    with processes.main_process_first():
        spec = choose_spec(recipe, teacher, speech, output, console, shared=shared)
    check_trellis(recipe, spec, weight_kinds(teacher))
    console.print(plan(recipe, spec, teacher, speech), markup=False)

    start = start_full(recipe, spec, teacher, speech, output, console)
    student = start.student
    outcome: training.Outcome | None = None
    if recipe.training.steps:
        with processes.main_process_first():
            targets, left_out = training_targets(recipe, teacher, speech, shared or output, console)
        if left_out:
            console.print(f"{left_out} utterances left out: the teacher got them wrong.")
        with training_bar(console, recipe.training.steps) as tell:
            outcome = training.finetune(
                student,
                teacher.model,
                teacher.adapter,
                targets,
                recipe,
                output,
                dev_wer=dev_wer(recipe, teacher, speech.dev_part) if speech.dev_part else None,
                tell=tell,
            )
    if not processes.is_main_process:
        return {}
    if outcome is not None:
        load_student(output / "best", student)
    else:
        students.round_kept(student)
        save_student(output / "best", student, None, {"step": 0, "dev_wer": None})
    pack(student.eval().cpu(), teacher.adapter, output / PACKED_FOLDER, coded=recipe.spec.entropy_coding)
    write_json(output / HISTOGRAMS_FILE, weight_histograms(student, teacher.model))

    evaluations = []
    if speech.test:
        if dense is None:
            dense = measure(dense_recognizer(teacher), speech.test, output, console)
        else:
            write_json(output / DENSE_FILE, dense.to_json())
        evaluations = [dense, measure(load(output / PACKED_FOLDER), speech.test, output, console)]
    size = (output / PACKED_FOLDER / WEIGHTS_NAME).stat().st_size
    result = make_report(recipe, teacher, outcome, start.to_dict(), evaluations, size)
    result["data"] = speech.describe()
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output / REPORT_FILE, result)
    show(result, evaluations, teacher, console)
    tell_page(output, [output], console)
    return result


def compress_streamed(recipe: Recipe, output: Path, console: Console) -> dict[str, Any]:
    """Packs a model weight by weight, without the dense one in memory; see `streamed`.

    Raises:
        RecipeError: the recipe asks for what needs the whole model.
        ModelError: the source is no directory of Transformers, or of a family that must be loaded whole.
    """
    started, memory, data = time.perf_counter(), PeakMemory(), recipe.data
    demands = {
        "training.steps": recipe.training.steps > 0,
        "student.start": recipe.student.start != "magnitude",
        "spec.target_size": recipe.spec.target_size is not None,
        "data": any((data.train, data.dev, data.test)),
    }
    for place, demanded in demands.items():
        if demanded:
            raise RecipeError(
                "needs the whole model in memory", where=place, expected="nothing that runs the model",
                found="model.streamed",
                remedy="Give --no-finetune --start magnitude and no speech, or leave out --streamed; "
                "'usmlite evaluate' measures the packed model.",
            )  # fmt: skip
    files = DenseFiles(Path(recipe.model.source).expanduser())
    claim(output, recipe)
    source = Teacher(cast(Any, files.model), files.adapter, recipe.model.source, files.float32_bytes)
    with stage_bar(console, "Packing", 1) as progress:
        pack_streamed(
            files, recipe.spec.build(), student_options(recipe), output / PACKED_FOLDER,
            coded=recipe.spec.entropy_coding, progress=progress,
        )  # fmt: skip
    size = (output / PACKED_FOLDER / WEIGHTS_NAME).stat().st_size
    result = make_report(recipe, source, None, None, [], size)
    result["data"], result["seconds"] = {}, round(time.perf_counter() - started, 1)
    result["peak_memory_bytes"] = memory.read()[0]
    write_json(output / REPORT_FILE, result)
    show(result, [], source, console)
    return result


def claim(output: Path, recipe: Recipe) -> None:
    """Makes the output directory ours, or checks that it holds a run of this very recipe.

    Raises:
        OutputError: it holds something else, or a run of another recipe, or cannot be written.
    """
    marker = output / RECIPE_FILE
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())) and not marker.is_file():
            raise OutputError(
                "the output exists and is not a run of usmlite",
                where=output,
                expected=f"a new or empty directory, or one with {RECIPE_FILE}",
                remedy="Name another directory.",
            )
        if marker.is_file():
            old, new = recipe_to_dict(load_recipe(marker)), recipe_to_dict(recipe)
            differing = [
                f"{section}.{key}: {old[section].get(key)!r} there, {new[section].get(key)!r} now"
                for section in new
                for key in sorted(old[section].keys() | new[section].keys())
                if old[section].get(key) != new[section].get(key)
            ]
            if differing:
                raise OutputError(
                    "the output holds a run of another recipe",
                    where=output,
                    found="; ".join(differing),
                    remedy="Name another directory, or repeat the old recipe to resume that run.",
                )
            return
        output.mkdir(parents=True, exist_ok=True)
        write_bytes(marker, recipe_to_toml(recipe).encode())
    except OSError as error:
        raise OutputError("cannot use the output directory", where=output, found=error.strerror) from None


def check_decoder(recipe: Recipe, adapter: Adapter) -> None:
    """Refuses settings that speak of a decoder where the model has none.

    Raises:
        RecipeError: there is such a setting.
    """
    settings = {"data.swapped": recipe.data.swapped, "training.attention": recipe.training.ever("attention")}
    for name, value in settings.items():
        if value and not adapter.has_decoder:
            raise RecipeError(
                "the model has no decoder", where=name, expected="0", found=value,
                remedy="Leave it out: it is for decoders that look at the speech.",
            )  # fmt: skip


def plan(recipe: Recipe, spec: CompressionSpec, teacher: Teacher, speech: Speech) -> str:
    """What is about to happen, in words."""
    size, hours = expected_bytes(spec, teacher), sum(u.duration for u in speech.train) / 3600
    steps, batch = recipe.training.steps, recipe.training.batch_size * recipe.training.accumulate
    lines = [
        f"Model     {teacher.source}: {teacher.float32_bytes / 1e6:.1f} MB in float32",
        *_rule_lines(spec),
        f"Packed    about {size / 1e6:.2f} MB, {100 * size / teacher.float32_bytes:.2f} % of float32"
        + (", before entropy coding" if recipe.spec.entropy_coding else ""),
        f"Speech    {len(speech.train)} utterances, {hours:.2f} h"
        + (
            f" ({speech.unusable} longer than 30 s or shorter than a frame left out)"
            if speech.unusable
            else ""
        ),
        f"Start     {recipe.student.start}",
    ]
    if steps:
        epochs = steps * batch * 30 / max(1.0, 3600 * hours)
        lines.append(
            f"Training  {steps} steps of {batch} windows of 30 s, about {epochs:.1f} times the speech;"
        )
        lines.append("          the time it takes is shown after the first steps")
    else:
        lines.append("Training  none")
    return "\n".join(lines)


def _rule_lines(spec: CompressionSpec) -> list[str]:
    named = [rule for rule in spec.rules if "*" not in rule.match]
    # One for each weight, as an allocation makes them, has just been shown as a table.
    shown = spec.rules if len(named) <= _MOST_RULES else [rule for rule in spec.rules if rule not in named]
    lines = [] if shown is spec.rules else [f"Spec      {len(named)} weights by name, each its own"]
    return lines + [f"Spec      {rule.kind or 'weights'}: {rule.spec} ({rule.match})" for rule in shown]


def measure(
    recognizer: Recognizer, utterances: Sequence[Utterance], output: Path, console: Console
) -> Evaluation:
    """Evaluates a model and keeps the result in the run's directory."""
    with stage_bar(console, f"Evaluating {recognizer.kind}", len(utterances)) as progress:
        found = evaluate(
            recognizer.transcribe_batch,
            utterances,
            name=recognizer.kind,
            weights_bytes=recognizer.weights_bytes,
            arithmetic=arithmetic(recognizer.model),
            progress=progress,
        )
    write_json(output / f"evaluation-{recognizer.kind}.json", found.to_json())
    return found


def make_report(
    recipe: Recipe,
    teacher: Teacher,
    outcome: training.Outcome | None,
    calibration: Mapping[str, Any] | None,
    evaluations: Sequence[Evaluation],
    size: int,
) -> dict[str, Any]:
    """Everything about the run, as `report.json` holds it; `size` is that of the weights' file in bytes."""
    result: dict[str, Any] = {
        "recipe": recipe_to_dict(recipe),
        "model": teacher.source,
        "float32_bytes": teacher.float32_bytes,
        "packed_bytes": size,
        "size": size / teacher.float32_bytes,
        "training": None if outcome is None else vars(outcome),
        "calibration_seconds": None if calibration is None else calibration.get("seconds"),
        "evaluations": {found.name: _summary(found) for found in evaluations},
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    if len(evaluations) == 2:
        dense, packed = evaluations
        result["difference"] = compare(packed, dense).to_json()
    return result


def _summary(found: Evaluation) -> dict[str, Any]:
    whole = found.to_json()
    kept = {key: value for key, value in whole.items() if key not in ("utterances", "machine", "versions")}
    return {**kept, "arithmetic": found.machine.get("arithmetic")}


def show(
    result: Mapping[str, Any], evaluations: Sequence[Evaluation], teacher: Teacher, console: Console
) -> None:
    """The table at the end."""
    rows = [tables.ComparisonRow.of(found, teacher.float32_bytes) for found in evaluations]
    if not rows:
        rows = [tables.ComparisonRow("packed", result["packed_bytes"], teacher.float32_bytes)]
    console.print(tables.comparison_table(rows))
    if len(evaluations) == 2:
        console.print(tables.difference_line(compare(evaluations[1], evaluations[0])))


def tell_page(output: Path, runs: Sequence[Path], console: Console) -> None:
    """Writes the report of some runs to a directory, and says where it is. Nothing else depends on it."""
    page = output / PAGE_FILE
    try:
        with console.status("Writing the report"):
            read_report(runs).write_page(page)
    except UsmliteError as error:
        console.print(f"No {PAGE_FILE}: {error}", markup=False)
    else:
        console.print(f"Report: {page}", markup=False)
