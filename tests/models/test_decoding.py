from __future__ import annotations

import random

import pytest
import torch

from openai_search import openai_rules
from small_whisper import lively, small_student, small_teacher
from usmlite.models import Options
from usmlite.models.decoding import TIMESTAMPS, Chooser, DecodingOptions, Prompt, Row, decode_greedily


def heard(model: torch.nn.Module, ids: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.model.decoder(
        ids, encoder_hidden_states=encoded, use_cache=False
    ).last_hidden_state
    return hidden


def without_cache(
    model: torch.nn.Module, encoded: torch.Tensor, prompt: list[int], options: DecodingOptions
) -> tuple[list[int], float]:
    """The same in a few lines: the whole text through the whole model for every token."""
    tokens: list[int] = []
    logprob = 0.0
    for step in range(options.max_new_tokens):
        ids = torch.tensor([[*prompt, *tokens]])
        hidden = model.model.decoder(
            ids, encoder_hidden_states=encoded[None], use_cache=False
        ).last_hidden_state
        logits = model.proj_out(hidden[:, -1])[0].detach()
        forbidden = [*options.suppress, options.no_timestamps, *(options.suppress_first if step == 0 else ())]
        logits[forbidden] = -torch.inf
        token = int(logits.argmax())
        logprob += float(logits.log_softmax(dim=0)[token])
        if token == options.end:
            break
        tokens.append(token)
    return tokens, logprob


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_with_a_cache_says_what_each_row_says_alone(seed: int) -> None:
    model, encoded = lively(seed, encoder_layers=1, decoder_layers=2, max_target_positions=90)
    options = DecodingOptions(
        end=0, timestamp_begin=None, no_timestamps=263, no_speech=262, max_new_tokens=75
    )
    with torch.inference_mode():
        free = [without_cache(model, row, [257, 263], options)[0] for row in encoded]
    # An end token that rows reach at different times, so that the batch shrinks from several places.
    common = [token for token in free[0] if sum(token in row for row in free) >= 3]
    end = common[0] if common else free[2][5]
    options = DecodingOptions(
        end=end, timestamp_begin=None, no_timestamps=263, no_speech=262, suppress=(7,),
        suppress_first=(free[0][0],), max_new_tokens=75,
    )  # fmt: skip
    rows = decode_greedily(model, encoded, Prompt(257, [263]), options)
    with torch.inference_mode():
        expected = [without_cache(model, row, [257, 263], options) for row in encoded]
    assert [row.tokens for row in rows] == [tokens for tokens, _ in expected]
    assert [row.logprob for row in rows] == pytest.approx([logprob for _, logprob in expected], abs=1e-2)
    assert [row.index for row in rows] == list(range(5))
    assert len({len(row.tokens) for row in rows}) > 1


def test_the_text_never_outgrows_the_model() -> None:
    model, encoded = lively(0, max_target_positions=12)
    options = DecodingOptions(end=0, timestamp_begin=None, no_timestamps=263, no_speech=262, suppress=(0,))
    rows = decode_greedily(model, encoded, Prompt(257, [263]), options)
    assert {len(row.tokens) for row in rows} == {10}


def test_no_speech_is_read_off_the_first_token() -> None:
    model, encoded = lively(1)
    options = DecodingOptions(end=0, timestamp_begin=None, no_timestamps=263, no_speech=262, max_new_tokens=1)
    rows = decode_greedily(model, encoded, Prompt(257, [263]), options)
    with torch.inference_mode():
        start = torch.full((5, 1), 257)
        hidden = heard(model, start, encoded)
        expected = model.proj_out(hidden[:, 0]).softmax(dim=-1)[:, 262]
    assert [row.no_speech for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_language_is_found_for_each_row() -> None:
    model, encoded = lively(2)
    options = DecodingOptions(
        end=0, timestamp_begin=None, no_timestamps=263, no_speech=None, max_new_tokens=6
    )
    languages = (40, 90, 150, 200)
    prompt = Prompt(257, lambda found: [found, 260, 263], languages)
    rows = decode_greedily(model, encoded, prompt, options)
    with torch.inference_mode():
        start = torch.full((5, 1), 257)
        hidden = heard(model, start, encoded)
        scores = model.proj_out(hidden[:, 0])[:, list(languages)]
        found = [languages[index] for index in scores.argmax(dim=-1).tolist()]
        expected = [
            without_cache(model, row, [257, language, 260, 263], options)[0]
            for row, language in zip(encoded, found, strict=True)
        ]
    assert [row.language for row in rows] == found
    assert [row.tokens for row in rows] == expected


def test_a_student_with_replaced_layers_decodes(subtests: pytest.Subtests) -> None:
    student, adapter = small_student()
    features = torch.randn(2, 8, 3000, generator=torch.Generator().manual_seed(0))
    plain = adapter.decode(student, features, max_new_tokens=8)
    with subtests.test("autocast"), torch.autocast("cpu", torch.bfloat16):
        assert len(adapter.decode(student, features, max_new_tokens=8)) == 2
    with subtests.test("bfloat16"):
        model, other = small_teacher()
        assert len(other.decode(model.bfloat16(), features, Options(), max_new_tokens=8)) == 2
    with subtests.test("the same as its own forward pass"), torch.inference_mode():
        ids = torch.tensor([[adapter.start, adapter.no_timestamps]]).expand(2, -1)
        logits = student(input_features=features, decoder_input_ids=ids).logits[:, -1]
        forbidden = {*adapter.generation.suppress_tokens, *adapter.generation.begin_suppress_tokens}
        logits[
            :, [token for token in {*forbidden, adapter.no_timestamps} if token < logits.shape[1]]
        ] = -torch.inf
        first = [result.tokens[0] if result.tokens else adapter.end for result in plain]
        assert first == logits.argmax(dim=-1).tolist()


OPTIONS = DecodingOptions(
    end=60, timestamp_begin=70, no_timestamps=69, no_speech=68, suppress=(3, 61), suppress_first=(4, 60)
)
HISTORIES = [
    [70], [75, 5], [75, 5, 90], [75, 5, 90, 90], [75, 5, 90, 90, 6], [75, 5, 90, 90, 6, 120], [70, 5, 6, 7],
    [70, 5, 70 + TIMESTAMPS - 1], [70, 5, 70 + TIMESTAMPS - 1, 70 + TIMESTAMPS - 1, 8],
]  # fmt: skip


@pytest.mark.parametrize("lean", [-4.0, 0.0, 4.0])
@pytest.mark.parametrize("histories", [[[]] * 9, HISTORIES])
def test_timestamps_follow_the_rules_of_openai(lean: float, histories: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(int(lean) + 7)
    choose = Chooser(OPTIONS, torch.device("cpu"))
    for _ in range(20):
        logits = torch.randn(len(histories), 70 + TIMESTAMPS, generator=generator)
        logits[:, 70:] += lean - 3
        expected = [openai_rules(row, tokens, OPTIONS) for row, tokens in zip(logits, histories, strict=True)]
        rows = [Row(index, list(tokens)) for index, tokens in enumerate(histories)]
        tokens, logprobs = choose(logits, rows)
        assert tokens.tolist() == [int(row.argmax()) for row in expected]
        assert logprobs.tolist() == pytest.approx(
            [float(row.log_softmax(dim=0).max()) for row in expected], abs=1e-4
        )


def test_timestamps_in_a_whole_text_come_in_rising_pairs() -> None:
    model, encoded = lively(3, max_target_positions=60)
    generator = random.Random(0)
    options = DecodingOptions(
        end=256, timestamp_begin=264, no_timestamps=263, no_speech=262,
        suppress=tuple(generator.sample(range(256), 20)),
    )  # fmt: skip
    for row in decode_greedily(model, encoded, Prompt(257, []), options):
        times = [token - 264 for token in row.tokens if token >= 264]
        assert row.tokens[0] >= 264
        assert times == sorted(times)
        assert times[0] <= 50
