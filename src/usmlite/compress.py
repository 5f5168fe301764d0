"""The whole flow on one page: recipe in, packed model and report out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import tomli_w
import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from usmlite import finetune as training
from usmlite import student as students
from usmlite import tables
from usmlite.allocate import CANDIDATES, Allocation, allocate, choose, read_weights
from usmlite.atomic import write_bytes, write_json
from usmlite.audio import SAMPLE_RATE, WINDOW_SECONDS
from usmlite.calibrate import calibrate
from usmlite.checkpoint import CheckpointFolder, load_student, save_student
from usmlite.data import Utterance, describe_corpus, load_corpus, usable_for_training
from usmlite.errors import DataError, OutputError, RecipeError, SpecError, UsmliteError
from usmlite.evaluate import Evaluation, compare, describe_machine, describe_versions, evaluate
from usmlite.histograms import weight_histograms
from usmlite.load import (
    ALLOCATION_FILE,
    CALIBRATION_FILE,
    DENSE_FILE,
    HISTOGRAMS_FILE,
    PACKED_FOLDER,
    PAGE_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SPEC_FILE,
    dense_recognizer,
    load,
    run_spec,
    student_options,
)
from usmlite.memory import PeakMemory
from usmlite.mixture import learn_allocation
from usmlite.models import Adapter, Options, Teacher, TimedText, load_teacher
from usmlite.pack import pack
from usmlite.packed import arithmetic
from usmlite.packfile import WEIGHTS_NAME
from usmlite.recipe import Recipe, load_recipe, recipe_to_dict, recipe_to_toml
from usmlite.report import read_report
from usmlite.runtime import Recognizer
from usmlite.spec import KEEP, CompressionSpec, LayerSpec, Rule, matrix_shape
from usmlite.streamed import DenseFiles, pack_streamed
from usmlite.transcripts import transcribe_corpus, with_targets

MIXTURE_FILE = "allocation-mixture.json"
# What a stored tensor takes in the header of the packed file, and into how many a weight is cut; about.
_HEADER_BYTES, _PARTS = 140, 3
# Utterances that are named where some are left out.
_MOST_NAMED = 10
# Rules that the plan shows one by one.
_MOST_RULES = 12
# Windows that the teacher decodes side by side for calibration, and those of a batch of it.
_DECODED, _CALIBRATION_BATCH = 16, 4


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
    processes = PartialState()  # more than one under `accelerate launch`; the first one talks and writes
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
    check_trellis(recipe, spec, _kinds(teacher))
    console.print(plan(recipe, spec, teacher, speech), markup=False)

    student, calibration = start_student(recipe, spec, teacher, speech, output, console)
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
    result = make_report(recipe, teacher, outcome, calibration, evaluations, size)
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
    with _bar(console, "Packing", 1) as progress:
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


class Speech:
    """The corpora of a run.

    Attributes:
        train: utterances that fit a training window.
        unusable: how many were longer than that, or shorter than a frame of the model.
        dev_part: the part of dev that checkpoints are chosen on; empty without dev.
        test: what the final table is measured on: test, else the part of dev; empty without both.
        calibration: the batches that `calibration_batches` made, None before.
    """

    calibration: list[dict[str, Tensor]] | None = None

    def __init__(
        self, train: list[Utterance], unusable: int, dev_part: list[Utterance], test: list[Utterance]
    ):
        self.train, self.unusable, self.dev_part, self.test = train, unusable, dev_part, test

    @classmethod
    def load(cls, recipe: Recipe, *, shortest: float = 0.0) -> Speech:
        """Reads the manifests and checks that what the recipe needs is there.

        Args:
            recipe: see `recipe.DataRecipe`.
            shortest: seconds that an utterance must last to be trained on.

        Raises:
            RecipeError: no training speech although the recipe needs some.
            DataError: a corpus is wrong.
        """
        data = recipe.data
        needs = recipe.training.steps > 0 or recipe.student.start != "magnitude"
        if needs and data.train is None:
            raise RecipeError(
                "no speech to work with",
                where="data.train (--data)",
                remedy="Name a manifest, a LibriSpeech directory or a folder of audio; or give "
                "--no-finetune --start magnitude, which needs none.",
            )
        everything = load_corpus(data.train, require_text=data.targets == "text") if data.train else []
        short_enough, _ = usable_for_training(everything)
        train = [utterance for utterance in short_enough if utterance.duration >= shortest]
        unusable = len(everything) - len(train)
        if needs and not train:
            raise RecipeError(
                "no usable speech",
                where=f"data.train: {data.train}",
                expected=f"utterances of {shortest:g} to 30 s",
                found=f"{unusable} longer or shorter ones",
                remedy="Cut long ones at pauses.",
            )
        dev = load_corpus(data.dev, require_text=True) if data.dev else []
        dev_part = spread_out(dev, recipe.training.eval_utterances)
        test = load_corpus(data.test, require_text=True) if data.test else dev_part
        return cls(train, unusable, dev_part, test)

    def describe(self) -> dict[str, Any]:
        """How much speech there was of each kind, and its checksum; see `data.describe_corpus`."""
        parts = {"train": self.train, "dev": self.dev_part, "test": self.test}
        return {name: describe_corpus(part) for name, part in parts.items() if part}


def spread_out(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """`count` utterances at even distances in the order of their ids, so that all speakers are in."""
    ordered = sorted(utterances, key=lambda u: u.id)
    if len(ordered) <= count:
        return ordered
    return [ordered[i * len(ordered) // count] for i in range(count)]


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
        if _is_trained(recipe, kind):
            raise SpecError(
                "a trained weight cannot follow a trellis", where=name,
                expected="rounding one by one, or no fine-tuning", found=str(layer),
                remedy="Leave trellis out of its rule, or compress with --no-finetune.",
            )  # fmt: skip


def _is_trained(recipe: Recipe, kind: str) -> bool:
    still = kind == "embedding" and not recipe.training.ever("embedding_learning_rate")
    return recipe.training.steps > 0 and not still


def _candidates(recipe: Recipe) -> Callable[[str], Sequence[LayerSpec]]:
    """What a target size chooses from, by the kind of a weight."""
    spec = recipe.spec
    if not spec.entropy_coding:
        return CANDIDATES["integer"]
    if spec.candidates != "trellis":
        return CANDIDATES[spec.candidates]
    if recipe.student.start != "hessian":
        return CANDIDATES["rate"]
    return lambda kind: CANDIDATES["rate" if _is_trained(recipe, kind) else "trellis"](kind)


def _kinds(teacher: Teacher) -> dict[str, str]:
    """The kinds of all weights that can be compressed, by module."""
    return {n.removesuffix(".weight"): k for n, k in teacher.adapter.compressible(teacher.model).items()}


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
    kinds = {name: kind for name, kind in _kinds(teacher).items() if kind != "positions"}
    kinds = {name: kind for name, kind in kinds.items() if not any(r.covers(name, kind) for r in fixed)}
    base = recipe.spec.build()
    shapes = {name: cast(Tensor, teacher.model.get_submodule(name).weight).shape for name in kinds}
    chosen_here = sum(base.resolve(n, k).bytes(*matrix_shape(shapes[n])) for n, k in kinds.items())
    tensors = _PARTS * len(kinds) + len(list(teacher.model.parameters()))
    rest = expected_bytes(base, teacher) - chosen_here + _HEADER_BYTES * tensors
    budget = target - rest
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
    rules = [*recipe.spec.rules, *(rule.to_dict() for rule in found.rules())]
    # Last, because its presence says that the choice is made.
    write_bytes(output / SPEC_FILE, tomli_w.dumps({"spec": {"rules": rules}}).encode())
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
                bars[stage] = stack.enter_context(_bar(console, f"Measuring {stage}", total))
            bars[stage](done, total)

        return allocate(
            teacher.model,
            kinds,
            calibration_batches(recipe, teacher, speech),
            budget,
            network=teacher.adapter.network,
            candidates=_candidates(recipe),
            coded=recipe.spec.entropy_coding,
            octaves=teacher.adapter.octaves(),
            autocast=_calibration_autocast(recipe),
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
    device, steps = PartialState().device, recipe.spec.allocation_steps
    precision = training.autocast_precision(recipe.training.precision, device)

    def batch(step: int) -> dict[str, Tensor]:
        rows = [windows[step * count + number] for number in range(count)]
        return training.make_batch(rows, teacher.adapter, recipe, device, step)

    with _bar(console, "Learning allocation", steps) as progress:
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


def _calibration_autocast(recipe: Recipe) -> torch.dtype | None:
    precision = training.autocast_precision(recipe.training.precision, torch.device("cpu"))
    return torch.bfloat16 if precision == "bf16" else None


def expected_bytes(spec: CompressionSpec, teacher: Teacher) -> int:
    """Bytes of the packed tensors, before the file's header."""
    kinds = _kinds(teacher)
    computed = teacher.adapter.computed(teacher.model)
    total = 0
    for name, parameter in teacher.model.named_parameters():
        if name in computed:
            continue
        module = name.removesuffix(".weight")
        layer = spec.resolve(module, kinds[module]) if module in kinds else KEEP
        total += 2 * parameter.numel() if layer.is_kept else layer.bytes(*matrix_shape(parameter.shape))
    return total


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


def training_targets(
    recipe: Recipe, teacher: Teacher, speech: Speech, folder: Path, console: Console
) -> tuple[list[Utterance], int]:
    """The training utterances with the texts the student shall learn, and how many were left out.

    The teacher's transcripts are kept in `folder`, unless the recipe names a file.
    """
    if recipe.data.targets == "text":
        return learnable(as_written(speech.train, teacher.adapter), teacher.adapter, console), 0
    path = Path(recipe.data.transcripts) if recipe.data.transcripts else folder / "transcripts.jsonl"
    with _bar(console, "Teacher transcribes", len(speech.train)) as progress:
        texts = transcribe_corpus(
            quick_recognizer(teacher.model, teacher, recipe), speech.train, path, progress=progress
        )
    targets, left_out = with_targets(speech.train, texts, max_wer=recipe.data.max_wer)
    if not targets:
        raise DataError(
            "the teacher got every utterance wrong",
            where="data.train",
            expected=f"transcripts within a WER of {recipe.data.max_wer:g} of the corpus text, and not empty",
            remedy="Check that model and texts are of one language, or train on the corpus text "
            "(--targets text).",
        )
    return learnable(targets, teacher.adapter, console), left_out


def as_written(utterances: Sequence[Utterance], adapter: Adapter) -> list[Utterance]:
    """The utterances with their texts as the model's family writes."""
    return [replace(u, text=adapter.written(u.text or "")) for u in utterances]


def check_letters(utterances: Sequence[Utterance], adapter: Adapter) -> None:
    """Refuses texts that the model cannot write.

    Raises:
        DataError: texts have letters that the tokenizer lacks.
    """
    lacking = adapter.unwritable("".join(utterance.text or "" for utterance in utterances))
    if lacking:
        example = next(u.id for u in utterances if any(letter in (u.text or "") for letter in lacking))
        raise DataError(
            "the tokenizer lacks letters of the transcripts",
            where=f"data.train: {example} and perhaps others",
            expected="letters of the model's vocabulary",
            found=" ".join(lacking),
            remedy="Write numbers out and correct such letters, or train on the teacher's own transcripts "
            "(--targets teacher).",
        )


def learnable(utterances: Sequence[Utterance], adapter: Adapter, console: Console) -> list[Utterance]:
    """The utterances whose texts (as written) the model can learn; says which ones are too long.

    Raises:
        DataError: texts have letters that the tokenizer lacks, or none can be learned.
    """
    check_letters(utterances, adapter)
    kept = [u for u in utterances if adapter.fits(u.text or "", u.duration)]
    if len(kept) < len(utterances):
        fitting = {u.id for u in kept}
        long = [u.id for u in utterances if u.id not in fitting]
        named = ", ".join(long[:_MOST_NAMED]) + (" ..." if len(long) > _MOST_NAMED else "")
        console.print(
            f"{len(long)} utterances left out: their texts are too long for their audio or the model: "
            f"{named}",
            markup=False,
        )
        if not kept:
            raise DataError(
                "no text is short enough for its audio", where="data.train", found=named,
                remedy="Check that the texts are those of the audio.",
            )  # fmt: skip
    return kept


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
    with _bar(console, "Starting point", len(students.layer_specs(student))) as progress:
        found = calibrate(
            student,
            teacher.model,
            windows,
            network=adapter.network,
            method=recipe.student.start,  # type: ignore[arg-type]
            autocast=_calibration_autocast(recipe),
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


def measure(
    recognizer: Recognizer, utterances: Sequence[Utterance], output: Path, console: Console
) -> Evaluation:
    """Evaluates a model and keeps the result in the run's directory."""
    with _bar(console, f"Evaluating {recognizer.kind}", len(utterances)) as progress:
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


@contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)

        def progress(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield progress


@contextmanager
def training_bar(console: Console, total: int) -> Iterator[Callable[[training.Progress], None]]:
    """A bar with loss, WER and time left; lines now and then where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Training", total=total)
        told = 0
        losses: list[float] = []

        def curve(width: int = 24) -> str:
            return tables.sparkline(losses, width, ascii_only=console.options.ascii_only)

        def tell(now: training.Progress) -> None:
            nonlocal told
            losses.append(now.losses["loss"])
            wer = "" if now.dev_wer is None else f" dev WER {100 * now.dev_wer:.1f} %"
            text = f"loss {now.losses['loss']:.3f} kl {now.losses['kl']:.3f}{wer}"
            bar.update(task, completed=now.step, description=f"{curve()} {text}")
            told += 1
            left = (now.total - now.step) * now.seconds_per_step
            if told == 3:
                console.print(
                    f"{now.seconds_per_step:.1f} s a step: about {left / 60:.0f} minutes to go. "
                    "Ctrl-C saves; the same command resumes."
                )
            elif not console.is_terminal and now.step % 25 == 0:
                console.print(
                    f"step {now.step}/{now.total} {text} mask churn {now.churn:.4f} {left / 60:.1f} min left"
                )

        yield tell
    if losses:
        console.print(f"Loss {curve(48)} {losses[0]:.3f} to {losses[-1]:.3f}", markup=False)
