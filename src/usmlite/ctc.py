"""A dense recognizer made of a pre-trained encoder: a new CTC head, and fine-tuning on speech with text.

That is what the USM-Lite paper starts from (arXiv 2312.08553, section 4). The training is the loop of
`finetune` with a spec that compresses nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import WhisperFeatureExtractor

from usmlite import finetune as training
from usmlite import student as students
from usmlite import tables
from usmlite.atomic import write_json
from usmlite.checkpoint import load_student
from usmlite.compress import claim, make_report, measure
from usmlite.data import Utterance
from usmlite.errors import ModelError, OutputError, RecipeError
from usmlite.first_head import teach_head
from usmlite.load import RECIPE_FILE, REPORT_FILE, dense_recognizer
from usmlite.models import Teacher, TimedText, WhisperAdapter, load_teacher
from usmlite.models.vocabulary import characters, labels_of, pieces, plain
from usmlite.models.whisper_ctc import WhisperForCTC
from usmlite.models.whisper_ctc_adapter import WhisperCTCAdapter
from usmlite.processes import this_process
from usmlite.progress import stage_bar, training_bar
from usmlite.recipe import Recipe
from usmlite.recipe.sections import CTCRecipe
from usmlite.speech import Speech
from usmlite.targets import as_written, learnable, training_targets
from usmlite.validation import dev_wer

TRAINING_FOLDER, START_FOLDER = "training", "start"
_FRAME = 0.02  # seconds of an encoder frame
# How much speech a new head learns from alone: more would teach a linear layer little.
_HEARD_SECONDS = 2 * 3600.0


def train_ctc(recipe: Recipe, output: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Makes a dense CTC model of a Whisper model's encoder; resumes where an earlier call stopped.

    Args:
        recipe: with a section [ctc]; `recipe.DENSE_CTC` are good settings for the others.
        output: becomes a directory of Transformers that everything takes as a model; its `training/` keeps
            the run: `recipe.toml`, `train.jsonl`, `report.json`, `start/` and `checkpoints/`.
        console: where the plan, the progress and the result go; None for none.

    Returns:
        The report that is also in `training/report.json`; nothing in processes but the first.

    Raises:
        UsmliteError: see `errors`; finished stages are kept.
        KeyboardInterrupt: Ctrl-C; the step at hand was finished and saved.
    """
    processes = this_process()
    if console is None or not processes.is_main_process:
        console = Console(quiet=True)
    settings = _check(recipe)
    run = output / TRAINING_FOLDER
    started = time.perf_counter()
    with processes.main_process_first():
        _check_output(output)
        claim(run, recipe)
    source = load_teacher(recipe.model.source)
    if not isinstance(source.adapter, WhisperAdapter):
        raise ModelError(
            "not a model whose encoder can get a head", where=recipe.model.source, expected="a Whisper model",
            found=f"family {source.adapter.family}",
            remedy="A model that has a CTC head already is fine-tuned by `usmlite compress --bits float "
            "--sparsity dense`.",
        )  # fmt: skip
    speech = Speech.load(recipe)
    with processes.main_process_first():
        targets, left_out = training_targets(recipe, source, speech, run, console)
        if left_out:
            console.print(f"{left_out} utterances left out: the teacher got them wrong.")
        start = run / START_FOLDER
        if not (start / "config.json").is_file():
            untrained = new_model(source, targets, settings, recipe.training.seed)
            if settings.head_steps:
                _teach_head(untrained, targets, recipe, settings.head_steps, console)
            save_dense(untrained, start)
    dense = load_teacher(start)
    targets = learnable(as_written(targets, dense.adapter), dense.adapter, console)
    console.print(_plan(recipe, dense, targets), markup=False)
    adapter = dense.adapter
    student = students.make_student(dense.model, adapter.compressible(dense.model), recipe.spec.build())
    with training_bar(console, recipe.training.steps) as tell:
        outcome = training.finetune(
            student, dense.model, adapter, targets, recipe, run, tell=tell,
            dev_wer=dev_wer(recipe, dense, speech.dev_part) if speech.dev_part else None,
        )  # fmt: skip
    if not processes.is_main_process:
        return {}
    load_student(run / "best", student)
    save_dense(Teacher(cast(Any, students.dense_equivalent(student, dense.model)), adapter, "", 0), output)
    return _report(recipe, output, outcome, speech, started, console)


def _check(recipe: Recipe) -> CTCRecipe:
    if recipe.ctc is None:
        raise RecipeError("the recipe has no section for a CTC model", where="recipe", expected="[ctc]")
    spec = recipe.spec.build()
    if recipe.spec.target_size is not None or any(not rule.spec.is_kept for rule in spec.rules):
        raise RecipeError(
            "a dense model is not compressed", where="spec", expected='bits = "float", sparsity = "dense"',
            remedy="Compress the model that `usmlite ctc` makes with `usmlite compress`.",
        )  # fmt: skip
    if recipe.training.kl or recipe.training.states or recipe.training.layers:
        raise RecipeError(
            "a new head has no teacher", where="training", expected="kl, states and layers of 0",
            remedy="Learn from the texts (ce = 1), or from Whisper's own (--targets teacher).",
        )  # fmt: skip
    if not recipe.training.steps:
        raise RecipeError(
            "a new head must be trained", where="training.steps", expected="at least 1", found=0
        )
    return recipe.ctc


def _check_output(output: Path) -> None:
    """Refuses a directory that holds something else.

    Raises:
        OutputError: it does.
    """
    ours = (output / TRAINING_FOLDER / RECIPE_FILE).is_file()
    if output.exists() and not ours and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(
            "the output exists and is not a run of `usmlite ctc`", where=output,
            expected="a new or empty directory", remedy="Name another directory.",
        )  # fmt: skip


def new_model(source: Teacher, utterances: Sequence[Utterance], settings: CTCRecipe, seed: int) -> Teacher:
    """The untrained model: the encoder, a new head, and a tokenizer made of the texts.

    Args:
        source: a Whisper model.
        utterances: with texts.
        settings: of the model.
        seed: of the new weights.

    Raises:
        DataError: no vocabulary can be made of the texts.
        RecipeError: the settings do not fit the encoder.
    """
    texts = [plain(utterance.text or "") for utterance in utterances]
    made = (
        characters(texts) if settings.vocabulary == "characters" else pieces(texts, settings.vocabulary_size)
    )
    torch.manual_seed(seed)
    try:
        model = WhisperForCTC.from_whisper(
            source.model,
            vocab_size=labels_of(made),
            pad_token_id=made.pad_token_id,
            dropout=settings.dropout,
            chunk_frames=round(settings.chunk / _FRAME),
            left_chunks=settings.left_chunks if settings.chunk else 0,
            time_reduction=settings.time_reduction,
            intermediate_layers=settings.layers(),
        )
    except ValueError as error:
        raise RecipeError("settings that do not fit the encoder", where="ctc", found=str(error)) from None
    extractor = cast(Any, WhisperFeatureExtractor)(
        feature_size=model.config.num_mel_bins, padding=True, return_attention_mask=True
    )
    adapter = WhisperCTCAdapter(model.config, extractor, made)
    return Teacher(model, adapter, "", 0)


def _teach_head(
    untrained: Teacher, targets: Sequence[Utterance], recipe: Recipe, steps: int, console: Console
) -> None:
    adapter = cast(WhisperCTCAdapter, untrained.adapter)
    targets = learnable(as_written(targets, adapter), adapter, Console(quiet=True))
    device = this_process().device
    bf16 = training.autocast_precision(recipe.training.precision, device) == "bf16"
    with stage_bar(console, "The new head", steps) as progress:
        teach_head(
            untrained.model.to(device), adapter, _Heard(targets, recipe),
            head=adapter.network.heads[0], steps=steps, seed=recipe.training.seed,
            autocast=torch.bfloat16 if bf16 else None, progress=progress,
        )  # fmt: skip
    untrained.model.cpu()


class _Heard:
    """The first windows of training, as `teach_head` hears them."""

    def __init__(self, targets: Sequence[Utterance], recipe: Recipe) -> None:
        self._windows = training.TrainingWindows(targets, recipe)
        seconds = [
            sum(each.duration for each in self._windows.window(i).utterances) for i in range(len(targets))
        ]
        enough = itertools.takewhile(lambda heard: heard < _HEARD_SECONDS, itertools.accumulate(seconds))
        self._count = min(len(targets), 1 + sum(1 for _ in enough))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, list[TimedText]]:
        samples, texts, _ = self._windows[index]
        return samples, texts


def save_dense(model: Teacher, output: Path) -> None:
    """Writes a model with its tokenizer and feature extractor as Transformers writes them.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        model.adapter.save_processor(output)
        cast(Any, model.model).save_pretrained(output)
    except OSError as error:
        raise OutputError("cannot write the model", where=output, found=error.strerror) from None


def _plan(recipe: Recipe, dense: Teacher, targets: Sequence[Utterance]) -> str:
    config, settings = cast(Any, dense.model.config), recipe.training
    seconds = sum(utterance.duration for utterance in targets)
    steps, batch = settings.steps, settings.batch_size * settings.accumulate
    share = steps * batch / len(targets)
    return "\n".join((
        f"Model     the encoder of {recipe.model.source} and {config.vocab_size} labels "
        f"({recipe.ctc.vocabulary if recipe.ctc else ''}): {dense.float32_bytes / 1e6:.1f} MB in float32",
        f"Speech    {len(targets)} utterances, {seconds / 3600:.2f} h",
        f"Training  {steps} steps of {batch} utterances, about {share:.1f} times the speech;",
        "          the time it takes is shown after the first steps",
    ))  # fmt: skip


def _report(
    recipe: Recipe, output: Path, outcome: training.Outcome, speech: Speech, started: float, console: Console
) -> dict[str, Any]:
    dense, run = load_teacher(output), output / TRAINING_FOLDER
    found = []
    if speech.test:
        found = [measure(dense_recognizer(dense), speech.test, run, console)]
    result = make_report(recipe, dense, outcome, None, found, (output / "model.safetensors").stat().st_size)
    result["data"] = speech.describe()
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_json(run / REPORT_FILE, result)
    if found:
        rows = [tables.ComparisonRow.of(each, dense.float32_bytes) for each in found]
        console.print(tables.comparison_table(rows))
    console.print(f"The model is in {output}. To compress it: usmlite compress {output} ...", markup=False)
    return result
