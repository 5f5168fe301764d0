"""`usmlite completion`."""

from __future__ import annotations

import argparse
from typing import Any

from usmlite.cli.arguments import add_command

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
# By their metavars: what is somewhere on the disk. A MODEL may be a name too, which a shell cannot know.
FOLDERS = ("DIR",)
FILES = ("FILE", "PATH", "MODEL", "OTHER", "RECIPE", "RUN", "OUT", "D")

EPILOG = """\
bash, in ~/.bashrc:                      eval "$(usmlite completion bash)"
zsh, in ~/.zshrc after compinit:         eval "$(usmlite completion zsh)"
fish, in ~/.config/fish/config.fish:     usmlite completion fish | source
tcsh:                                    usmlite completion tcsh > ~/.usmlite.tcsh, and source that
PowerShell, in $PROFILE:                 usmlite completion powershell | Out-String | Invoke-Expression
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(
        commands, "completion", "print what lets a shell complete commands and flags", EPILOG, run
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    import shtab

    parser: argparse.ArgumentParser = arguments.parser
    _mark_paths(parser, shtab.FILE, shtab.DIRECTORY)
    print(shtab.complete(parser, arguments.shell), flush=True)
    return 0


def _mark_paths(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Tells shtab by `complete`, its attribute of actions, which words are paths."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command, file, folder)
        elif action.choices is None and action.metavar in (*FOLDERS, *FILES):
            vars(action)["complete"] = folder if action.metavar in FOLDERS else file
