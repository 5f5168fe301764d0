"""The model that comes along is whole, small, and what it is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import usmlite
from usmlite.info import dense_float32_bytes
from usmlite.kernels import native
from usmlite.packfile import WEIGHTS_NAME, WeightsFile, read_manifest
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


@pytest.mark.skipif(not native.paths(), reason="installed without the native library")
@pytest.mark.parametrize("name", SHIPPED)
def test_both_decoders_read_it_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shipped(name)
    assert folder is not None
    manifest, weights = read_manifest(folder), WeightsFile(folder / WEIGHTS_NAME)
    with weights.open() as read:
        for module, layer in manifest.layers.items():
            monkeypatch.delenv(native.VARIABLE, raising=False)
            found = weights.weight(module, layer, read)
            monkeypatch.setenv(native.VARIABLE, "reference")
            expected = weights.weight(module, layer, read)
            assert torch.equal(found.codes, expected.codes), module


def test_other_names_are_none() -> None:
    assert shipped("tiny.en") is None
    assert shipped(Path(DEFAULT)) is None
