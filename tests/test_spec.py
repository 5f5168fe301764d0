from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usmlite.errors import SpecError
from usmlite.spec import (
    KEEP,
    KINDS,
    MAX_M,
    NM,
    CompressionSpec,
    Int,
    LayerSpec,
    Rule,
    matrix_shape,
)


@st.composite
def ints(draw: st.DrawFn) -> Int:
    bits = draw(st.integers(1, 8))
    symmetric = draw(st.booleans())
    grids = ["integer", "midrise", "ternary"] if bits == 2 else ["integer", "midrise"]
    grid = draw(st.sampled_from(grids)) if symmetric else "integer"
    return Int(bits, symmetric, grid)


@st.composite
def patterns(draw: st.DrawFn) -> NM:
    m = draw(st.integers(2, MAX_M))
    return NM(draw(st.integers(1, m - 1)), m)


@st.composite
def layer_specs(draw: st.DrawFn) -> LayerSpec:
    quant = draw(st.none() | ints())
    group = None if quant is None else draw(st.none() | st.integers(1, 200))
    return LayerSpec(quant, draw(st.none() | patterns()), group)


# Int


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, "4", True, None])
def test_bits_are_1_to_8(bits: object) -> None:
    with pytest.raises(SpecError, match="bits: unsupported number of bits") as error:
        Int(bits)  # type: ignore[arg-type]
    assert error.value.expected == "a whole number from 1 to 8"
    assert error.value.found == repr(bits)


def test_grids() -> None:
    with pytest.raises(SpecError, match="unknown grid"):
        Int(4, grid="uneven")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no zero point"):
        Int(4, symmetric=False, grid="midrise")
    with pytest.raises(SpecError, match="no zero point"):
        Int(2, symmetric=False, grid="ternary")
    with pytest.raises(SpecError, match="ternary grid has codes of 2 bits"):
        Int(3, grid="ternary")
    assert Int(1).grid == "midrise"
    assert Int(1, symmetric=False).grid == "integer"


def test_levels() -> None:
    def levels(quant: Int) -> list[float]:
        return [code - quant.zero for code in range(quant.max_code + 1)]

    assert levels(Int(1)) == [-0.5, 0.5]
    assert levels(Int(2)) == [-2, -1, 0, 1]
    assert levels(Int(2, grid="midrise")) == [-1.5, -0.5, 0.5, 1.5]
    assert levels(Int(2, grid="ternary")) == [-1, 0, 1]
    assert levels(Int(4)) == list(range(-8, 8))
    assert levels(Int(8))[0] == -128


@pytest.mark.parametrize(
    ("quant", "text"),
    [
        (Int(4), "int4"), (Int(1), "int1"), (Int(2, grid="midrise"), "int2 midrise"),
        (Int(3, symmetric=False), "int3 asymmetric"), (Int(2, grid="ternary"), "ternary"),
    ],
)  # fmt: skip
def test_names(quant: Int, text: str) -> None:
    assert str(quant) == text


def test_the_embedding_is_ternary_only_with_two_bits() -> None:
    for embedding_bits, grid in ((None, "ternary"), (2, "ternary"), (4, "integer")):
        spec = CompressionSpec.simple(2, "2:4", grid="ternary", embedding_bits=embedding_bits, coded=False)
        assert spec.resolve("fc1", "linear") == LayerSpec(Int(2, grid="ternary"), NM(2, 4))
        embedding = spec.resolve("embed", "embedding").quant
        assert embedding == Int(embedding_bits or 2, grid=grid)  # type: ignore[arg-type]


# NM


@pytest.mark.parametrize(
    ("n", "m"), [(3, 2), (2, 2), (0, 4), (-1, 4), (1, 33), (1.0, 2), (True, 2), ("2", 4)]
)
def test_impossible_sparsity(n: object, m: object) -> None:
    with pytest.raises(SpecError, match="sparsity: impossible sparsity") as error:
        NM(n, m)  # type: ignore[arg-type]
    assert error.value.found == f"{n}:{m}"


def test_parse() -> None:
    assert NM.parse("2:4") == NM(2, 4)
    assert NM.parse(" 1 : 16 ") == NM(1, 16)
    for text in ("dense", "none", "", " DENSE "):
        assert NM.parse(text) is None
    for text in ("2", "2:", ":4", "a:b", "2:4:8", "-1:4", "2/4", "1.5:4"):
        with pytest.raises(SpecError, match="sparsity"):
            NM.parse(text)


def test_two_of_four_fits_three_to_a_byte() -> None:
    code = NM(2, 4).code
    assert (code.patterns, code.word_bytes, code.groups) == (6, 1, 3)
    assert NM(1, 4).code.groups == 4
    assert NM(1, 2).code.groups == 8


@given(patterns())
def test_pattern_code_fits_and_wastes_little(nm: NM) -> None:
    code = nm.code
    assert code.patterns == math.comb(nm.m, nm.n)
    assert code.patterns**code.groups <= 2 ** min(8 * code.word_bytes, 63)
    bits = code.word_bytes * 8 / code.groups
    others = [
        8 * size / math.floor(min(8 * size, 63) / math.log2(code.patterns))
        for size in (1, 2, 4, 8)
        if code.patterns <= 2 ** min(8 * size, 63)
    ]
    assert bits <= min(others) + 1e-9


# LayerSpec


@given(layer_specs())
def test_layer_spec_survives_json(spec: LayerSpec) -> None:
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(layer_specs(), st.integers(1, 40), st.integers(1, 300))
def test_bytes_add_up(spec: LayerSpec, rows: int, columns: int) -> None:
    sizes = spec.sizes(rows, columns)
    assert spec.bytes(rows, columns) == sum(sizes.values())
    assert all(size % rows == 0 for size in sizes.values())  # every row is stored on its own
    assert spec.bytes(2 * rows, columns) == 2 * spec.bytes(rows, columns)
    nm = spec.sparsity
    if nm is not None:
        assert spec.stored_columns(columns) % nm.n == 0
        assert spec.stored_columns(columns) * nm.m >= columns * nm.n
    if spec.group is not None:
        assert (
            (spec.scale_groups(columns) - 1) * spec.group < columns <= spec.scale_groups(columns) * spec.group
        )


def test_headline_bytes() -> None:
    # 64 columns: 32 codes of 4 bits and 16 groups of 2:4, three to a byte; one scale.
    assert LayerSpec(Int(4), NM(2, 4)).sizes(1, 64) == {"codes": 16, "scale": 2, "pattern": 6}
    assert LayerSpec(Int(3), group=32).sizes(2, 64) == {"codes": 48, "scale": 8}
    assert LayerSpec(Int(3, symmetric=False)).sizes(1, 9) == {"codes": 4, "scale": 2, "zero": 1}
    assert LayerSpec(None, NM(1, 4)).sizes(1, 10) == {"values": 6, "pattern": 1}
    assert KEEP.sizes(3, 5) == {"values": 30}


@pytest.mark.parametrize("group", [0, -1, 1.5, "8", True])
def test_groups(group: object) -> None:
    with pytest.raises(SpecError, match="group"):
        LayerSpec(Int(4), group=group)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="without quantization"):
        LayerSpec(None, NM(2, 4), group=8)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"bit": 4}, "unknown key"),
        ({"bits": 0}, "here.bits"),
        ({"bits": "four"}, "here.bits"),
        ({"bits": 4, "sparsity": "3:2"}, "here.sparsity"),
        ({"bits": 4, "sparsity": 2}, "unreadable sparsity"),
        ({"bits": 4, "group": 0}, "here.group"),
        ({"bits": 4, "grid": "odd"}, "here.grid"),
    ],
)
def test_wrong_specs_name_their_place(values: dict[str, object], match: str) -> None:
    with pytest.raises(SpecError, match=match) as error:
        LayerSpec.from_dict(values, where="here")
    assert str(error.value).startswith("here")


def test_spec_texts() -> None:
    assert str(LayerSpec(Int(4), NM(2, 4), 64)) == "int4 2:4 group 64"
    assert str(LayerSpec(None, NM(1, 4))) == "float16 1:4"
    assert str(KEEP) == "float16"


# Rules


def test_first_rule_decides() -> None:
    spec = CompressionSpec.simple(
        4, "2:4", first=[Rule("model.decoder.*", LayerSpec(Int(3))), Rule("*.fc1", KEEP, "linear")]
    )
    assert spec.resolve("model.decoder.layers.0.fc1", "linear") == LayerSpec(Int(3))
    assert spec.resolve("model.encoder.layers.0.fc1", "linear") == KEEP
    assert spec.resolve("model.encoder.layers.0.fc2", "linear") == LayerSpec(Int(4), NM(2, 4))
    assert spec.resolve("model.encoder.conv1", "conv1d") == LayerSpec(Int(8))
    assert CompressionSpec().resolve("anything", "linear") == KEEP


@pytest.mark.parametrize("kind", KINDS)
def test_simple_covers_every_kind(kind: str) -> None:
    assert not CompressionSpec.simple(4, NM(2, 4)).resolve("x", kind).is_kept
    assert CompressionSpec.simple(None, "dense").resolve("x", kind).is_kept


def test_unused_rules() -> None:
    spec = CompressionSpec.simple(
        4, first=[Rule("*.fc3", LayerSpec(Int(2))), Rule("*.fc1", LayerSpec(Int(3)))]
    )
    unused = spec.unused({"a.fc1": "linear", "a.fc2": "linear", "conv": "conv1d"})
    assert [(rule.match, rule.kind) for rule in unused] == [
        ("*.fc3", None), ("*", "positions"), ("*", "embedding"),
    ]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from(["*", "model.*", "*.fc?"]), layer_specs(), st.sampled_from([None, *KINDS]))
    )
)
def test_rules_survive_json(parts: list[tuple[str, LayerSpec, str | None]]) -> None:
    spec = CompressionSpec(tuple(Rule(match, layer, kind) for match, layer, kind in parts))  # type: ignore[arg-type]
    assert CompressionSpec.from_list(json.loads(json.dumps(spec.to_list()))) == spec


def test_wrong_rules_are_counted() -> None:
    with pytest.raises(SpecError, match=r"spec\.rules\[1\]\.bits"):
        CompressionSpec.from_list([{"match": "*", "bits": 4}, {"match": "*", "bits": 40}])
    with pytest.raises(SpecError, match="unreadable match"):
        Rule.from_dict({"match": 3, "bits": 4})
    with pytest.raises(SpecError, match="unknown kind"):
        Rule("*", KEEP, "conv2d")  # type: ignore[arg-type]


def test_matrix_shape() -> None:
    assert matrix_shape((5, 7)) == (5, 7)
    assert matrix_shape((5, 7, 3)) == (5, 21)
    for shape in itertools.chain([()], [(3,)], [(1, 2, 3, 4)]):
        with pytest.raises(SpecError, match="unsupported shape"):
            matrix_shape(shape)


@pytest.mark.parametrize(
    ("bits", "sparsity", "wanted", "expected"),
    [
        (4, "2:4", None, 3), (4, "1:4", None, 2), (2, "2:4", None, 2), (8, "2:4", None, 5),
        (4, None, None, 4), (1, None, None, 1), (4, "2:4", 6, 6), (None, "2:4", 3, 3),
    ],
)  # fmt: skip
def test_embeddings_are_dense_with_bits_for_equal_bytes(
    bits: int | None, sparsity: str | None, wanted: int | None, expected: int
) -> None:
    spec = CompressionSpec.simple(bits, sparsity, embedding_bits=wanted, coded=False).resolve(
        "x", "embedding"
    )
    coded = CompressionSpec.simple(bits, sparsity, embedding_bits=wanted).resolve("x", "embedding")
    assert coded == LayerSpec.at_rate(expected)
    assert spec == LayerSpec(Int(expected), column_scales=True)
    if wanted is None and bits is not None:
        pruned = LayerSpec(Int(bits), None if sparsity is None else NM.parse(sparsity))
        assert spec.sizes(7, 480)["codes"] >= pruned.bytes(7, 480) - 7 * 2


def test_column_scales_survive_their_dict_and_need_codes() -> None:
    spec = LayerSpec(Int(3), column_scales=True)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert str(spec) == "int3 column scales"
    with pytest.raises(SpecError, match="column_scales"):
        LayerSpec(None, NM(2, 4), column_scales=True)
    with pytest.raises(SpecError, match="true or false"):
        LayerSpec.from_dict({"bits": 3, "column_scales": 1})


def test_a_rate_survives_its_dict_and_counts_as_bytes() -> None:
    spec = LayerSpec.at_rate(2.5)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert str(spec) == "2.5 bits coded"
    assert spec.sizes(10, 64) == {"codes": 10 * 64 * 2.5 / 8, "scale": 10, "column_scale": 64}


def test_scales_of_8_bits_survive_their_dict_and_take_half() -> None:
    spec = LayerSpec(Int(4, scale_bits=8), group=32)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert spec.sizes(10, 64)["scale"] == 20
    assert CompressionSpec.simple(4, scale_bits=8).resolve("x", "linear").quant == Int(4, scale_bits=8)
    with pytest.raises(SpecError, match="expected 16 or 8, found 4"):
        LayerSpec.from_dict({"bits": 4, "scale_bits": 4})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 8, "rate": 3.0}, "column scales"),
        ({"bits": 8, "rate": 0}, "unusable rate"),
        ({"bits": 8, "rate": 9.5}, "unusable rate"),
        ({"bits": 8, "rate": True}, "unusable rate"),
        ({"bits": 8, "rate": "3"}, "unusable rate"),
        ({"bits": 2, "rate": 3.0}, "no fewer bits"),
        ({"bits": 8, "rate": 3.0, "symmetric": False}, "symmetric"),
        ({"bits": None, "rate": 3.0}, "float16"),
        ({"bits": 8, "rate": 3.0, "sparsity": "2:4", "column_scales": True}, "sparsity"),
        ({"bits": 8, "rate": 3.0, "group": 32, "column_scales": True}, "groups"),
    ],
)
def test_impossible_rates(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LayerSpec.from_dict(wrong)


def test_a_trellis_goes_with_a_rate() -> None:
    spec = LayerSpec.at_rate(2.5, 8)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert spec.to_dict()["trellis"] == 8
    assert str(spec) == "2.5 bits coded, trellis 8"
    assert spec.with_precision(4) == LayerSpec.at_rate(4.0, 8)
    for wrong in (5, 0, True, "8", 8.0, 64):
        with pytest.raises(SpecError, match=r"unusable trellis.*4, 8, 16, 32 states"):
            LayerSpec.from_dict({**spec.to_dict(), "trellis": wrong}, where="here")
    with pytest.raises(SpecError, match="a trellis without a rate"):
        LayerSpec.from_dict({"bits": 8, "trellis": 8})
    with pytest.raises(SpecError, match="a trellis without a rate"):
        LayerSpec(Int(4), NM(2, 4), trellis=8)
    with pytest.raises(SpecError, match="a rate with sparsity"):
        LayerSpec.from_dict({**spec.to_dict(), "sparsity": "2:4"})
    with pytest.raises(SpecError, match=r"a trellis without a rate.*integer codes of 8 bits"):
        LayerSpec(Int(7, scale_bits=8), column_scales=True, rate=2.0, trellis=8)
