"""The numbers behind the figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from small_ctc import CLASSES, small_model
from usmlite.evaluate import UtteranceScore
from usmlite.report import measures, pareto_front
from usmlite.report.records import Layer, Record, Recordings, read_records
from usmlite.tables import ResultRow


def row(name: str, size: int, wer: float | None) -> ResultRow:
    interval = None if wer is None else (wer - 0.005, wer + 0.005)
    return ResultRow(name, size, 100_000_000, wer=wer, ci95=interval)


def score(name: str, errors: int, words: int, **more: float | str) -> UtteranceScore:
    text = " ".join(["word"] * words)
    return UtteranceScore(name, str(more.pop("speaker", "a")), text, text, errors, 0, 0, words, **more)  # type: ignore[arg-type]


def test_the_front_is_what_nothing_beats() -> None:
    rows = [
        row("int8", 37_000_000, 0.059), row("int4", 19_000_000, 0.063), row("worse", 20_000_000, 0.07),
        row("int3", 14_000_000, 0.088), row("same", 14_000_000, 0.088), row("unmeasured", 1_000_000, None),
    ]  # fmt: skip
    assert [found.name for found in pareto_front(rows)] == ["int3", "int4", "int8"]
    assert pareto_front([]) == pareto_front(rows[-1:]) == []


def test_every_set_of_speech_has_its_front() -> None:
    records = [
        Record("a", Path("a"), row("a", 10, 0.1), measured="x"),
        Record("b", Path("b"), row("b", 20, 0.2), measured="x"),
        Record("c", Path("c"), row("c", 20, 0.2), measured="y"),
    ]
    assert measures.fronts(records) == {"a", "c"}


@pytest.mark.parametrize(
    ("name", "kind", "shape", "part"),
    [
        ("model.decoder.embed_tokens.weight", "embedding", (10, 4), "token embedding"),
        ("model.encoder.embed_positions.weight", "positions", (10, 4), "positions"),
        ("model.encoder.conv1.weight", "conv1d", (4, 2, 3), "convolutions"),
        ("model.encoder.layers.0.self_attn.q_proj.weight", "linear", (4, 4), "encoder self-attention"),
        ("model.decoder.layers.3.self_attn.q_proj.weight", "linear", (4, 4), "decoder self-attention"),
        ("model.decoder.layers.3.encoder_attn.v_proj.weight", "linear", (4, 4), "decoder cross-attention"),
        ("model.decoder.layers.3.fc1.weight", "linear", (8, 4), "decoder feed-forward"),
        ("model.encoder.layers.0.fc1.bias", "other", (8,), "biases and norms"),
        ("wav2vec2.encoder.layers.1.attention.k_proj.weight", "linear", (4, 4), "encoder self-attention"),
        ("w2v.encoder.layers.1.feed_forward.output_dense.weight", "linear", (4, 8), "encoder feed-forward"),
        ("lm_head.weight", "linear", (32, 4), "output layer"),
    ],
)  # fmt: skip
def test_parts_of_networks(name: str, kind: str, shape: tuple[int, ...], part: str) -> None:
    assert measures.part_of(Layer(name, kind, shape, "int4", 1, 4)) == part
    assert part in measures.PARTS


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.encoder.layers.0.self_attn.q_proj.weight", ("encoder 0", "self q")),
        ("model.decoder.layers.11.encoder_attn.out_proj.weight", ("decoder 11", "cross out")),
        ("model.decoder.layers.2.fc2.weight", ("decoder 2", "fc2")),
        ("model.encoder.conv1.weight", ("encoder", "conv1")),
        ("model.decoder.embed_tokens.weight", ("decoder", "embed_tokens")),
        ("wav2vec2.encoder.layers.1.attention.k_proj.weight", ("encoder 1", "self k")),
        ("lm_head.weight", ("other", "lm_head")),
    ],
)
def test_places_in_the_map(name: str, place: tuple[str, str]) -> None:
    assert measures.place_of(name) == place


def test_parts_add_up(study: Path) -> None:
    records, _ = read_records([study])
    for record in records:
        rows = [row for row in measures.parts(records) if row["run"] == record.name]
        assert sum(row["packed"] for row in rows) == record.row.weights_bytes
        assert sum(row["dense"] for row in rows) == record.row.float32_bytes


def test_curves_are_those_of_the_log(study: Path) -> None:
    records, _ = read_records([study])
    [curve] = measures.curves(records)
    log = next(record.log for record in records if record.name == "trained")
    assert curve["run"] == "trained"
    for term in ("step", "loss", "churn", "lr"):
        assert curve[term] == pytest.approx([line[term] for line in log], rel=1e-3)


def test_long_curves_are_thinned_to_means() -> None:
    log = tuple({"step": float(step), "loss": float(step % 2)} for step in range(1, 1001))
    [curve] = measures.curves([Record("a", Path("a"), row("a", 1, None), log=log)])
    assert len(curve["step"]) == len(curve["loss"]) <= 200
    assert sum(curve["loss"]) / len(curve["loss"]) == pytest.approx(0.5, abs=0.01)
    assert curve["step"] == sorted(curve["step"])


def test_wer_is_shown_where_it_was_measured() -> None:
    wers = [0.5, 0.5, 0.4, 0.4, 0.3]
    log = tuple({"step": float(step), "loss": 1.0, "dev_wer": wer} for step, wer in enumerate(wers, start=1))
    record = Record(
        "a", Path("a"), row("a", 1, None), log=log, recipe={"training": {"eval_every": 3}},
        report={"training": {"best_step": 5}},
    )  # fmt: skip
    assert measures.dev_curves([record]) == [
        {"run": "a", "step": 0.0, "wer": 50.0, "best": False},
        {"run": "a", "step": 3.0, "wer": 40.0, "best": False},
        {"run": "a", "step": 5.0, "wer": 30.0, "best": True},
    ]


def test_groups(study: Path) -> None:
    [record], _ = read_records([study / "trained"])
    assert record.evaluation is not None
    scores = (
        score("1", 1, 10, speaker="a", seconds=1.0, snr_db=0.0),
        score("2", 0, 10, speaker="b", seconds=3.0, snr_db=10.0),
        score("3", 4, 10, speaker="b", seconds=4.0, snr_db=0.0),
        score("4", 9, 0, speaker="c", seconds=40.0),
    )
    record = replace(record, dense=None, evaluation=replace(record.evaluation, utterances=scores))
    found = measures.groups([record], Recordings([]))
    assert {row["group"]: (row["wer"], row["words"], row["utterances"]) for row in found["speaker"]} == {
        "a": (10.0, 10, 1), "b": (20.0, 20, 2), "c": (None, 0, 1),
    }  # fmt: skip
    assert {row["group"]: row["wer"] for row in found["length"]} == {
        "0 to 2 s": 10.0, "2 to 5 s": 20.0, "from 30 s": None,
    }  # fmt: skip
    assert {row["group"]: row["wer"] for row in found["noise"]} == {"0 dB": 25.0, "10 dB": 0.0}
    low, high = next((row["low"], row["high"]) for row in found["speaker"] if row["group"] == "b")
    assert (low, high) == (0.0, 40.0)
    assert measures.group_order("noise", found["noise"]) == ["0 dB", "10 dB"]
    assert measures.group_order("length", found["length"]) == ["0 to 2 s", "2 to 5 s", "from 30 s"]
    assert measures.group_order("speaker", found["speaker"]) == ["b", "a", "c"]


def test_many_noise_levels_become_ranges(study: Path) -> None:
    [record], _ = read_records([study / "trained"])
    assert record.evaluation is not None
    scores = tuple(score(str(level), 1, 10, snr_db=level + 0.5) for level in range(-5, 20))
    record = replace(record, dense=None, evaluation=replace(record.evaluation, utterances=scores))
    rows = measures.groups([record], Recordings([]))["noise"]
    assert measures.group_order("noise", rows) == [
        "-5 to 0 dB", "0 to 5 dB", "5 to 10 dB", "10 to 15 dB", "15 to 20 dB",
    ]  # fmt: skip


def test_lengths_come_from_the_speech_where_a_run_kept_none(study: Path, recordings: Path) -> None:
    [record], _ = read_records([study / "trained"])
    assert record.evaluation is not None
    old = tuple(replace(each, seconds=None) for each in record.evaluation.utterances)
    record = replace(record, dense=None, evaluation=replace(record.evaluation, utterances=old))
    assert measures._groups_of(old, Recordings([]))["length"] == []
    assert measures._groups_of(old, Recordings([record]))["length"][0]["group"] == "0 to 2 s"


def test_histograms_are_shares(study: Path) -> None:
    records, _ = read_records([study])
    rows, dense = measures.histograms(records)
    # Both runs start from one model, whose histograms stand there once.
    assert len(dense) == len({row["layer"] for row in rows})
    for row in rows:
        assert sum(row["packed"]) == pytest.approx(100, abs=2)
        assert sum(dense[row["before"]]["dense"]) == pytest.approx(100, abs=2)
    pruned = next(row for row in rows if row["run"] == "trained" and row["layer"].endswith("fc1"))
    assert pruned["pruned"] == 50
    assert pruned["zero"] >= 50
    assert next(row for row in rows if row["run"] == "int8")["layer"] == "all weights"


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_of_other_families_has_a_place_of_its_own(name: str, tmp_path: Path) -> None:
    model = small_model(name)
    places: dict[tuple[str, str], str] = {}
    for weight, parameter in model.named_parameters():
        if parameter.dim() >= 2 and weight.endswith(".weight"):
            assert places.setdefault(measures.place_of(weight), weight) == weight
        layer = Layer(weight, "other", tuple(parameter.shape), "int4", 1, 4)
        assert measures.part_of(layer) in measures.PARTS
