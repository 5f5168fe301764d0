"""Labels of frames to words with times."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from small_ctc import CONFIGS, WITHOUT, save_model
from usmlite.errors import ModelError
from usmlite.models import CTCAdapter, load_teacher
from usmlite.models.alignment import Piece, collapse, cut_at_pauses, joined, pause_to_go_on_from, words_of
from usmlite.runtime import Recognizer, Segment

# One for each kind of tokenizer.
NAMES = [n for n in CONFIGS if n in ("Wav2Vec2ForCTC", "ParakeetForCTC", "LasrForCTC") and n not in WITHOUT]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CTCAdapter]:
    folder = tmp_path_factory.mktemp("models")
    return {name: load_teacher(save_model(folder / name, name)).adapter for name in NAMES}


def frames_of(adapter: CTCAdapter, text: str, *, gap: int = 1, blanks: int = 1) -> list[int]:
    """Labels of frames that say a text: each label twice, with blanks after it."""
    labels: list[int] = []
    for label in adapter.encode_text(text):
        labels += [label, label] + [adapter.blank] * blanks
    return [adapter.blank] * gap + labels


def test_repeats_count_once_and_blanks_not_at_all() -> None:
    emitted = collapse(
        [0, 7, 7, 0, 7, 3, 3, 3, 0, 0], [-1.0, -0.2, -0.4, -1, -0.1, -0.3, -0.3, -0.6, -1, -1], 0, 2.0
    )
    assert [each.label for each in emitted] == [7, 7, 3]
    assert [each.start for each in emitted] == pytest.approx([0.2, 0.8, 1.0])
    assert [each.end for each in emitted] == pytest.approx([0.6, 1.0, 1.6])
    assert [each.logprob for each in emitted] == pytest.approx([-0.3, -0.1, -0.4])
    assert collapse([], [], 0, 1.0) == []


@pytest.mark.parametrize("name", NAMES)
def test_words_are_told_apart_as_the_tokenizer_marks_them(name: str, adapters: dict[str, CTCAdapter]) -> None:
    adapter = adapters[name]
    frames = frames_of(adapter, "to toll at")
    emitted = collapse(frames, [-0.5] * len(frames), adapter.blank, 0.02 * len(frames))
    words = words_of(emitted, adapter.tokenizer)
    assert [adapter.decode_text(word.labels) for word in words] == ["to", "toll", "at"]
    assert adapter.decode_text([label for word in words for label in word.labels]) == "to toll at"
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert all(word.logprob == pytest.approx(-0.5) for word in words)


def piece(start: float, end: float) -> Piece:
    return Piece((1,), start, end, -1.0)


def test_pieces_end_at_pauses_and_are_not_too_long() -> None:
    words = [piece(0.0, 0.3), piece(0.5, 0.9), piece(1.6, 2.0)]
    cut = [joined(piece) for piece in cut_at_pauses(words)]
    assert [(p.start, p.end, len(p.labels)) for p in cut] == [(0.0, 0.9, 2), (1.6, 2.0, 1)]
    endless = [piece(i * 0.4, i * 0.4 + 0.3) for i in range(60)]
    assert all(p[-1].end - p[0].start <= 10.0 for p in cut_at_pauses(endless))
    assert cut_at_pauses([]) == []


def test_the_next_window_begins_in_the_longest_of_the_last_pauses() -> None:
    words = [piece(1.0, 2.0), piece(15.0, 16.0), piece(22.0, 23.0), piece(23.2, 25.0), piece(25.6, 29.9)]
    assert pause_to_go_on_from(words, 30.0) == pytest.approx(25.3)
    assert pause_to_go_on_from(words, 29.99) is None  # the last window of its recording
    assert pause_to_go_on_from([*words[:-1], piece(25.6, 29.4)], 30.0) is None  # ends with a pause
    assert pause_to_go_on_from([piece(0.0, 29.9)], 30.0) is None
    assert pause_to_go_on_from([], 30.0) is None


class Scripted(nn.Module):
    """A model that hears its own script: samples are labels of frames, held for 320 samples each."""

    def __init__(self, adapter: CTCAdapter) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.adapter = adapter

    def logits(self, values: Tensor, frames: Tensor) -> Tensor:
        rows = [values[row, 200::320][: int(count)] for row, count in enumerate(frames)]
        labels = torch.cat(rows).mul(100.0).round().long()
        return 20.0 * nn.functional.one_hot(labels, 32).float()


def test_long_audio_is_read_window_by_window_without_cutting_words(
    adapters: dict[str, CTCAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapters["Wav2Vec2ForCTC"]
    model = Scripted(adapter)
    adapter.extractor.do_normalize = False
    monkeypatch.setattr(type(adapter.network), "states", lambda self, model, batch: batch["input_values"])
    monkeypatch.setattr(
        type(adapter.network),
        "logits",
        lambda self, model, batch, states: model.logits(states, self.frames(batch["lengths"])),
    )
    said = [f"{'abcdefgh'[i % 8]}{'klmnop'[i % 6]}{'rstuv'[i % 5]}" for i in range(90)]
    frames: list[int] = []
    for word in said:
        frames += frames_of(adapter, word, gap=12, blanks=4) + frames_of(adapter, " ", gap=0)
    samples = np.repeat(np.array(frames, dtype=np.float32) / 100.0, 320)
    recognizer = Recognizer(model, adapter, name="scripted", kind="dense", weights_bytes=1)
    found = recognizer.transcribe(samples)
    assert found.text.split() == said
    assert len(samples) > 3 * 480_000 / 2
    assert isinstance(found.segments[0], Segment)
    assert found.segments[-1].end <= found.duration
    starts = [segment.start for segment in found.segments]
    assert starts == sorted(starts)
    # Where no times are wanted, short audio is one piece.
    short = recognizer.transcribe(samples[:160_000], timestamps=False)
    assert len(short.segments) == 1
    assert said[: len(short.text.split()) - 1] == short.text.split()[:-1]
    # Each word is where its labels are, and the words are the text.
    timed = recognizer.transcribe(samples, word_timestamps=True)
    words = [word for segment in timed.segments for word in segment.words or ()]
    assert [word.word.strip() for word in words] == said
    assert timed.text == found.text
    step = 0.02 * len(frames) / len(said)
    assert all(abs(word.end - step * (n + 1)) < 0.5 for n, word in enumerate(words))
    assert all(a.end <= b.start + 1e-6 for a, b in pairwise(words))
    assert all(0.99 < word.probability <= 1.0 for word in words)
    for segment in timed.segments:
        assert segment.words
        assert "".join(word.word for word in segment.words).strip() == segment.text
    # And it streams.
    chunks = (samples[low : low + 32_000] for low in range(0, len(samples), 32_000))
    updates = list(recognizer.stream(chunks, every=2.0))
    assert "".join(update.final for update in updates).split() == said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"initial_prompt": "a"}, "initial prompt"),
        ({"task": "translate"}, "translate"),
    ],
)
def test_what_a_ctc_model_cannot_do_is_said(
    changes: dict[str, object], expected: str, adapters: dict[str, CTCAdapter]
) -> None:
    adapter = adapters["Wav2Vec2ForCTC"]
    recognizer = Recognizer(Scripted(adapter), adapter, name="scripted", kind="dense", weights_bytes=1)
    with pytest.raises(ModelError, match=expected):
        recognizer.transcribe(np.full(16_000, 0.1, np.float32), **changes)
    with pytest.raises(ModelError, match="does not tell languages"):
        recognizer.languages_heard(np.full(16_000, 0.1, np.float32))
