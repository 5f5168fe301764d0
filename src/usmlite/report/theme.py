"""Colors and lines of the figures, on light and on dark ground."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# In files there is no browser to find the system's font.
PAPER_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colors as #rrggbb.

    Attributes:
        ground: behind everything.
        ink: text.
        faint: axes and secondary text.
        grid: lines of grids.
        runs: one for each run, used in turn; told apart by people who do not see all colors.
        ramp: of a quantity, from little to much.
        parts: one for each of `measures.PARTS`: encoder and decoder have a family each.
    """

    ground: str
    ink: str
    faint: str
    grid: str
    runs: tuple[str, ...]
    ramp: tuple[str, ...]
    parts: tuple[str, ...]


LIGHT = Theme(
    ground="#ffffff",
    ink="#1b1f24",
    faint="#5a6472",
    grid="#e6e9ee",
    runs=(
        "#1668b0", "#c2500a", "#0a7a5c", "#a8337f", "#6a4fc3", "#86690a", "#bd2740", "#0d7a86",
        "#7a5548", "#51606f",
    ),
    ramp=("#eef4fa", "#c3dbef", "#8dbbdf", "#4f94c9", "#1f6aa8", "#0b3f72"),
    parts=(
        "#39424e", "#7d8794", "#0f766e", "#3fa79d", "#8ed1c8", "#7c3a12", "#b8682f", "#e0a878", "#6b4fa0",
        "#a9b0ba", "#d0d4da", "#e3e6ea",
    ),
)  # fmt: skip
DARK = Theme(
    ground="#14181d",
    ink="#e8ebef",
    faint="#a3adb9",
    grid="#2b323b",
    runs=(
        "#6cb2f0", "#ff9d62", "#4fd0a4", "#ee8fd0", "#b5a1fb", "#dfc052", "#ff8d97", "#5fd0dc",
        "#cbaa9b", "#aab8c7",
    ),
    ramp=("#1d2833", "#1f4163", "#27629a", "#3f8bcb", "#7db9e8", "#d3e9fb"),
    parts=(
        "#d5dae1", "#8f99a6", "#a5ebe0", "#4db8ab", "#1f7a70", "#ffd0a8", "#dc8f57", "#9a5525", "#b9a3ea",
        "#6b7480", "#525a65", "#3d454f",
    ),
)  # fmt: skip


def config(theme: Theme, *, font: str = FONT) -> dict[str, Any]:
    """The theme as a Vega-Lite configuration; the marks of figures name the styles in it."""
    return {
        "background": theme.ground,
        "font": font,
        "view": {"stroke": None},
        "axis": {
            "labelColor": theme.faint, "titleColor": theme.ink, "gridColor": theme.grid,
            "domainColor": theme.faint, "tickColor": theme.faint, "labelFontSize": 12, "titleFontSize": 12,
            "titleFontWeight": "normal", "labelLimit": 220,
        },
        "legend": {
            "labelColor": theme.ink, "titleColor": theme.ink, "labelFontSize": 12, "titleFontSize": 12,
            "titleFontWeight": "normal", "labelLimit": 260,
        },
        "range": {"category": list(theme.runs), "heatmap": list(theme.ramp), "ramp": list(theme.ramp),
                  "ordinal": list(theme.parts)},
        "style": {
            "dense": {"color": theme.ink},
            "dense-band": {"color": theme.ink, "fillOpacity": 0.08},
            "front": {"color": theme.faint},
            "note": {"color": theme.ink},
            "on-high": {"color": theme.ground},
            "on-low": {"color": theme.ink},
        },
    }  # fmt: skip
