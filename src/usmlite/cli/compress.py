"""`usmlite compress`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command
from usmlite.cli.console import make_console, settle_libraries
from usmlite.cli.recipe_flags import SECTIONS, add_recipe_flags, recipe_from, set_once

EPILOG = """\
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


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands, "compress", "compress a model: plan, fine-tune, pack, measure before and after",
        EPILOG, run,
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
    add_recipe_flags(parser, SECTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    if arguments.source is not None:
        set_once(arguments, "model.source", arguments.source, "MODEL")
    if arguments.no_finetune:
        set_once(arguments, "training.steps", 0, "--no-finetune")
    recipe = recipe_from(arguments, arguments.recipe)
    settle_libraries()
    from usmlite.compress import compress

    compress(recipe, arguments.out, console=make_console())
    return 0
