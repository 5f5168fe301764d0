"""The figures, as Vega-Lite specifications: interactive in the page, or for a paper."""

from __future__ import annotations

from collections.abc import Sequence

from usmlite.report import measures
from usmlite.report.figures import groups, network, sizes, training
from usmlite.report.figures.sheet import Column, Figure, Sheet
from usmlite.report.records import Record, Recordings

__all__ = ["Column", "Figure", "draw"]


def draw(records: Sequence[Record], recordings: Recordings, *, paper: bool = False) -> list[Figure]:
    """Every figure that there are data for.

    Args:
        records: the runs.
        recordings: the test speech, for the lengths of utterances that earlier versions did not keep.
        paper: of a fixed width and with legends, instead of as wide as the page and with choices.
    """
    sheet = Sheet(records, paper=paper)
    scored = measures.groups(records, recordings)
    log, layers = measures.curves(records), measures.layers(records)
    made = (
        sizes.wer_against_bytes(sheet, records),
        sizes.part_shares(sheet, records),
        sizes.parts(sheet, records),
        training.course(sheet, log),
        training.dev_wer(sheet, measures.dev_curves(records)),
        network.allocation(sheet, layers),
        network.sensitivity(sheet, layers),
        training.churn(sheet, log),
        network.weights(sheet, *measures.histograms(records)),
        groups.by_speaker(sheet, scored["speaker"]),
        groups.by_step(sheet, "length", scored["length"]),
        groups.by_step(sheet, "noise", scored["noise"]),
    )
    return [figure for figure in made if figure is not None]
