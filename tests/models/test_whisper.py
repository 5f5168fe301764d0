from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, WhisperConfig, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from small_whisper import SPECIAL, logits, small_teacher
from usmlite.audio import log_mel
from usmlite.errors import ModelError
from usmlite.models import Options, TimedText, WhisperAdapter
from usmlite.models.adapter import Said
from usmlite.models.whisper import ENCODER_POSITIONS, IGNORED


@pytest.fixture(scope="module")
def english() -> WhisperAdapter:
    return small_teacher(max_target_positions=40)[1]


@pytest.fixture(scope="module")
def multilingual() -> WhisperAdapter:
    names = [*SPECIAL[:2], "<|en|>", "<|de|>", "<|fr|>", *SPECIAL[2:]]
    vocab = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return WhisperAdapter(WhisperConfig(vocab_size=51_865, max_target_positions=40), tokenizer)


def words(adapter: WhisperAdapter, text: str) -> list[int]:
    return adapter.encode_text(text)


def test_features_are_those_of_the_audio_module(english: WhisperAdapter) -> None:
    samples = torch.randn(2, 480_000, generator=torch.Generator().manual_seed(0)) * 0.1
    features = english.features(samples)
    assert features.shape == (2, 8, 3000)
    assert torch.equal(features, log_mel(samples, 8))
    with pytest.raises(ValueError, match="480000"):
        english.features(samples[:, :1000])


@pytest.mark.parametrize("scale_embedding", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_centred_embedding_computes_the_same_words(scale_embedding: bool, tied: bool) -> None:
    model, adapter = small_teacher(scale_embedding=scale_embedding)
    if not tied:
        model.proj_out.weight = torch.nn.Parameter(torch.randn_like(model.proj_out.weight) + 0.3)
    table = model.model.decoder.embed_tokens.weight
    with torch.no_grad():
        table[:, 2] += 0.5
        before = logits(model).log_softmax(dim=-1)
        adapter.centre(model)
        assert table.mean(dim=0).abs().max() < 1e-6
        assert model.proj_out.weight.mean(dim=0).abs().max() < 1e-6
        after = logits(model).log_softmax(dim=-1)
        again = table.clone()
        adapter.centre(model)
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(again, table, atol=1e-7)


def test_targets_without_timestamps(english: WhisperAdapter) -> None:
    inputs, labels = english.targets([[TimedText(0, 1, " a "), TimedText(1, 2, "b")]], timestamps=[False])
    text = words(english, " a b")
    assert inputs.tolist() == [[english.start, english.no_timestamps, *text]]
    assert labels.tolist() == [[IGNORED, *text, english.end]]
    assert inputs.dtype == labels.dtype == torch.int64


def test_targets_with_timestamps(english: WhisperAdapter) -> None:
    window = [TimedText(0.0, 8.52, "a"), TimedText(8.52, 15.0, "b")]
    inputs, labels = english.targets([window], timestamps=[True])
    zero = english.timestamp_begin
    body = [zero, *words(english, " a"), zero + 426, zero + 426, *words(english, " b"), zero + 750]
    assert inputs.tolist() == [[english.start, *body]]
    assert labels.tolist() == [[*body, english.end]]


def test_targets_of_several_windows_are_padded_and_not_scored(english: WhisperAdapter) -> None:
    long, short = [TimedText(0, 9, "abcdef")], [TimedText(0, 9, "a")]
    inputs, labels = english.targets([long, short, []], timestamps=[True, False, True])
    assert inputs.shape == labels.shape
    text = words(english, " a")
    width = inputs.shape[1]
    pad = width - 2 - len(text)
    assert inputs[1].tolist() == [english.start, english.no_timestamps, *text, *[english.end] * pad]
    assert labels[1].tolist() == [IGNORED, *text, english.end, *[IGNORED] * pad]
    # A window without a word has no times either.
    assert inputs[2, :2].tolist() == [english.start, english.no_timestamps]
    assert labels[2, :3].tolist() == [IGNORED, english.end, IGNORED]


def test_targets_name_the_language_of_a_multilingual_model(multilingual: WhisperAdapter) -> None:
    german, task = (
        multilingual.languages["de"],
        multilingual.tokenizer.convert_tokens_to_ids("<|transcribe|>"),
    )
    inputs, labels = multilingual.targets([[TimedText(0, 1, "a")]], timestamps=[True], language="german")
    assert inputs[0, :3].tolist() == [multilingual.start, german, task]
    assert labels[0, :3].tolist() == [IGNORED, IGNORED, multilingual.timestamp_begin]
    assert (
        multilingual.targets([[]], timestamps=[False], language=None)[0][0, 1] == multilingual.languages["en"]
    )


def test_targets_are_cut_at_the_longest_text_the_model_takes(english: WhisperAdapter) -> None:
    inputs, labels = english.targets([[TimedText(0, 30, "x" * 100)]], timestamps=[False])
    assert inputs.shape == (1, 40)
    assert english.end not in labels[0].tolist()
    assert labels[0, :-1].tolist()[1:] == inputs[0, 2:].tolist()


def test_times_never_run_back_and_stay_in_the_window(english: WhisperAdapter) -> None:
    window = [TimedText(-1.0, 5.0, "a"), TimedText(4.0, 31.0, "b")]
    inputs, _ = english.targets([window], timestamps=[True])
    zero = english.timestamp_begin
    times = [token - zero for token in inputs[0].tolist() if token >= zero]
    assert times == [0, 250, 250, 1500]


def test_flags_must_match_the_windows(english: WhisperAdapter) -> None:
    with pytest.raises(ValueError, match="1 windows but 2"):
        english.targets([[]], timestamps=[True, False])


def test_markup_in_a_text_is_text(english: WhisperAdapter) -> None:
    tokens = words(english, " stop <|endoftext|> <|0.00|>")
    assert max(tokens) < english.end
    assert english.decode_text(tokens) == "stop < |endoftext|> < |0.00|>"
    assert english.decode_text([english.start, *words(english, " a"), english.timestamp_begin + 9]) == "a"


def piece(adapter: WhisperAdapter, start: float | None, text: str, end: float | None) -> list[int]:
    mark = [None if time is None else adapter.timestamp_begin + round(time / 0.02) for time in (start, end)]
    return [token for token in [mark[0], *words(adapter, f" {text}"), mark[1]] if token is not None]


def test_segments_that_are_complete_use_up_the_window(english: WhisperAdapter) -> None:
    tokens = piece(english, 0.0, "a", 2.5) + piece(english, 2.5, "b", 4.0)
    found, seek = english.segments(tokens)
    assert found == (TimedText(0.0, 2.5, "a"), TimedText(2.5, 4.0, "b"))
    assert seek is None


def test_a_segment_that_is_cut_off_is_left_to_the_next_window(english: WhisperAdapter) -> None:
    tokens = piece(english, 0.0, "a", 22.5) + piece(english, 22.5, "b", None)
    assert english.segments(tokens) == ((TimedText(0.0, 22.5, "a"),), 22.5)
    tokens = [*piece(english, 0.0, "a", 22.5), english.timestamp_begin + 1150]
    assert english.segments(tokens) == ((TimedText(0.0, 22.5, "a"),), 22.5)


def test_a_window_that_would_hardly_advance_is_taken_whole(english: WhisperAdapter) -> None:
    tokens = piece(english, 0.0, "a", 0.5) + piece(english, 0.5, "b", None)
    assert english.segments(tokens) == ((TimedText(0.0, 0.5, "a"), TimedText(0.5, 30.0, "b")), None)
    assert english.segments(tokens, min_advance=0.1)[1] == 0.5


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(None, None, (0.0, 30.0)), (0.5, None, (0.0, 0.5)), (0.0, None, (0.0, 30.0)), (0.5, 7.0, (0.5, 7.0))],
)
def test_a_window_without_pairs_is_one_segment(
    english: WhisperAdapter, start: float | None, end: float | None, expected: tuple[float, float]
) -> None:
    assert english.segments(piece(english, start, "a", end)) == ((TimedText(*expected, "a"),), None)


def test_segments_without_text_are_left_out(english: WhisperAdapter) -> None:
    assert english.segments([]) == ((), None)
    zero = english.timestamp_begin
    assert english.segments([zero, zero + 10, zero + 10, *words(english, " a"), zero + 20])[0] == (
        TimedText(0.2, 0.4, "a"),
    )


def test_languages_and_tasks_that_the_model_does_not_know(
    english: WhisperAdapter, multilingual: WhisperAdapter
) -> None:
    assert english.language_code("English") == "en"
    assert multilingual.language_code("FRENCH") == "fr"
    assert multilingual.language_code(None) is None
    with pytest.raises(ModelError, match=r"English.*multilingual model such as base"):
        english.language_code("de")
    with pytest.raises(ModelError, match="en, de, fr"):
        multilingual.language_code("klingon")
    model, _ = small_teacher()
    features = torch.zeros(1, 8, 3000)
    with pytest.raises(ModelError, match="translate"):
        english.decode(model, features, Options(task="translate"))
    with pytest.raises(ModelError, match="transcribe or translate"):
        multilingual.decode(model, features, Options(task="sing"))


def test_decoding_without_timestamps_gives_one_segment() -> None:
    model, adapter = small_teacher()
    (found,) = adapter.decode(model, torch.randn(1, 8, 3000), max_new_tokens=5)
    assert found.language == "en"
    assert len(found.tokens) <= 5
    assert found.segments == ((TimedText(0.0, 30.0, found.text),) if found.text else ())
    assert 0 <= found.no_speech <= 1
    assert found.mean_logprob < 0


def test_what_stands_before_is_hotwords_prompt_and_the_end_of_what_was_said(english: WhisperAdapter) -> None:
    (start,) = (english._backend.token_to_id("<|startofprev|>"),)
    assert english._before(Options(), "") == []
    assert english._before(Options(hotwords=" ", initial_prompt=""), [" "]) == []
    found = english._before(Options(hotwords="ho", initial_prompt="pro"), ["said"])
    assert found == [start, *words(english, " ho pro said")]
    # Half of the 40 positions, with the token that begins it; what was said loses its beginning first.
    found = english._before(Options(hotwords="ho"), ["0123456789abcdefghij"])
    assert found == [start, *words(english, " ho" + "456789abcdefghij")]
    found = english._before(Options(initial_prompt="x" * 50), ["said"])
    assert found == [start, *words(english, " " + "x" * 18)]
    # With its times, where times are asked for.
    spoken = [TimedText(0.0, 1.5, "ab"), TimedText(1.5, 2.0, ""), "cd"]
    at = english.timestamp_begin
    found = english._before(Options(), spoken)
    assert found == [start, at, *words(english, " ab"), at + 75, *words(english, " cd")]
    assert english._before(Options(timestamps=False), spoken) == [start, *words(english, " ab cd")]


def test_prompts_of_any_length_change_each_window_by_itself() -> None:
    model, adapter = small_teacher(max_target_positions=40)
    features = torch.randn(3, 8, 3000, generator=torch.Generator().manual_seed(0))
    previous: list[list[Said]] = [["said"], [], ["another one"]]
    together = adapter.decode(model, features, previous=previous, max_new_tokens=5)
    alone = [
        adapter.decode(model, features[row : row + 1], previous=previous[row : row + 1], max_new_tokens=5)[0]
        for row in range(3)
    ]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert [each.mean_logprob for each in together] == pytest.approx(
        [e.mean_logprob for e in alone], rel=1e-3
    )
    plain = adapter.decode(model, features, max_new_tokens=5)
    assert plain[1].mean_logprob == pytest.approx(together[1].mean_logprob, rel=1e-3)
    assert plain[0].mean_logprob != pytest.approx(together[0].mean_logprob, rel=1e-4)


def test_every_matrix_of_the_model_is_compressible_or_computed() -> None:
    model, adapter = small_teacher(encoder_layers=2, decoder_layers=3)
    kinds = adapter.compressible(model)
    matrices = {name for name, value in model.named_parameters() if value.ndim > 1}
    assert kinds.keys() | adapter.computed(model) == matrices
    assert not kinds.keys() & adapter.computed(model)
    assert [name for name, kind in kinds.items() if kind == "embedding"] == [
        "model.decoder.embed_tokens.weight"
    ]
    assert {kind for name, kind in kinds.items() if "proj" in name or ".fc" in name} == {"linear"}
    assert list(kinds)[:2] == ["model.encoder.conv1.weight", "model.encoder.conv2.weight"]
    assert kinds["model.decoder.embed_positions.weight"] == "positions"


def test_compressible_refuses_another_model() -> None:
    model, _ = small_teacher()
    _, adapter = small_teacher(decoder_layers=2)
    with pytest.raises(ModelError, match=r"layers\.1"):
        adapter.compressible(model)


def test_positions_that_are_no_sinusoids_are_not_computed() -> None:
    model, adapter = small_teacher()
    assert adapter.computed(model) == {ENCODER_POSITIONS}
    assert torch.equal(adapter.compute(ENCODER_POSITIONS), model.get_parameter(ENCODER_POSITIONS))
    model.get_parameter(ENCODER_POSITIONS).data[3, 3] += 0.01
    assert adapter.computed(model) == set()
    with pytest.raises(KeyError):
        adapter.compute("model.encoder.conv1.weight")


def test_the_processor_files_come_back(tmp_path: Path, multilingual: WhisperAdapter) -> None:
    multilingual.generation.suppress_tokens = [1, 2]
    multilingual.config.save_pretrained(tmp_path)
    multilingual.save_processor(tmp_path)
    again = WhisperAdapter.from_directory(tmp_path, multilingual.config)
    assert again.generation.to_dict() == multilingual.generation.to_dict()
    assert again.languages == multilingual.languages == {"en": 258, "de": 259, "fr": 260}
    assert again.encode_text(" abc <") == multilingual.encode_text(" abc <")
    assert again.generation.lang_to_id["<|de|>"] == 259
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.feature_extractor.feature_size == multilingual.config.num_mel_bins
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["sampling_rate"] == 16_000


def test_bad_processor_files_are_refused(tmp_path: Path, english: WhisperAdapter) -> None:
    config = english.config
    with pytest.raises(ModelError, match=r"tokenizer\.json: the tokenizer is missing"):
        WhisperAdapter.from_directory(tmp_path, config)
    english.save_processor(tmp_path)
    good = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(good[: len(good) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        WhisperAdapter.from_directory(tmp_path, config)
    settings = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer.json").write_text(good.replace("<|notimestamps|>", "<|other|>"))
    (tmp_path / "tokenizer_config.json").write_text(settings.replace("<|notimestamps|>", "<|other|>"))
    with pytest.raises(ModelError, match="a token <|notimestamps|>".replace("|", r"\|")):
        WhisperAdapter.from_directory(tmp_path, config)
    (tmp_path / "tokenizer.json").write_text(good)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        WhisperAdapter.from_directory(tmp_path, config)


def test_a_tokenizer_of_another_model_is_refused(english: WhisperAdapter) -> None:
    with pytest.raises(ModelError, match="does not fit the model"):
        WhisperAdapter(WhisperConfig(vocab_size=1000), english.tokenizer)


def test_frequent_words_and_special_tokens_keep_fine_steps(english: WhisperAdapter) -> None:
    ((name, octaves),) = english.octaves().items()
    assert name == "model.decoder.embed_tokens.weight"
    assert octaves.shape == (english.config.vocab_size,)
    assert (octaves[english.end :] == 0).all()
    words = octaves[: english.end]
    assert (words.diff() >= 0).all()
    assert words.min() == 0


def test_words_are_what_is_not_special(english: WhisperAdapter) -> None:
    tokens = torch.tensor([[english.start, 5, english.end], [english.end - 1, english.timestamp_begin, 0]])
    assert english.words(tokens).tolist() == [[False, True, False], [True, False, True]]
