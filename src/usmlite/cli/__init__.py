"""The command line: thin commands over the library.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import cast

from usmlite.cli import (
    completion,
    compress,
    ctc,
    demo,
    evaluate,
    export,
    info,
    plan,
    push,
    report,
    serve,
    sweep,
    transcribe,
)
from usmlite.cli.arguments import STYLE, Parser
from usmlite.cli.console import complain
from usmlite.errors import UsmliteError

# As --help lists them.
COMMANDS = (
    compress, ctc, sweep, report, evaluate, transcribe, serve, info, plan, push, export, demo, completion
)  # fmt: skip
INTERRUPTED = 130  # as shells report a program ended by Ctrl-C
BROKEN_PIPE = 141  # and by SIGPIPE

MAIN_EPILOG = """\
at once, with the small model that comes along:
  usmlite transcribe interview.wav

the usual way through:
  usmlite info tiny.en --bits 4 --sparsity 2:4       what it would take, before anything is trained
  usmlite plan tiny.en --measure                     what training would take: memory, time
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


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, without anything heavy."""
    from usmlite import __version__

    parser = Parser(
        prog="usmlite",
        description="Compress a speech recognition model to a tenth of its bytes, and measure what it cost.",
        epilog=MAIN_EPILOG,
        **STYLE,
    )
    parser.add_argument("--version", action="version", version=f"usmlite {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parser.set_defaults(parser=parser)  # `usmlite completion` reads it
    for command in COMMANDS:
        command.add(commands)
    return parser


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
            rest = transcribe.sort_out(arguments, rest)
        if rest:
            raise _unknown(parser, command, rest[0])
        if not command:
            parser.print_help(sys.stderr)
            return UsmliteError.exit_code
        code = cast(int, arguments.run(arguments))
        sys.stdout.flush()
        return code
    except UsmliteError as error:
        complain(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        saved = "; what is done is saved, the same command goes on from there"
        complain("interrupted" + (saved if command in ("compress", "ctc", "demo", "sweep") else ""))
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has left (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _unknown(parser: argparse.ArgumentParser, command: str, word: str) -> UsmliteError:
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    chosen = commands.choices[command] if command else parser
    known = [option for action in chosen._actions for option in action.option_strings]
    close = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'?" if close else f"`{chosen.prog} --help` lists what there is."
    return UsmliteError(f"unknown argument {word!r}", where=chosen.prog, remedy=hint)
