"""`usmlite ctc`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command
from usmlite.cli.console import make_console, settle_libraries
from usmlite.cli.recipe_flags import add_recipe_flags, recipe_from, set_once
from usmlite.recipe import DENSE_CTC

SECTIONS = ("model", "data", "ctc", "training")

EPILOG = """\
The encoder of a Whisper model gets a new head that gives every 20 ms a letter or nothing (CTC), and both are
fine-tuned. What comes out hears audio of its true length, says each word once, where it heard it, and is a
quarter of the model: DIR is a directory of Transformers, which every other command takes as MODEL.

Every flag but --recipe and --out is a key of the recipe file. Ctrl-C finishes the step and saves; the same
command again goes on from there, also after a kill.

examples:
  usmlite ctc tiny.en --data train/ --dev dev/ --out ctc-tiny/
  usmlite ctc base --data train/ --vocabulary pieces --vocabulary-size 500 --out ctc-base/
  usmlite ctc tiny.en --data unlabelled/ --targets teacher --out ctc-tiny/
  usmlite ctc tiny.en --data train/ --chunk 1.28 --left-chunks 4 --out ctc-streaming/
  usmlite compress ctc-tiny/ --data train/ --dev dev/ --targets text --out ctc-small/
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands, "ctc", "make a dense CTC model of a Whisper model's encoder, to compress", EPILOG, run
    )
    parser.add_argument(
        "source", nargs="?", metavar="MODEL", help="a Whisper model, by name or directory (default: tiny.en)"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="becomes the model's directory"
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file with any of the keys below")
    add_recipe_flags(parser, SECTIONS, defaults=DENSE_CTC)


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    if arguments.source is not None:
        set_once(arguments, "model.source", arguments.source, "MODEL")
    recipe = recipe_from(arguments, arguments.recipe, defaults=DENSE_CTC)
    settle_libraries()
    from usmlite.ctc import train_ctc

    train_ctc(recipe, arguments.out, console=make_console())
    return 0
