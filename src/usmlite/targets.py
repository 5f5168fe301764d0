"""The texts that training learns: the corpus's or the teacher's own, as the model can write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from usmlite.data import Utterance
from usmlite.errors import DataError
from usmlite.models import Adapter, Teacher
from usmlite.progress import stage_bar
from usmlite.recipe import Recipe
from usmlite.speech import Speech
from usmlite.transcripts import transcribe_corpus, with_targets
from usmlite.validation import quick_recognizer

# Utterances that are named where some are left out.
_MOST_NAMED = 10


def training_targets(
    recipe: Recipe, teacher: Teacher, speech: Speech, folder: Path, console: Console
) -> tuple[list[Utterance], int]:
    """The training utterances with the texts the student shall learn, and how many were left out.

    The teacher's transcripts are kept in `folder`, unless the recipe names a file.
    """
    if recipe.data.targets == "text":
        return learnable(as_written(speech.train, teacher.adapter), teacher.adapter, console), 0
    path = Path(recipe.data.transcripts) if recipe.data.transcripts else folder / "transcripts.jsonl"
    with stage_bar(console, "Teacher transcribes", len(speech.train)) as progress:
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
