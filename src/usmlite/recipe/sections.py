"""The keys of a recipe, section by section: names, defaults and what help says of them."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import typing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from usmlite.errors import RecipeError
from usmlite.spec import CompressionSpec, Rule

if sys.version_info >= (3, 11):
    pass
else:
    pass

FLOAT = "float"


def _key(
    default: Any, text: str, *, flag: str | None = None, choices: tuple[str, ...] = (), path: bool = False
) -> Any:
    """A recipe key: its default, its help text, its flag if that differs from the key."""
    metadata = {"help": text, "flag": flag, "choices": choices, "path": path}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelRecipe:
    """[model]: where to start."""

    source: str = _key("tiny.en", "a name (tiny.en, base), a model directory, or a hub id", flag="model")
    streamed: bool = _key(
        False,
        "read, round and write the weights of a directory one by one, so that a model of any size needs "
        "little memory; without fine-tuning and speech (--no-finetune --start magnitude)",
    )


@dataclass(frozen=True)
class DataRecipe:
    """[data]: speech to train on, choose on and report on."""

    train: str | None = _key(
        None,
        "speech to fine-tune on: a manifest.jsonl, a LibriSpeech directory, a folder of audio, or tar shards",
        flag="data",
        path=True,
    )
    dev: str | None = _key(
        None, "speech with text for choosing the best checkpoint; without it the last is kept", path=True
    )
    test: str | None = _key(
        None, "speech with text for the final table; without it the part of dev serves", path=True
    )
    targets: str = _key(
        "teacher",
        "what the student is trained to say: the teacher's own transcripts or the corpus text",
        choices=("teacher", "text"),
    )
    transcripts: str | None = _key(
        None,
        "JSONL file that keeps the teacher's transcripts, to share between runs (default: in the output)",
        path=True,
    )
    language: str = _key("en", "language of the speech, for multilingual models")
    max_wer: float = _key(
        0.5,
        "leave out utterances whose teacher transcript differs from the corpus text by more than this WER",
    )
    timestamps: float = _key(0.1, "share of the training windows that are written with timestamps")
    single: float = _key(0.15, "share of the training windows with one short utterance and then silence")
    speed: float = _key(0.0, "play training speech up to this share faster or slower (0.1: 0.9 to 1.1 times)")
    noise: float = _key(0.0, "share of the training windows with noise added, at 10 to 40 dB")
    by_length: bool = _key(
        False,
        "batches of utterances of like length, each in a window of its own: for models that hear audio of "
        "its true length",
    )
    swapped: float = _key(
        0.0, "share of the words before the one to predict that are replaced by other words of the batch"
    )
    level: float = _key(0.0, "raise or lower training speech by up to this many dB")


@dataclass(frozen=True)
class SpecRecipe:
    """[spec]: what each weight becomes."""

    bits: int | str = _key(4, "bits per weight, 1 to 8, or 'float'")
    sparsity: str = _key("2:4", "N:M along the input axis (2:4 keeps 2 of every 4), or 'dense'")
    group: int = _key(0, "inputs that share a scale; 0 for one scale per output channel")
    symmetric: bool = _key(True, "symmetric codes; otherwise each group stores a zero point")
    grid: str = _key(
        "integer",
        "levels: 'integer' has a zero, 'midrise' lies around zero (good at 1 and 2 bits), 'ternary' is -1, 0 "
        "and 1 times the scale (bits = 2)",
        choices=("integer", "midrise", "ternary"),
    )
    scale_bits: int = _key(16, "bits of each stored scale: 16, or 8 (a rate always takes 8)")
    embedding_bits: float = _key(
        0.0,
        "bits a weight of token embeddings, which are not pruned; with entropy coding any number, such as "
        "2.5; 0 for the least whole number that is no less than the bits of the rest (3 for int4 with 2:4)",
    )
    entropy_coding: bool = _key(
        True, "entropy-code the codes in the packed file: smaller, the same model, slower to load"
    )
    target_size: str | None = _key(
        None,
        "size of the packed file, such as 9.4% (of float32), 14MB or 14000000: bits and sparsity are then "
        "chosen for each weight by measuring (rules still decide first)",
    )
    candidates: str = _key(
        "trellis",
        "what a target size chooses from: integer (1 to 8 bits, dense, 3:4, 2:4 and 1:4), rate (0.5 to 6 "
        "bits a weight by entropy coding), trellis (rates, with codes along a trellis in a token embedding "
        "that is not trained), or all (integer and rate)",
        choices=("trellis", "rate", "integer", "all"),
    )
    measured: str | None = _key(
        None,
        "allocation.json of an earlier run of the same model: a target size chooses from its figures again "
        "instead of measuring",
        path=True,
    )
    allocation: str = _key(
        "measured",
        "how a target size is shared out: measured (each weight on its own), or learned (from there, a "
        "mixture of each weight's nearest candidates is trained, all weights together)",
        choices=("measured", "learned"),
    )
    allocation_steps: int = _key(60, "steps of batch_size windows that a learned allocation trains")
    rules: tuple[dict[str, Any], ...] = ()

    def target_bytes(self, float32_bytes: int, *, where: str = "spec.target_size") -> int | None:
        """`target_size` in bytes; None if there is none.

        Raises:
            RecipeError: it cannot be read.
        """
        if self.target_size is None:
            return None
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kKMG]?B?)\s*", self.target_size)
        factors = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "K": 1e3, "M": 1e6, "G": 1e9}
        if match is None or not float(match[1]) > 0:
            raise RecipeError(
                "unreadable size",
                where=where,
                expected="a share such as 9.4%, or bytes such as 14MB or 14000000",
                found=repr(self.target_size),
            )
        number, unit = float(match[1]), match[2].upper()
        return int(number / 100 * float32_bytes if unit == "%" else number * factors[unit])

    def build(self) -> CompressionSpec:
        """The compression spec: `rules` first, then the one-line settings.

        Raises:
            SpecError: an impossible setting.
            RecipeError: bits is neither a number nor 'float'.
        """
        if isinstance(self.bits, str) and self.bits != FLOAT:
            raise RecipeError(
                "unknown number of bits", where="spec.bits", expected="1 to 8, or 'float'", found=self.bits
            )
        first = [Rule.from_dict(rule, where=f"spec.rules[{i}]") for i, rule in enumerate(self.rules)]
        rated = next((rule for rule in first if rule.spec.rate is not None), None)
        if rated is not None and not self.entropy_coding:
            raise RecipeError(
                "a rate needs entropy coding",
                where=f"spec.rules: {rated.match}",
                remedy="Leave entropy_coding on, or give bits without a rate.",
            )
        return CompressionSpec.simple(
            None if isinstance(self.bits, str) else self.bits,
            self.sparsity,
            self.group or None,
            symmetric=self.symmetric,
            grid=typing.cast("Any", self.grid),
            embedding_bits=self.embedding_bits or None,
            coded=self.entropy_coding,
            scale_bits=self.scale_bits,
            first=first,
        )


@dataclass(frozen=True)
class StudentRecipe:
    """[student]: how the student starts and how its masks and scales behave."""

    start: str = _key(
        "hessian",
        "starting point: magnitude, activation (Wanda) or hessian (SparseGPT with GPTQ rounding)",
        choices=("magnitude", "activation", "hessian"),
    )
    calibration: int = _key(
        96, "30-second windows of training speech that the starting point is computed from"
    )
    scales: str = _key(
        "learned",
        "scales: min-max, min-error (searched clip), learned (LSQ) or rand (min-max with a gradient to the "
        "largest weights, and noise instead of rounding until mask_freeze)",
        choices=("min-max", "min-error", "learned", "rand"),
    )
    masks: str = _key(
        "sr-ste",
        "masks: fixed, periodic, sr-ste (periodic, and pruned weights decay), gradual (dense at first, "
        "then N falls by one at a time to that of the spec, in equal parts until mask_freeze) or gumbel "
        "(learned: patterns are drawn at random until mask_freeze; at most 16 patterns a group)",
        choices=("fixed", "periodic", "sr-ste", "gradual", "gumbel"),
    )
    mask_every: int = _key(5, "optimizer steps between mask updates; a large number is few-shot pruning")
    mask_decay: float = _key(
        10.0, "decay of pruned weights per unit of learning rate (sr-ste and gradual); 0 for none"
    )
    mask_freeze: float = _key(0.7, "masks and bits stop moving after this share of the steps")
    bits_schedule: str | None = _key(
        None,
        "bits before those of the spec, descending, such as 8,4,3: weights begin with the first, and come to "
        "their own in equal parts of the steps until mask_freeze, each time with new scales; rates descend "
        "likewise, embeddings do not",
    )
    stochastic_bits: str | None = _key(
        None,
        "until mask_freeze, now and then a weight has more bits for one step, drawn from these, such as 4,8; "
        "embeddings have not",
    )
    stochastic_share: float = _key(0.5, "with stochastic_bits, the share of the steps, for each weight")

    def schedule(self, *, where: str = "student") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`bits_schedule` and `stochastic_bits` as numbers; empty if there are none.

        Raises:
            RecipeError: one cannot be read, or the schedule does not descend.
        """
        before = _list_of_bits(self.bits_schedule, f"{where}.bits_schedule")
        if any(a <= b for a, b in pairwise(before)):
            raise RecipeError(
                "bits that do not descend",
                where=f"{where}.bits_schedule",
                expected="such as 8,4,3",
                found=repr(self.bits_schedule),
            )
        return before, _list_of_bits(self.stochastic_bits, f"{where}.stochastic_bits")


def _list_of_bits(text: str | None, where: str) -> tuple[int, ...]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part in "12345678" and len(part) == 1 for part in parts):
        raise RecipeError(
            "unreadable list of bits", where=where, expected="1 to 8 each, such as 8,4,3", found=repr(text)
        )
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class TrainingRecipe:
    """[training]: the fine-tuning."""

    steps: int = _key(1000, "optimizer steps; 0 compresses without fine-tuning")
    batch_size: int = _key(
        4,
        "windows per step and process: of 30 seconds, or utterances where encoders hear true lengths",
    )
    accumulate: int = _key(1, "batches whose gradients are added up for one step")
    learning_rate: float = _key(1e-4, "peak learning rate of the weights")
    scale_learning_rate: float = _key(1e-3, "peak learning rate of the learned scales' logarithms")
    mask_learning_rate: float = _key(
        0.02, "peak learning rate of learned masks' logits (gumbel); a mask starts 1.5 to 3 above the others"
    )
    embedding_learning_rate: float = _key(
        0.0, "peak learning rate of the token embedding and its scales; 0 leaves them as they start"
    )
    head_learning_rate: float = _key(0.0, "peak learning rate of a CTC head; 0 for that of the other weights")
    warmup: float = _key(0.05, "share of the steps in which the learning rate rises")
    final_rate: float = _key(0.02, "the learning rate at the end, as a share of the peak (cosine decay)")
    weight_decay: float = _key(0.0, "AdamW's decoupled weight decay")
    average: float = _key(
        0.0,
        "ship a running average of the weights: share of the old average that stays at each step, such as "
        "0.99; 0 ships the last weights",
    )
    clip: float = _key(1.0, "gradients are clipped to this norm")
    kl: float = _key(1.0, "weight of the KL divergence from the teacher's token distribution")
    ce: float = _key(0.2, "weight of the cross-entropy on the target text")
    states: float = _key(10.0, "weight of the match of encoder states")
    layers: float = _key(0.0, "weight of the match of every layer's output")
    attention: float = _key(0.0, "weight of the match of what the decoder's heads look at in the speech")
    temperature: float = _key(1.0, "temperature of the KL term")
    network_dropout: bool = _key(
        False, "train with the dropout that the model's configuration has, which dense models need"
    )
    spec_augment: bool = _key(False, "mask bands of time and frequency in what is heard (SpecAugment)")
    teacher_hears: str = _key(
        "same",
        "with spec_augment, what the teacher hears: the same masked speech as the student, or clean speech",
        choices=("same", "clean"),
    )
    precision: str = _key(
        "auto",
        "auto (bf16 autocast where the device is fast at it), bf16 or float32",
        choices=("auto", "bf16", "float32"),
    )
    recompute: bool = _key(
        False,
        "compute each layer's activations again in the backward pass instead of keeping them: less memory, "
        "about a quarter more time",
    )
    seed: int = _key(0, "seed of everything random")
    eval_every: int = _key(200, "steps between WER measurements on a part of dev")
    eval_utterances: int = _key(48, "size of that part of dev")
    checkpoint_every: int = _key(50, "steps between checkpoints")
    phases: tuple[dict[str, Any], ...] = ()

    def at(self, step: int) -> TrainingRecipe:
        """These settings with those of the phase that a step (from 0) is in; after the last, as they are."""
        for phase in self.phases:
            if step < math.ceil(phase["until"] * self.steps):
                return dataclasses.replace(self, **{k: v for k, v in phase.items() if k != "until"})
        return self

    def ever(self, key: str) -> float:
        """The largest value that this setting has in any phase or after them."""
        return max(float(values[key]) for values in (vars(self), *self.phases) if key in values)


@dataclass(frozen=True)
class CTCRecipe:
    """[ctc]: the dense model that `usmlite ctc` makes of an encoder."""

    vocabulary: str = _key(
        "characters",
        "labels, made of the transcripts: characters, or pieces (of words, by byte-pair encoding)",
        choices=("characters", "pieces"),
    )
    vocabulary_size: int = _key(256, "how many word pieces")
    chunk: float = _key(
        0.0,
        "attend in chunks of this many seconds, so that no text waits for the end of the audio; 0: to all",
    )
    left_chunks: int = _key(4, "with chunk, how many chunks before its own a frame hears")
    time_reduction: int = _key(1, "frames of 20 ms that the head reads together: 1 gives 50 labels a second")
    intermediate: str | None = _key(
        None,
        "layers after which the model is told what it would say so far (self-conditioned CTC), such as 2",
    )
    dropout: float = _key(
        0.0, "dropout while the model trains; Whisper's encoder was trained without, and 0.03 breaks it"
    )
    head_steps: int = _key(
        400, "steps in which the new head learns alone, on what the untrained encoder says; 0 for none"
    )

    def layers(self) -> tuple[int, ...]:
        """`intermediate` as numbers.

        Raises:
            RecipeError: it cannot be read.
        """
        parts = [] if self.intermediate is None else [part.strip() for part in self.intermediate.split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise RecipeError(
                "unreadable list of layers", where="ctc.intermediate", expected="numbers from 1, such as 2",
                found=repr(self.intermediate),
            )  # fmt: skip
        return tuple(int(part) for part in parts)
