"""The page in a real browser: a file, and a microphone that is fed from a WAV file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from chromium import MARKS, chromium, playwright, screenshot
from serve.serving import Running
from usmlite.runtime import Recognizer

sync_api = playwright()

pytestmark = MARKS
SPEECH = Path(__file__).parents[1] / "speech/0.opus"
SAID = "My sister found a silver key behind the school."
PATIENCE = 120_000  # ms


@pytest.fixture(scope="module")
def shipped(small_model: Recognizer) -> Iterator[Running]:
    running = Running(small_model, name="tiny.en-small", keys=("secret",))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    heard = tmp_path_factory.mktemp("microphone") / "speech.wav"
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    # The file is played in a circle: long silence keeps the sentence from being heard twice.
    soundfile.write(heard, np.concatenate([samples, np.zeros(60 * rate, np.float32)]), rate, subtype="PCM_16")
    flags = (
        "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={heard}%noloop",
    )  # fmt: skip
    with chromium(*flags) as browser:
        yield browser


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, shipped: Running, request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(
        color_scheme=request.param,
        viewport={"width": 390 if request.param == "dark" else 1100, "height": 900},
    )
    page = context.new_page()
    said: list[str] = []
    # Chromium itself notes every answer that is an error, and has advice for forms with keys.
    page.on(
        "console", lambda m: None if "status of 415" in m.text or m.type == "debug" else said.append(m.text)
    )
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda asking: asked.append(asking.url))
    page.goto(shipped.url)
    page.get_by_label("API key").fill("secret")
    yield page
    screenshot(page, f"serve-{request.node.originalname}-{request.param}")
    assert said == []
    assert all(url.startswith((shipped.url, "blob:", "data:")) for url in asked)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


def test_a_file(page: Any) -> None:
    page.locator("#file").set_input_files(SPEECH)
    sync_api.expect(page.locator("#status")).to_have_text("Done.", timeout=PATIENCE)
    assert page.locator("#text").inner_text() == SAID
    assert page.locator("#words li").count() == 9
    assert page.locator("#audio-seconds").inner_text() == "3.17 s"
    assert float(page.locator("#factor").inner_text()) > 0
    sync_api.expect(page.locator("#memory")).to_have_text(re.compile(r"\d+ MB"))
    assert page.locator("#model").inner_text() == "tiny.en-small"
    page.get_by_role("button", name="silver, at").click()
    assert 1.0 < page.locator("#player").evaluate("player => player.currentTime") < 2.0
    with page.expect_download() as found:
        page.get_by_role("button", name="Save as subtitles").click()
    assert SAID in Path(found.value.path()).read_text()


def test_what_is_no_audio(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(b"nothing of the kind")
    page.locator("#file").set_input_files(file)
    alert = page.get_by_role("alert")
    sync_api.expect(alert).to_contain_text("Cannot be read as audio", timeout=PATIENCE)


def test_the_microphone(page: Any) -> None:
    button = page.locator("#speak")
    button.focus()
    page.keyboard.press("Enter")
    sync_api.expect(button).to_have_attribute("aria-pressed", "true", timeout=PATIENCE)
    final = page.locator("#final")
    sync_api.expect(final).to_contain_text("My sister", timeout=PATIENCE)  # while it is still listening
    sync_api.expect(page.locator("#text")).to_contain_text("school", timeout=PATIENCE)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#status")).to_have_text("Done.", timeout=PATIENCE)
    assert "silver key behind the school" in final.inner_text()
    assert page.locator("#words li").count() >= 9
