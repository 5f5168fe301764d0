"""Two real runs of a model too small to know any English, and copies of them that tests may spoil."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from usmlite.compress import compress
from usmlite.recipe import build_recipe

CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "trained": {
        "spec": {"bits": 4, "sparsity": "2:4"},
        "student": {"calibration": 2, "masks": "sr-ste", "mask_every": 1, "mask_freeze": 0.8},
        "training": {"steps": 6, "batch_size": 1, "eval_every": 3, "learning_rate": 1e-2},
    },
    "int8": {
        "spec": {"bits": 8, "sparsity": "dense"},
        "student": {"start": "magnitude"},
        "training": {"steps": 0},
    },
}


@pytest.fixture(scope="session")
def made(dense_model: Path, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs "trained" and "int8"."""
    folder = tmp_path_factory.mktemp("report") / "study"
    for name, changes in CHANGES.items():
        data = {"train": str(recordings), "test": str(recordings / "manifest.jsonl"), "targets": "text"}
        compress(
            build_recipe({"model": {"source": str(dense_model)}, "data": data, **changes}), folder / name
        )
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """A copy of these runs, with transcripts in which there is something to see."""
    folder = tmp_path / "study"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("checkpoints", "best"))
    for name in CHANGES:
        say(folder / name / "evaluation-packed.json", {"r0": "once two", "r1": "", "r2": "for for sick yes"})
        say(folder / name / "evaluation-dense.json", {})
    return folder


# The words of the recordings are numbers, which the normalizer turns into figures.
SAID = {"r0": "once too", "r1": "tree", "r2": "for fine sick", "r3": "seventh"}


def say(path: Path, words: dict[str, str]) -> None:
    """Changes what a model wrote down, and the counts that follow from it."""
    from jiwer import process_words

    found = json.loads(path.read_text())
    for score in found["utterances"]:
        score["reference"] = SAID[score["id"]]
        score["hypothesis"] = words.get(score["id"], score["reference"])
        counts = process_words(score["reference"], score["hypothesis"])
        score |= {
            "substitutions": counts.substitutions,
            "deletions": counts.deletions,
            "insertions": counts.insertions,
            "words": len(score["reference"].split()),
        }
    path.write_text(json.dumps(found))
