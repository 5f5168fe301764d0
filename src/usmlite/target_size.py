"""The spec of a run, chosen for its target size where it has one, and the bytes that come of a spec."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import tomli_w
import torch
from rich.console import Console
from torch import Tensor

from usmlite import finetune as training
from usmlite import tables
from usmlite.allocate import CANDIDATES, Allocation, allocate, choose, read_weights
from usmlite.atomic import write_bytes, write_json
from usmlite.errors import RecipeError
from usmlite.load import ALLOCATION_FILE, SPEC_FILE, run_spec
from usmlite.mixture import learn_allocation
from usmlite.models import Teacher
from usmlite.processes import this_process
from usmlite.progress import stage_bar
from usmlite.recipe import Recipe, build_recipe
from usmlite.spec import KEEP, CompressionSpec, LayerSpec, Rule, matrix_shape
from usmlite.speech import Speech
from usmlite.start import calibration_autocast, calibration_batches, is_trained
from usmlite.targets import training_targets

MIXTURE_FILE = "allocation-mixture.json"
# What a stored tensor takes in the header of the packed file, and into how many a weight is cut; about.
_HEADER_BYTES, _PARTS = 140, 3
# What training may not use of a target size.
_UNTRAINED_SHARE = 0.99


def choose_spec(
    recipe: Recipe,
    teacher: Teacher,
    speech: Speech,
    output: Path,
    console: Console,
    *,
    shared: Path | None = None,
) -> CompressionSpec:
    """The recipe's spec; with a target size, the one that was found best, kept in `spec.toml`.

    What was measured is in `allocation.json`, and taken from there if a call was cut off after it.

    Raises:
        SpecError: the target size cannot be reached.
        RecipeError: no speech to measure on.
    """
    target = recipe.spec.target_bytes(teacher.float32_bytes)
    if target is None or (output / SPEC_FILE).is_file():
        return run_spec(output, recipe)
    learned = recipe.spec.allocation == "learned"
    if not speech.train and (recipe.spec.measured is None or learned):
        raise RecipeError(
            "a target size needs speech to measure on",
            where="data.train (--data)",
            remedy="Name some speech, or give --bits and --sparsity instead of --target-size.",
        )
    fixed = [Rule.from_dict(rule) for rule in recipe.spec.rules]
    kinds = {name: kind for name, kind in weight_kinds(teacher).items() if kind != "positions"}
    kinds = {name: kind for name, kind in kinds.items() if not any(r.covers(name, kind) for r in fixed)}
    base = recipe.spec.build()
    shapes = {name: cast(Tensor, teacher.model.get_submodule(name).weight).shape for name in kinds}
    chosen_here = sum(base.resolve(n, k).bytes(*matrix_shape(shapes[n])) for n, k in kinds.items())
    tensors = _PARTS * len(kinds) + len(list(teacher.model.parameters()))
    rest = expected_bytes(base, teacher) - chosen_here + _HEADER_BYTES * tensors
    budget = aim(recipe, target) - rest
    mine = output / ALLOCATION_FILE
    earlier = recipe.spec.measured or (mine if mine.is_file() else None)
    if earlier is None:
        found = _allocate(recipe, teacher, speech, kinds, budget, console)
    else:
        found = choose(read_weights(earlier, kinds), budget)
    write_json(mine, found.to_dict())
    if learned:
        measured = found
        found = _learned(recipe, teacher, speech, measured, output, shared or output, console)
        pairs = zip(measured.weights, found.weights, strict=True)
        moved = sum(one.chosen != other.chosen for one, other in pairs)
        count = len(found.weights)
        console.print(f"Learned: another candidate than measured for {moved} of {count} weights.")
        write_json(mine, found.to_dict())
    # Last, because its presence says that the choice is made.
    write_rules(output, recipe, found)
    rows = [
        tables.LayerRow(w.name, w.shape, w.kind, str(w.choice.spec), w.choice.bytes) for w in found.weights
    ]
    console.print(tables.layer_table(rows, title="What each weight becomes"))
    console.print(
        f"Predicted KL from the dense model before fine-tuning: {found.loss:.3f} nats a word. "
        f"The choice is in {output / SPEC_FILE}; edited, it can be given as --recipe.",
        markup=False,
    )
    return run_spec(output, recipe)


def aim(recipe: Recipe, target: int) -> int:
    """The bytes that a file should have before training, so that it has at most `target` after it.

    Training moves weights and scales, and with them the frequencies of codes.
    """
    return math.floor(target * _UNTRAINED_SHARE) if recipe.training.steps else target


def write_rules(output: Path, recipe: Recipe, found: Allocation) -> None:
    """Keeps a choice in the run's `spec.toml`, after the recipe's own rules."""
    write_bytes(output / SPEC_FILE, tomli_w.dumps(_chosen(recipe, found)).encode())


def chosen_spec(recipe: Recipe, found: Allocation) -> CompressionSpec:
    """The spec of a choice, as a run whose `spec.toml` has it reads it."""
    return build_recipe(_chosen(recipe, found)).spec.build()


def _chosen(recipe: Recipe, found: Allocation) -> dict[str, Any]:
    return {"spec": {"rules": [*recipe.spec.rules, *(rule.to_dict() for rule in found.rules())]}}


def candidates(recipe: Recipe) -> Callable[[str], Sequence[LayerSpec]]:
    """What a target size chooses from, by the kind of a weight."""
    spec = recipe.spec
    if not spec.entropy_coding:
        return CANDIDATES["integer"]
    if spec.candidates != "trellis":
        return CANDIDATES[spec.candidates]
    if recipe.student.start != "hessian":
        return CANDIDATES["rate"]
    return lambda kind: CANDIDATES["rate" if is_trained(recipe, kind) else "trellis"](kind)


def _allocate(
    recipe: Recipe,
    teacher: Teacher,
    speech: Speech,
    kinds: Mapping[str, str],
    budget: int,
    console: Console,
) -> Allocation:
    bars: dict[str, Any] = {}
    with ExitStack() as stack:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                stack.close()  # one bar at a time
                bars[stage] = stack.enter_context(stage_bar(console, f"Measuring {stage}", total))
            bars[stage](done, total)

        return allocate(
            teacher.model,
            kinds,
            calibration_batches(recipe, teacher, speech),
            budget,
            network=teacher.adapter.network,
            candidates=candidates(recipe),
            coded=recipe.spec.entropy_coding,
            octaves=teacher.adapter.octaves(),
            autocast=calibration_autocast(recipe),
            progress=progress,
        )


def _learned(
    recipe: Recipe,
    teacher: Teacher,
    speech: Speech,
    measured: Allocation,
    output: Path,
    transcripts: Path,
    console: Console,
) -> Allocation:
    """The allocation that mixing the candidates of all weights leads to, on the windows of training."""
    targets, _ = training_targets(recipe, teacher, speech, transcripts, console)
    windows, count = training.TrainingWindows(targets, recipe), recipe.training.batch_size
    device, steps = this_process().device, recipe.spec.allocation_steps
    precision = training.autocast_precision(recipe.training.precision, device)

    def batch(step: int) -> dict[str, Tensor]:
        rows = [windows[step * count + number] for number in range(count)]
        return training.make_batch(rows, teacher.adapter, recipe, device, step)

    with stage_bar(console, "Learning allocation", steps) as progress:
        return learn_allocation(
            copy.deepcopy(teacher.model).to(device),
            measured,
            batch,
            steps=steps,
            seed=recipe.training.seed,
            state_file=output / MIXTURE_FILE,
            network=teacher.adapter.network,
            octaves=teacher.adapter.octaves(),
            autocast=torch.bfloat16 if precision == "bf16" else None,
            progress=progress,
        )


def expected_bytes(spec: CompressionSpec, teacher: Teacher) -> int:
    """Bytes of the packed tensors, before the file's header."""
    kinds = weight_kinds(teacher)
    computed = teacher.adapter.computed(teacher.model)
    total = 0
    for name, parameter in teacher.model.named_parameters():
        if name in computed:
            continue
        module = name.removesuffix(".weight")
        layer = spec.resolve(module, kinds[module]) if module in kinds else KEEP
        total += 2 * parameter.numel() if layer.is_kept else layer.bytes(*matrix_shape(parameter.shape))
    return total


def weight_kinds(teacher: Teacher) -> dict[str, str]:
    """The kinds of all weights that can be compressed, by module."""
    return {n.removesuffix(".weight"): k for n, k in teacher.adapter.compressible(teacher.model).items()}
