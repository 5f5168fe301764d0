"""The corpora of one run: what it trains on, chooses checkpoints by, and is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from usmlite.data import Utterance, describe_corpus, load_corpus, usable_for_training
from usmlite.errors import RecipeError
from usmlite.recipe import Recipe


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
