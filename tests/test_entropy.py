"""The entropy coder: exact for every input, close to the entropy, and not to be fooled by altered bytes."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite import entropy
from usmlite.entropy import Contexts
from usmlite.kernels import native, trellis

# NumPy's, and the native library's where there is one.
DECODERS = ["reference", *native.paths()[:1]]


def entropy_bytes(codes: np.ndarray) -> float:
    counts = np.bincount(codes.reshape(-1))
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum() * codes.size / 8)


def normal_codes(rng: np.random.Generator, bits: int, width: object, shape: tuple[int, int]) -> np.ndarray:
    highest = (1 << bits) - 1
    return np.clip(np.round(rng.normal(highest / 2, width, shape)), 0, highest).astype(np.uint8)


def decode(
    decoder: str,
    data: np.ndarray,
    bits: int,
    shape: tuple[int, int],
    tables: int,
    beside: int = 0,
    states: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    with mock.patch.dict(os.environ, {native.VARIABLE: decoder}):
        return entropy.decode(data, bits, shape, tables, beside, trellis=states)


def comes_back(codes: np.ndarray, bits: int, contexts: Contexts, beside: np.ndarray | None = None) -> bool:
    data = entropy.encode(codes, bits, contexts, beside)
    assert data.dtype == np.uint8
    count = 0 if beside is None else len(beside)
    for decoder in DECODERS:
        found, others = decode(decoder, data, bits, codes.shape, contexts.tables, count)
        if not np.array_equal(found, codes) or (beside is not None and not np.array_equal(others, beside)):
            return False
    return True


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(0.01, 60.0),
    st.integers(0, 2**32 - 1),
)
def test_what_is_decoded_is_what_was_encoded(
    bits: int, rows: int, columns: int, width: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = normal_codes(rng, bits, width, (rows, columns))
    beside = rng.integers(0, 256, rows).astype(np.uint8)
    assert comes_back(codes, bits, Contexts.single(rows, columns), beside)
    assert comes_back(codes, bits, entropy.best_contexts(codes, bits))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 64),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
def test_any_levels_and_any_number_of_tables_come_back(
    bits: int, rows: int, columns: int, tables: int, lowest: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    levels = [rng.integers(0, 256, count).astype(np.uint8) for count in (rows, columns)]
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    assert comes_back(codes, bits, Contexts(levels[0], levels[1], lowest, tables))


def test_tables_pay_where_rows_and_columns_differ() -> None:
    rng = np.random.default_rng(0)
    alike = normal_codes(rng, 6, 8, (640, 640))
    assert entropy.best_contexts(alike, 6).tables == 1
    widths = np.exp2(rng.uniform(-1, 1, (640, 1)) + rng.uniform(-1, 1, 640)) * 3
    differing = normal_codes(rng, 6, widths, (640, 640))
    best = entropy.best_contexts(differing, 6)
    assert best.tables > 4
    single = len(entropy.encode(differing, 6, Contexts.single(640, 640)))
    several = len(entropy.encode(differing, 6, best))
    # Known widths would allow this much; rounding them to half octaves costs next to nothing.
    ideal = float(np.log2(widths * np.sqrt(2 * np.pi * np.e)).sum()) / 8
    assert several < 0.95 * single
    assert several < 1.02 * ideal + 1000
    counts = entropy.count_codes(differing, 6, best)
    assert several == pytest.approx(entropy.coded_bytes(counts, 1280), rel=0.01)


@pytest.mark.parametrize("code", [0, 5])
def test_one_code_only(code: int) -> None:
    codes = np.full((50, 20), code, np.uint8)
    assert comes_back(codes, 3, entropy.best_contexts(codes, 3))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bytes_are_close_to_the_entropy(bits: int) -> None:
    codes = normal_codes(np.random.default_rng(bits), bits, ((1 << bits) - 1) / 6, (400, 1000))
    single = Contexts.single(400, 1000)
    size, bound = len(entropy.encode(codes, bits, single)), entropy_bytes(codes)
    assert bound < size < 1.01 * bound + 1000
    assert size == pytest.approx(entropy.coded_bytes(entropy.count_codes(codes, bits, single), 0), rel=0.01)


def test_rare_codes_survive_next_to_very_frequent_ones() -> None:
    codes = np.zeros((100, 1000), np.uint8)
    codes.reshape(-1)[[3, 50_000, 99_999]] = [255, 7, 1]
    assert comes_back(codes, 8, Contexts.single(100, 1000))
    assert comes_back(codes, 8, entropy.best_contexts(codes, 8))


@pytest.mark.parametrize("rows", [1, 3, 4000])
def test_steps_of_lanes_reach_over_rows(rows: int) -> None:
    """More lanes than columns, and the other way round."""
    rng = np.random.default_rng(rows)
    codes = normal_codes(rng, 5, np.exp2(rng.uniform(-1, 2, (rows, 1))), (rows, 800_000 // rows))
    levels = rng.integers(0, 4, rows).astype(np.uint8), rng.integers(0, 5, codes.shape[1]).astype(np.uint8)
    assert comes_back(codes, 5, Contexts(levels[0], levels[1], 1, 5))


@pytest.mark.parametrize("decoder", DECODERS)
def test_altered_bytes_are_noticed(decoder: str) -> None:
    rng = np.random.default_rng(0)
    codes = normal_codes(rng, 4, np.exp2(rng.uniform(-2, 2, (80, 1))), (80, 100))
    contexts = entropy.best_contexts(codes, 4)
    data = entropy.encode(codes, 4, contexts)
    shape, tables = codes.shape, contexts.tables
    assert tables > 1
    for place in (0, 1, 5, 12, 40, 100, len(data) // 2, len(data) - 1):
        altered = data.copy()
        altered[place] ^= 0x55
        with contextlib.suppress(ValueError):
            assert not np.array_equal(decode(decoder, altered, 4, shape, tables)[0], codes)
    for cut in (data[:3], data[:10], data[:200], data[:-2], data[:-1], np.concatenate([data, data[:2]])):
        with pytest.raises(ValueError, match=r"codes|early|end|levels|add up"):
            decode(decoder, cut, 4, shape, tables)


@pytest.mark.skipif(not native.paths(), reason="installed without the native library")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_both_decoders_make_the_same_of_hostile_bytes(data: st.DataObject) -> None:
    """The same codes, or the same refusal in the same words."""
    bits, tables = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 64))
    shape = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = [rng.integers(0, 256, count).astype(np.uint8) for count in shape]
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    contexts = Contexts(levels[0], levels[1], int(rng.integers(0, 256)), tables)
    coded = entropy.encode(codes, bits, contexts)
    # Behind the levels, which both read with the same code, and mostly behind the frequencies too.
    first = 4 + int(coded[:4].view("<u4")[0])
    for place in data.draw(st.lists(st.integers(first, len(coded) - 1), max_size=3)):
        coded[place] ^= data.draw(st.integers(1, 255))
    coded = coded[: data.draw(st.integers(0, len(coded)) | st.just(len(coded)))]
    results: list[object] = []
    for decoder in DECODERS:
        try:
            results.append(decode(decoder, coded, bits, shape, tables)[0].tolist())
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


def along_trellis(rng: np.random.Generator, shape: tuple[int, int], size: float, states: int) -> np.ndarray:
    return trellis.nearest(rng.normal(0, size, shape).astype(np.float32), states)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(trellis.STATES),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([0.2, 2.0, 60.0]),
    st.integers(0, 2**32 - 1),
)
def test_codes_along_a_trellis_come_back(
    states: int, rows: int, columns: int, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes, beside = along_trellis(rng, (rows, columns), size, states), rng.integers(0, 9, 5).astype(np.uint8)
    levels = [rng.integers(0, 5, count).astype(np.uint8) for count in (rows, columns)]
    contexts = Contexts(levels[0], levels[1], 2, int(rng.integers(1, 9)))
    data = entropy.encode(codes, 8, contexts, beside, trellis=states)
    for decoder in DECODERS:
        found, others = decode(decoder, data, 8, codes.shape, contexts.tables, 5, states)
        assert np.array_equal(found, codes)
        assert np.array_equal(others, beside)


@pytest.mark.parametrize("columns", [3, 100])
def test_a_long_trellis_comes_back_over_its_new_beginnings(columns: int) -> None:
    """With more lanes than columns, and with fewer."""
    codes = along_trellis(np.random.default_rng(0), (2 * trellis.ROWS + 5, columns), 2.0, 8)
    contexts = entropy.best_contexts(codes, 8, 8)
    data = entropy.encode(codes, 8, contexts, trellis=8)
    for decoder in DECODERS:
        assert np.array_equal(decode(decoder, data, 8, codes.shape, contexts.tables, 0, 8)[0], codes)
    counts = entropy.count_codes(codes, 8, contexts, 8)
    side = 0 if contexts.tables == 1 else sum(codes.shape)
    assert len(data) == pytest.approx(entropy.coded_bytes(counts, side), rel=0.03)


def test_codes_beside_the_trellis_are_refused() -> None:
    codes = along_trellis(np.random.default_rng(0), (40, 30), 2.0, 8)
    codes[7, 3] ^= 1
    with pytest.raises(ValueError, match="do not follow"):
        entropy.encode(codes, 8, Contexts.single(40, 30), trellis=8)


@pytest.mark.skipif(not native.paths(), reason="installed without the native library")
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_both_decoders_make_the_same_of_a_hostile_trellis(data: st.DataObject) -> None:
    """The same codes, or the same refusal in the same words; whatever is decoded follows the trellis."""
    states, tables = data.draw(st.sampled_from(trellis.STATES)), data.draw(st.integers(1, 64))
    shape = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = [rng.integers(0, 256, count).astype(np.uint8) for count in shape]
    contexts = Contexts(levels[0], levels[1], int(rng.integers(0, 256)), tables)
    coded = entropy.encode(along_trellis(rng, shape, 3.0, states), 8, contexts, trellis=states)
    first = 4 + int(coded[:4].view("<u4")[0])
    for place in data.draw(st.lists(st.integers(first, len(coded) - 1), max_size=3)):
        coded[place] ^= data.draw(st.integers(1, 255))
    coded = coded[: data.draw(st.integers(0, len(coded)) | st.just(len(coded)))]
    results: list[object] = []
    for decoder in DECODERS:
        try:
            found = decode(decoder, coded, 8, shape, tables, 0, states)[0]
        except ValueError as error:
            results.append(str(error))
        else:
            trellis.split(found, states)
            results.append(found.tolist())
    assert results[0] == results[1]


@pytest.mark.skipif(not native.paths(), reason="installed without the native library")
def test_the_native_decoder_compares_all_sizes() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 3, 9).astype(np.uint8), rng.integers(0, 3, 50).astype(np.uint8)
    frequencies = np.full((2, 16), 256)
    stream = rng.integers(0, 256, 2000).astype(np.uint8)
    for wrong in (
        {"stream": stream[:100]},
        {"stream": stream[:1999]},
        {"stream": stream.astype(np.int64)},
        {"frequencies": frequencies[:, :8]},
        {"frequencies": frequencies[:0]},
        {"frequencies": np.full((65, 16), 256)},
        {"frequencies": frequencies - 300},
        {"frequencies": frequencies + 65536},
        {"bits": 0},
        {"bits": 9},
        {"lowest": -1},
        {"lowest": 256},
        {"states": 8},
        {"states": 5},
    ):
        arguments = {"stream": stream, "frequencies": frequencies, "bits": 4, "levels": levels, "lowest": 1}
        with pytest.raises(ValueError, match=r"codes|frequencies|expected|add up|trellis"):
            native.decode_stream(**{**arguments, **wrong})  # type: ignore[arg-type]


def test_levels_that_unfold_without_end_are_cut_off() -> None:
    codes = np.zeros((40, 40), np.uint8)
    data = entropy.encode(codes, 4, Contexts.single(40, 40), np.zeros(1 << 22, np.uint8))
    assert len(data) < 1 << 14
    with pytest.raises(ValueError, match="levels are not 81 numbers"):
        entropy.decode(data, 4, codes.shape)


def test_lanes_are_few_enough_to_cost_little() -> None:
    assert entropy.lanes_for(1) == 1
    assert entropy.lanes_for(20) == 20
    assert all(4 * entropy.lanes_for(count) < 0.01 * count for count in (100_000, 20_000_000))
