"""What an export makes of each tensor, summed by kind of layer: said before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from usmlite.export.source import Source, Stored
from usmlite.tables import readable_bytes


@dataclass(frozen=True)
class Becomes:
    """What one tensor is in the other format.

    Attributes:
        name: the tensor.
        form: in words, such as "int8, blocks of 32".
        bytes: what it takes there, scales included.
        exact: whether its numbers stay the same.
    """

    name: str
    form: str
    bytes: int
    exact: bool


@dataclass(frozen=True)
class Change:
    """All tensors of one kind that go the same way.

    Attributes:
        kind: "linear", "conv1d", "embedding", "positions" or "other".
        before: how they were stored.
        after: how they will be.
        exact: whether their numbers stay the same.
        count: how many there are.
        bytes_before: of all of them.
        bytes_after: of all of them.
    """

    kind: str
    before: str
    after: str
    exact: bool
    count: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Plan:
    """What an export will write.

    Attributes:
        target: its name.
        form: the numbers that were asked for, such as "int8".
        changes: by kind of layer and form.
    """

    target: str
    form: str
    changes: tuple[Change, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(change.bytes_before for change in self.changes)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors in the export, without headers, tokenizer and the like."""
        return sum(change.bytes_after for change in self.changes)

    @property
    def exact(self) -> bool:
        """Whether every weight keeps its numbers."""
        return all(change.exact for change in self.changes)

    def table(self, name: str) -> Table:
        """Draws it for the console, with the sums of bytes below.

        Args:
            name: the model's.
        """
        table = Table(title=f"{name} to {self.target}, {self.form}", title_justify="left", show_footer=True)
        table.add_column("kind")
        table.add_column("tensors", justify="right")
        table.add_column("stored as", overflow="fold")
        table.add_column("bytes", justify="right", footer=f"{self.bytes_before:,}")
        table.add_column("becomes", overflow="fold")
        table.add_column("bytes", justify="right", footer=f"{self.bytes_after:,}")
        table.add_column("numbers")
        for row in self.changes:
            table.add_row(
                row.kind, f"{row.count}", Text(row.before), f"{row.bytes_before:,}", Text(row.after),
                f"{row.bytes_after:,}", "as they are" if row.exact else "rounded",
            )  # fmt: skip
        return table

    def summary(self) -> str:
        """The sums, in words."""
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        kept = "every number stays as it is" if self.exact else "numbers are rounded where the table says so"
        return (
            f"{readable_bytes(self.bytes_before)} become {readable_bytes(self.bytes_after)} "
            f"({share:.2f} times as much); {kept}"
        )


def make_plan(target: str, form: str, source: Source, tensors: Iterable[Becomes]) -> Plan:
    """Sums up by kind, in the order of the network; biases, norms and buffers last."""
    sums: dict[tuple[str, str, str, bool], list[int]] = {}
    for becomes in tensors:
        stored = source.tensors[becomes.name]
        key = (stored.kind, _family(stored), becomes.form, becomes.exact)
        row = sums.setdefault(key, [0, 0, 0])
        row[0] += 1
        row[1] += stored.bytes
        row[2] += becomes.bytes
    ordered = sorted(sums.items(), key=lambda item: item[0][0] == "other")
    return Plan(target, form, tuple(Change(*key, *row) for key, row in ordered))


def _family(stored: Stored) -> str:
    return stored.form if stored.is_weight else "float"
