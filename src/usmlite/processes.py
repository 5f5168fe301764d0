"""The processes of one run: whether they do the same, and what becomes of a run when one of them is gone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object

from usmlite.data import Utterance
from usmlite.errors import TrainingError
from usmlite.packfile import usmlite_version
from usmlite.recipe import Recipe, recipe_to_dict

# What Accelerate takes for yes.
_YES = ("y", "yes", "t", "true", "on", "1")
# How torch.distributed's backends begin to say that they cannot reach another process.
_UNREACHABLE = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


def this_process() -> PartialState:
    """The process at hand among those of the run; the first of one where it was started alone.

    Without an accelerator, or where Accelerate was told to leave it alone, the processes of a launcher
    share the work on CPUs. `PartialState` itself would take each of them for a run of its own.
    """
    spared = os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES
    return PartialState(cpu=spared or not torch.accelerator.is_available())


def check_alike(count: int, told: Mapping[str, str]) -> None:
    """Compares what the processes of a run are about to do.

    Args:
        count: of the processes.
        told: what this one says, by what it is: see `told_of`.

    Raises:
        TrainingError: in every process, if one differs from the first.
    """
    if count == 1:
        return
    everything: list[dict[str, str]] = gather_object([dict(told)])
    for index, other in enumerate(everything):
        for what, value in everything[0].items():
            if other[what] != value:
                raise TrainingError(
                    f"the processes of this run do not agree on {what}", where=f"process {index}",
                    expected=f"{value}, as in process 0", found=other[what],
                    remedy="Start all of them with the same command, on the same speech, with the same "
                    "version of usmlite.",
                )  # fmt: skip


def told_of(recipe: Recipe, utterances: Sequence[Utterance], step: int) -> dict[str, str]:
    """What all processes of a run must agree on; where things are on a machine is not among it.

    Args:
        recipe: of the run.
        utterances: what it trains on.
        step: of the checkpoint that it goes on from.
    """
    sections = recipe_to_dict(recipe)
    code = sorted(Path(__file__).parent.rglob("*.py"))
    return {
        "the version of usmlite": usmlite_version(),
        "the code": _digest(path.read_text(encoding="utf-8") for path in code),
        "the version of PyTorch": str(torch.__version__),
        "the version of Transformers": transformers.__version__,
        "the recipe": _digest(
            json.dumps(sections[name], sort_keys=True, default=str) for name in ("student", "training")
        ),
        "the speech": f"{len(utterances)} utterances, {_digest(_lines(utterances))}",
        "the checkpoint": f"step {step}",
    }


def _lines(utterances: Sequence[Utterance]) -> Iterator[str]:
    for utterance in utterances:
        yield json.dumps([utterance.id, utterance.duration, utterance.text])


def _digest(texts: Iterator[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode() + b"\0")
    return found.hexdigest()[:16]


@contextmanager
def telling_of_lost_ones(count: int, saved: Callable[[], Any]) -> Iterator[None]:
    """Turns what PyTorch raises when another process has died into one error.

    Args:
        count: of the processes.
        saved: the newest checkpoint, or None.

    Raises:
        TrainingError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or any(
            word in str(error) for word in _UNREACHABLE
        )
        if count == 1 or not lost:
            raise
        raise TrainingError(
            "another process of this run is gone", where="training",
            found=str(error).strip().splitlines()[0][:200],
            remedy=f"Its own message says why. The same command goes on from {saved() or 'the beginning'}.",
        ) from None  # fmt: skip
