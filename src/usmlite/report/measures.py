"""The numbers behind the figures, as rows of plain values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from usmlite.evaluate import UtteranceScore, score_together
from usmlite.report.records import DENSE, Layer, Record, Recordings
from usmlite.tables import ResultRow

Rows = list[dict[str, Any]]

# In the order of the forward pass; each has a color of its own.
PARTS = (
    "token embedding",
    "positions",
    "convolutions",
    "encoder self-attention",
    "encoder feed-forward",
    "decoder self-attention",
    "decoder cross-attention",
    "decoder feed-forward",
    "output layer",
    "other layers",
    "biases and norms",
    "file header",
)
# Seconds at which a group of utterances ends.
_LENGTHS = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0)
# Noise levels that are named one by one; of more, those within so many dB are one group.
_MOST_LEVELS, _LEVEL_STEP = 8, 5.0
# Points of a curve that a screen can show.
_MOST_POINTS = 160
# A list of modules in a name: encoder.layers.3.fc1, feature_extractor.conv_layers.0.conv.
_BLOCK = re.compile(r"^(?:.*\.)?(\w+)\.\w+\.(\d+)\.(.+)$")
_SIGNIFICANT = 4


def rounded(value: float | None) -> float | None:
    """To as many digits as a page needs."""
    return None if value is None else float(f"{value:.{_SIGNIFICANT}g}")


def pareto_front(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """The models that no other one beats in both bytes and WER, the smallest first."""
    front: list[ResultRow] = []
    for row in sorted(rows, key=lambda row: (row.weights_bytes, row.wer or 0.0)):
        if row.wer is not None and (not front or row.wer < (front[-1].wer or 0.0)):
            front.append(row)
    return front


def fronts(records: Sequence[Record]) -> set[str]:
    """The runs on the Pareto front of their test set: WERs on different speech do not compare."""
    sets: dict[str | None, list[ResultRow]] = {}
    for record in records:
        sets.setdefault(record.measured, []).append(record.row)
    return {row.name for rows in sets.values() for row in pareto_front(rows)}


def results(records: Sequence[Record]) -> Rows:
    """Bytes and WER of every run that was measured, in MB and percent."""
    best = fronts(records)
    return [
        {
            "run": record.name,
            "mb": record.row.weights_bytes / 1e6,
            **percents(record.row),
            "front": record.name in best,
            "measured": record.measured,
        }
        for record in records
        if record.row.wer is not None
    ]


def dense_results(records: Sequence[Record]) -> list[tuple[str | None, ResultRow]]:
    """The dense model of each test set, with what that is in words."""
    found: dict[str | None, ResultRow] = {}
    for record in records:
        if record.dense_row is not None:
            found.setdefault(record.measured, record.dense_row)
    return list(found.items())


def percents(row: ResultRow) -> dict[str, float | None]:
    """WER and its interval in percent."""
    low, high = row.ci95 or (None, None)
    return {
        "wer": rounded(None if row.wer is None else 100 * row.wer),
        "low": rounded(None if low is None else 100 * low),
        "high": rounded(None if high is None else 100 * high),
    }


def part_of(layer: Layer) -> str:
    """The part of the network that a tensor belongs to, in words."""
    name = layer.name
    side = "decoder" if "decoder." in name else "encoder"
    if layer.kind == "positions" or "positions" in name:
        return "positions"
    if layer.kind == "embedding":
        return "token embedding"
    if layer.kind == "conv1d":
        return "convolutions"
    if len(layer.shape) < 2:
        return "biases and norms"
    if "encoder_attn" in name:
        return "decoder cross-attention"
    if "attn" in name or "attention" in name:
        return f"{side} self-attention"
    if "head" in name or "proj_out" in name:
        return "output layer"
    return f"{side} feed-forward" if _BLOCK.match(name) else "other layers"


def parts(records: Sequence[Record]) -> Rows:
    """Bytes of each part of the network, dense and packed, the largest dense part first."""
    rows: Rows = []
    for record in records:
        dense: dict[str, int] = {}
        packed: dict[str, int] = {}
        for layer in record.layers:
            part = part_of(layer)
            dense[part] = dense.get(part, 0) + layer.dense_bytes
            packed[part] = packed.get(part, 0) + layer.bytes
        if packed:
            packed[PARTS[-1]], dense[PARTS[-1]] = record.header_bytes, 0
        for part in sorted(dense, key=lambda part: -dense[part]):
            rows.append({"run": record.name, "part": part, "dense": dense[part], "packed": packed[part]})
    return rows


def place_of(name: str) -> tuple[str, str]:
    """Row and column of a weight in a map of the network: its block, and what it is there."""
    module = name.removesuffix(".weight")
    found = _BLOCK.match(module)
    if found is not None:
        leaf = found[3].replace("self_attn.", "self ").replace("encoder_attn.", "cross ")
        leaf = leaf.replace("attention.", "self ").replace("_proj", "")
        return f"{found[1]} {found[2]}", leaf
    for side in ("encoder", "decoder"):
        _, within, leaf = module.partition(f"{side}.")
        if within:
            return side, leaf
    block, _, leaf = module.rpartition(".")
    return block.rpartition(".")[2] or "other", leaf


def layers(records: Sequence[Record]) -> Rows:
    """Every weight of every run: where it is, what it became, and how much it matters."""
    rows: Rows = []
    for record in records:
        for layer in record.layers:
            if len(layer.shape) < 2 or not layer.bytes:
                continue
            block, place = place_of(layer.name)
            rows.append({
                "run": record.name, "name": layer.name.removesuffix(".weight"), "block": block,
                "place": place, "spec": layer.spec, "pattern": layer.pattern, "bytes": layer.bytes,
                "bits": rounded(layer.bits), "sensitivity": rounded(layer.sensitivity),
                "error": rounded(layer.error),
            })  # fmt: skip
    return rows


def curves(records: Sequence[Record]) -> Rows:
    """The training of every run: of each quantity the steps and the values, thinned out."""
    rows: Rows = []
    for record in records:
        if not record.log:
            continue
        names = [name for name in record.log[0] if name not in ("step", "dev_wer", "seconds")]
        columns: dict[str, list[float]] = {
            "step": [row["step"] for row in record.log],
            **{name: [row.get(name, 0.0) for row in record.log] for name in names},
        }
        thin = {name: _thinned(values) for name, values in columns.items()}
        rows.append({"run": record.name, **{name: [rounded(v) for v in thin[name]] for name in thin}})
    return rows


def _thinned(values: Sequence[float]) -> list[float]:
    """Means of equal parts, where there are more values than can be seen."""
    if len(values) <= _MOST_POINTS:
        return list(values)
    edges = [len(values) * part // _MOST_POINTS for part in range(_MOST_POINTS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def dev_curves(records: Sequence[Record]) -> Rows:
    """WER on the part of dev, at the steps where it was measured."""
    rows: Rows = []
    for record in records:
        log = [row for row in record.log if "dev_wer" in row]
        if not log:
            continue
        every = ((record.recipe or {}).get("training") or {}).get("eval_every")
        best = ((record.report or {}).get("training") or {}).get("best_step")
        last = log[-1]["step"]
        points = {0.0: log[0]["dev_wer"]} if log[0]["step"] < (every or last) else {}
        for row in log:
            if row["step"] == last or (every and row["step"] % every == 0):
                points[row["step"]] = row["dev_wer"]
        for step, wer in points.items():
            rows.append({"run": record.name, "step": step, "wer": rounded(100 * wer), "best": step == best})
    return rows


def histograms(records: Sequence[Record]) -> tuple[Rows, Rows]:
    """Shares of the weights in equal bins, in percent, for all weights together and for each.

    Returns:
        The packed weights of every run, and the dense ones that their `before` names by `key`: once, where
        runs start from the same model.
    """
    rows: Rows = []
    keys: dict[tuple[str, tuple[int, ...]], int] = {}
    for record in records:
        found = record.histograms
        if not found or not found["weights"]:
            continue
        for weight in (_together(found["weights"]), *found["weights"]):
            key = (weight["name"], tuple(weight["dense"]))
            rows.append({
                "run": record.name, "layer": weight["name"], "reach": found["reach"],
                "before": keys.setdefault(key, len(keys)), "packed": _shares(weight["packed"]),
                "zero": rounded(100 * weight["zero"]),
                "pruned": None if weight["pruned"] is None else rounded(100 * weight["pruned"]),
            })  # fmt: skip
    return rows, [{"key": number, "dense": _shares(counts)} for (_, counts), number in keys.items()]


def _together(weights: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = {
        key: [sum(column) for column in zip(*(weight[key] for weight in weights), strict=True)]
        for key in ("dense", "packed")
    }
    total = sum(counts["dense"]) or 1
    shares = {
        key: sum((weight[key] or 0.0) * sum(weight["dense"]) for weight in weights) / total
        for key in ("zero", "pruned")
    }
    return {"name": "all weights", **counts, **shares}


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    # Whole numbers, most of them zeros, as such: there are thousands in a page.
    shares = [float(f"{100 * count / total:.2g}") for count in counts]
    return [int(share) if share.is_integer() else share for share in shares]


def groups(records: Sequence[Record], recordings: Recordings) -> dict[str, Rows]:
    """WER by "speaker", "length" and "noise", dense models first; a kind without two groups has no rows."""
    kinds: dict[str, Rows] = {"speaker": [], "length": [], "noise": []}
    models = {(record.measured, DENSE): record.dense for record in records if record.dense is not None}
    models |= {(record.measured, record.name): record.evaluation for record in records if record.evaluation}
    for (measured, name), evaluation in models.items():
        for kind, rows in _groups_of(evaluation.utterances, recordings).items():
            kinds[kind] += [{"run": name, "measured": measured, **row} for row in rows]
    return {kind: rows if _several(rows) else [] for kind, rows in kinds.items()}


def _several(rows: Rows) -> bool:
    return len({row["group"] for row in rows}) > 1 and any(row["wer"] is not None for row in rows)


def _groups_of(scores: Sequence[UtteranceScore], recordings: Recordings) -> dict[str, Rows]:
    lengths = {score.id: _seconds(score, recordings) for score in scores}
    levels = sorted({score.snr_db for score in scores if score.snr_db is not None})
    found: dict[str, dict[str, list[UtteranceScore]]] = {"speaker": {}, "length": {}, "noise": {}}
    for score in scores:
        if score.speaker is not None:
            found["speaker"].setdefault(score.speaker, []).append(score)
        seconds = lengths[score.id]
        if seconds is not None:
            found["length"].setdefault(_length(seconds), []).append(score)
        if score.snr_db is not None:
            found["noise"].setdefault(_level(score.snr_db, len(levels)), []).append(score)
    return {kind: [_group(name, members) for name, members in found[kind].items()] for kind in found}


def _group(name: str, scores: Sequence[UtteranceScore]) -> dict[str, Any]:
    together = score_together(scores)
    wer, (low, high) = together or (None, (None, None))
    return {
        "group": name,
        "wer": rounded(None if wer is None else 100 * wer),
        "low": rounded(None if low is None else 100 * low),
        "high": rounded(None if high is None else 100 * high),
        "words": sum(score.words for score in scores),
        "utterances": len(scores),
    }


def _seconds(score: UtteranceScore, recordings: Recordings) -> float | None:
    if score.seconds is not None:
        return score.seconds
    known = recordings.find(score.id)
    return known.duration if known else None


def _length(seconds: float) -> str:
    before = 0.0
    for end in _LENGTHS:
        if seconds < end:
            return f"{before:g} to {end:g} s"
        before = end
    return f"from {before:g} s"


def _level(snr: float, levels: int) -> str:
    if levels <= _MOST_LEVELS:
        return f"{snr:g} dB"
    low = _LEVEL_STEP * (snr // _LEVEL_STEP)
    return f"{low:g} to {low + _LEVEL_STEP:g} dB"


def group_order(kind: str, rows: Rows) -> list[str]:
    """The groups as they should stand: by length, by noise level, speakers by the WER of the first model."""
    names = list(dict.fromkeys(row["group"] for row in rows))
    if kind != "speaker":
        return sorted(names, key=lambda name: float(name.removeprefix("from ").split()[0]))
    first = {row["group"]: row["wer"] or 0.0 for row in reversed(rows)}
    return sorted(names, key=lambda name: (-first[name], name))
