"""The parser of the command line, and the kinds of values that flags take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from usmlite.errors import UsmliteError


class Parser(argparse.ArgumentParser):
    """Reports wrong flags like every other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """In the place of printing the usage and leaving."""
        raise UsmliteError(message, where=self.prog, remedy=f"`{self.prog} --help` explains the flags.")


# Abbreviations would change their meaning when a flag is added.
STYLE: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


def add_command(commands: Any, name: str, short: str, epilog: str, run: Callable[..., int]) -> Any:
    """A command's parser; `run` gets what is parsed and returns the exit code."""
    description = f"{short[0].upper()}{short[1:]}."
    parser = commands.add_parser(name, help=short, description=description, epilog=epilog, **STYLE)
    parser.set_defaults(run=run)
    return parser


def whole(lowest: int) -> Callable[[str], int]:
    """Text to a whole number that is not below `lowest`."""

    def convert(text: str) -> int:
        # Of ASCII digits: int() alone would take "1_000" and other scripts.
        if not (text.isascii() and text.isdigit()) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {lowest}, found {text!r}")
        return int(text)

    return convert


def number(lowest: float, highest: float, *, none: bool = False) -> Callable[[str], float | None]:
    """Text to a number between the two; with `none`, "none" is None."""

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
