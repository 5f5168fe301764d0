"""Every error that usmlite raises on purpose.

    UsmliteError
    ├── SpecError          a compression spec that cannot be carried out
    ├── RecipeError        a recipe file or flag that is wrong
    ├── ModelError         a model source that is unknown, unreadable or unsupported
    ├── AudioError         an audio file or array that cannot be used
    │   ├── AudioFormatError   that is not audio, or of a format that cannot be read
    │   └── AudioTooLongError  that is longer than was allowed
    ├── DataError          a manifest or corpus that is wrong
    ├── PackedModelError   a packed model that is damaged, altered or from another version
    ├── TrainingError      a fine-tuning run that cannot start, go on or resume
    ├── ReportError        a report that cannot be made as it was asked for
    └── OutputError        a place that cannot be written

Each message says where, what, what was expected, what was found and what to do about it. The
command line prints the message alone and exits with `UsmliteError.exit_code`.
"""

from __future__ import annotations

from os import PathLike


class UsmliteError(Exception):
    """Base class of all errors that a user can cause and mend.

    Args:
        what: what is wrong, one clause, no full stop.
        where: the file, line, flag or tensor it is about.
        expected: what should have been there.
        found: what was there.
        remedy: what the user can do, one sentence.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self._compose())

    def _compose(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        comparison = [
            f"{label} {value}"
            for label, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if comparison:
            text += f" ({', '.join(comparison)})"
        return f"{text}. {self.remedy}" if self.remedy else text


class SpecError(UsmliteError):
    """A compression spec that cannot be carried out."""


class RecipeError(UsmliteError):
    """A recipe file or flag that is wrong."""


class ModelError(UsmliteError):
    """A model source that is unknown, unreadable or unsupported."""


class AudioError(UsmliteError):
    """An audio file or array that cannot be used."""


class AudioFormatError(AudioError):
    """A file that is not audio, or of a format that cannot be read."""


class AudioTooLongError(AudioError):
    """Audio that is longer than was allowed."""


class DataError(UsmliteError):
    """A manifest or corpus that is wrong."""


class PackedModelError(UsmliteError):
    """A packed model that is damaged, altered or from another version."""


class TrainingError(UsmliteError):
    """A fine-tuning run that cannot start, go on or resume."""


class ReportError(UsmliteError):
    """A report that cannot be made as it was asked for."""


class OutputError(UsmliteError):
    """A place that cannot be written."""
