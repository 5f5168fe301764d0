from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from small_whisper import small_student, small_teacher
from usmlite.errors import ModelError, PackedModelError
from usmlite.info import COMPUTED, KEPT, dense_float32_bytes, describe, information_table
from usmlite.pack import pack
from usmlite.spec import KEEP, NM, CompressionSpec, Int, LayerSpec, Rule

SPECS = {
    "int4 2:4": CompressionSpec.simple(4, "2:4", coded=False),
    "int3 groups": CompressionSpec.simple(3, None, 16, symmetric=False),
    "float 1:4": CompressionSpec.simple(None, "1:4"),
    "mixed": CompressionSpec((Rule("*.fc1", KEEP), Rule("*", LayerSpec(Int(2, grid="midrise"), NM(3, 7))))),
    "nothing": CompressionSpec(),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_prediction_equals_the_packed_file(spec: CompressionSpec, dense_model: Path, tmp_path: Path) -> None:
    predicted = describe(dense_model, spec)
    student, adapter = small_student(spec)
    packed = pack(student, adapter, tmp_path / "packed", coded=False)
    found = describe(tmp_path / "packed", CompressionSpec())
    assert found.file_bytes == packed.weights_bytes == (tmp_path / "packed/model.safetensors").stat().st_size
    assert predicted.file_bytes == found.file_bytes
    assert predicted.float32_bytes == found.float32_bytes
    assert [(r.name, r.shape, r.kind, r.spec, r.bytes) for r in predicted.rows] == [
        (r.name, r.shape, r.kind, r.spec, r.bytes) for r in found.rows
    ]


def test_every_tensor_is_there_once(dense_model: Path) -> None:
    teacher, adapter = small_teacher()
    found = describe(dense_model, SPECS["int4 2:4"])
    assert [row.name for row in found.rows] == [name for name, _ in teacher.named_parameters()]
    assert found.float32_bytes == sum(4 * p.numel() for p in teacher.parameters())
    assert dense_float32_bytes(adapter.config) == found.float32_bytes
    by_name = {row.name: row for row in found.rows}
    assert by_name["model.encoder.embed_positions.weight"].spec == COMPUTED
    assert by_name["model.decoder.embed_tokens.weight"].spec == "int3 column scales"
    assert by_name["model.encoder.conv1.weight"].spec == "int8"
    assert by_name["model.encoder.layer_norm.weight"].spec == KEPT
    assert "proj_out.weight" not in by_name  # tied to the token embedding


def test_unused_rules_are_named(dense_model: Path) -> None:
    spec = CompressionSpec((Rule("model.decodr.*", LayerSpec(Int(2))), *SPECS["int4 2:4"].rules))
    found = describe(dense_model, spec)
    assert any("model.decodr.*" in line for line in found.summary())


def test_table_and_json_agree(packed_model: Path) -> None:
    found = describe(packed_model, CompressionSpec())
    console = Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(information_table(found))
    drawn = console.export_text()
    console.file.close()
    plain = json.loads(json.dumps(found.to_json()))
    assert f"{found.file_bytes - found.header_bytes:,}" in drawn
    assert sum(row["bytes"] for row in plain["tensors"]) + plain["header_bytes"] == plain["file_bytes"]
    assert "biases and norms" in drawn
    assert f"{found.file_bytes:,} bytes" in " ".join(found.summary())


def test_tiny_en_is_below_the_goal() -> None:
    found = describe("tiny.en", CompressionSpec.simple(4, "2:4"))
    assert found.float32_bytes == 151_041_024
    assert found.share < 0.094


def test_damaged_and_unknown_models(packed_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Supported are"):
        describe(tmp_path / "nothing", CompressionSpec())
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"d_model": "wide"}))
    with pytest.raises(PackedModelError, match=r"config\.json"):
        describe(copy, CompressionSpec())
    (copy / "config.json").write_text(json.dumps(config))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(PackedModelError, match="truncated"):
        describe(copy, CompressionSpec())


def test_a_coded_file_says_what_fixed_width_would_take(tmp_path: Path) -> None:
    student, adapter = small_student(CompressionSpec.simple(4), d_model=64, decoder_ffn_dim=256)
    sizes = {}
    for coded in (False, True):
        pack(student, adapter, tmp_path / str(coded), coded=coded)
        sizes[coded] = describe(tmp_path / str(coded), CompressionSpec())
    assert sizes[False].saved_bytes == 0
    assert sizes[True].file_bytes < sizes[False].file_bytes
    fixed = sizes[True].to_json()["fixed_width_bytes"]
    # The header differs by a few characters, and by the scales that lie with the codes.
    assert abs(fixed - sizes[False].file_bytes) < 400
    assert any(f"{fixed:,} bytes" in line for line in sizes[True].summary())
    assert any(row.spec.endswith("coded") for row in sizes[True].rows)
