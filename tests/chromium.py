"""Chromium, for tests of pages: where it is, and what a test needs of it.

A program in the path, or named by the variable CHROMIUM; and pip install playwright. `make test-browser`
runs these tests. Screenshots go to the folder in SCREENSHOTS, to be looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it, or name it in CHROMIUM"),
    # Playwright's own loop, which it closes when the interpreter ends.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def playwright() -> Any:
    """Playwright's synchronous interface; skips the module that asks where it is not installed."""
    reason = "pip install playwright, or make test-browser"
    return pytest.importorskip("playwright.sync_api", reason=reason)


@contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    """A browser, closed at the end."""
    with playwright().sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
        yield browser
        browser.close()


def screenshot(page: Any, name: str) -> None:
    """Keeps a picture of the whole page, where SCREENSHOTS says so."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
