"""The entropy coder: exact for every input, close to the entropy, and not to be fooled by altered bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite import entropy
from usmlite.kernels import native


def entropy_bytes(codes: np.ndarray) -> float:
    counts = np.bincount(codes)
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum() * codes.size / 8)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3000), st.floats(0.01, 60.0), st.integers(0, 2**32 - 1))
def test_what_is_decoded_is_what_was_encoded(bits: int, count: int, width: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    highest = (1 << bits) - 1
    codes = np.clip(np.round(rng.normal(highest / 2, width, count)), 0, highest).astype(np.uint8)
    data = entropy.encode(codes, bits)
    assert data.dtype == np.uint8
    assert np.array_equal(entropy.decode(data, bits, count), codes)
    assert np.array_equal(entropy.reference_decode(data, bits, count), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5000), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_any_number_of_tables_comes_back(bits: int, count: int, tables: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    data = entropy.encode(codes, bits, tables)
    assert np.array_equal(entropy.decode(data, bits, count, tables), codes)
    assert np.array_equal(entropy.reference_decode(data, bits, count, tables), codes)


def test_tables_pay_where_runs_differ() -> None:
    rng = np.random.default_rng(0)
    alike = np.clip(np.round(rng.normal(32, 8, 400_000)), 0, 63).astype(np.uint8)
    widths = np.repeat(np.linspace(12, 1, 64), 6250)
    differing = np.clip(np.round(rng.normal(32, widths)), 0, 63).astype(np.uint8)
    assert entropy.best_tables(alike, 6) == 1
    assert entropy.best_tables(differing, 6) == entropy.MOST_TABLES
    sizes = [len(entropy.encode(differing, 6, tables)) for tables in (1, 64)]
    assert sizes[1] < 0.98 * sizes[0], sizes
    bits = entropy.entropy_of(entropy.count_codes(differing, 6, 64))
    assert sizes[1] == pytest.approx(entropy.coded_bytes(differing.size, 6, bits, 64), rel=0.01)


@pytest.mark.parametrize("code", [0, 5])
def test_one_code_only(code: int) -> None:
    codes = np.full(1000, code, np.uint8)
    assert np.array_equal(entropy.decode(entropy.encode(codes, 3), 3, 1000), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bytes_are_close_to_the_entropy(bits: int) -> None:
    rng = np.random.default_rng(bits)
    highest = (1 << bits) - 1
    codes = np.clip(np.round(rng.normal(highest / 2, highest / 6, 400_000)), 0, highest).astype(np.uint8)
    size, bound = len(entropy.encode(codes, bits)), entropy_bytes(codes)
    assert bound < size < 1.01 * bound + 1200
    assert size == pytest.approx(entropy.coded_bytes(codes.size, bits, 8 * bound / codes.size), rel=0.01)


def test_rare_codes_survive_next_to_very_frequent_ones() -> None:
    codes = np.zeros(100_000, np.uint8)
    codes[[3, 50_000, 99_999]] = [255, 7, 1]
    assert np.array_equal(entropy.decode(entropy.encode(codes, 8), 8, codes.size), codes)


DECODERS = [entropy.reference_decode, *([native.decode_codes] if native.paths() else [])]


@pytest.mark.parametrize("decode", DECODERS)
def test_altered_bytes_are_noticed(decode: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, 5000).astype(np.uint8)
    data = entropy.encode(codes, 4)
    for place in (0, 1, 40, len(data) // 2, len(data) - 1):
        altered = data.copy()
        altered[place] ^= 0x55
        with contextlib.suppress(ValueError):
            assert not np.array_equal(decode(altered, 4, codes.size, 1), codes)
    for cut in (data[:10], data[:-2], data[:-1], np.concatenate([data, data[:2]])):
        with pytest.raises(ValueError, match=r"codes|early|end"):
            decode(cut, 4, codes.size, 1)


@pytest.mark.skipif(not native.paths(), reason="installed without the native library")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_both_decoders_make_the_same_of_hostile_bytes(data: st.DataObject) -> None:
    """The same codes, or the same refusal in the same words."""
    bits, tables = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 64))
    count = data.draw(st.integers(0, 3000))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    if count and data.draw(st.booleans()):
        coded = entropy.encode(rng.integers(0, 1 << bits, count).astype(np.uint8), bits, tables)
        for place in data.draw(st.lists(st.integers(0, len(coded) - 1), max_size=3)):
            coded[place] ^= data.draw(st.integers(1, 255))
        coded = coded[: data.draw(st.integers(0, len(coded)) | st.just(len(coded)))]
    else:
        coded = rng.integers(0, 256, data.draw(st.integers(0, 2000))).astype(np.uint8)
    results: list[object] = []
    for decode in DECODERS:
        try:
            results.append(decode(coded, bits, count, tables).tolist())
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_lanes_are_few_enough_to_cost_little() -> None:
    assert entropy.lanes_for(1) == 1
    assert entropy.lanes_for(100) == 100
    assert all(4 * entropy.lanes_for(count) < 0.01 * count for count in (300_000, 20_000_000))
