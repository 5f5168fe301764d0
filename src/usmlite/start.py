"""The student where training starts: calibrated on some of the training speech."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn

from usmlite import finetune as training
from usmlite import student as students
from usmlite.atomic import write_json
from usmlite.audio import SAMPLE_RATE, WINDOW_SECONDS
from usmlite.calibrate import calibrate
from usmlite.checkpoint import CheckpointFolder
from usmlite.errors import SpecError
from usmlite.load import CALIBRATION_FILE, student_options
from usmlite.models import Options, Teacher, TimedText
from usmlite.progress import stage_bar
from usmlite.recipe import Recipe
from usmlite.spec import CompressionSpec
from usmlite.speech import Speech

# Windows that the teacher decodes side by side for calibration, and those of a batch of it.
_DECODED, _CALIBRATION_BATCH = 16, 4


def start_student(
    recipe: Recipe, spec: CompressionSpec, teacher: Teacher, speech: Speech, output: Path, console: Console
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The student at its starting point, or as shaped for a checkpoint that will replace it."""
    adapter = teacher.adapter
    resumed = CheckpointFolder(output / "checkpoints").newest() is not None
    student = students.make_student(
        teacher.model,
        adapter.compressible(teacher.model),
        spec,
        student_options(recipe),
        computed=adapter.computed(teacher.model),
        octaves=adapter.octaves(),
        start=not resumed,
    )
    if resumed or recipe.student.start == "magnitude" or not students.layer_specs(student):
        return student, None
    windows = calibration_batches(recipe, teacher, speech)
    with stage_bar(console, "Starting point", len(students.layer_specs(student))) as progress:
        found = calibrate(
            student,
            teacher.model,
            windows,
            network=adapter.network,
            method=recipe.student.start,  # type: ignore[arg-type]
            autocast=calibration_autocast(recipe),
            progress=lambda stage, done, total: progress(done, total or done),
        )
    if PartialState().is_main_process:
        write_json(output / CALIBRATION_FILE, found.to_dict())
    return student, found.to_dict()


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
