from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from usmlite import entropy, kernels, packfile
from usmlite import quantize as q
from usmlite.errors import ModelError, OutputError, PackedModelError
from usmlite.kernels import trellis
from usmlite.packfile import Manifest, PackedLayer, WeightsFile, WeightsWriter
from usmlite.sparsify import nm_mask
from usmlite.spec import NM, Int, LayerSpec, matrix_shape

# Byte layout: examples worked by hand


def test_codes_lie_least_significant_bit_first() -> None:
    four = torch.tensor([[0x1, 0x2, 0x3]], dtype=torch.uint8)
    assert packfile.pack_codes(four, 4).tolist() == [[0x21, 0x03]]
    three = torch.tensor([[0b001, 0b010, 0b111]], dtype=torch.uint8)
    # 111 010 001 read from the right: 11010001 and a lonely 1.
    assert packfile.pack_codes(three, 3).tolist() == [[0b11010001, 0b1]]


def test_three_patterns_of_2_4_share_a_byte() -> None:
    spec = LayerSpec(Int(4), NM(2, 4))
    kept = [(0, 1), (2, 3), (1, 2), (0, 3)]  # ranks 0, 5, 2, 3
    mask = torch.zeros(1, 16, dtype=torch.bool)
    for group, places in enumerate(kept):
        for place in places:
            mask[0, 4 * group + place] = True
    codes = torch.arange(16, dtype=torch.uint8)[None]
    parts = packfile.pack_rows(spec, codes, mask=mask, scale=torch.ones(1, 1))
    assert parts["pattern"].tolist() == [[0 + 5 * 6 + 2 * 36, 3]]
    assert parts["codes"].tolist() == [[0x10, 0x76, 0xA9, 0xFC]]


def test_codes_are_not_changed_by_packing() -> None:
    codes = torch.randint(0, 2, (3, 8), dtype=torch.uint8)
    before = codes.clone()
    packfile.pack_codes(codes, 1)
    assert torch.equal(codes, before)


def test_a_short_last_group_is_filled_with_code_0() -> None:
    spec = LayerSpec(Int(4), NM(2, 4))
    mask = torch.tensor([[True, True, False, False, True]])
    codes = torch.full((1, 5), 9, dtype=torch.uint8)
    parts = packfile.pack_rows(spec, codes, mask=mask, scale=torch.ones(1, 1))
    # The fifth column is alone in its group; the first virtual column takes the second slot.
    assert parts["codes"].tolist() == [[0x99, 0x09]]
    assert parts["pattern"].tolist() == [[0]]


def read_by_the_document(spec: LayerSpec, columns: int, parts: dict[str, Any], row: int) -> list[float]:
    """One row, read bit by bit as docs/format.md says, without any code of the library's."""
    stored = spec.stored_columns(columns)
    if spec.quant is None:
        values = [float(value) for value in parts["values"][row]]
    else:
        bits = spec.quant.bits
        number = int.from_bytes(bytes(parts["codes"][row].tolist()), "little")
        codes = [(number >> (bits * i)) & ((1 << bits) - 1) for i in range(stored)]
    if spec.sparsity is None:
        places = list(range(columns))
    else:
        n, m = spec.sparsity.n, spec.sparsity.m
        code = spec.sparsity.code
        raw = bytes(parts["pattern"][row].tolist())
        ranks = []
        for start in range(0, len(raw), code.word_bytes):
            word = int.from_bytes(raw[start : start + code.word_bytes], "little")
            ranks += [word // math.comb(m, n) ** digit % math.comb(m, n) for digit in range(code.groups)]
        places = []
        for group in range(math.ceil(columns / m)):
            rank, chosen = ranks[group], []
            for k in range(n, 0, -1):
                place = max(place for place in range(m) if math.comb(place, k) <= rank)
                rank -= math.comb(place, k)
                chosen.append(group * m + place)
            places += chosen[::-1]
    out = [0.0] * columns
    for slot, column in enumerate(places):
        if column >= columns:
            continue
        if spec.quant is None:
            out[column] = values[slot]
            continue
        group = 0 if spec.group is None else column // spec.group
        zero = spec.quant.zero if spec.quant.symmetric else int(parts["zero"][row][group])
        out[column] = (codes[slot] - zero) * float(parts["scale"][row][group])
        if spec.column_scales:
            # Both products are rounded to float32.
            out[column] = float(np.float32(out[column]) * np.float32(parts["column_scale"][column]))
    return out


@pytest.mark.parametrize(
    ("spec", "columns"),
    [
        (LayerSpec(Int(4), NM(2, 4)), 50),
        (LayerSpec(Int(3), NM(1, 4), 7), 33),
        (LayerSpec(Int(5, symmetric=False), NM(7, 16), 20), 45),
        (LayerSpec(Int(2, grid="midrise"), NM(16, 32)), 70),
        (LayerSpec(Int(2, grid="ternary"), NM(3, 4), 8), 29),
        (LayerSpec(Int(7)), 19),
        (LayerSpec(Int(3), None, None, column_scales=True), 21),
        (LayerSpec(Int(5, symmetric=False), NM(2, 4), 8, column_scales=True), 30),
        (LayerSpec(None, NM(3, 5)), 23),
    ],
    ids=str,
)
def test_another_reader_reads_the_same(spec: LayerSpec, columns: int) -> None:
    weight = torch.randn(3, columns)
    mask = None if spec.sparsity is None else nm_mask(weight.abs(), spec.sparsity)
    scale = zero = None
    codes = weight.half()
    if spec.quant is not None:
        scale, zero = q.min_max(weight, spec.quant, spec.group)
        codes = q.quantize(weight, scale, zero, spec.quant, spec.group)
    parts = packfile.pack_rows(spec, codes, mask=mask, scale=scale, zero=zero)
    if spec.column_scales:
        parts["column_scale"] = torch.rand(columns).half() + 0.5
    assert {k: v.numel() * v.element_size() for k, v in parts.items()} == spec.sizes(3, columns)
    dense = kernels.unpack(packfile.packed_weight(spec, (3, columns), parts, where="w"))
    for row in range(3):
        expected = torch.tensor(read_by_the_document(spec, columns, parts, row), dtype=torch.float64)
        assert torch.equal(dense[row], expected.float())


def test_a_mask_that_does_not_fit_the_spec_is_refused() -> None:
    spec = LayerSpec(Int(4), NM(2, 4))
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    mask = torch.tensor([[True, True, True, False, True, False, False, False]])
    with pytest.raises(ModelError, match="2 of every 4"):
        packfile.pack_rows(spec, codes, mask=mask, scale=torch.ones(1, 1))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-9, 0.1])
def test_scales_that_float16_cannot_hold_are_refused(scale: float) -> None:
    with pytest.raises(ModelError, match="scales"):
        packfile.pack_rows(
            LayerSpec(Int(4)), torch.zeros(1, 8, dtype=torch.uint8), scale=torch.full((1, 1), scale)
        )


# One weight's values


def parts_of(spec: LayerSpec, rows: int = 4, columns: int = 24) -> dict[str, torch.Tensor]:
    weight = torch.randn(rows, columns)
    mask = None if spec.sparsity is None else nm_mask(weight.abs(), spec.sparsity)
    if spec.quant is None:
        return packfile.pack_rows(spec, weight.half(), mask=mask)
    scale, zero = q.min_max(weight, spec.quant, spec.group)
    codes = q.quantize(weight, scale, zero, spec.quant, spec.group)
    return packfile.pack_rows(spec, codes, mask=mask, scale=scale, zero=zero)


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan"), float("inf")])
def test_impossible_scales_are_named(bad: float) -> None:
    spec = LayerSpec(Int(4))
    parts = parts_of(spec)
    parts["scale"][2, 0] = bad
    with pytest.raises(PackedModelError, match=r"file: w\.scale: impossible scale .*above 0, found"):
        packfile.packed_weight(spec, (4, 24), parts, where="file: w")


def test_an_impossible_column_scale_is_named() -> None:
    spec = LayerSpec(Int(4), column_scales=True)
    parts = parts_of(spec) | {"column_scale": torch.ones(24).half()}
    parts["column_scale"][7] = 0.0
    with pytest.raises(PackedModelError, match=r"w\.column_scale: impossible scale .*above 0, found"):
        packfile.packed_weight(spec, (4, 24), parts, where="file: w")


def test_values_that_are_not_finite_are_named() -> None:
    spec = LayerSpec(None, NM(2, 4))
    parts = parts_of(spec)
    parts["values"][1, 3] = float("inf")
    with pytest.raises(PackedModelError, match=r"w\.values.*found 1 of 48"):
        packfile.packed_weight(spec, (4, 24), parts, where="w")


def test_zero_points_beyond_the_codes_are_named() -> None:
    spec = LayerSpec(Int(3, symmetric=False))
    parts = parts_of(spec)
    parts["zero"][0, 0] = 8
    with pytest.raises(PackedModelError, match=r"w\.zero.*expected 0 to 7, found 8"):
        packfile.packed_weight(spec, (4, 24), parts, where="w")


@pytest.mark.parametrize(
    ("nm", "columns", "byte", "value"),
    [
        (NM(2, 4), 24, 0, 216),  # three digits in base 6
        (NM(2, 4), 16, 1, 6),  # the last word has one digit
        (NM(1, 4), 20, 1, 4),
        (NM(4, 8), 80, 7, 255),  # the highest bit of a word of 8 bytes, or too much for one of 4
        (NM(16, 32), 64, 7, 128),
    ],
)
def test_patterns_that_do_not_exist_are_named(nm: NM, columns: int, byte: int, value: int) -> None:
    spec = LayerSpec(Int(4), nm)
    parts = parts_of(spec, columns=columns)
    packfile.packed_weight(spec, (4, columns), parts, where="w")
    parts["pattern"][2, byte] = value
    with pytest.raises(PackedModelError, match=rf"w\.pattern, row 2: impossible {nm} pattern .*a word below"):
        packfile.packed_weight(spec, (4, columns), parts, where="w")


def test_parts_that_contradict_the_spec_are_named() -> None:
    parts = parts_of(LayerSpec(Int(4)))
    with pytest.raises(PackedModelError, match=r"w\.codes: contradicts .*\[4, 9\].*\[4, 12\]"):
        packfile.packed_weight(LayerSpec(Int(3)), (4, 24), parts, where="w")
    with pytest.raises(PackedModelError, match="expected codes, pattern, scale, found codes, scale"):
        packfile.packed_weight(LayerSpec(Int(4), NM(2, 4)), (4, 24), parts, where="w")


# The weights file


TENSORS = {
    "b": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "a": torch.randn(5).half(),
    "steps": torch.tensor(7),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "model.safetensors", TENSORS)
    return tmp_path / "model.safetensors"


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    writer = WeightsWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    for name in sorted(tensors):
        writer.write(name, tensors[name])
    writer.close()


def test_safetensors_reads_what_was_written(path: Path) -> None:
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with WeightsFile(path).open() as read:
        kept = {name: read(name) for name in TENSORS}
    assert all(torch.equal(kept[name], tensor) for name, tensor in TENSORS.items())


def test_the_writer_insists_on_what_was_announced(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path / "f", {"a": (torch.uint8, (3,)), "b": (torch.uint8, (3,))})
    with pytest.raises(ValueError, match="announced"):
        writer.write("a", torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="never written: b"):
        writer.close()


def test_the_digest_is_the_documents(path: Path) -> None:
    state = hashlib.sha256()
    state.update(b'["steps","I64",[]]\n' + (7).to_bytes(8, "little"))
    state.update(b'["a","F16",[5]]\n' + TENSORS["a"].numpy().tobytes())
    state.update(b'["b","U8",[2,3]]\n' + bytes(range(6)))
    assert WeightsFile(path).digest() == f"sha256:{state.hexdigest()}"


def test_the_digest_does_not_depend_on_the_writer(path: Path, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "other.safetensors", metadata={"more": "text"})
    assert WeightsFile(path).digest() == WeightsFile(tmp_path / "other.safetensors").digest()


def test_every_truncation_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PackedModelError, match=r"model\.safetensors"):
            WeightsFile(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(PackedModelError, match="longer than its header says"):
        WeightsFile(path)


def test_every_flipped_bit_is_found(path: Path) -> None:
    whole = path.read_bytes()
    weights = WeightsFile(path)
    digest = weights.digest()
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    header_end = 8 + int.from_bytes(whole[:8], "little")
    metadata = range(whole.index(b'"__metadata__"'), whole.index(b"}") + 1)
    # Free text, and the blanks between header and data, mean nothing.
    blanks = range(len(whole[:header_end].rstrip()), header_end)
    for position in set(range(len(whole))) - set(metadata) - set(blanks):
        altered = bytearray(whole)
        altered[position] ^= 1 << (position % 8)
        path.write_bytes(altered)
        with pytest.raises(PackedModelError, match=r"model\.safetensors"):
            check_all(path, expected, digest)


def check_all(path: Path, expected: dict[str, Any], digest: str) -> None:
    file = WeightsFile(path)
    file.check_tensors(expected)
    file.check_digest(digest)


def with_header(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


ENTRY = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": {**ENTRY, "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}, "truncated .*4398046511"),
        ({"a": {**ENTRY, "shape": [1 << 42]}}, "impossible header entry 'a'"),
        ({"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}, "impossible header entry"),
        ({"a": {**ENTRY, "shape": [1 << 63]}}, "impossible header entry"),
        ({"a": {**ENTRY, "shape": [-8]}}, "impossible header entry"),
        ({"a": {**ENTRY, "shape": [8.0]}}, "impossible header entry"),
        ({"a": {**ENTRY, "shape": "8"}}, "impossible header entry"),
        ({"a": {**ENTRY, "dtype": "U9"}}, "impossible header entry"),
        ({"a": {**ENTRY, "dtype": ["U8"]}}, "impossible header entry"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "impossible header entry"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "impossible header entry"),
        ({"a": {**ENTRY, "more": 1}}, "impossible header entry"),
        ({"a": 3}, "impossible header entry"),
        ({"a": ENTRY, "b": ENTRY}, "overlap"),
        ({"a": {**ENTRY, "shape": [7], "data_offsets": [1, 8]}}, "leave gaps"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[1, 2]", "unreadable header"),
        (b"\xff\xfe{}", "unreadable header"),
        (b"[" * 200_000, "unreadable header"),
        (b"", "impossible header length"),
    ],
)
def test_impossible_headers_are_refused(tmp_path: Path, header: Any, match: str) -> None:
    path = tmp_path / "model.safetensors"
    with_header(path, header)
    with pytest.raises(PackedModelError, match=match) as caught:
        WeightsFile(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, 100_000])
def test_an_absurd_header_length_is_refused(tmp_path: Path, length: int) -> None:
    with_header(tmp_path / "f", {"a": ENTRY}, length=length)
    with pytest.raises(PackedModelError, match="impossible header length"):
        WeightsFile(tmp_path / "f")


def test_a_missing_file_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(PackedModelError, match="cannot be read"):
        WeightsFile(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(PackedModelError, match=r"truncated .*8 bytes, found 0 bytes"):
        WeightsFile(tmp_path / "empty")


def test_missing_extra_and_different_tensors_are_named(path: Path) -> None:
    weights = WeightsFile(path)
    expected: dict[str, Any] = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    weights.check_tensors(expected)
    weights.check_tensors({**expected, "a": (None, (5,)), "steps": (None, ())})
    with pytest.raises(PackedModelError, match=r"missing .*expected c, found not in the file"):
        weights.check_tensors({**expected, "c": (torch.uint8, (1,))})
    with pytest.raises(PackedModelError, match=r"does not have .*found a"):
        weights.check_tensors({name: expected[name] for name in ("b", "steps")})
    with pytest.raises(PackedModelError, match=r": a: contradicts .*F16 \[6\], found F16 \[5\]"):
        weights.check_tensors({**expected, "a": (None, (6,))})
    with pytest.raises(PackedModelError, match=r": b: contradicts .*F16 \[2, 3\], found U8"):
        weights.check_tensors({**expected, "b": (torch.float16, (2, 3))})


# The manifest

MANIFEST = Manifest(
    {
        "fc1": PackedLayer((4, 24), LayerSpec(Int(4), NM(2, 4), 12)),
        "conv": PackedLayer((4, 3, 3), LayerSpec(Int(8))),
    },
    {"positions.weight": "sinusoids"},
    "sha256:" + "0" * 64,
    "1.2.3",
)


def test_the_manifest_survives_json() -> None:
    values = json.loads(json.dumps(MANIFEST.to_dict()))
    assert Manifest.from_dict(values, where="config.json") == MANIFEST


@pytest.mark.parametrize("place", range(5))
def test_the_fourth_code_of_a_ternary_weight_is_refused(place: int) -> None:
    spec, codes = LayerSpec(Int(2, grid="ternary")), torch.tensor([[0, 1, 2, 2, 1]], dtype=torch.uint8)
    parts = packfile.pack_rows(spec, codes, scale=torch.ones(1, 1))
    weight = kernels.unpack(packfile.packed_weight(spec, (1, 5), parts, where="w"))
    assert weight.tolist() == [[-1.0, 0.0, 1.0, 1.0, 0.0]]
    codes[0, place] = 3
    parts = packfile.pack_rows(spec, codes, scale=torch.ones(1, 1))
    with pytest.raises(PackedModelError, match="impossible ternary code"):
        packfile.packed_weight(spec, (1, 5), parts, where="w")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_method": "gptq"}, "not a packed model of usmlite .*found quant_method 'gptq'"),
        ({"format_version": 4}, "newer usmlite .*expected 2 or 3, found 4.*pip install"),
        ({"format_version": 1}, "before its first release.*expected 2 or 3, found 1.*again"),
        ({"format_version": 2.0}, "unusable format version"),
        ({"format_version": "1"}, "unusable format version"),
        ({"format_version": True}, "unusable format version"),
        ({"format_version": 0}, "unusable format version"),
        ({"digest": "md5:0"}, "unusable digest"),
        ({"digest": None}, "unusable digest"),
        ({"layers": []}, "no layers"),
        ({"computed": {"a": "exec"}}, "unknown computed"),
        ({"computed": {"a": []}}, "unknown computed"),
        ({"computed": ["a"]}, "unknown computed"),
        ({"layers": {"a": 3}}, r"layers\['a'\]: unreadable layer"),
        ({"layers": {"a": {"shape": [4], "bits": 4}}}, "unusable shape"),
        ({"layers": {"a": {"shape": [4, 0], "bits": 4}}}, "unusable shape"),
        ({"layers": {"a": {"shape": [4, 1 << 40], "bits": 4}}}, "unusable shape"),
        ({"layers": {"a": {"shape": [4, 4], "bits": 99}}}, "unusable layer spec.*found 99"),
        ({"layers": {"a": {"shape": [4, 4], "bits": 4, "sparsity": "9:3"}}}, "unusable layer spec.*9:3"),
        ({"layers": {"a": {"shape": [4, 4], "bits": [4]}}}, "unusable layer spec"),
        ({"layers": {"a": {"shape": [4, 4], "bits": 4, "symmetric": False, "grid": "midrise"}}}, "unusable"),
        ({"layers": {"a": {"shape": [4, 4], "bits": 3, "grid": "ternary"}}}, "unusable layer spec.*bits = 2"),
        ({"layers": {"a": {"shape": [4, 4], "bits": 4, "group": -1}}}, "unusable layer spec"),
        ({"layers": {"a": {"shape": [4, 4], "bits": 4, "run": "rm"}}}, "unusable layer spec.*run"),
        ({"layers": {"a": {"shape": [4, 4]}}}, "neither bits nor sparsity"),
    ],
)
def test_a_bad_manifest_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(PackedModelError, match=match) as caught:
        Manifest.from_dict({**MANIFEST.to_dict(), **change}, where="dir/config.json")
    assert str(caught.value).startswith("dir/config.json")


def test_no_manifest_at_all() -> None:
    with pytest.raises(PackedModelError, match="found no quantization_config"):
        Manifest.from_dict(None, where="config.json")


def test_the_manifest_is_compared_with_the_model() -> None:
    shapes = {"fc1.weight": (4, 24), "fc1.bias": (4,), "conv.weight": (4, 3, 3), "positions.weight": (6, 4)}
    tensors = MANIFEST.tensors(shapes, where="c")
    assert tensors["fc1.bias"] == (None, (4,))
    assert tensors["fc1.weight.scale"] == (torch.float16, (4, 2))
    assert "positions.weight" not in tensors
    with pytest.raises(PackedModelError, match=r"does not have .*found conv\.weight"):
        MANIFEST.tensors({name: shapes[name] for name in shapes if name != "conv.weight"}, where="c")
    with pytest.raises(PackedModelError, match=r"fc1.weight: .*expected \[5, 24\], found \[4, 24\]"):
        MANIFEST.tensors({**shapes, "fc1.weight": (5, 24)}, where="c")


# Computed tensors


def test_sinusoids_are_those_of_whisper() -> None:
    from transformers.models.whisper.modeling_whisper import sinusoids

    table = sinusoids(1500, 384)
    assert torch.equal(packfile.compute("sinusoids", (1500, 384)), table)
    assert packfile.computed_rule(table) == "sinusoids"
    assert packfile.computed_rule(table.half().float()) == "sinusoids-float16"
    assert packfile.computed_rule(table + 0.01) is None
    assert packfile.computed_rule(torch.randn(20, 4)) is None
    assert packfile.computed_rule(torch.zeros(7)) is None


@pytest.mark.parametrize("shape", [(10, 3), (10, 2), (10,), (1 << 40, 4)])
def test_tables_that_cannot_be_computed(shape: tuple[int, ...]) -> None:
    with pytest.raises(PackedModelError, match="cannot be computed"):
        packfile.compute("sinusoids", shape)


# The directory


def test_config_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(PackedModelError, match="no such directory"):
        packfile.read_manifest(tmp_path / "none")
    with pytest.raises(PackedModelError, match=r"config\.json: no such file"):
        packfile.read_manifest(tmp_path)
    config = tmp_path / "config.json"
    for text, match in (("{", "not JSON"), ("[]", "not a model's config"), ("{}", "no quantization_config")):
        config.write_text(text)
        with pytest.raises(PackedModelError, match=match) as caught:
            packfile.read_manifest(tmp_path)
        assert str(config) in str(caught.value)
    config.write_text("[" * 100_000)
    with pytest.raises(PackedModelError, match="not JSON"):
        packfile.read_manifest(tmp_path)
    config.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PackedModelError, match="not JSON"):
        packfile.read_manifest(tmp_path)
    assert not packfile.is_packed(tmp_path)


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../secret.json")
    with pytest.raises(PackedModelError, match="leads out of the directory"):
        packfile.member(folder, "config.json")
    with pytest.raises(PackedModelError, match="leads out"):
        packfile.member(folder, "../secret.json")
    (folder / "real.json").write_text("{}")
    (folder / "link.json").symlink_to("real.json")
    assert packfile.member(folder, "link.json").read_text() == "{}"
    os.mkfifo(folder / "pipe")
    with pytest.raises(PackedModelError, match="not a regular file"):
        packfile.member(folder, "pipe")


def test_a_hub_snapshot_may_link_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    assert packfile.read_config(snapshot) == {}


def test_an_index_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    with pytest.raises(
        PackedModelError, match=r"model\.safetensors\.index\.json, which packed models do not use"
    ):
        packfile.member(tmp_path, "model.safetensors")


def make_packed(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": MANIFEST.to_dict()}))
    (folder / "model.safetensors").write_text("old")
    (folder / "vocab.json").write_text("old")
    (folder / "notes.txt").write_text("mine")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_directory_appears_whole(tmp_path: Path) -> None:
    with packfile.new_directory(tmp_path / "deep" / "out") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == {"out"}
    assert names(tmp_path / "deep" / "out") == {"config.json"}


def test_a_packed_model_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    make_packed(tmp_path / "out")
    with packfile.new_directory(tmp_path / "out") as folder:
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"config.json", "model.safetensors", "notes.txt"}
    assert (tmp_path / "out" / "model.safetensors").read_text() == "new"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def write_half(target: Path, failure: BaseException) -> None:
    with packfile.new_directory(target) as folder:
        (folder / "model.safetensors").write_text("half")
        raise failure


FAILURES: list[tuple[BaseException, type[BaseException]]] = [
    (OSError(errno.ENOSPC, "No space left on device"), OutputError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (RuntimeError("bug"), RuntimeError),
]


@pytest.mark.parametrize(("failure", "expected"), FAILURES, ids=["full disk", "Ctrl-C", "bug"])
def test_nothing_half_written_stays(
    tmp_path: Path, failure: BaseException, expected: type[BaseException]
) -> None:
    make_packed(tmp_path / "out")
    for target in ("out", "fresh"):
        with pytest.raises(expected) as caught:
            write_half(tmp_path / target, failure)
        if expected is OutputError:
            assert "No space left on device" in str(caught.value)
            assert str(tmp_path / target) in str(caught.value)
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"


def test_a_failed_swap_brings_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_packed(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"), packfile.new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"


def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match=r"exists and is not a packed model .*found thesis\.tex"), \
            packfile.new_directory(tmp_path):  # fmt: skip
        pass
    with pytest.raises(OutputError, match="is not a directory"), \
            packfile.new_directory(tmp_path / "thesis.tex"):  # fmt: skip
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with packfile.new_directory(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert names(tmp_path / "out") == {"a"}


def test_part_shapes_cost_what_the_spec_says() -> None:
    for spec in (
        LayerSpec(Int(3, symmetric=False), NM(5, 9), 7),
        LayerSpec(None, NM(2, 4)),
        LayerSpec(Int(8)),
        LayerSpec(Int(3), column_scales=True),
    ):
        for shape in ((5, 31), (7, 3, 3)):
            rows, columns = matrix_shape(shape)
            found = {
                part: math.prod(size) * dtype.itemsize
                for part, (dtype, size) in packfile.part_shapes(spec, rows, columns).items()
            }
            assert found == spec.sizes(rows, columns)
    assert packfile.part_shapes(LayerSpec(), 4, 4) == {}


def read_coded_by_the_document(
    data: bytes, bits: int, rows: int, columns: int, tables: int, beside: int, states_of: int = 0
) -> tuple[list[int], list[int]]:
    """Entropy-coded codes and what lies with them, read one by one as docs/format.md says."""
    (size,) = struct.unpack("<I", data[:4])
    side, data = zlib.decompress(data[4 : 4 + size]), data[4 + size :]
    lowest, row_levels, column_levels = side[0], side[1 : 1 + rows], side[1 + rows : 1 + rows + columns]
    frequencies, bits = [], 7 if states_of else bits
    for _ in range(2 * tables if states_of else tables):
        first, more = data[0], data[1] + 1
        found = struct.unpack(f"<{more}H", data[2 : 2 + 2 * more])
        frequencies.append([0] * first + list(found) + [0] * ((1 << bits) - first - more))
        data = data[2 + 2 * more :]
    count = rows * columns
    lanes = max(1, min(count, 32 + count // 16384))
    states = list(struct.unpack(f"<{lanes}I", data[: 4 * lanes]))
    words = [word for (word,) in struct.iter_unpack("<H", data[4 * lanes :])]
    codes, places = [], [0] * columns
    quantizer_bits, parity_bits = {0: (0, 0), 4: (2, 1), 8: (5, 2), 16: (9, 2), 32: (18, 4)}[states_of]
    for first in range(0, count, lanes):
        active = range(min(lanes, count - first))
        for lane in active:
            row, column = divmod(first + lane, columns)
            level = row_levels[row] + column_levels[column] - lowest
            table = min(max(level, 0), tables - 1)
            if states_of:
                places[column] = 0 if row % 4096 == 0 else places[column]
                table = 2 * table + places[column] % 2
            table = frequencies[table]
            slot, start, code = states[lane] % 4096, 0, 0
            while slot >= start + table[code]:
                start += table[code]
                code += 1
            if states_of:
                k, place = code - 64, places[column]
                sign = (k > 0) - (k < 0)
                codes.append(128 + 2 * k - (sign if place % 2 else 0))
                places[column] = place // 2 ^ place % 2 * quantizer_bits ^ k % 2 * parity_bits
            else:
                codes.append(code)
            states[lane] = table[code] * (states[lane] // 4096) + slot - start
        for lane in active:
            if states[lane] < 1 << 16:
                states[lane] = (states[lane] << 16) + words.pop(0)
    assert not words
    assert set(states) == {1 << 16}
    assert len(side) == 1 + rows + columns + beside
    return codes, list(side[1 + rows + columns :])


@pytest.mark.parametrize(
    ("bits", "rows", "columns"), [(3, 50, 100), (8, 70, 10), (4, 1, 1), (1, 20, 100), (6, 60, 80)]
)
def test_another_reader_decodes_the_same(bits: int, rows: int, columns: int) -> None:
    widths = torch.exp2(torch.linspace(-2, 1, rows)).unsqueeze(1) * 2.0 ** (bits - 3)
    codes = (torch.randn(rows, columns) * widths).add(2.0 ** (bits - 1)).round()
    array = codes.clamp(0, 2**bits - 1).to(torch.uint8).numpy()
    beside = torch.arange(rows).to(torch.uint8).numpy()
    contexts = entropy.Contexts.of(array)
    assert contexts.tables > 1 or bits < 6 or array.size < 1024
    data = entropy.encode(array, bits, contexts, beside)
    found = read_coded_by_the_document(data.tobytes(), bits, rows, columns, contexts.tables, rows)
    assert found == (array.reshape(-1).tolist(), beside.tolist())


@pytest.mark.parametrize(("states", "rows", "columns"), [(4, 50, 40), (8, 4100, 3), (16, 1, 9), (32, 90, 7)])
def test_another_reader_decodes_a_trellis(states: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(states)
    codes = trellis.nearest(torch.randn(rows, columns, generator=generator).mul(3).numpy(), states)
    contexts = entropy.Contexts.of(codes)
    data = entropy.encode(codes, 8, contexts, trellis=states)
    found = read_coded_by_the_document(data.tobytes(), 8, rows, columns, contexts.tables, 0, states)
    assert found == (codes.reshape(-1).tolist(), [])


def test_layers_along_a_trellis_are_checked() -> None:
    spec = LayerSpec(Int(8, scale_bits=8), column_scales=True)
    codes = torch.from_numpy(trellis.nearest(torch.randn(64, 96).mul(2).numpy(), 8))
    ones = kernels.scale_codes(torch.ones(160))
    fixed = {"codes": codes, "scale": ones[:64].unsqueeze(1), "column_scale": ones[64:]}
    layer, parts = PackedLayer((64, 96), spec).encoded(fixed, codes, 8)
    assert layer.trellis == 8
    assert set(parts) == {"coded"}
    assert_same(layer.decoded(parts, where="w"), fixed)
    assert PackedLayer.from_dict(layer.to_dict(), 3, where="here") == layer
    for values, version in (
        (layer.to_dict(), 2),
        ({**layer.to_dict(), "trellis": 5}, 3),
        ({**layer.to_dict(), "trellis": True}, 3),
        ({**layer.to_dict(), "trellis": [8]}, 3),
        ({**layer.to_dict(), "bits": 7}, 3),
        ({**layer.to_dict(), "symmetric": False}, 3),
        ({**layer.to_dict(), "sparsity": "2:4"}, 3),
        ({**layer.to_dict(), "coded": None}, 3),
    ):
        with pytest.raises(PackedModelError, match=r"here\.trellis|here\.tables|here\.coded"):
            PackedLayer.from_dict(values, version, where="here")
    codes[5, 5] ^= 1
    with pytest.raises(ModelError, match=r"does not follow its trellis.*hessian"):
        PackedLayer((64, 96), spec).encoded(fixed, codes, 8)


def test_coded_layers_are_checked() -> None:
    spec = LayerSpec(Int(4))
    codes = torch.randn(64, 96).mul(1.5).add(8).round().clamp(0, 15).to(torch.uint8)
    fixed = {"codes": packfile.pack_codes(codes, 4), "scale": torch.ones(64, 1).half()}
    layer, parts = PackedLayer((64, 96), spec).encoded(fixed, codes)
    assert layer.coded == len(parts["coded"]) < 64 * 48
    assert_same(layer.decoded(parts, where="w"), fixed)
    assert PackedLayer.from_dict(layer.to_dict(), 2, where="here") == layer
    with pytest.raises(PackedModelError, match=r"w\.coded"):
        layer.decoded({**parts, "coded": parts["coded"].flip(0)}, where="w")
    for wrong in (0, 64 * 48, 64 * 48 // 16 - 1, True, "many", 1.5):
        with pytest.raises(PackedModelError, match=r"here\.coded.*expected 192 to 3071"):
            PackedLayer.from_dict({**layer.to_dict(), "coded": wrong}, 2, where="here")


def test_scales_of_8_bits_lie_with_the_coded_codes() -> None:
    spec = LayerSpec(Int(4, scale_bits=8), column_scales=True)
    codes = torch.randn(64, 96).mul(1.5).add(8).round().clamp(0, 15).to(torch.uint8)
    scale, columns = kernels.scale_of(torch.arange(64)), kernels.scale_of(torch.arange(96) + 100)
    fixed = packfile.pack_rows(spec, codes, scale=scale.float().unsqueeze(1))
    fixed["column_scale"] = packfile.stored_scales(columns.float(), spec.quant or Int(4))
    layer, parts = PackedLayer((64, 96), spec).encoded(fixed, codes)
    assert set(parts) == {"coded"} == set(layer.parts())
    assert_same(layer.decoded(parts, where="w"), fixed)
    weight = packfile.packed_weight(spec, (64, 96), fixed, where="w")
    assert torch.equal(weight.scale, scale.unsqueeze(1))
    assert torch.equal(weight.column_scale, columns)
    with pytest.raises(PackedModelError, match=r"w\.scale.*expected 0 to 239, found 240"):
        packfile.packed_weight(spec, (64, 96), {**fixed, "scale": fixed["scale"] * 0 + 240}, where="w")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scale_codes_are_eighths_of_octaves() -> None:
    codes = torch.arange(kernels.MOST_SCALE_CODE + 1).to(torch.uint8)
    scales = kernels.scale_of(codes)
    assert scales[0] == kernels.MIN_SCALE
    assert scales[112] == 1.0
    assert scales[120] == 2.0
    assert torch.equal(kernels.scale_codes(scales), codes)
    assert bool(scales.isfinite().all())
    between = torch.rand(1000) * 3 + 0.01
    assert bool(((kernels.scale_of(kernels.scale_codes(between)) / between).log2().abs() < 1 / 15).all())
