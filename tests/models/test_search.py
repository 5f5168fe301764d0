from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openai_search import allowed, openai_beams
from small_whisper import lively
from usmlite.models.decoding import DecodingOptions, Prompt, Row, _Decoder, decode_greedily
from usmlite.models.search import decode_by_drawing, decode_with_beams, likeliest
from usmlite.models.windows import likeliest_languages

PROMPT = Prompt(257, [263])
TIMED = DecodingOptions(
    end=256, timestamp_begin=264, no_timestamps=263, no_speech=262, suppress=(7,), max_new_tokens=9
)
PLAIN = replace(TIMED, timestamp_begin=None)


@pytest.mark.parametrize(
    ("seed", "options", "size", "patience", "length_penalty"),
    [(0, PLAIN, 3, 1.0, None), (1, PLAIN, 4, 1.5, 0.6), (2, TIMED, 3, 1.0, None), (3, TIMED, 2, 2.0, 0.0)],
)
def test_beams_are_those_of_openai(
    seed: int, options: DecodingOptions, size: int, patience: float, length_penalty: float | None
) -> None:
    model, encoded = lively(seed, max_target_positions=60)
    with torch.inference_mode():
        free = decode_greedily(model, encoded, PROMPT, options)
        # An end that beams reach at different times.
        text = [token for token in free[0].tokens if token < 256]
        options = replace(options, end=text[len(text) // 2] if text and options is PLAIN else 256)
        found = decode_with_beams(
            model, encoded, PROMPT, options, beam_size=size, patience=patience, length_penalty=length_penalty
        )
        expected = [
            openai_beams(model, row, [257, 263], options, size, patience, length_penalty) for row in encoded
        ]
    assert [row.tokens for row in found] == expected
    assert len({tuple(row.tokens) for row in found}) > 1


def test_one_beam_is_greedy_and_more_are_likelier() -> None:
    model, encoded = lively(4, max_target_positions=60)
    greedy = decode_greedily(model, encoded, PROMPT, PLAIN)
    one = decode_with_beams(model, encoded, PROMPT, PLAIN, beam_size=1)
    assert [row.tokens for row in one] == [row.tokens for row in greedy]
    assert [row.no_speech for row in one] == pytest.approx([row.no_speech for row in greedy])
    five = decode_with_beams(model, encoded, PROMPT, PLAIN, beam_size=5)
    assert sum(row.logprob for row in five) > sum(row.logprob for row in greedy)


def test_draws_repeat_and_do_not_depend_on_the_batch() -> None:
    model, encoded = lively(5, max_target_positions=60)
    draw = {"temperature": 0.8, "best_of": 3, "seed": 7}
    together = decode_by_drawing(model, encoded, PROMPT, TIMED, **draw)
    alone = [decode_by_drawing(model, row[None], PROMPT, TIMED, **draw)[0] for row in encoded]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    other = decode_by_drawing(model, encoded, PROMPT, TIMED, **{**draw, "seed": 8})
    assert [row.tokens for row in together] != [row.tokens for row in other]
    assert {row.temperature for row in together} == {0.8}


def test_draws_near_zero_are_greedy_and_log_probabilities_have_no_temperature() -> None:
    model, encoded = lively(6, max_target_positions=60)
    greedy = decode_greedily(model, encoded, PROMPT, PLAIN)
    cold = decode_by_drawing(model, encoded, PROMPT, PLAIN, temperature=1e-4, best_of=2)
    assert [row.tokens for row in cold] == [row.tokens for row in greedy]
    assert [row.logprob for row in cold] == pytest.approx([row.logprob for row in greedy], abs=1e-3)
    with pytest.raises(ValueError, match="temperature"):
        decode_by_drawing(model, encoded, PROMPT, PLAIN, temperature=0.0, best_of=1)


def test_draws_follow_the_probabilities() -> None:
    model, encoded = lively(7)
    options = replace(PLAIN, max_new_tokens=1)
    with torch.inference_mode():
        ids = torch.tensor([[257, 263]])
        hidden = model.model.decoder(
            ids, encoder_hidden_states=encoded[:1], use_cache=False
        ).last_hidden_state
        chances = (allowed(model.proj_out(hidden[:, -1])[0], [], options) / 2.0).softmax(dim=-1)
    likely = int(chances.argmax())
    found = [
        decode_by_drawing(model, encoded[:1], PROMPT, options, temperature=2.0, best_of=1, seed=seed)[0]
        for seed in range(400)
    ]
    share = sum(row.tokens == [likely] for row in found) / 400
    assert share == pytest.approx(float(chances[likely]), abs=0.08)


def test_what_stands_before_is_told() -> None:
    model, encoded = lively(8, max_target_positions=60)
    before = [[261, 10, 20], [261, 30, 40], [261, 50, 60], [261, 70, 80], [261, 90, 100]]
    prompt = replace(PROMPT, previous=before)
    for rows in (
        decode_greedily(model, encoded, prompt, PLAIN),
        decode_with_beams(model, encoded, prompt, PLAIN, beam_size=1),
    ):
        with torch.inference_mode():
            for row, tokens, heard in zip(rows, before, encoded, strict=True):
                assert row.tokens == openai_beams(model, heard, [*tokens, 257, 263], PLAIN, 1, 1.0, None)


def test_slots_go_on_from_other_slots() -> None:
    model, encoded = lively(9)
    with torch.inference_mode():
        decoder = _Decoder(model, encoded[:3])
        decoder.step(torch.tensor([[257, 1], [257, 2], [257, 3]]))
        decoder.select([0, 0, 2, 2])
        decoder.step(torch.tensor([[4], [5], [6], [7]]))
        decoder.select([3, 2])
        found = decoder.step(torch.tensor([[8], [9]]))[:, 0]
        expected = [
            model.model.decoder(torch.tensor([ids]), encoder_hidden_states=encoded[2:3], use_cache=False)
            for ids in ([257, 3, 7, 8], [257, 3, 6, 9])
        ]
    for row, whole in zip(found, expected, strict=True):
        assert torch.allclose(row, whole.last_hidden_state[0, -1], atol=1e-4)
    with pytest.raises(ValueError, match="side by side"):
        _Decoder(model, encoded[:3]).select([0, 1, 0])


def test_languages_are_told_by_their_probabilities() -> None:
    model, encoded = lively(10)
    languages = {"en": 40, "de": 90, "fr": 150}
    found = likeliest_languages(model, encoded, 257, languages)
    with torch.inference_mode():
        start = torch.full((5, 1), 257)
        hidden = model.model.decoder(start, encoder_hidden_states=encoded, use_cache=False)
        logits = model.proj_out(hidden.last_hidden_state[:, 0])[:, list(languages.values())]
    for row, expected in zip(found, logits.softmax(dim=-1).tolist(), strict=True):
        assert row == pytest.approx(dict(zip(languages, expected, strict=True)), abs=1e-5)
        assert list(row.values()) == sorted(row.values(), reverse=True)


def test_texts_are_ranked_by_length_or_penalty() -> None:
    short, long = Row(0, [1], -1.0), Row(0, [1, 2, 3, 4, 5, 6, 7], -4.0)
    assert likeliest([short, long], None) is long
    assert likeliest([short, long], 0.0) is short
    assert likeliest([Row(0, [], -0.5), short], None).tokens == []
