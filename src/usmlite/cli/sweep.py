"""`usmlite sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command
from usmlite.cli.console import complain, make_console, settle_libraries
from usmlite.cli.recipe_flags import SECTIONS, add_recipe_flags, recipe_values
from usmlite.errors import UsmliteError
from usmlite.recipe import build_recipe

EPILOG = """\
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


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands, "sweep", "run many recipes: one table and one picture of WER against bytes",
        EPILOG, run,
    )  # fmt: skip
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="TOML files, see below")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the runs and the table go")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="DIR",
        help="only make the table of an earlier sweep again, from its runs",
    )
    add_recipe_flags(parser, SECTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    values = recipe_values(arguments)
    if arguments.table is not None:
        if arguments.recipes or arguments.out is not None or values:
            raise UsmliteError("--table runs nothing", where="--table", remedy="Give it alone.")
        from usmlite.sweep import remake_table

        remake_table(arguments.table, console=make_console())
        return 0
    if not arguments.recipes or arguments.out is None:
        raise UsmliteError(
            "RECIPE and --out are required", where="usmlite sweep",
            remedy="Or --table DIR, for the table of an earlier sweep.",
        )  # fmt: skip
    from usmlite.grid import expand

    build_recipe(values, where="command line")  # alone first, see `recipe_from`
    runs = expand(arguments.recipes, values)
    settle_libraries()
    from usmlite.sweep import sweep

    failed = sweep(runs, arguments.out, console=make_console())
    for name, error in failed.items():
        complain(f"error: {name}: {error}")
    if failed:
        complain(f"error: {len(failed)} of {len(runs)} runs failed; the same command tries them again")
    return UsmliteError.exit_code if failed else 0
