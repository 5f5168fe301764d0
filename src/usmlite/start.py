"""The student where training starts: calibrated on some of the training speech."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from usmlite import finetune as training
from usmlite import student as students
from usmlite.audio import SAMPLE_RATE, WINDOW_SECONDS
from usmlite.calibrate import CalibrationReport, LayerCalibration, Statistics, calibrate, collect_statistics
from usmlite.checkpoint import CheckpointFolder
from usmlite.errors import SpecError
from usmlite.load import student_options
from usmlite.models import Options, Teacher, TimedText
from usmlite.progress import stage_bar
from usmlite.recipe import Recipe
from usmlite.spec import CompressionSpec
from usmlite.speech import Speech

# Windows that the teacher decodes side by side for calibration, and those of a batch of it.
_DECODED, _CALIBRATION_BATCH = 16, 4


@dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        student: with its masks, scales and weights.
        report: what calibration did; None where there was none.
        statistics: what it knew of the dense model; None where there was none.
    """

    student: nn.Module
    report: CalibrationReport | None
    statistics: Statistics | None

    def to_dict(self) -> dict[str, Any] | None:
        """The report of the calibration as JSON holds it."""
        return None if self.report is None else self.report.to_dict()


def start_student(
    recipe: Recipe,
    spec: CompressionSpec,
    teacher: Teacher,
    speech: Speech,
    output: Path,
    console: Console,
    *,
    earlier: Start | None = None,
) -> Start:
    """The student at its starting point, or as shaped for a checkpoint that will replace it.

    Args:
        recipe: of the run.
        spec: of the student.
        teacher: the dense model.
        speech: to calibrate on.
        output: the run's directory.
        console: for the progress.
        earlier: a start of the same run with another spec; layers that are to be the same are taken from it.
    """
    adapter, options = teacher.adapter, student_options(recipe)
    resumed = CheckpointFolder(output / "checkpoints").newest() is not None
    calibrated = recipe.student.start != "magnitude"
    student = students.make_student(
        teacher.model,
        adapter.compressible(teacher.model),
        spec,
        options,
        computed=adapter.computed(teacher.model),
        octaves=adapter.octaves(),
        start=not resumed,
    )
    layers = dict(students.compressed_layers(student))
    if resumed or not calibrated or not layers:
        return Start(student, None, None)
    statistics = None if earlier is None else earlier.statistics
    known: dict[str, LayerCalibration] = {}
    if earlier is not None and earlier.report is not None:
        before = dict(students.compressed_layers(earlier.student))
        rows = {row.name: row for row in earlier.report.layers}
        for name, layer in layers.items():
            if name in before and before[name].compression.spec == layer.compression.spec:
                layer.load_state_dict(before[name].state_dict())
                layer.compression.present = before[name].compression.present
                known[name] = rows[name]
    names = [name for name in layers if name not in known]
    with stage_bar(console, "Starting point", len(names)) as progress:
        if statistics is None:
            rated = any(layer.compression.spec.rate is not None for layer in layers.values())
            statistics = collect_statistics(
                teacher.model, list(layers), calibration_batches(recipe, teacher, speech),
                network=adapter.network, felt=recipe.student.start == "hessian" and rated,
                autocast=calibration_autocast(recipe),
                progress=lambda stage, done, total: progress(done, total or done),
            )  # fmt: skip
        found = calibrate(
            student,
            teacher.model,
            statistics,
            network=adapter.network,
            method=recipe.student.start,  # type: ignore[arg-type]
            only=names,
            progress=lambda stage, done, total: progress(done, total or done),
        )
    new = known | {row.name: row for row in found.layers}
    seconds = statistics.seconds if earlier is None or earlier.report is None else earlier.report.seconds
    report = replace(
        found,
        layers=tuple(new[name] for name in layers),
        teacher_seconds=statistics.seconds,
        seconds=seconds + found.seconds,
    )
    return Start(student, report, statistics)


def calibration_batches(recipe: Recipe, teacher: Teacher, speech: Speech) -> list[dict[str, Tensor]]:
    """Windows of training speech with the teacher's own words for them, as forward inputs; made once."""
    if speech.calibration is None:
        speech.calibration = list(_calibration_batches(recipe, teacher, speech))
    return speech.calibration


def _calibration_batches(recipe: Recipe, teacher: Teacher, speech: Speech) -> Iterator[dict[str, Tensor]]:
    dataset, adapter = training.TrainingWindows(speech.train, recipe), teacher.adapter
    language = recipe.data.language
    for low in range(0, recipe.student.calibration, _DECODED):
        rows = [dataset[index] for index in range(low, min(low + _DECODED, recipe.student.calibration))]
        samples = torch.stack([row[0] for row in rows])
        seconds = [max((text.end for text in row[1]), default=0.0) for row in rows]
        if recipe.data.targets == "text":
            texts = [row[1] for row in rows]
        else:
            heard = [row[: round(end * SAMPLE_RATE)] for row, end in zip(samples, seconds, strict=True)]
            decoded = adapter.transcribe(teacher.model, heard, Options(timestamps=False, language=language))
            texts = [[TimedText(0.0, WINDOW_SECONDS, out.text)] for out in decoded]
        for first in range(0, len(rows), _CALIBRATION_BATCH):
            part = slice(first, first + _CALIBRATION_BATCH)
            written = adapter.teach(texts[part], timestamps=[False] * len(texts[part]), language=language)
            yield {**adapter.hear(samples[part], seconds[part]), **written}


def calibration_autocast(recipe: Recipe) -> torch.dtype | None:
    """The dtype that calibration may compute in; None for float32."""
    precision = training.autocast_precision(recipe.training.precision, torch.device("cpu"))
    return torch.bfloat16 if precision == "bf16" else None


def check_trellis(recipe: Recipe, spec: CompressionSpec, kinds: Mapping[str, str]) -> None:
    """Refuses codes along a trellis where they would not stay there.

    Raises:
        SpecError: of a weight that is trained, or not started by second-order rounding.
    """
    for name, kind in kinds.items():
        layer = spec.resolve(name, kind)
        if layer.trellis is None:
            continue
        if recipe.student.start != "hessian":
            raise SpecError(
                "a trellis needs second-order rounding", where=name, expected="student.start hessian",
                found=recipe.student.start, remedy="Leave trellis out, or start with hessian.",
            )  # fmt: skip
        if is_trained(recipe, kind):
            raise SpecError(
                "a trained weight cannot follow a trellis", where=name,
                expected="rounding one by one, or no fine-tuning", found=str(layer),
                remedy="Leave trellis out of its rule, or compress with --no-finetune.",
            )  # fmt: skip


def is_trained(recipe: Recipe, kind: str) -> bool:
    """Whether training changes weights of this kind."""
    still = kind == "embedding" and not recipe.training.ever("embedding_learning_rate")
    return recipe.training.steps > 0 and not still
