"""The page at `/`: one file, sent with a policy that lets it load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from starlette.responses import HTMLResponse

_FILE = Path(__file__).with_name("page.html")


@lru_cache(maxsize=1)
def page() -> HTMLResponse:
    """The page."""
    text = _FILE.read_text(encoding="utf-8")
    scripts = " ".join(_hash(body) for body in re.findall(r"<script>(.*?)</script>", text, re.DOTALL))
    styles = " ".join(_hash(body) for body in re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    policy = (
        # The microphone's worklet is a blob that the page makes.
        f"default-src 'none'; script-src {scripts} blob:; style-src {styles}; connect-src 'self'; "
        "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Permissions-Policy": "microphone=(self)",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
