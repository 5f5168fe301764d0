"""`usmlite push`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command
from usmlite.cli.console import settle_libraries

EPILOG = """\
  usmlite push small/ me/whisper-tiny-small --license mit
  usmlite transcribe me/whisper-tiny-small interview.wav

Log in first with `hf auth login`, or set HF_TOKEN. Of a run, the card has the word error rates that the run
measured, also in the form that the hub shows beside the model (model-index); look at it with --dry-run. The
whole model goes in one commit.
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands,
        "push",
        "put a packed model on the Hugging Face hub, with a model card",
        EPILOG,
        run,
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


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    settle_libraries()
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
