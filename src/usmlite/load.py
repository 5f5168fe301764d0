"""Any model that usmlite can run, by its path or name: dense, student or packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from usmlite import hub
from usmlite.checkpoint import load_student
from usmlite.errors import ModelError
from usmlite.kernels import Activations
from usmlite.models import Teacher, load_teacher
from usmlite.movement import take_up
from usmlite.packed import Hold, fastest_hold, load_packed
from usmlite.packfile import WEIGHTS_NAME, is_packed
from usmlite.recipe import Recipe, load_recipe
from usmlite.runtime import Recognizer
from usmlite.schedule import moving_steps
from usmlite.shipped import DEFAULT, SHIPPED, shipped
from usmlite.spec import CompressionSpec, matrix_shape
from usmlite.student import StudentOptions, dense_equivalent, layer_specs, make_student

RECIPE_FILE, PACKED_FOLDER, STUDENT_FILE = "recipe.toml", "packed", "student.safetensors"
REPORT_FILE, LOG_FILE, ALLOCATION_FILE = "report.json", "train.jsonl", "allocation.json"
CALIBRATION_FILE, HISTOGRAMS_FILE = "calibration.json", "histograms.json"
DENSE_FILE, EVALUATION_FILE = "evaluation-dense.json", "evaluation-packed.json"
PAGE_FILE = "report.html"
SPEC_FILE = "spec.toml"
"""The rules that were chosen for a target size, as a recipe of their own."""


def load(
    source: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    hold: Hold | None = None,
    activations: Activations = "int8",
) -> Recognizer:
    """Loads a model for transcription and evaluation.

    Args:
        source: the name of a model that comes with usmlite ("tiny.en-small", a packed one, the default); a
            packed model's directory; a run's directory (its packed model is taken); a student that a run
            saved (`RUN/best`, `RUN/checkpoints/step-000200`); "USER/NAME" or "USER/NAME@REVISION" on the
            hub, packed or dense; or anything else `load_teacher` takes.
        revision: the branch, tag or commit of a model on the hub, where its name does not say it.
        hold: how a packed model's weights are kept in memory: expanded to "float32", as "int8" codes, or
            "packed" as in the file (smallest). None chooses the fastest: "int8" with the native library,
            "float32" without.
        activations: what the native library multiplies "int8" and "packed" weights by: rounded to "int8",
            row by row, or as they are, in "float32", which is slower.

    Raises:
        ModelError: unknown or unsupported source.
        PackedModelError: a damaged packed model.
        TrainingError: a damaged student.
    """
    name, path = str(source), shipped(source) or Path(source)
    named = None if path.is_dir() else hub.parse(source)
    if revision is not None and (named is None or named[1] is not None):
        raise ModelError(
            "only a model on the hub has a revision, and one",
            where=name,
            expected="USER/NAME",
            found=f"revision {revision}",
        )
    if named is not None:
        repository, revision = named[0], named[1] or revision
        found = hub.fetch_packed(repository, revision)
        if found is not None:
            path = found
        elif revision is not None:
            source = hub.fetch_dense(repository, revision)
    if source in SHIPPED and not path.is_dir():
        raise ModelError(
            "this installation came without its models",
            where=source,
            remedy="Install usmlite from its wheel, from a checkout, or name a model of your own.",
        )
    if (path / RECIPE_FILE).is_file():
        if not (path / PACKED_FOLDER).is_dir():
            raise ModelError(
                "this run has not packed a model yet",
                where=path,
                expected=path / PACKED_FOLDER,
                remedy=f"Finish it with 'usmlite compress --recipe {path / RECIPE_FILE} --out {path}', "
                f"or load its best student so far from {path / 'best'}.",
            )
        path = path / PACKED_FOLDER
    if is_packed(path):
        model, adapter = load_packed(path, hold=hold or fastest_hold(), activations=activations)
        size = (path / WEIGHTS_NAME).stat().st_size
        return Recognizer(model, adapter, name=name, kind="packed", weights_bytes=size)
    if (path / STUDENT_FILE).is_file():
        return _load_student(path)
    return dense_recognizer(load_teacher(source))


def dense_recognizer(teacher: Teacher) -> Recognizer:
    """The teacher as something that transcribes."""
    return Recognizer(
        teacher.model, teacher.adapter, name=teacher.source, kind="dense", weights_bytes=teacher.float32_bytes
    )


def run_spec(run: Path, recipe: Recipe) -> CompressionSpec:
    """The spec of a run: the one that was chosen for its target size, else the recipe's."""
    chosen = run / SPEC_FILE
    return (load_recipe(chosen) if chosen.is_file() else recipe).spec.build()


def student_options(recipe: Recipe) -> StudentOptions:
    """How the recipe wants scales, masks and bits to behave."""
    wanted = recipe.student
    # Masks and bits move while the student trains: without training they are those of the start.
    if not recipe.training.steps:
        return StudentOptions(cast(Any, wanted.scales), "fixed")
    before, drawn = wanted.schedule()
    return StudentOptions(
        cast(Any, wanted.scales),
        cast(Any, wanted.masks),
        wanted.mask_every,
        wanted.mask_decay,
        before,
        drawn,
        wanted.stochastic_share,
    )


def _load_student(path: Path) -> Recognizer:
    run = next((folder for folder in path.resolve().parents if (folder / RECIPE_FILE).is_file()), None)
    if run is None:
        raise ModelError(
            "a student without its run",
            where=path,
            expected=f"{RECIPE_FILE} in a folder above it",
            remedy="Keep a run's directory together.",
        )
    recipe = load_recipe(run / RECIPE_FILE)
    teacher = load_teacher(recipe.model.source)
    adapter = teacher.adapter
    student = make_student(
        teacher.model,
        adapter.compressible(teacher.model),
        run_spec(run, recipe),
        student_options(recipe),
        computed=adapter.computed(teacher.model),
        start=False,
    )
    # A student on its way has bits of its own, which its scales are for.
    moving = moving_steps(recipe.training.steps, freeze=recipe.student.mask_freeze)
    take_up(student, int(load_student(path, student).get("step", moving)), moving)
    specs = layer_specs(student)
    computed = adapter.computed(teacher.model)
    size = 0
    for name, parameter in teacher.model.named_parameters():
        module = name.removesuffix(".weight")
        if module in specs:
            size += specs[module].bytes(*matrix_shape(parameter.shape))
        elif name not in computed:
            size += 2 * parameter.numel()
    dense = dense_equivalent(student, teacher.model)
    return Recognizer(dense, adapter, name=str(path), kind="student", weights_bytes=size)
