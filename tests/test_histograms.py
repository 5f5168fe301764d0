"""Values of weights, before and after."""

from __future__ import annotations

import json

import pytest
import torch

from small_whisper import small_teacher
from usmlite.histograms import BINS, REACH, weight_histograms
from usmlite.spec import CompressionSpec
from usmlite.student import compressed_layers, fake_quantized, make_student


def test_counts() -> None:
    teacher, adapter = small_teacher()
    with torch.no_grad():
        # Beyond the reach: in the outermost bins.
        teacher.model.encoder.layers[0].fc1.weight[0, 0] = 100.0
    student = make_student(teacher, adapter.compressible(teacher), CompressionSpec.simple(4, "2:4"))
    found = weight_histograms(student, teacher)
    assert json.loads(json.dumps(found)) == found
    assert (found["bins"], found["reach"]) == (BINS, REACH)
    layers = dict(compressed_layers(student))
    assert [row["name"] for row in found["weights"]] == list(layers)
    for row in found["weights"]:
        layer = layers[row["name"]]
        dense, packed = teacher.get_submodule(row["name"]).weight, fake_quantized(layer)
        assert sum(row["dense"]) == sum(row["packed"]) == dense.numel()
        assert row["sigma"] == pytest.approx(float(dense.detach().std(correction=0)))
        assert row["zero"] == pytest.approx(float((packed == 0).float().mean()))
        inside = (packed / row["sigma"]).abs() < REACH / BINS
        assert row["packed"][BINS // 2] == int(inside.sum())
    rows = {row["name"]: row for row in found["weights"]}
    pruned = rows["model.encoder.layers.0.fc1"]
    assert pruned["pruned"] == 0.5
    assert pruned["dense"][-1] >= 1
    assert rows["model.decoder.embed_tokens"]["pruned"] is None


def test_a_weight_of_equal_values() -> None:
    teacher, adapter = small_teacher()
    with torch.no_grad():
        teacher.model.encoder.layers[0].fc1.weight.zero_()
    student = make_student(teacher, adapter.compressible(teacher), CompressionSpec.simple(4))
    row = next(row for row in weight_histograms(student, teacher)["weights"] if row["name"].endswith("0.fc1"))
    assert (row["sigma"], row["zero"]) == (1.0, 1.0)
    assert row["packed"][BINS // 2] == 24 * 40
