"""The packed models that come with usmlite, and where they lie."""

from __future__ import annotations

from pathlib import Path

SHIPPED = ("tiny.en-small",)
DEFAULT = SHIPPED[0]
"""What transcribes where no model is named."""

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str | Path) -> Path | None:
    """The directory of a shipped model; None if that is not the name of one, or it did not come along."""
    if name not in SHIPPED:
        return None
    # Inside the package where it was installed, beside the sources in a checkout.
    for folder in (_PACKAGE / "shipped", _PACKAGE.parents[1] / "models"):
        if (folder / name).is_dir():
            return folder / name
    return None
