"""`usmlite info`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command
from usmlite.cli.console import make_console, settle_libraries
from usmlite.cli.recipe_flags import add_recipe_flags, recipe_from
from usmlite.errors import RecipeError

EPILOG = """\
For a dense model: what each weight would become and the bytes it would take, the kept ones too. For a
packed model: what is stored in its file.

examples:
  usmlite info tiny.en --bits 4 --sparsity 2:4
  usmlite info tiny.en --bits 3 --sparsity dense --group 64
  usmlite info base --rules-from recipes/tiny.en-int4-2of4.toml
  usmlite info small/packed --json
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(commands, "info", "show what each weight takes, or would take", EPILOG, run)
    parser.add_argument("source", metavar="MODEL", help="a dense or packed model")
    parser.add_argument(
        "--rules-from", type=Path, metavar="RECIPE", help="take the [spec] of this recipe; flags win over it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_recipe_flags(parser, ("spec",))


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    recipe = recipe_from(arguments, arguments.rules_from)
    if recipe.spec.target_size is not None:
        raise RecipeError(
            "a target size is reached by measuring, which info does not do",
            where="spec.target_size",
            remedy="Run 'usmlite compress' with it, and --rules-from its spec.toml afterwards.",
        )
    settle_libraries()
    from usmlite.info import describe, information_table

    found = describe(arguments.source, recipe.spec.build())
    if arguments.json:
        import json

        print(json.dumps(found.to_json(), indent=2))
        return 0
    console = make_console()
    console.print(information_table(found))
    for line in found.summary():
        console.print(line, markup=False)
    return 0
