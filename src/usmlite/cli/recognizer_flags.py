"""How a model is held and how it searches for texts, as flags of several commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from usmlite.cli.arguments import number, whole

if TYPE_CHECKING:
    from usmlite.models import Options
    from usmlite.runtime import Recognizer

HOLDS = ("float32", "int8", "packed", "mapped")

ACTIVATIONS = ("int8", "float32")
_BEAMS = 5  # as openai/whisper's command line; docs/transcription.md says what they do


def add_hold(parser: argparse.ArgumentParser) -> None:
    """How a packed model's weights stand in memory and are multiplied."""
    parser.add_argument(
        "--hold", choices=HOLDS, default=None,
        help="a packed model's weights in memory: int8 is fastest, packed is smaller, mapped leaves them in "
        "the file (default: int8, or "
        "float32 where usmlite was installed without its native library)",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=ACTIVATIONS, default=ACTIVATIONS[0],
        help="what the native library multiplies int8 and packed weights by: int8 is fastest, float32 "
        f"changes nothing but the order of sums (default: {ACTIVATIONS[0]})",
    )  # fmt: skip


def add_search(parser: argparse.ArgumentParser) -> None:
    """What of `Options` says how texts are searched for; names and defaults as openai/whisper's."""
    add_language_model(parser)
    group = parser.add_argument_group("search (Whisper, and where it says so CTC models)")
    group.add_argument(
        "--beam-size", type=whole(1), metavar="N",
        help="texts followed side by side at temperature 0; 1 is greedy (default: 5, with --mic 1; CTC "
        "models: 1, or 64 with a language model or hotwords)",
    )  # fmt: skip
    group.add_argument(
        "--patience", type=number(0.01, 100.0), default=1.0, metavar="X",
        help="how many times the beam size of finished texts to wait for (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--length-penalty", type=number(0.0, 1.0), metavar="X",
        help="rank finished texts by Wu et al.'s penalty (default: by mean log probability)",
    )  # fmt: skip
    group.add_argument(
        "--best-of",
        type=whole(1),
        default=5,
        metavar="N",
        help="texts drawn above temperature 0 (default: 5)",
    )
    group.add_argument(
        "--temperature", type=number(0.0, 10.0), default=0.0, metavar="T",
        help="0 searches, more draws at random (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--temperature-increment-on-fallback", type=number(0.01, 10.0, none=True), default=0.2, metavar="X",
        help="try again at higher temperatures, up to 1, where a text fails the checks below; none: never "
        "(default: 0.2)",
    )  # fmt: skip
    group.add_argument(
        "--compression-ratio-threshold", type=number(0.0, 100.0, none=True), default=2.4, metavar="X",
        help="a text that zlib shrinks more than this repeats itself (default: 2.4)",
    )  # fmt: skip
    group.add_argument(
        "--logprob-threshold", type=number(-100.0, 0.0, none=True), default=-1.0, metavar="X",
        help="a text of a lower mean log probability is not trusted (default: -1)",
    )  # fmt: skip
    group.add_argument(
        "--no-speech-threshold", type=number(0.0, 1.0, none=True), default=0.6, metavar="P",
        help="silence, if the model says so with more than this and does not trust its text (default: 0.6)",
    )  # fmt: skip
    group.add_argument(
        "--initial-prompt", metavar="TEXT", help="text that stands before: names, spelling, style"
    )
    group.add_argument("--hotwords", metavar="TEXT", help="words to expect (CTC models too)")
    group.add_argument(
        "--condition-on-previous-text", action="store_true",
        help="tell each window of 30 seconds what was said before it; mistakes may carry on",
    )  # fmt: skip


def add_language_model(parser: argparse.ArgumentParser) -> None:
    """What of `Options` says which language model CTC models are searched with."""
    group = parser.add_argument_group('search (CTC models; pip install "usmlite[lm]")')
    group.add_argument(
        "--language-model", metavar="FILE",
        help="a word n-gram model, ARPA or KenLM's binary form, whose words are written as the labels are",
    )  # fmt: skip
    group.add_argument(
        "--lm-weight", type=number(0.0, 100.0), default=0.5, metavar="X",
        help="what its log probability counts (default: 0.5)",
    )  # fmt: skip
    group.add_argument(
        "--lm-bonus", type=number(-100.0, 100.0), default=1.5, metavar="X",
        help="what each word counts with it, so that it does not prefer few words (default: 1.5)",
    )  # fmt: skip


def options_from(arguments: argparse.Namespace, recognizer: Recognizer) -> Options:
    """What `add_search` and the flags for one recording ask for; a server's requests say the latter."""
    from usmlite.models import Options

    given = vars(arguments)
    beams = 1 if given.get("mic") or not recognizer.adapter.searches else _BEAMS
    first, step = arguments.temperature, arguments.temperature_increment_on_fallback
    temperatures = [first]
    while step is not None and temperatures[-1] + step <= 1.0 + 1e-6:
        temperatures.append(round(temperatures[-1] + step, 6))
    return Options(
        word_timestamps=given.get("word_timestamps", False) or given.get("highlight_words", False),
        language=given.get("language"),
        task=given.get("task", "transcribe"),
        beam_size=arguments.beam_size or beams,
        patience=arguments.patience,
        length_penalty=arguments.length_penalty,
        best_of=arguments.best_of,
        temperatures=tuple(temperatures),
        compression_ratio_threshold=arguments.compression_ratio_threshold,
        logprob_threshold=arguments.logprob_threshold,
        no_speech_threshold=arguments.no_speech_threshold,
        initial_prompt=arguments.initial_prompt,
        hotwords=arguments.hotwords,
        language_model=arguments.language_model,
        lm_weight=arguments.lm_weight,
        lm_bonus=arguments.lm_bonus,
    )
