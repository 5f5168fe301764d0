"""A new head on what an encoder says already."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from small_whisper import small_teacher
from usmlite.ctc import new_model
from usmlite.data import Utterance
from usmlite.first_head import teach_head
from usmlite.models import Teacher, TimedText
from usmlite.recipe.sections import CTCRecipe

TEXTS = ("one two", "two one", "one", "two")


@pytest.fixture(scope="module")
def untrained() -> Teacher:
    whisper, adapter = small_teacher(encoder_layers=2)
    for parameter in whisper.model.encoder.parameters():  # the usual start makes every frame the same
        if parameter.ndim == 2 and len(parameter) < 100:
            parameter.data *= 10.0
    speech = [Utterance(text, "", 1.0, text) for text in TEXTS]  # type: ignore[arg-type]
    return new_model(Teacher(whisper, adapter, "", 0), speech, CTCRecipe(), seed=0)


def _speech() -> list[tuple[Tensor, list[TimedText]]]:
    """A tone for each word."""
    tones = {"one": 300.0, "two": 1700.0}
    rows: list[tuple[Tensor, list[TimedText]]] = []
    for text in TEXTS:
        parts = [torch.sin(tones[word] * 2 * torch.pi * torch.arange(9600) / 16_000) for word in text.split()]
        samples = 0.3 * torch.cat(parts)
        padded = torch.nn.functional.pad(samples, (0, 480_000 - len(samples)))
        rows.append((padded, [TimedText(0.0, len(samples) / 16_000, text)]))
    return rows


def _loss(teacher: Teacher) -> float:
    model, adapter, losses = teacher.model.eval(), teacher.adapter, []
    for samples, texts in _speech():
        batch = {
            **adapter.hear(samples[None], [texts[0].end]),
            **adapter.teach([texts], timestamps=[False], language=None),
        }
        with torch.no_grad():
            logits = adapter.network.logits(model, batch, adapter.network.states(model, batch))
            losses.append(float(adapter.network.text_loss(logits, batch)))
    return sum(losses) / len(losses)


def test_the_head_learns_and_nothing_else_changes(untrained):
    teacher = Teacher(copy.deepcopy(untrained.model), untrained.adapter, "", 0)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    first = _loss(teacher)
    told = []
    losses = teach_head(
        teacher.model, teacher.adapter, _speech(), head="ctc_head", steps=60, seed=0,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert len(losses) == 60
    assert told == [(done, 64) for done in range(1, 65)]
    assert losses[-1] < 0.5 * losses[0]
    # What was learned on standardized states holds for the states themselves.
    assert _loss(teacher) < 0.5 * first
    assert _loss(teacher) == pytest.approx(losses[-1], rel=0.3)
    changed = {name for name, value in teacher.model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"ctc_head.weight", "ctc_head.bias"}


def test_the_same_seed_gives_the_same_head(untrained):
    heads = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(untrained.model)
        teach_head(model, untrained.adapter, _speech() * 5, head="ctc_head", steps=3, seed=seed)
        heads.append(model.ctc_head.weight.detach())  # type: ignore[union-attr]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_channels_that_never_vary_and_rows_without_labels_are_no_trouble(untrained):
    model = copy.deepcopy(untrained.model)
    with torch.no_grad():
        norm = model.encoder.layer_norm  # type: ignore[union-attr]
        norm.weight[3] = 0.0
        norm.bias[3] = 7.0
    silent = [(samples, [TimedText(0.0, 1.0, "")]) for samples, _ in _speech()[:1]]
    losses = teach_head(model, untrained.adapter, [*_speech(), *silent], head="ctc_head", steps=20, seed=0)
    assert all(torch.tensor(losses).isfinite())
    assert bool(model.ctc_head.weight.isfinite().all())  # type: ignore[union-attr]
