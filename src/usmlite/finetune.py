"""The fine-tuning loop, all of it.

Everything random is drawn from (seed, step), so a run's state is the student, the optimizer and the
number of the step: a run that was killed ends like one that was not.
"""

from __future__ import annotations

import json
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from usmlite import student as students
from usmlite.atomic import write_bytes
from usmlite.audio import WINDOW_SECONDS
from usmlite.augment import add_noise, spec_augment, swap_words
from usmlite.average import averaged, take_average, update_average
from usmlite.checkpoint import CheckpointFolder, save_student
from usmlite.data import Utterance
from usmlite.distill import Distillation, LossWeights
from usmlite.errors import OutputError, TrainingError
from usmlite.memory import PeakMemory
from usmlite.models import Adapter, TimedText
from usmlite.movement import attach
from usmlite.processes import check_alike, telling_of_lost_ones, told_of
from usmlite.recipe import Recipe
from usmlite.recipe.sections import TrainingRecipe
from usmlite.schedule import moving_steps, rate
from usmlite.training_windows import Window, by_length, load_window, pack_windows

# Power of speech over that of noise where noise is added, in dB: from a busy room to a quiet one.
_SNR_DB = (10.0, 40.0)


@dataclass(frozen=True)
class Progress:
    """What the loop tells while it runs.

    Attributes:
        step: optimizer steps done.
        total: optimizer steps of the run.
        losses: "loss", "kl", "ce" and "states" of the last step.
        dev_wer: the last word error rate on the part of dev, a fraction; None before the first.
        churn: share of the mask entries that the last mask update changed.
        seconds_per_step: mean over the last steps.
    """

    step: int
    total: int
    losses: Mapping[str, float]
    dev_wer: float | None
    churn: float
    seconds_per_step: float


@dataclass(frozen=True)
class Outcome:
    """What a finished run says of itself.

    Attributes:
        steps: optimizer steps.
        best_step: the step whose student is in `best/`.
        best_wer: its word error rate on the part of dev, or None without dev.
        seconds: time spent in training steps, resumed parts included.
        windows: 30-second windows trained on.
        peak_memory_bytes: highest resident memory of this process in the last part of the run, with the
            teacher, the student, its gradients and the optimizer; on a GPU, of the device instead.
    """

    steps: int
    best_step: int
    best_wer: float | None
    seconds: float
    windows: int
    peak_memory_bytes: int


def at_random_speeds(utterances: Sequence[Utterance], spread: float, seed: str) -> list[Utterance]:
    """The utterances, each played at a speed drawn from 1 - spread to 1 + spread.

    Those that would no longer fit a window are left at their own speed.
    """
    rng = random.Random(f"speed/{seed}")
    out = []
    for utterance in utterances:
        speed = rng.uniform(1.0 - spread, 1.0 + spread) if spread else 1.0
        slower = replace(utterance, speed=speed, duration=utterance.duration / speed)
        # A few samples more than its share may come out of the resampler.
        out.append(slower if slower.duration + 0.01 <= WINDOW_SECONDS else utterance)
    return out


class TrainingWindows(Dataset[tuple[Tensor, list[TimedText], bool]]):
    """Endless training windows, item i a function of (seed, i): each epoch packs the speech anew.

    Items are samples float32 `[480000]`, the texts in it, and whether to write timestamps.
    """

    def __init__(self, utterances: Sequence[Utterance], recipe: Recipe) -> None:
        self.utterances = utterances
        self.recipe = recipe
        self._epochs: dict[int, list[Window]] = {}
        self._ends = [0]

    def __len__(self) -> int:
        training = self.recipe.training
        return training.steps * training.batch_size * training.accumulate

    def _epoch(self, number: int) -> list[Window]:
        seed = self.recipe.training.seed
        if number not in self._epochs:
            windows = pack_windows(
                at_random_speeds(self.utterances, self.recipe.data.speed, f"{seed}/{number}"),
                seed=seed,
                epoch=number,
                single_fraction=1.0 if self.recipe.data.by_length else self.recipe.data.single,
            )
            if self.recipe.data.by_length:
                batch, first = self.recipe.training.batch_size, self._ends[number]
                windows = by_length(windows, batch, first=first, seed=f"by length/{seed}/{number}")
            self._epochs[number] = windows
        return self._epochs[number]

    def window(self, index: int) -> Window:
        """The window with this number, counted over all epochs."""
        while self._ends[-1] <= index:
            self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends) - 1)))
        number = next(i for i, end in enumerate(self._ends[1:]) if index < end)
        return self._epoch(number)[index - self._ends[number]]

    def __getitem__(self, index: int) -> tuple[Tensor, list[TimedText], bool]:
        window = self.window(index)
        rng = np.random.default_rng([self.recipe.training.seed, index])
        samples = load_window(window)
        data = self.recipe.data
        if rng.random() < data.noise:
            samples = add_noise(samples, rng.uniform(*_SNR_DB), rng).astype(np.float32)
        if data.level:
            samples = samples * np.float32(10 ** (rng.uniform(-data.level, data.level) / 20))
        texts = [
            TimedText(start, start + utterance.duration, utterance.text or "")
            for utterance, start in zip(window.utterances, window.starts, strict=True)
        ]
        draw = random.Random(f"timestamps/{self.recipe.training.seed}/{index}").random()
        return torch.from_numpy(samples), texts, draw < self.recipe.data.timestamps


def autocast_precision(choice: str, device: torch.device) -> str:
    """Either "bf16" or "no", bf16 only where the device computes fast in it."""
    if choice != "auto":
        return "bf16" if choice == "bf16" else "no"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Without these instructions bf16 is emulated, and slower than float32.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    else:
        fast = False
    return "bf16" if fast else "no"


def choose_trained(student: nn.Module, training: TrainingRecipe) -> set[int]:
    """Freezes the token embedding where it has no learning rate; the ids of its parameters."""
    try:
        table = cast(nn.Module, cast(Any, student).get_input_embeddings())
    except NotImplementedError:  # how Transformers says that there is none
        table = nn.Module()
    for parameter in table.parameters():
        parameter.requires_grad_(training.ever("embedding_learning_rate") > 0)
    return {id(parameter) for parameter in table.parameters()}


def make_optimizer(student: nn.Module, recipe: Recipe, heads: Sequence[str] = ()) -> torch.optim.AdamW:
    """AdamW with groups for the weights, learned scales, the token embedding, learned masks and CTC heads.

    The embedding has a rate of its own because most of its rows are words that the speech never has: all
    they get is the noise of the softmax, which Adam would scale up to full steps. A group's "rate" names the
    setting with its peak learning rate.
    """
    training = recipe.training
    embedding = choose_trained(student, training)
    groups: list[dict[str, Any]] = [
        {"params": [], "rate": "learning_rate", "weight_decay": training.weight_decay},
        {"params": [], "rate": "scale_learning_rate", "weight_decay": 0.0},
        {"params": [], "rate": "embedding_learning_rate", "weight_decay": 0.0},
        {"params": [], "rate": "mask_learning_rate", "weight_decay": 0.0},
        {"params": [], "rate": "head_learning_rate", "weight_decay": training.weight_decay},
    ]
    endings = {"log_scale": 1, "logits": 3}
    inside = tuple(f"{head}." for head in heads) if training.ever("head_learning_rate") else ()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            usual = 4 if name.startswith(inside) else 0
            group = 2 if id(parameter) in embedding else endings.get(name.rpartition(".")[2], usual)
            groups[group]["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.learning_rate, fused=True
    )


def recompute_layers(
    student: nn.Module,
    layers: Sequence[str],
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Keeps only the inputs of these layers for the backward pass, which computes the rest once more.

    Args:
        student: changed in place.
        layers: names of its modules.
        within: what is entered around the second computation.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), within()

    for name in layers:
        layer = student.get_submodule(name)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


def loss_weights(training: TrainingRecipe) -> LossWeights:
    """How much each term of the loss counts with these settings."""
    return LossWeights(
        training.kl, training.ce, training.states, training.temperature, training.layers, training.attention
    )


@contextmanager
def _finish_step_on_signal() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a flag that is asked after each step; a second one interrupts."""
    asked = False

    def handler(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever is there handles signals
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    adapter: Adapter,
    utterances: Sequence[Utterance],
    recipe: Recipe,
    output: Path,
    *,
    dev_wer: Callable[[nn.Module], float] | None = None,
    tell: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Trains the student, resuming from `output/checkpoints` if a run was cut off there.

    Args:
        student: from `student.make_student`; trained in place, the best kept in `output/best`.
        teacher: the dense model.
        adapter: turns audio into features and texts into tokens.
        utterances: with the target texts, none longer than 30 s.
        recipe: see `recipe.TrainingRecipe`.
        output: the run's directory; gets `checkpoints/`, `best/` and `train.jsonl`.
        dev_wer: measures a student's WER (fraction) on a part of dev; without it the last is the best.
        tell: called after every step on the main process.

    Returns:
        What happened.

    Raises:
        TrainingError: the loss became NaN or infinite (the last checkpoint is kept), or the
            checkpoint there does not fit.
        OutputError: a checkpoint could not be written.
        KeyboardInterrupt: after Ctrl-C; the step was finished and saved first.
    """
    training = recipe.training
    # Learned masks take no part in the steps after they are frozen, learned scales in those with other bits.
    partial = recipe.student.masks == "gumbel" or recipe.student.stochastic_bits is not None
    partial = partial or adapter.has_idle_parameters
    unused = DistributedDataParallelKwargs(find_unused_parameters=partial)
    accelerator = Accelerator(kwargs_handlers=[unused])
    device = accelerator.device
    # Not Accelerate's mixed precision: that is fixed for the life of the process, and bf16 needs no more.
    bf16 = autocast_precision(training.precision, device) == "bf16"
    students.train_compression(student.to(device), network=training.network_dropout)
    teacher.to(device).eval()
    optimizer = make_optimizer(student, recipe, adapter.network.heads)
    moving = moving_steps(training.steps, freeze=recipe.student.mask_freeze)
    movement = attach(student, optimizer, moving=moving, seed=training.seed)
    folder, log = CheckpointFolder(output / "checkpoints"), output / "train.jsonl"
    state: dict[str, Any] = {
        "step": 0,
        "windows": 0,
        "seconds": 0.0,
        "best_wer": None,
        "best_step": 0,
        "dev_wer": None,
        "seed": training.seed,
    }
    restored = folder.restore(student, optimizer) or {}
    state.update(restored)
    first = int(state["step"])
    check_alike(accelerator.num_processes, told_of(recipe, utterances, first))
    movement.at(first)
    _cut_log(log, first)

    objective = Distillation(
        student,
        teacher,
        loss_weights(training),
        network=adapter.network,
        layers=adapter.layers(),
        attentions=adapter.attentions(),
    )
    if training.recompute:
        recompute_layers(student, adapter.layers())
    distillation = accelerator.prepare(objective)
    dataset = TrainingWindows(utterances, recipe)
    per_step = training.batch_size * training.accumulate * accelerator.num_processes
    # Not counted from steps alone: the run may go on with another number of processes.
    heard = int(restored.get("windows", first * per_step))
    own = training.batch_size * training.accumulate
    mine = [
        heard + step * per_step + accelerator.process_index * own + i
        for step in range(training.steps - first)
        for i in range(own)
    ]
    loader = DataLoader(
        dataset,
        batch_size=training.batch_size,
        sampler=_Order(mine),
        collate_fn=list,
        # On an accelerator the host would keep it waiting; on a CPU a worker only competes for cores.
        num_workers=0 if device.type == "cpu" else 4,
    )
    batches = iter(loader)

    memory, peaks = PeakMemory(), [0]

    def evaluate_now(step: int) -> None:
        peaks.append(memory.read()[0])  # an evaluation measures its own peak, from there on
        if dev_wer is None or not accelerator.is_main_process:
            return
        student.eval()
        # In the end the average has become the weights.
        with averaged(optimizer) if step < training.steps else nullcontext():
            wer = dev_wer(student)
            state["dev_wer"] = wer
            # With more weights or bits than the spec allows it would be the best, and could not be packed.
            if movement.at_target and (state["best_wer"] is None or wer <= state["best_wer"]):
                state["best_wer"], state["best_step"] = wer, step
                save_student(output / "best", student, None, {"step": step, "dev_wer": wer})
        students.train_compression(student, network=training.network_dropout)

    if first == 0:
        # Where the start is good already, a short training may not better it.
        students.round_kept(student)
        evaluate_now(0)
    recent: list[float] = []
    lost = telling_of_lost_ones(accelerator.num_processes, folder.newest)
    with lost, _finish_step_on_signal() as stop_asked:
        for step in range(first, training.steps):
            started = time.perf_counter()
            torch.manual_seed(hash((training.seed, step)) % 2**63)  # what the student draws
            share = rate(step, training.steps, warmup=training.warmup, final=training.final_rate)
            phase = training.at(step)
            objective.weights = loss_weights(phase)
            for group in optimizer.param_groups:
                group["lr"] = getattr(phase, group["rate"]) * share
            sums: dict[str, float] = {}
            for part in range(training.accumulate):
                batch = make_batch(next(batches), adapter, recipe, device, step, part)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses = distillation(**batch)
                accelerator.backward(losses["loss"] / training.accumulate)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / training.accumulate
            norm = float(accelerator.clip_grad_norm_(distillation.parameters(), training.clip or math.inf))
            if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
                raise TrainingError(
                    "the loss or its gradient is not finite",
                    where=f"step {step + 1}",
                    found=sums["loss"],
                    remedy=f"The last checkpoint is {folder.newest() or 'none yet'}; lower "
                    "training.learning_rate and start again in another output directory.",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if training.average:
                update_average(optimizer, training.average, step)

            done = step + 1
            last = done == training.steps
            if last:
                take_average(optimizer)
                # What is stored as float16 is rounded before it is judged, so that the judged one ships.
                students.round_kept(student)
            seconds = time.perf_counter() - started
            state["step"], state["seconds"] = done, state["seconds"] + seconds
            state["windows"] = heard + (done - first) * per_step
            recent = [*recent[-19:], seconds]
            if last or done % training.eval_every == 0:
                evaluate_now(done)
            stopping = _anywhere(stop_asked(), accelerator)
            if accelerator.is_main_process:
                _write_log(
                    log, done, sums, optimizer.param_groups[0]["lr"], norm, movement.churn, seconds, state
                )
                if last or stopping or done % training.checkpoint_every == 0:
                    folder.save(student, optimizer, state, done)
                if tell is not None:
                    mean = sum(recent) / len(recent)
                    tell(Progress(done, training.steps, sums, state["dev_wer"], movement.churn, mean))
            if stopping and not last:
                raise KeyboardInterrupt
    if accelerator.is_main_process and state["best_wer"] is None:
        state["best_step"] = training.steps
        save_student(output / "best", student, None, {"step": training.steps, "dev_wer": None})
    accelerator.wait_for_everyone()
    return Outcome(
        training.steps,
        int(state["best_step"]),
        state["best_wer"],
        float(state["seconds"]),
        int(state["windows"]),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else max(peaks),
    )


def _anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    total: Tensor = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(total > 0)


class _Order(torch.utils.data.Sampler[int]):
    """A given order of items."""

    def __init__(self, items: Sequence[int]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def make_batch(
    rows: Sequence[tuple[Tensor, list[TimedText], bool]],
    adapter: Adapter,
    recipe: Recipe,
    device: torch.device,
    step: int,
    part: int = 0,
) -> dict[str, Tensor]:
    """Items of `TrainingWindows` as inputs of `distill.Distillation`, on the device.

    Args:
        rows: the items.
        adapter: turns audio into features and texts into tokens.
        recipe: what is masked and swapped in them.
        device: where the models are.
        step: what is drawn at random is drawn from the recipe's seed and this,
        part: and the number of the batch within the step.
    """
    samples = torch.stack([row[0] for row in rows]).to(device)
    speech = adapter.hear(samples, [max((text.end for text in row[1]), default=0.0) for row in rows])
    heard = taught = speech.pop(adapter.main_input)
    generator = torch.Generator().manual_seed((recipe.training.seed * 1_000_003 + step) * 64 + part)
    if recipe.training.spec_augment:
        heard = spec_augment(taught, generator, adapter.channel_axis)
        if recipe.training.teacher_hears == "same":
            taught = heard
    text = adapter.teach(
        [row[1] for row in rows], timestamps=[row[2] for row in rows], language=recipe.data.language
    )
    if recipe.data.swapped:
        ids = text["decoder_input_ids"]
        text["decoder_input_ids"] = swap_words(ids, adapter.words(ids), recipe.data.swapped, generator)
    moved = {name: value.to(device) for name, value in text.items()}
    return {"heard": heard, "taught": taught, **speech, **moved}


def _cut_log(path: Path, steps: int) -> None:
    """Forgets lines of steps after the checkpoint: they are about to be done again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        write_bytes(path, "".join(whole[:steps]).encode())


def _write_log(
    path: Path,
    step: int,
    losses: Mapping[str, float],
    lr: float,
    norm: float,
    churn: float,
    seconds: float,
    state: Mapping[str, Any],
) -> None:
    row = {"step": step, **losses, "lr": lr, "norm": norm, "churn": churn, "seconds": round(seconds, 3)}
    if state["dev_wer"] is not None:
        row["dev_wer"] = state["dev_wer"]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n")
    except OSError as error:
        raise OutputError("cannot write the training log", where=path, found=error.strerror) from None
