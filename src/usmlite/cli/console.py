"""What commands print, and where."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from usmlite.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console


def complain(text: str) -> None:
    """One line on standard error."""
    line = " ".join(text.splitlines())
    print(f"usmlite: {line}", file=sys.stderr, flush=True)


def make_console(*, stderr: bool = False) -> Console:
    """What tables are printed to."""
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        # Files and pipes have no width of their own, and 80 columns would fold the tables.
        console.width = max(console.width, 120)
    return console


@contextmanager
def bar(label: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error while it is a terminal; calls give the share that is done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def check_folder(folder: Path, where: Path) -> None:
    """That `where` can be written, before the work and not after it.

    Raises:
        OutputError: there is no such folder.
    """
    if not folder.is_dir():
        raise OutputError(
            "no such directory", where=where, expected=f"a directory {folder}", remedy=f"mkdir -p {folder}"
        )


def settle_libraries() -> None:
    """Keeps the libraries' own advice off the console, but not their errors; lets their threads sleep."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for work spin, unless told otherwise, on cores that somebody else may need: two
    # threads on two busy cores transcribed at a quarter of the speed of one (docs/performance.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
