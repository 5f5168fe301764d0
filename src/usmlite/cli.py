"""The command line: thin commands over the library.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from usmlite.errors import OutputError, RecipeError, UsmliteError
from usmlite.recipe import Key, Recipe, build_recipe, keys, load_recipe
from usmlite.shipped import DEFAULT

if TYPE_CHECKING:
    from rich.console import Console

    from usmlite.data import Utterance
    from usmlite.evaluate import Evaluation
    from usmlite.models import Options
    from usmlite.report import Report
    from usmlite.runtime import Recognizer
    from usmlite.transcription import Output

INTERRUPTED = 130  # as shells report a program ended by Ctrl-C
BROKEN_PIPE = 141  # and by SIGPIPE
SOME_FAILED = 1
API_KEY = "USMLITE_API_KEY"
HOLDS = ("float32", "int8", "packed")
ACTIVATIONS = ("int8", "float32")
FORMATS = ("txt", "json", "srt", "vtt", "tsv")
REPORTS = ("html", "md", "json", "latex")
EXPORTS = ("transformers", "compressed-tensors", "onnx", "sherpa-onnx", "ctranslate2", "ggml")

_BEAMS = 5  # as openai/whisper's command line; docs/transcription.md says what they do
_SECTIONS = {
    "model": "where to start",
    "data": "speech to train on, choose on and report on",
    "spec": "what each weight becomes",
    "student": "how the student starts and how its masks, scales and bits behave",
    "training": "the fine-tuning",
}

MAIN_EPILOG = """\
at once, with the small model that comes along:
  usmlite transcribe interview.wav

the usual way through:
  usmlite info tiny.en --bits 4 --sparsity 2:4       what it would take, before anything is trained
  usmlite compress tiny.en --data speech/ --out small/
  usmlite evaluate small/packed --data test.jsonl --against tiny.en
  usmlite transcribe small/packed interview.wav --format srt
  usmlite sweep int4.toml int3.toml --data speech/ --test test.jsonl --out study/
  usmlite report small/ study/ --out report.html
  usmlite export small/packed --to ctranslate2 --out small-ct2/
  usmlite serve small/                               an HTTP server with OpenAI's audio API, and a page

MODEL is a name (tiny.en, base, or tiny.en-small, which comes along), a directory of Transformers with a
Whisper or an encoder with a CTC head (wav2vec 2.0, HuBERT, Parakeet, ...), a Whisper directory of CTranslate2
(faster-whisper), a hub id such as openai/whisper-base, or what `usmlite compress` wrote.

Every command explains itself: usmlite COMMAND --help. Errors in what you give it end with exit code 2.
"""

COMPRESS_EPILOG = """\
Every flag but --recipe, --out and --no-finetune is a key of the recipe file too: --learning-rate is
training.learning_rate. A flag wins over the file. The run writes the recipe it really used to
DIR/recipe.toml, so that `usmlite compress --recipe DIR/recipe.toml --out DIR2` repeats it.

Ctrl-C finishes the step and saves; the same command again goes on from there, also after a kill.

examples:
  usmlite compress tiny.en --data speech/ --out small/
  usmlite compress --recipe recipes/tiny.en-int4-2of4.toml --out small/
  usmlite compress base --data train.jsonl --dev dev.jsonl --bits 3 --sparsity dense --out base3/
  usmlite compress tiny.en --data train.jsonl --bits 8 --sparsity dense --no-finetune --out int8/

Rules for single layers stand in the file only, the first match decides:
  [[spec.rules]]
  match = "model.decoder.*"
  bits = 3

So do phases of training, which set learning rates and weights of losses until a share of the steps is over:
  [[training.phases]]
  until = 0.3
  learning_rate = 4e-4
  states = 30.0
"""

EVALUATE_EPILOG = """\
Both texts go through the Whisper English normalizer. The interval is a bootstrap over utterances; with
--against the same utterances are drawn for both models, so that small differences can be told.

examples:
  usmlite evaluate small/packed --data LibriSpeech/test-clean
  usmlite evaluate small/packed --data test.jsonl --against tiny.en --worst 10
  usmlite evaluate tiny.en --data test.jsonl --json dense.json
  usmlite evaluate small/packed --data test.jsonl --against dense.json
"""

TRANSCRIBE_EPILOG = """\
Audio may have any length, rate and number of channels: WAV, FLAC, OGG, Opus or MP3. Of a folder all audio in
it is taken. A file that cannot be read does not stop the others; it is named at the end, and the exit code is
then 1. Ctrl-C leaves the transcripts that are finished.

Without MODEL, tiny.en-small transcribes: English, a tenth of the bytes of tiny.en, inside usmlite itself.

examples:
  usmlite transcribe interview.wav
  usmlite transcribe small/packed interview.wav --word-timestamps --format json
  usmlite transcribe small/packed recordings/ --format all --output-dir transcripts/
  usmlite transcribe lecture.mp3 --vad --beam-size 5 --hotwords Tintoretto
  usmlite transcribe base rede.flac --language de --task translate --format vtt
  usmlite transcribe --mic
"""

SWEEP_EPILOG = """\
RECIPE is a recipe file, or a recipe with a table [grid], whose lists vary keys; every combination is a run:
  [grid]
  "spec.bits" = [8, 4]
  "spec.sparsity" = ["dense", "2:4"]
  name = "study-{spec.bits}-{spec.sparsity}"     (optional)

Single values in [grid] hold for all of its runs, several [[grid]] stand beside each other, and keys that
vary together are written as one: "spec.bits, training.steps" = [[8, 0], [4, 320]]. Flags win over all.

Each run is one of `usmlite compress`, in DIR/NAME. Finished runs are not run again; one that fails is noted
in DIR/NAME/error.json and tried again the next time, and the others go on. The teacher's transcripts are
made once, and the dense model is measured once. Ctrl-C stops; the same command goes on from there. DIR gets
report.html, sweep.md (the table), sweep.json (all figures) and, with pip install "usmlite[plot]", a picture,
sweep.svg and sweep.png.

examples:
  usmlite sweep recipes/paper-grid.toml --data train/ --dev dev/ --test test/ --out study/
  usmlite sweep int4.toml int3.toml --data train/ --test test/ --steps 60 --out short/
  usmlite sweep --table study/
"""

REPORT_EPILOG = """\
RUN is what `usmlite compress` or `usmlite sweep` wrote, or a .json of `usmlite evaluate --json`. The page is
one file: it opens without a network, and may be sent to others. It names no places on this machine, but it
has the words of test speech, and with players some seconds of recordings: --audio 0 leaves these out.

What is missing or damaged in a run is named, and the rest is drawn. A RUN that cannot be read at all ends
with exit code 2, after the others were drawn.

examples:
  usmlite report small/
  usmlite report study/ small/ --out report.html --figures figures/
  usmlite report results/*.json --data LibriSpeech/test-clean --out report.html
  usmlite report study/ --format latex --out table.tex
"""

SERVE_EPILOG = """\
It needs the extra: pip install "usmlite[serve]". The API is OpenAI's: POST /v1/audio/transcriptions and
/v1/audio/translations, GET /v1/models; live audio at ws://HOST:PORT/v1/audio/live; a page at /; /health, and
/metrics for Prometheus. See docs/serving.md.

Requests are decoded side by side. SIGTERM or Ctrl-C ends the server once what it has accepted is answered, a
second one at once. A server that others can reach should have a key, and a proxy for HTTPS in front of it.

examples:
  usmlite serve
  usmlite serve small/packed --port 9000 --beam-size 5
  USMLITE_API_KEY=secret usmlite serve small/ --host 0.0.0.0
"""

INFO_EPILOG = """\
For a dense model: what each weight would become and the bytes it would take, the kept ones too. For a
packed model: what is stored in its file.

examples:
  usmlite info tiny.en --bits 4 --sparsity 2:4
  usmlite info tiny.en --bits 3 --sparsity dense --group 64
  usmlite info base --rules-from recipes/tiny.en-int4-2of4.toml
  usmlite info small/packed --json
"""

PUSH_EPILOG = """\
  usmlite push small/ me/whisper-tiny-small --license mit
  usmlite transcribe me/whisper-tiny-small interview.wav

Log in first with `hf auth login`, or set HF_TOKEN. Of a run, the card has the word error rates that the run
measured, also in the form that the hub shows beside the model (model-index); look at it with --dry-run. The
whole model goes in one commit.
"""

EXPORT_EPILOG = """\
target              for                            --dtype, the first is the default
transformers        Transformers, and all that     float32, float16, bfloat16
                    reads its directories
compressed-tensors  Transformers with the package  auto, int8, int4: linear layers
                    compressed-tensors
onnx                ONNX Runtime (MatMulNBits)     auto, int8, int4, float16, float32
sherpa-onnx         sherpa-onnx                    auto, int8, int4, float16, float32
ctranslate2         faster-whisper                 int8, float16, float32
ggml                whisper.cpp; OUT is a file     auto, f16, q8_0, q5_0, q4_0

The target's own integers and scales are the packed model's wherever it has them; "auto" takes the fewest bits
that hold every weight as it is. What a target has not (entropy-coded codes, N:M, scales of columns) is
widened: the plan says to what, by kind of layer, with the bytes, before anything is written. --plan stops
there. onnx and sherpa-onnx need the extra: pip install "usmlite[onnx]". CTC models go to transformers and
compressed-tensors. What each runtime makes of the files, in words and bytes, is in docs/exports.md.

examples:
  usmlite export small/packed --to ctranslate2 --out small-ct2/
  usmlite export tiny.en-small --to ggml --out ggml-tiny.en-small.bin
  usmlite export small/packed --to onnx --out small-onnx/ --plan
  usmlite export small/packed --to transformers --dtype float16 --out small-float16/
"""

DEMO_EPILOG = """\
It needs the extra: pip install "usmlite[demo]". The speech is synthetic and made on the spot, by one voice:
the word error rates say that the whole flow works, not how good a model is. Results on real speech are in
results/ and in the README.
"""


class _Parser(argparse.ArgumentParser):
    """Reports wrong flags like every other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsmliteError(message, where=self.prog, remedy=f"`{self.prog} --help` explains the flags.")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, without anything heavy."""
    from usmlite import __version__

    parser = _Parser(
        prog="usmlite",
        description="Compress a speech recognition model to a tenth of its bytes, and measure what it cost.",
        epilog=MAIN_EPILOG,
        **_STYLE,
    )
    parser.add_argument("--version", action="version", version=f"usmlite {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_compress(commands)
    _add_sweep(commands)
    _add_report(commands)
    _add_evaluate(commands)
    _add_transcribe(commands)
    _add_serve(commands)
    _add_info(commands)
    _add_push(commands)
    _add_export(commands)
    _add_demo(commands)
    return parser


# Abbreviations would change their meaning when a flag is added.
_STYLE: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


def _command(commands: Any, name: str, short: str, epilog: str, run: Callable[..., int]) -> Any:
    description = f"{short[0].upper()}{short[1:]}."
    parser = commands.add_parser(name, help=short, description=description, epilog=epilog, **_STYLE)
    parser.set_defaults(run=run)
    return parser


def _add_compress(commands: Any) -> None:
    parser = _command(
        commands, "compress", "compress a model: plan, fine-tune, pack, measure before and after",
        COMPRESS_EPILOG, _run_compress,
    )  # fmt: skip
    parser.add_argument(
        "source", nargs="?", metavar="MODEL", help="a name, a model directory or a hub id (default: tiny.en)"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where the run keeps and writes everything"
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file with any of the keys below")
    parser.add_argument(
        "--no-finetune", action="store_true", help="only round and prune, without any training (--steps 0)"
    )
    _add_recipe_flags(parser, _SECTIONS)


def _add_sweep(commands: Any) -> None:
    parser = _command(
        commands, "sweep", "run many recipes: one table and one picture of WER against bytes",
        SWEEP_EPILOG, _run_sweep,
    )  # fmt: skip
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="TOML files, see below")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the runs and the table go")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="DIR",
        help="only make the table of an earlier sweep again, from its runs",
    )
    _add_recipe_flags(parser, _SECTIONS)


def _add_report(commands: Any) -> None:
    parser = _command(
        commands, "report", "look at runs: one page with figures, alignments and recipes; or tables",
        REPORT_EPILOG, _run_report,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directories or .json files")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="where it goes (default: report.html; tables and JSON go to the console)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=REPORTS, default="html",
        help="a page, a table in Markdown or LaTeX, or all figures as JSON (default: html)",
    )  # fmt: skip
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help='the figures as SVG and PNG too (pip install "usmlite[plot]")',
    )
    parser.add_argument(
        "--data", type=Path, action="append", default=[], metavar="D",
        help="the test speech, where it is not in the place that the recipe names; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--worst", type=_whole(0), default=5, metavar="N", help="utterances of each run, aligned (default: 5)"
    )
    parser.add_argument(
        "--audio",
        type=_whole(0),
        default=12,
        metavar="N",
        help="of these with a player, at most (default: 12)",
    )


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", "measure a model's word error rate", EVALUATE_EPILOG, _run_evaluate
    )
    parser.add_argument("source", metavar="MODEL", help="dense, student checkpoint or packed model")
    parser.add_argument(
        "--data", required=True, metavar="D",
        help="speech with text: a manifest.jsonl, a LibriSpeech directory or a folder of audio and .txt",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="OTHER", help="another model, or a .json of an earlier run on the same data"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and transcripts here")
    parser.add_argument(
        "--worst",
        type=_whole(0),
        default=0,
        metavar="N",
        help="show the N worst utterances, aligned (default: 0)",
    )
    parser.add_argument(
        "--batch-size",
        type=_whole(1),
        default=16,
        metavar="N",
        help="utterances decoded together (default: 16)",
    )
    parser.add_argument("--limit", type=_whole(1), metavar="N", help="only the first N utterances")
    _add_hold(parser)


def _add_transcribe(commands: Any) -> None:
    parser = _command(
        commands, "transcribe", "write down what is said in audio files", TRANSCRIBE_EPILOG, _run_transcribe
    )
    parser.add_argument(
        "source", nargs="?", metavar="MODEL",
        help=f"dense, student checkpoint or packed model (default: {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio, or folders of it")
    parser.add_argument("--model", help="the same as MODEL")
    parser.add_argument(
        "--format", choices=(*FORMATS, "all"), default="txt",
        help="plain text, JSON with times, subtitles, or times and text in columns (default: txt)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="one file for each recording, instead of the console"
    )
    parser.add_argument(
        "--language", metavar="CODE", help="such as en or German (default: heard from the speech itself)"
    )
    parser.add_argument(
        "--task", choices=("transcribe", "translate"), default="transcribe",
        help="translate goes into English, with multilingual models (default: transcribe)",
    )  # fmt: skip
    parser.add_argument(
        "--word-timestamps",
        action="store_true",
        help="time and probability of every word, in JSON and WebVTT",
    )
    parser.add_argument(
        "--highlight-words", action="store_true",
        help="underline each word in SRT and WebVTT while it is spoken",
    )  # fmt: skip
    parser.add_argument(
        "--vad", action="store_true",
        help="hear only where somebody speaks, stretches of one recording side by side "
        '(pip install "usmlite[vad]")',
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=_whole(1), default=8, metavar="N",
        help="recordings, or with --vad stretches of them, decoded side by side (default: 8)",
    )  # fmt: skip
    _add_search(parser)
    group = parser.add_argument_group("microphone")
    group.add_argument(
        "--mic", action="store_true",
        help='write down what is said now, until Ctrl-C (pip install "usmlite[mic]")',
    )  # fmt: skip
    group.add_argument(
        "--mic-device", metavar="NAME", help="number or part of the name (default: the system's)"
    )
    group.add_argument(
        "--mic-every", type=_number(0.2, 10.0), default=1.0, metavar="S",
        help="seconds after which the text is made again (default: 1)",
    )  # fmt: skip
    _add_hold(parser)


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands, "serve", "transcribe for others: OpenAI's audio API, live audio, a page", SERVE_EPILOG,
        _run_serve,
    )  # fmt: skip
    parser.add_argument(
        "source", nargs="?", default=DEFAULT, metavar="MODEL",
        help=f"dense, student checkpoint or packed model (default: {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=_whole(0), default=8000, metavar="N", help="0 takes a free one (default: 8000)"
    )
    parser.add_argument("--name", help="what clients call the model (default: as it is called here)")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help=f"keys, one a line, of which clients must send one (or one key in the variable {API_KEY})",
    )  # fmt: skip
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="a web site that may use the server from a browser; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size",
        type=_whole(1),
        default=8,
        metavar="N",
        help="windows decoded side by side (default: 8)",
    )
    parser.add_argument("--access-log", action="store_true", help="log every request")
    group = parser.add_argument_group("limits")
    for flag, metavar, default, text in _LIMITS:
        group.add_argument(
            flag, type=_whole(1), default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    _add_search(parser)
    _add_hold(parser)


_LIMITS = (
    ("--max-upload", "MB", 25, "size of a request"),
    ("--max-audio", "S", 3600, "seconds of one recording"),
    ("--max-requests", "N", 64, "requests in work or waiting"),
    ("--max-live", "N", 4, "sessions of live audio"),
    ("--upload-timeout", "S", 60, "seconds in which a request must have arrived"),
    ("--timeout", "S", 600, "seconds in which it must be answered"),
    ("--stop-timeout", "S", 120, "seconds to wait for answers after SIGTERM"),
)


def _add_search(parser: argparse.ArgumentParser) -> None:
    """What of `Options` says how texts are searched for; names and defaults as openai/whisper's."""
    group = parser.add_argument_group("search (Whisper)")
    group.add_argument(
        "--beam-size", type=_whole(1), metavar="N",
        help="texts followed side by side at temperature 0; 1 is greedy (default: 5, with --mic 1)",
    )  # fmt: skip
    group.add_argument(
        "--patience", type=_number(0.01, 100.0), default=1.0, metavar="X",
        help="how many times the beam size of finished texts to wait for (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--length-penalty", type=_number(0.0, 1.0), metavar="X",
        help="rank finished texts by Wu et al.'s penalty (default: by mean log probability)",
    )  # fmt: skip
    group.add_argument(
        "--best-of",
        type=_whole(1),
        default=5,
        metavar="N",
        help="texts drawn above temperature 0 (default: 5)",
    )
    group.add_argument(
        "--temperature", type=_number(0.0, 10.0), default=0.0, metavar="T",
        help="0 searches, more draws at random (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--temperature-increment-on-fallback", type=_number(0.01, 10.0, none=True), default=0.2, metavar="X",
        help="try again at higher temperatures, up to 1, where a text fails the checks below; none: never "
        "(default: 0.2)",
    )  # fmt: skip
    group.add_argument(
        "--compression-ratio-threshold", type=_number(0.0, 100.0, none=True), default=2.4, metavar="X",
        help="a text that zlib shrinks more than this repeats itself (default: 2.4)",
    )  # fmt: skip
    group.add_argument(
        "--logprob-threshold", type=_number(-100.0, 0.0, none=True), default=-1.0, metavar="X",
        help="a text of a lower mean log probability is not trusted (default: -1)",
    )  # fmt: skip
    group.add_argument(
        "--no-speech-threshold", type=_number(0.0, 1.0, none=True), default=0.6, metavar="P",
        help="silence, if the model says so with more than this and does not trust its text (default: 0.6)",
    )  # fmt: skip
    group.add_argument(
        "--initial-prompt", metavar="TEXT", help="text that stands before: names, spelling, style"
    )
    group.add_argument("--hotwords", metavar="TEXT", help="words to expect")
    group.add_argument(
        "--condition-on-previous-text", action="store_true",
        help="tell each window of 30 seconds what was said before it; mistakes may carry on",
    )  # fmt: skip


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", "show what each weight takes, or would take", INFO_EPILOG, _run_info)
    parser.add_argument("source", metavar="MODEL", help="a dense or packed model")
    parser.add_argument(
        "--rules-from", type=Path, metavar="RECIPE", help="take the [spec] of this recipe; flags win over it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_recipe_flags(parser, ("spec",))


def _add_push(commands: Any) -> None:
    parser = _command(
        commands,
        "push",
        "put a packed model on the Hugging Face hub, with a model card",
        PUSH_EPILOG,
        _run_push,
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="a run, or its packed model")
    parser.add_argument("name", metavar="USER/NAME", help="what it shall be called there")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch (default: the main one)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument(
        "--license", metavar="ID", help="the weights' license in the hub's words, such as mit"
    )
    parser.add_argument("--card", type=Path, metavar="FILE", help="a README.md to take instead")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the model and print the card; nothing is sent"
    )


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", "write a model in the format of another runtime", EXPORT_EPILOG, _run_export
    )
    parser.add_argument("source", metavar="MODEL", help="a packed, dense or student model")
    parser.add_argument("--to", required=True, choices=EXPORTS, metavar="TARGET", help=", ".join(EXPORTS))
    parser.add_argument(
        "--out", required=True, type=Path, metavar="OUT", help="a new or empty directory; of ggml, a new file"
    )
    parser.add_argument("--dtype", metavar="TYPE", help="numbers of the weights there, see below")
    parser.add_argument("--plan", action="store_true", help="only say what would be written")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", "see the whole flow on synthetic speech, in minutes", DEMO_EPILOG, _run_demo
    )
    parser.add_argument(
        "--out", type=Path, default=Path("usmlite-demo"), metavar="DIR",
        help="where the speech and the models go (default: usmlite-demo)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_whole(0), metavar="N", help="optimizer steps, instead of the demo's own"
    )


def _add_hold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hold", choices=HOLDS, default=None,
        help="a packed model's weights in memory: int8 is fastest, packed is smallest (default: int8, or "
        "float32 where usmlite was installed without its native library)",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=ACTIVATIONS, default=ACTIVATIONS[0],
        help="what the native library multiplies int8 and packed weights by: int8 is fastest, float32 "
        f"changes nothing but the order of sums (default: {ACTIVATIONS[0]})",
    )  # fmt: skip


def _add_recipe_flags(parser: argparse.ArgumentParser, sections: Iterable[str]) -> None:
    for section in sections:
        group = parser.add_argument_group(f"[{section}] {_SECTIONS[section]}")
        for key in keys():
            if key.section == section and (key.section, key.name) != ("model", "source"):
                _add_recipe_flag(group, key)
        if section == "model":
            group.add_argument(
                "--model",
                dest="model.source",
                default=argparse.SUPPRESS,
                metavar="MODEL",
                help="the same as MODEL",
            )


def _add_recipe_flag(group: Any, key: Key) -> None:
    # SUPPRESS: only what was given is in the namespace, and so wins over the recipe file.
    settings: dict[str, Any] = {"dest": f"{key.section}.{key.name}", "default": argparse.SUPPRESS}
    text = key.help.replace("%", "%%")
    if "(default:" not in text:
        text += f" (default: {_shown(key.default)})"
    if key.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        names = {int: "N", float: "X", str: "TEXT"}
        settings["metavar"] = "{" + ",".join(key.choices) + "}" if key.choices else names[key.kind]
        settings["type"] = _converter(key)
    group.add_argument(f"--{key.flag}", help=text, **settings)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default is None:
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _converter(key: Key) -> Callable[[str], Any]:
    """Text to the key's type. Ranges and choices are the recipe's business."""

    def convert(text: str) -> Any:
        if key.kind is str or (key.name == "bits" and text == "float"):
            return text
        try:
            return key.kind(text)
        except ValueError:
            expected = "a whole number" if key.kind is int else "a number"
            if key.name == "bits":
                expected += ", or 'float'"
            raise RecipeError(
                "unreadable value", where=f"--{key.flag}", expected=expected, found=repr(text)
            ) from None

    return convert


def _whole(lowest: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        # Of ASCII digits: int() alone would take "1_000" and other scripts.
        if not (text.isascii() and text.isdigit()) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {lowest}, found {text!r}")
        return int(text)

    return convert


def _number(lowest: float, highest: float, *, none: bool = False) -> Callable[[str], float | None]:
    def convert(text: str) -> float | None:
        if none and text.lower() == "none":
            return None
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not lowest <= value <= highest:
            expected = f"a number from {lowest:g} to {highest:g}" + (", or none" if none else "")
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return convert


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 where some of several recordings could not be read, 2 after an error that the
        user can mend, 130 after Ctrl-C.
    """
    command = ""
    try:
        parser = build_parser()
        arguments, rest = parser.parse_known_args(argv)
        command = arguments.command or ""
        if command == "transcribe":
            rest = _sort_out(arguments, rest)
        if rest:
            raise _unknown(parser, command, rest[0])
        if not command:
            parser.print_help(sys.stderr)
            return UsmliteError.exit_code
        code = cast(int, arguments.run(arguments))
        sys.stdout.flush()
        return code
    except UsmliteError as error:
        _complain(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        saved = "; what is done is saved, the same command goes on from there"
        _complain("interrupted" + (saved if command in ("compress", "demo", "sweep") else ""))
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has left (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _sort_out(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """Tells MODEL from the files, which flags may stand between; returns what is neither.

    argparse alone takes the first of several recordings for the model.
    """
    words = [word for word in (arguments.source, *arguments.files) if word is not None]
    # A word after a flag: argparse gave all it had to the words before.
    words += [word for word in rest if not word.startswith("-")]
    arguments.source = arguments.model or DEFAULT
    if words and arguments.model is None and not _is_recording(words[0]):
        arguments.source, *words = words
    if bool(words) == arguments.mic:
        raise UsmliteError(
            "a file and the microphone are named" if words else "no audio file is named",
            where="usmlite transcribe", expected="[MODEL] FILE..., or [MODEL] --mic",
            found=words[0] if words else f"only {arguments.source}",
        )  # fmt: skip
    arguments.files = [Path(word) for word in words]
    return [word for word in rest if word.startswith("-")]


def _is_recording(word: str) -> bool:
    from usmlite.audio import SUFFIXES

    path = Path(word)
    if path.is_dir():
        # Whatever a model's directory is made by, it has one of these.
        marks = ("config.json", "recipe.toml", "model.bin", "student.safetensors")
        return not any((path / mark).is_file() for mark in marks)
    # Models are directories or names; a name may have a dot too (tiny.en), but not these endings.
    return path.is_file() or path.suffix.lower() in SUFFIXES


def _complain(text: str) -> None:
    line = " ".join(text.splitlines())
    print(f"usmlite: {line}", file=sys.stderr, flush=True)


def _unknown(parser: argparse.ArgumentParser, command: str, word: str) -> UsmliteError:
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    chosen = commands.choices[command] if command else parser
    known = [option for action in chosen._actions for option in action.option_strings]
    close = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'?" if close else f"`{chosen.prog} --help` lists what there is."
    return UsmliteError(f"unknown argument {word!r}", where=chosen.prog, remedy=hint)


def _recipe_values(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The recipe keys that were given as flags, by section."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in vars(arguments).items():
        section, dot, key = name.partition(".")
        if dot:
            values.setdefault(section, {})[key] = value
    return values


def recipe_from(arguments: argparse.Namespace, file: Path | None) -> Recipe:
    """The recipe file, if there is one, with the flags on top.

    Raises:
        RecipeError: a wrong flag or file.
        SpecError: a spec that cannot be carried out.
    """
    values = _recipe_values(arguments)
    # Alone first, so that a wrong flag is not put down to the file.
    recipe = build_recipe(values, where="command line")
    return recipe if file is None else load_recipe(file, values)


def _once(arguments: argparse.Namespace, name: str, value: object, flag: str) -> None:
    """Sets a recipe key from a second way to say it, which must not say something else."""
    if vars(arguments).get(name, value) != value:
        raise RecipeError("contradicts another flag", where=flag, found=f"{name} = {vars(arguments)[name]!r}")
    setattr(arguments, name, value)


def _run_compress(arguments: argparse.Namespace) -> int:
    if arguments.source is not None:
        _once(arguments, "model.source", arguments.source, "MODEL")
    if arguments.no_finetune:
        _once(arguments, "training.steps", 0, "--no-finetune")
    recipe = recipe_from(arguments, arguments.recipe)
    _settle_libraries()
    from usmlite.compress import compress

    compress(recipe, arguments.out, console=_console())
    return 0


def _run_sweep(arguments: argparse.Namespace) -> int:
    values = _recipe_values(arguments)
    if arguments.table is not None:
        if arguments.recipes or arguments.out is not None or values:
            raise UsmliteError("--table runs nothing", where="--table", remedy="Give it alone.")
        from usmlite.sweep import remake_table

        remake_table(arguments.table, console=_console())
        return 0
    if not arguments.recipes or arguments.out is None:
        raise UsmliteError(
            "RECIPE and --out are required", where="usmlite sweep",
            remedy="Or --table DIR, for the table of an earlier sweep.",
        )  # fmt: skip
    from usmlite.grid import expand

    build_recipe(values, where="command line")  # alone first, see `recipe_from`
    runs = expand(arguments.recipes, values)
    _settle_libraries()
    from usmlite.sweep import sweep

    failed = sweep(runs, arguments.out, console=_console())
    for name, error in failed.items():
        _complain(f"error: {name}: {error}")
    if failed:
        _complain(f"error: {len(failed)} of {len(runs)} runs failed; the same command tries them again")
    return UsmliteError.exit_code if failed else 0


def _run_report(arguments: argparse.Namespace) -> int:
    out: Path | None = arguments.out
    if out is None and arguments.format == "html":
        out = Path("report.html")
    if out is not None:
        _check_folder(out.parent, out)
    _settle_libraries()
    from usmlite.report import read_report, write_figures
    from usmlite.tables import ComparisonRow, comparison_table

    found = read_report(arguments.runs, arguments.data)
    # Beside a table on standard output, words would be taken for a part of it.
    console = _console(stderr=out is None)
    if arguments.format == "html" and out is not None:
        with console.status("Writing the report"):
            found.write_page(out, worst=arguments.worst, players=arguments.audio)
    else:
        _deliver_table(found, arguments.format, out)
    if out is not None:
        console.print(comparison_table([ComparisonRow.of_result(row) for row in found.rows]))
    for line in found.notes:
        console.print(line, markup=False)
    if arguments.figures is not None:
        with _bar("Drawing") as progress:
            names = write_figures(found.figures(), arguments.figures, progress=progress)
        console.print(f"In {arguments.figures}: {len(names)} files", markup=False)
    if out is not None:
        console.print(f"Report: {out}", markup=False)
    for text in found.unreadable:
        _complain(f"error: {text}")
    return UsmliteError.exit_code if found.unreadable else 0


def _deliver_table(found: Report, form: str, out: Path | None) -> None:
    import json

    from usmlite.atomic import write_bytes

    if form == "json":
        text = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    else:
        text = found.table(form)
    if out is None:
        print(text, flush=True)
    else:
        write_bytes(out, f"{text}\n".encode())


def _run_evaluate(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        _check_folder(arguments.json.parent, arguments.json)
    _settle_libraries()
    from usmlite.atomic import write_json
    from usmlite.data import load_corpus
    from usmlite.evaluate import compare, worst
    from usmlite.tables import comparison_table, difference_line

    utterances = load_corpus(arguments.data, require_text=True)[: arguments.limit]
    found, row = _evaluated(arguments.source, utterances, arguments)
    rows, result = [row], {**found.to_json(), "float32_bytes": row.float32_bytes}
    console = _console()
    difference = None
    if arguments.against is not None:
        other, other_row = _baseline(arguments, utterances, row.float32_bytes)
        difference = compare(found, other)
        rows.insert(0, other_row)
        result |= {"comparison": difference.to_json(), "against": other.to_json()}
    console.print(comparison_table(rows))
    console.print(
        f"{found.name}: {found.substitutions} words substituted, {found.deletions} deleted, "
        f"{found.insertions} inserted, of {found.reference_words}; {found.audio_seconds / 60:.1f} minutes of "
        f"speech in {found.wall_seconds:.1f} s with {found.machine['arithmetic']}; "
        f"peak memory {found.peak_memory_bytes / 1e6:,.0f} MB",
        markup=False,
    )
    if difference is not None:
        console.print(difference_line(difference), markup=False)
    _print_speakers(found, console)
    for text in worst(found, arguments.worst):
        # Aligned text must not be wrapped.
        print(f"\n{text}", flush=True)
    if arguments.json is not None:
        write_json(arguments.json, result)
    return 0


def _evaluated(
    source: str, utterances: Sequence[Utterance], arguments: argparse.Namespace
) -> tuple[Evaluation, Any]:
    from usmlite.evaluate import evaluate
    from usmlite.info import dense_float32_bytes
    from usmlite.load import load
    from usmlite.packed import arithmetic
    from usmlite.tables import ComparisonRow

    recognizer = load(source, hold=arguments.hold, activations=arguments.activations)
    with _bar(f"Evaluating {source}") as progress:
        found = evaluate(
            recognizer.transcribe_batch,
            utterances,
            name=recognizer.name,
            weights_bytes=recognizer.weights_bytes,
            batch_size=arguments.batch_size,
            arithmetic=arithmetic(recognizer.model),
            progress=lambda done, total: progress(done / total),
        )
    return found, ComparisonRow.of(found, dense_float32_bytes(recognizer.adapter.config))


def _baseline(
    arguments: argparse.Namespace, utterances: Sequence[Utterance], float32_bytes: int
) -> tuple[Evaluation, Any]:
    """The other model's evaluation: from an earlier run's JSON, or made now."""
    path = Path(arguments.against)
    if path.suffix != ".json" or not path.is_file():
        return _evaluated(arguments.against, utterances, arguments)
    import json

    from usmlite.evaluate import Evaluation
    from usmlite.tables import ComparisonRow

    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsmliteError("not a readable JSON file", where=path, found=str(error)) from None
    other = Evaluation.from_json(plain, where=str(path))
    return other, ComparisonRow.of(other, float32_bytes)


def _print_speakers(found: Evaluation, console: Console) -> None:
    scored = {name: row for name, row in found.speakers.items() if row["wer"] is not None}
    if len(scored) < 2:
        return
    ordered = sorted(scored, key=lambda name: (scored[name]["wer"], name))
    worst = ", ".join(f"{name} {100 * (scored[name]['wer'] or 0):.1f} %" for name in reversed(ordered[-5:]))
    best = ", ".join(f"{name} {100 * (scored[name]['wer'] or 0):.1f} %" for name in ordered[:3])
    console.print(f"{len(scored)} speakers; worst {worst}; best {best}", markup=False)


def _run_transcribe(arguments: argparse.Namespace) -> int:
    formats = FORMATS if arguments.format == "all" else (arguments.format,)
    if arguments.format == "all" and arguments.output_dir is None:
        raise UsmliteError("several formats need files", where="--format all", remedy="Add --output-dir DIR.")
    if arguments.vad and (arguments.condition_on_previous_text or arguments.mic):
        other = "--mic" if arguments.mic else "--condition-on-previous-text"
        raise UsmliteError("contradicts --vad", where=other, remedy="Leave one of them out.")
    _settle_libraries()
    from usmlite.transcription import Output, recordings

    names = recordings(arguments.files)
    output = Output(formats, arguments.output_dir, arguments.highlight_words, len(names) > 1)
    output.prepare(names)
    if arguments.mic:
        return _run_microphone(arguments, output)
    from usmlite.load import load
    from usmlite.transcription import Outcome, transcribe_files

    recognizer = load(arguments.source, hold=arguments.hold, activations=arguments.activations)
    outcome = Outcome()
    try:
        with _bar("Transcribing") as progress:
            transcribe_files(
                recognizer, names, output, outcome, _options(arguments, recognizer),
                batch_size=arguments.batch_size, vad=arguments.vad, progress=progress,
                condition_on_previous_text=arguments.condition_on_previous_text,
            )  # fmt: skip
    except KeyboardInterrupt:
        _complain(f"{outcome.written} of {len(names)} transcripts are finished")
        raise
    finally:
        for problem in outcome.bad:
            _complain(f"error: {problem}")
    if not outcome.bad:
        return 0
    if len(names) == 1:
        return UsmliteError.exit_code
    _complain(f"error: {len(outcome.bad)} of {len(names)} files could not be transcribed")
    return SOME_FAILED


def _options(arguments: argparse.Namespace, recognizer: Recognizer) -> Options:
    """What `_add_search` and the flags for one recording ask for; a server's requests say the latter."""
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
    )


def _run_microphone(arguments: argparse.Namespace, output: Output) -> int:
    from usmlite.load import load
    from usmlite.microphone import Microphone
    from usmlite.transcription import LiveText, transcribe_live

    microphone = Microphone(arguments.mic_device)
    recognizer = load(arguments.source, hold=arguments.hold, activations=arguments.activations)
    _complain("listening; Ctrl-C ends")
    # What comes as text is shown as it comes; all other formats need the whole.
    live = LiveText() if output.folder is not None or output.formats == ("txt",) else None
    found = transcribe_live(
        recognizer,
        microphone,
        _options(arguments, recognizer),
        live or (lambda update: None),
        every=arguments.mic_every,
    )
    if live is not None:
        live.close()
    if output.folder is not None or live is None:
        output.deliver(found, "microphone", Path(time.strftime("microphone-%Y%m%d-%H%M%S")))
    return 0


def _run_serve(arguments: argparse.Namespace) -> int:
    keys = _api_keys(arguments.api_key_file)
    _settle_libraries()
    try:
        from usmlite.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("usmlite"):
            raise
        raise UsmliteError(
            "the server needs packages that are not installed", where="usmlite serve", found=str(error),
            remedy='pip install "usmlite[serve]"',
        ) from error  # fmt: skip
    from usmlite.load import load
    from usmlite.serve.limits import MEGABYTE, Limits
    from usmlite.serve.service import Settings

    limits = Limits(
        upload_bytes=arguments.max_upload * MEGABYTE,
        # Room for ten of the largest.
        held_bytes=10 * arguments.max_upload * MEGABYTE,
        audio_seconds=arguments.max_audio,
        held_seconds=4 * arguments.max_audio,
        requests=arguments.max_requests,
        live=arguments.max_live,
        upload_seconds=arguments.upload_timeout,
        request_seconds=arguments.timeout,
    )
    recognizer = load(arguments.source, hold=arguments.hold, activations=arguments.activations)
    settings = Settings(
        name=arguments.name or _served_name(arguments.source),
        options=_options(arguments, recognizer),
        limits=limits,
        keys=keys,
        batch_size=arguments.batch_size,
        conditioned=arguments.condition_on_previous_text,
        origins=tuple(arguments.allow_origin),
    )
    if not keys and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        _complain(f"warning: without an API key, whoever reaches {arguments.host} can use this server")
    serve(
        recognizer, settings, host=arguments.host, port=arguments.port,
        stop_seconds=arguments.stop_timeout, access_log=arguments.access_log,
        ready=lambda address: print(f"Serving {settings.name} on {address} (Ctrl-C stops)", flush=True),
    )  # fmt: skip
    return 0


def _api_keys(file: Path | None) -> tuple[str, ...]:
    """Keys from the file and from the environment; the command line would show them to everybody."""
    keys = [os.environ[API_KEY]] if os.environ.get(API_KEY) else []
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UsmliteError("the API keys cannot be read", where=file, found=str(error)) from None
        keys += [line for line in found if line]
        if not any(found):
            raise UsmliteError("there is no API key in the file", where=file, expected="one a line")
    return tuple(keys)


def _served_name(source: str) -> str:
    """What a model is called where its directory is nobody's business."""
    path = Path(source)
    if not path.exists():
        return source
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "packed" else resolved.name


def _run_info(arguments: argparse.Namespace) -> int:
    recipe = recipe_from(arguments, arguments.rules_from)
    if recipe.spec.target_size is not None:
        raise RecipeError(
            "a target size is reached by measuring, which info does not do",
            where="spec.target_size",
            remedy="Run 'usmlite compress' with it, and --rules-from its spec.toml afterwards.",
        )
    _settle_libraries()
    from usmlite.info import describe, information_table

    found = describe(arguments.source, recipe.spec.build())
    if arguments.json:
        import json

        print(json.dumps(found.to_json(), indent=2))
        return 0
    console = _console()
    console.print(information_table(found))
    for line in found.summary():
        console.print(line, markup=False)
    return 0


def _run_push(arguments: argparse.Namespace) -> int:
    _settle_libraries()
    from usmlite.push import prepare, push

    if arguments.dry_run:
        _, text = prepare(arguments.source, arguments.name, license_id=arguments.license, card=arguments.card)
        print(text, end="", flush=True)
        return 0
    address = push(
        arguments.source,
        arguments.name,
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message,
        license_id=arguments.license,
        card=arguments.card,
    )
    print(address, flush=True)
    return 0


def _run_export(arguments: argparse.Namespace) -> int:
    _settle_libraries()
    from usmlite.export import TARGETS, check_new, open_source, plan_export, write_export

    target = TARGETS[arguments.to]
    if not arguments.plan:
        # Before the model is read, not after it.
        target.check_packages()
        check_new(target, arguments.out)
    console = _console()
    with console.status("Reading the model"):
        source = open_source(arguments.source)
        plan = plan_export(source, arguments.to, arguments.dtype)
    console.print(plan.table(source.name))
    console.print(plan.summary(), markup=False)
    if arguments.plan:
        return 0
    with _bar(f"Writing {arguments.out}") as progress:
        write_export(source, plan, arguments.out, progress=progress)
    console.print(f"Written: {arguments.out}", markup=False)
    return 0


def _run_demo(arguments: argparse.Namespace) -> int:
    _settle_libraries()
    from usmlite.demo import run_demo

    run_demo(arguments.out, console=_console(), steps=arguments.steps)
    return 0


def _check_folder(folder: Path, where: Path) -> None:
    # Before the work, not after it.
    if not folder.is_dir():
        raise OutputError(
            "no such directory", where=where, expected=f"a directory {folder}", remedy=f"mkdir -p {folder}"
        )


def _settle_libraries() -> None:
    """Keeps the libraries' own advice off the console, but not their errors; lets their threads sleep."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for work spin, unless told otherwise, on cores that somebody else may need: two
    # threads on two busy cores transcribed at a quarter of the speed of one (docs/performance.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        # Files and pipes have no width of their own, and 80 columns would fold the tables.
        console.width = max(console.width, 120)
    return console


@contextmanager
def _bar(label: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error while it is a terminal; calls give the share that is done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda share: bar.update(task, completed=share)
