"""Progress bars of a run: of one stage, and of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from usmlite import finetune as training
from usmlite import tables


@contextmanager
def stage_bar(console: Console, label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left; calls give what is done, and of how many."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)

        def progress(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield progress


@contextmanager
def training_bar(console: Console, total: int) -> Iterator[Callable[[training.Progress], None]]:
    """A bar with loss, WER and time left; lines now and then where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Training", total=total)
        told = 0
        losses: list[float] = []

        def curve(width: int = 24) -> str:
            return tables.sparkline(losses, width, ascii_only=console.options.ascii_only)

        def tell(now: training.Progress) -> None:
            nonlocal told
            losses.append(now.losses["loss"])
            wer = "" if now.dev_wer is None else f" dev WER {100 * now.dev_wer:.1f} %"
            text = f"loss {now.losses['loss']:.3f} kl {now.losses['kl']:.3f}{wer}"
            bar.update(task, completed=now.step, description=f"{curve()} {text}")
            told += 1
            left = (now.total - now.step) * now.seconds_per_step
            if told == 3:
                console.print(
                    f"{now.seconds_per_step:.1f} s a step: about {left / 60:.0f} minutes to go. "
                    "Ctrl-C saves; the same command resumes."
                )
            elif not console.is_terminal and now.step % 25 == 0:
                console.print(
                    f"step {now.step}/{now.total} {text} mask churn {now.churn:.4f} {left / 60:.1f} min left"
                )

        yield tell
    if losses:
        console.print(f"Loss {curve(48)} {losses[0]:.3f} to {losses[-1]:.3f}", markup=False)
