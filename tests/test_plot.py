"""The picture of WER against bytes."""

from __future__ import annotations

import pytest

from usmlite.plot import pareto_front, rendered, wer_against_bytes
from usmlite.tables import ResultRow


def row(name: str, size: int, wer: float | None, *, width: float = 0.005) -> ResultRow:
    interval = None if wer is None else (wer - width, wer + width)
    return ResultRow(name, size, 100_000_000, wer=wer, ci95=interval)


ROWS = [
    row("int8", 37_000_000, 0.059),
    row("int4", 19_000_000, 0.063),
    row("worse", 20_000_000, 0.07),
    row("int3", 14_000_000, 0.088),
    row("same", 14_000_000, 0.088),
    row("unmeasured", 1_000_000, None),
]
DENSE = [row("dense", 151_000_000, 0.058)]


def test_the_front_is_what_nothing_beats() -> None:
    assert [found.name for found in pareto_front(ROWS)] == ["int3", "int4", "int8"]
    assert pareto_front([]) == pareto_front(ROWS[-1:]) == []


def test_the_figure_shows_every_measured_model() -> None:
    [axes] = wer_against_bytes({"dense": ROWS[:3], "2:4": ROWS[3:]}, DENSE).axes
    assert sorted(text.get_text() for text in axes.texts) == ["int3", "int4", "int8", "same", "worse"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "Pareto front",
        "dense, float32",
        "dense",
        "2:4",
    ]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")


def test_far_apart_values_get_logarithmic_axes() -> None:
    far = [row("large", 100_000_000, 0.05), row("small", 5_000_000, 1.2)]
    [axes] = wer_against_bytes({"dense": far}, []).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    # An interval that reaches zero has no place on a logarithmic axis.
    [axes] = wer_against_bytes({"dense": [far[1], row("perfect", 100_000_000, 0.0, width=0.0)]}, []).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_same_figure_gives_the_same_file(ending: str, start: bytes) -> None:
    first, second = (rendered(wer_against_bytes({"dense": ROWS}, DENSE), ending) for _ in range(2))
    assert first.startswith(start)
    assert first == second
