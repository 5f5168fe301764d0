"""Recognition while a run is under way: fast where the device allows it, and not for the report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import nn

from usmlite import finetune as training
from usmlite import student as students
from usmlite.data import Utterance
from usmlite.evaluate import evaluate
from usmlite.models import Teacher
from usmlite.recipe import Recipe
from usmlite.runtime import Recognizer


def dev_wer(
    recipe: Recipe, teacher: Teacher, utterances: Sequence[Utterance]
) -> Callable[[nn.Module], float]:
    """Measures a student's WER on some utterances."""

    def measured(student: nn.Module) -> float:
        recognizer = quick_recognizer(students.dense_equivalent(student, teacher.model), teacher, recipe)
        return evaluate(recognizer.transcribe_batch, utterances, name="student", weights_bytes=0).wer

    return measured


def quick_recognizer(model: nn.Module, teacher: Teacher, recipe: Recipe) -> Recognizer:
    """The model in bf16 if the recipe allows it and the device is fast at it, for what is not reported."""
    device = next(model.parameters()).device
    if training.autocast_precision(recipe.training.precision, device) == "bf16":
        model = in_bfloat16(model)
    return Recognizer(model, teacher.adapter, name=teacher.source, kind="dense", weights_bytes=0)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy in bf16, but for the positions that it computes: three digits are too few for them."""
    small = copy.deepcopy(model).bfloat16()
    for module, original in zip(small.modules(), model.modules(), strict=True):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):  # its statistics must be like its input
            for name, buffer in original.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())
    return small
