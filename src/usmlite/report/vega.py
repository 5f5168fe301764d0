"""The JavaScript that every page carries: Vega, Vega-Lite and Vega-Embed in one file, `vega.js`.

It lies beside this module because bundling takes ten seconds and the package `vl-convert-python`, of 33 MB,
which a page needs for nothing else. `python -m usmlite.report.vega` makes it again, for the Vega-Lite that
the installed Altair writes.
"""

from __future__ import annotations

from pathlib import Path

import altair

from usmlite.atomic import write_bytes

FILE = Path(__file__).with_name("vega.js")
# As Vega-Lite's specifications name it: v6.4.1.
VEGA_LITE = altair.SCHEMA_VERSION
_HEAD = "/* Vega-Embed, Vega-Lite {version} and Vega, by usmlite.report.vega; licenses in vega.LICENSE. */\n"


def source() -> str:
    """The script's text."""
    return FILE.read_text(encoding="utf-8")


def bundle() -> str:
    """The script made anew.

    Raises:
        ImportError: vl-convert-python is not installed.
    """
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", converter_version())
    return _HEAD.format(version=VEGA_LITE) + script


def converter_version() -> str:
    """The Vega-Lite version as `vl_convert` names it: 6.4."""
    return VEGA_LITE.lstrip("v").rpartition(".")[0]


if __name__ == "__main__":
    write_bytes(FILE, bundle().encode())
