"""Beam search with a language model and hotwords, and the alignment of what it finds."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from small_ctc import save_model
from usmlite.errors import ModelError
from usmlite.load import load
from usmlite.models import CTCAdapter, Options, ctc_search, load_teacher
from usmlite.models.alignment import align, collapse
from usmlite.models.ctc_search import written_labels

ARPA = """\\data\\
ngram 1=6
ngram 2=3

\\1-grams:
-2\t<unk>\t0
-2\t<s>\t0
-1\t</s>
-1\tsea\t-0.3
-1\tsee\t-0.3
-1\tme\t-0.3

\\2-grams:
-0.1\t<s> sea
-0.1\tsea me
-0.1\tme </s>

\\end\\
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> CTCAdapter:
    found = load_teacher(save_model(tmp_path_factory.mktemp("model"), "WhisperForCTC")).adapter
    assert isinstance(found, CTCAdapter)
    return found


def frames(adapter: CTCAdapter, chances: list[dict[str, float]]) -> Tensor:
    """Log probabilities of frames: of each letter ("" for the blank), the rest shared by all others."""
    rows = torch.full((len(chances), 32), 1e-6)
    for row, given in zip(rows, chances, strict=True):
        for letter, chance in given.items():
            row[adapter.encode_text(letter)[0] if letter else adapter.blank] = chance
    return rows.log().log_softmax(dim=1)


def heard(adapter: CTCAdapter) -> Tensor:
    """Rather "see me" than "sea me"."""
    said: list[dict[str, float]] = [{"s": 0.99}, {"": 0.99}, {"e": 0.99}, {"": 0.99}]
    said += [{"e": 0.6, "a": 0.4}, {"": 0.99}]
    space = {adapter.tokenizer.word_delimiter_token: 0.99}
    rows = frames(adapter, said)
    after = frames(adapter, [{"m": 0.99}, {"e": 0.99}, {"": 0.99}])
    between = torch.full((1, 32), 1e-6)
    between[0, adapter.tokenizer.convert_tokens_to_ids(next(iter(space)))] = 0.99
    return torch.cat((rows, between.log().log_softmax(dim=1), after))


def say(adapter: CTCAdapter, row: Tensor, options: Options) -> str:
    return adapter._placed(row, 0.02 * len(row), options).text


def test_a_language_model_and_hotwords_change_what_is_said(adapter: CTCAdapter, tmp_path: Path) -> None:
    pytest.importorskip("ctc_beam_decoder")
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    row = heard(adapter)
    assert say(adapter, row, Options()) == "see me"
    assert say(adapter, row, Options(beam_size=8)) == "see me"
    assert say(adapter, row, Options(language_model=str(path))) == "sea me"
    assert say(adapter, row, Options(language_model=str(path), lm_weight=0.0)) == "see me"
    assert say(adapter, row, Options(hotwords="Sea, Tintoretto")) == "sea me"


def test_words_that_were_searched_for_have_times_and_probabilities(adapter: CTCAdapter) -> None:
    pytest.importorskip("ctc_beam_decoder")
    row = heard(adapter)
    options = Options(hotwords="sea", word_timestamps=True)
    found = adapter._placed(row, 0.02 * len(row), options)
    words = [word for segment in found.segments for word in segment.words or ()]
    assert [word.word for word in words] == [" sea", " me"]
    assert [(word.start, word.end) for word in words] == [(0.0, 0.1), (0.14, 0.18)]
    assert words[0].probability == pytest.approx((0.99 * 0.99 * 0.4) ** (1 / 3), abs=0.01)
    assert words[1].probability > 0.97


def test_a_search_without_its_package_says_what_to_install(
    adapter: CTCAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctc_search._decoder.cache_clear()
    for name in ("ctc_beam_decoder", "pyctcdecode"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"usmlite\[lm\]"):
        say(adapter, heard(adapter), Options(beam_size=3))


@pytest.mark.parametrize(
    ("text", "said"),
    [("rubbish\n", "no unigrams"), (ARPA[:80], "cannot be read"), (None, "no such language model")],
)
def test_a_damaged_language_model_is_named(
    text: str | None, said: str, adapter: CTCAdapter, tmp_path: Path
) -> None:
    pytest.importorskip("ctc_beam_decoder")
    path = tmp_path / "words.arpa"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ModelError, match=rf"words\.arpa.*{said}"):
        say(adapter, heard(adapter), Options(language_model=str(path)))


def test_whisper_has_no_use_for_a_language_model() -> None:
    from small_whisper import small_teacher

    model, adapter = small_teacher()
    with pytest.raises(ModelError, match="no use for a word language model"):
        adapter.transcribe(model, [torch.zeros(16_000)], Options(language_model="x.arpa"))


def test_beams_through_the_recognizer(tmp_path: Path) -> None:
    pytest.importorskip("ctc_beam_decoder")
    recognizer = load(save_model(tmp_path, "WhisperForCTC"))
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    found = recognizer.transcribe(noise, beam_size=4, word_timestamps=True)
    assert found.text == recognizer.transcribe_batch([noise], Options(timestamps=False, beam_size=4))[0]


def test_alignment_is_the_likeliest_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for labels in ([1, 2], [1, 1], [2], [1, 2, 1]):
        rows = torch.randn(5, 3, generator=generator).log_softmax(dim=1)
        best = max(
            (
                path
                for path in itertools.product(range(3), repeat=5)
                if [each.label for each in collapse(path, [0.0] * 5, 0, 1.0)] == labels
            ),
            key=lambda path: sum(float(rows[i, label]) for i, label in enumerate(path)),
        )
        assert align(rows, labels, 0).tolist() == list(best)
    assert align(rows, [1, 1, 1, 1], 0).tolist() == [0] * 5  # needs seven frames
    assert align(rows, [], 0).tolist() == [0] * 5


def test_labels_as_the_search_takes_them() -> None:
    tokens = ["<pad>", "<s>", "|", "a", "b"]
    assert written_labels(tokens, 0, "|", ["<pad>", "<s>", "|"]) == ("", "\ue001", " ", "a", "b")
    assert math.prod(len(label) for label in written_labels(tokens, 0, "|", ["<s>"])[1:]) == 1
