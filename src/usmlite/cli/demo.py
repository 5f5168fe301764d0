"""`usmlite demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command, whole
from usmlite.cli.console import make_console, settle_libraries

EPILOG = """\
It needs the extra: pip install "usmlite[demo]". The speech is synthetic and made on the spot, by one voice:
the word error rates say that the whole flow works, not how good a model is. Results on real speech are in
results/ and in the README.
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(commands, "demo", "see the whole flow on synthetic speech, in minutes", EPILOG, run)
    parser.add_argument(
        "--out", type=Path, default=Path("usmlite-demo"), metavar="DIR",
        help="where the speech and the models go (default: usmlite-demo)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=whole(0), metavar="N", help="optimizer steps, instead of the demo's own"
    )


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    settle_libraries()
    from usmlite.demo import run_demo

    run_demo(arguments.out, console=make_console(), steps=arguments.steps)
    return 0
