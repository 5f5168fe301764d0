"""`usmlite plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command, number
from usmlite.cli.console import make_console, settle_libraries
from usmlite.cli.recipe_flags import SECTIONS, add_recipe_flags, recipe_from, set_once

EPILOG = """\
Nothing is loaded but the model's configuration: a config.json alone will do, of any size. Memory is that of
one training step, traced without allocating; docs/scale.md says how near measurements came.

Devices are names such as 8xH100-80GB, or a TOML file of one's own:
  [[machine]]
  name = "our card"
  count = 4
  memory_gb = 48
  tflops = 180        (dense bfloat16, as the maker states it)
  link_gb = 32        (bytes a second between devices, in GB)

examples:
  usmlite plan tiny.en --measure
  usmlite plan config.json --recipe recipes/conformer-2b/recipe.toml --devices 8xH100-80GB
  usmlite plan openai/whisper-large-v3 --devices 8xA100-40GB --engine fsdp2 --speech-hours 960
  usmlite plan base --batch-size 16 --devices cluster.toml --json
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands, "plan", "what a run would take: memory of every device, time, bytes", EPILOG, run
    )
    parser.add_argument(
        "source", nargs="?", metavar="MODEL",
        help="a config.json, a model directory, a name or a hub id (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file with any of the keys below")
    parser.add_argument(
        "--devices", metavar="LIST", help="such as 8xH100-80GB, or a .toml file (default: this machine)"
    )
    parser.add_argument(
        "--engine", action="append", choices=("single", "ddp", "fsdp2"),
        help="plan this engine only; may be given several times (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--efficiency", type=number(0.01, 1.0), metavar="X",
        help="share of the stated speed that training reaches (default: 0.35)",
    )  # fmt: skip
    parser.add_argument(
        "--speech-hours", type=number(0.01, 1e9), metavar="X",
        help="plan the time to hear so much speech once, instead of the recipe's steps",
    )  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true",
        help="time real steps of the model cut down to one and two layers, on this machine",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_recipe_flags(parser, SECTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    if arguments.source is not None:
        set_once(arguments, "model.source", arguments.source, "MODEL")
    recipe = recipe_from(arguments, arguments.recipe)
    settle_libraries()
    from usmlite.devices import read_devices
    from usmlite.plan import EFFICIENCY, ENGINES, make_plan, plan_table

    plans = [
        make_plan(
            recipe.model.source,
            recipe,
            device,
            engines=arguments.engine or ENGINES,
            efficiency=arguments.efficiency or EFFICIENCY,
            speech_hours=arguments.speech_hours,
            measure=arguments.measure,
        )
        for device in read_devices(arguments.devices)
    ]
    if arguments.json:
        import json

        print(json.dumps([found.to_json() for found in plans], indent=2))
        return 0
    console = make_console()
    for found in plans:
        console.print(plan_table(found))
        for line in found.summary():
            console.print(line, markup=False)
    return 0
