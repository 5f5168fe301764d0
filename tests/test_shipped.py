"""The model that comes along is whole, small, and what it is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import usmlite
from usmlite.info import dense_float32_bytes
from usmlite.shipped import DEFAULT, SHIPPED, shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_at_most_9_4_percent_of_its_parent(name: str) -> None:
    recognizer = usmlite.load(name)
    assert recognizer.kind == "packed"
    assert recognizer.weights_bytes <= 0.094 * dense_float32_bytes(recognizer.adapter.config)


def test_the_card_tells_what_was_measured() -> None:
    folder = shipped(DEFAULT)
    assert folder is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    (recipe,) = (line for line in card.splitlines() if line.startswith("| recipe |"))
    name = Path(recipe.split("`")[1]).stem
    result = json.loads((folder.parents[1] / "results" / "librispeech" / f"{name}.json").read_text())
    assert (folder / "model.safetensors").stat().st_size == result["evaluation"]["weights_bytes"]
    assert f"{100 * result['evaluation']['wer']:.2f} %" in card


def test_other_names_are_none() -> None:
    assert shipped("tiny.en") is None
    assert shipped(Path(DEFAULT)) is None
