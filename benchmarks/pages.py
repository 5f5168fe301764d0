"""Tables that commands write into pages, between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from pathlib import Path

from usmlite.atomic import write_bytes


def place(page: Path, name: str, text: str) -> None:
    """Puts a text where a page has room for it; what was there goes.

    Raises:
        ValueError: the page has no such place, or several.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = page.read_text(encoding="utf-8")
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{page}: expected one {start} and one {end}")
    head, rest = whole.split(start)
    write_bytes(page, f"{head}{start}\n{text}\n{end}{rest.split(end)[1]}".encode())
