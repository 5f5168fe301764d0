"""The student of a target size, its spec adjusted until its packed file takes no more and hardly less.

An allocation predicts bytes from some rows of a weight, or from plain rounding. Here they are counted in
the file itself, the counts replace the predictions, and the choice is made again; only weights that become
something else are rounded anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import nn

from usmlite import student as students
from usmlite.allocate import Allocation, WeightAllocation, choose, read_allocation
from usmlite.atomic import write_json
from usmlite.checkpoint import CheckpointFolder
from usmlite.errors import SpecError
from usmlite.load import ALLOCATION_FILE, CALIBRATION_FILE, run_spec
from usmlite.models import Teacher
from usmlite.pack import pack
from usmlite.processes import this_process
from usmlite.recipe import Recipe
from usmlite.spec import CompressionSpec, LayerSpec
from usmlite.speech import Speech
from usmlite.start import Start, start_student
from usmlite.target_size import aim, chosen_spec, write_rules

# Files that are so much smaller than they might be are full.
_NEAR = 0.0005
# How often a choice is tried, and how often before what was too much is taken from the next budget.
_ROUNDS, _TRUSTING = 8, 3


def start_full(
    recipe: Recipe, spec: CompressionSpec, teacher: Teacher, speech: Speech, output: Path, console: Console
) -> Start:
    """The student at its starting point; with a target size, with the spec that makes the most of it.

    That spec replaces the one in `spec.toml`, and `allocation.json` has the bytes that were counted.

    Raises:
        SpecError: the target size cannot be reached.
    """
    target, processes = recipe.spec.target_bytes(teacher.float32_bytes), this_process()
    resumed = CheckpointFolder(output / "checkpoints").newest() is not None
    if target is None or resumed:
        start = start_student(recipe, spec, teacher, speech, output, console)
    else:
        with processes.main_process_first():
            if processes.is_main_process and not (found := read_allocation(output / ALLOCATION_FILE)).counted:
                start = _fill(recipe, found, aim(recipe, target), teacher, speech, output, console)
            else:
                spec = run_spec(output, recipe)
                start = start_student(recipe, spec, teacher, speech, output, console)
    if processes.is_main_process and start.report is not None:
        write_json(output / CALIBRATION_FILE, start.report.to_dict())
    return start


def _fill(
    recipe: Recipe,
    found: Allocation,
    most: int,
    teacher: Teacher,
    speech: Speech,
    output: Path,
    console: Console,
) -> Start:
    start: Start | None = None
    best: tuple[Allocation, Start, int] | None = None
    counted: dict[tuple[str, LayerSpec], int] = {}
    predicted, excess, least = found, 0, 0
    for number in range(_ROUNDS):
        spec = chosen_spec(recipe, found)
        start = start_student(recipe, spec, teacher, speech, output, console, earlier=start)
        layers = students.compressed_layers(start.student)
        if any(layer.compression.present != layer.compression.spec for _, layer in layers):
            return start  # bits or N:M that come with training: there is nothing to count yet
        total, sizes = _count(start.student, teacher, coded=recipe.spec.entropy_coding)
        counted |= {(weight.name, weight.choice.spec): sizes[weight.name] for weight in found.weights}
        weights = tuple(_corrected(weight, sizes[weight.name], counted) for weight in found.weights)
        found = replace(found, weights=weights, counted=True)
        if total <= most and (best is None or found.loss < best[0].loss):
            best = found, start, total
        if most * (1 - _NEAR) <= total <= most:
            break
        excess += max(0, total - most) if number >= _TRUSTING else 0
        least = min(least or total, total)
        again = choose(weights, most - (total - found.bytes) - excess)
        if again.rules() == found.rules():
            break
        found = again
    if best is None:
        raise SpecError(
            "no choice was found that keeps the target size", where="target size",
            expected=f"at most {most:,} bytes", found=f"{least:,}",
            remedy="Allow more bytes, or candidates with fewer bits.",
        )  # fmt: skip
    choice, start, total = best
    first = {weight.name: weight.choice.spec for weight in predicted.weights}
    moved = sum(weight.choice.spec != first[weight.name] for weight in choice.weights)
    console.print(
        f"Counted in the file: another choice for {moved} of {len(first)} weights. Predicted KL "
        f"{choice.loss:.3f} at {total:,} bytes of {most:,}.",
        markup=False,
    )
    write_rules(output, recipe, choice)
    # Last, because it says that the bytes were counted.
    write_json(output / ALLOCATION_FILE, choice.to_dict())
    return start


def _count(student: nn.Module, teacher: Teacher, *, coded: bool) -> tuple[int, dict[str, int]]:
    """Bytes of the packed file, and of each weight in it."""
    with tempfile.TemporaryDirectory() as folder:
        packed = pack(student, teacher.adapter, Path(folder) / "packed", coded=coded)
    return packed.weights_bytes, {name: layer.bytes for name, layer in packed.layers.items()}


def _corrected(
    weight: WeightAllocation, size: int, counted: Mapping[tuple[str, LayerSpec], int]
) -> WeightAllocation:
    """The weight with bytes as they were counted, and those of other candidates as much more or less."""
    ratio = size / weight.choice.bytes
    candidates = (
        replace(each, bytes=counted.get((weight.name, each.spec), round(each.bytes * ratio)))
        for each in weight.candidates
    )
    return replace(weight, candidates=tuple(candidates))
