"""The page in a real browser: it draws, filters and plays, and says nothing in the console."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import MARKS, chromium, playwright, screenshot
from usmlite.report import read_report
from usmlite.report.theme import DARK, LIGHT

playwright()

pytestmark = MARKS
POINTS = "svg path[aria-roledescription='point']"
LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light", "has_touch": True},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium("--autoplay-policy=no-user-gesture-required") as browser:
        yield browser


@pytest.fixture
def file(study: Path, tmp_path: Path) -> Path:
    target = tmp_path / "report.html"
    read_report([study]).write_page(target)
    return target


class Opened:
    """A page, and what the browser had to say about it."""

    def __init__(self, browser: Any, file: Path, look: str = "light") -> None:
        self.context = browser.new_context(offline=True, **LOOKS[look])
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=120_000)

    def _hear(self, message: Any) -> None:
        # Vega warns of axes that have no values left once their runs are filtered out.
        if message.type != "warning" or "Infinity" not in message.text:
            self.said.append(f"{message.type}: {message.text}")

    def points(self, key: str) -> int:
        """Marks of runs that can be seen in a figure."""
        return int(self.page.locator(f"#plot-{key} {POINTS}").count())

    def wait_for_points(self, key: str, count: int) -> None:
        self.until(lambda: self.points(key) == count)

    def until(self, true: Callable[[], bool]) -> None:
        """Waits; Playwright's own `wait_for_function` evaluates text, which the page's policy forbids."""
        for _ in range(300):
            if true():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError("it did not happen within 30 seconds")


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Opened]:
    found = Opened(browser, file)
    yield found
    assert found.said == []
    found.context.close()


@pytest.mark.parametrize("look", LOOKS)
def test_it_draws(browser: Any, file: Path, look: str) -> None:
    found = Opened(browser, file, look)
    page = found.page
    assert page.locator(".plot svg").count() == page.locator("figure").count() > 6
    for svg in page.locator(".plot svg").all():
        box = svg.bounding_box()
        assert box is not None
        assert box["height"] > 50
        assert svg.get_attribute("aria-label")
    # Nothing but wide tables and maps scrolls sideways, each by itself.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if look == "dark" else "light")
    assert [url for url in found.asked if not url.startswith(("file:", "data:"))] == []
    assert found.said == []
    screenshot(page, f"report-{look}")
    found.context.close()


def test_it_filters(opened: Opened) -> None:
    page = opened.page
    before = opened.points("parts")
    page.get_by_role("checkbox", name="int8").uncheck()
    opened.wait_for_points("parts", before // 2)
    assert before >= 12
    assert "1 of 2 shown" in page.locator("#told").inner_text()
    page.locator("#figure-parts details.data summary").click()
    rows = page.locator("#figure-parts details.data tbody tr")
    assert rows.count() == before // 2
    assert set(rows.locator("td:first-child").all_inner_texts()) == {"trained"}
    page.get_by_role("button", name="all runs").click()
    opened.wait_for_points("parts", before)
    assert rows.count() == before
    page.get_by_role("button", name="none", exact=True).click()
    assert page.locator("article.card:visible").count() == 0
    opened.wait_for_points("parts", 0)


def test_choices(opened: Opened) -> None:
    page = opened.page
    first = page.locator("#plot-allocation svg").inner_html()
    page.locator("select[data-figure='allocation'][data-signal='run']").select_option("trained")
    opened.until(lambda: "2:4" in page.locator("#plot-allocation svg").inner_html())
    assert page.locator("#plot-allocation svg").inner_html() != first
    page.locator("select[data-figure='training']").select_option("learning rate")
    page.locator("#worst-of").select_option("trained")
    assert page.locator("article.card:visible").count() == 3


def test_it_plays(opened: Opened) -> None:
    page = opened.page
    player = page.locator("audio").first
    player.evaluate("player => player.play()")
    opened.until(lambda: bool(player.evaluate("player => player.currentTime > 0.1")))
    assert player.evaluate("player => player.duration") == pytest.approx(1.0, abs=0.2)


def test_it_is_used_by_keyboard(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    names = []
    for _ in range(60):
        page.keyboard.press("Tab")
        names.append(page.evaluate(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
            " return [e.id || e.value || e.textContent.trim().slice(0, 20), s.outlineStyle, e.tagName]; })()"
        ))  # fmt: skip
    assert {"theme", "int8", "trained"} <= {name for name, _, _ in names}
    # Players have a ring of their own.
    assert [found for found in names if found[1] == "none" and found[2] not in ("AUDIO", "BODY")] == []
    page.get_by_role("checkbox", name="trained").focus()
    page.keyboard.press("Space")
    assert not page.get_by_role("checkbox", name="trained").is_checked()


def test_the_other_theme(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    figure = page.locator("#plot-parts svg")
    opened.until(lambda: figure.count() == 1 and DARK.ink in figure.inner_html())
    assert LIGHT.ink not in figure.inner_html()


def test_figures_can_be_saved(opened: Opened) -> None:
    page = opened.page
    with page.expect_download() as found:
        page.locator("#figure-wer-bytes button[data-save='svg']").click()
    assert found.value.suggested_filename == "wer-bytes.svg"


def test_hostile_texts_do_nothing(browser: Any, study: Path, tmp_path: Path) -> None:
    import json

    hostile = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
    for name in ("trained", "int8"):
        path = study / name / "evaluation-packed.json"
        found = json.loads(path.read_text())
        for number, score in enumerate(found["utterances"]):
            score |= {"id": f"{hostile}{number}", "hypothesis": hostile, "speaker": hostile, "insertions": 9}
        path.write_text(json.dumps(found))
    shutil.move(study / "int8", study / "<img src=x onerror=hacked=1>'); hacked=1; ('")
    target = tmp_path / "report.html"
    read_report([study]).write_page(target)
    opened = Opened(browser, target)
    opened.page.locator("#worst-of").select_option(index=1)
    assert opened.page.evaluate("window.hacked") is None
    assert opened.said == []
    opened.context.close()
