"""Codes along a trellis: the search is exact, everywhere the same, and worth it."""

from __future__ import annotations

import itertools
import math
import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite import entropy
from usmlite.entropy import Contexts
from usmlite.kernels import native, trellis
from usmlite.spec import TRELLIS_STATES

BOTH = ["reference", *native.paths()[:1]]
needs_native = pytest.mark.skipif(not native.paths(), reason="installed without the native library")


def search(kernels: str, *args: object, **kwargs: object) -> np.ndarray:
    with mock.patch.dict(os.environ, {native.VARIABLE: kernels}):
        return trellis.search(*args, **kwargs)  # type: ignore[arg-type]


def nearest(kernels: str, steps: np.ndarray, states: int) -> np.ndarray:
    with mock.patch.dict(os.environ, {native.VARIABLE: kernels}):
        return trellis.nearest(steps, states)


def follow(indices: tuple[int, ...], states: int) -> tuple[list[int], list[int]]:
    """What places along the trellis stand for, and their quantizers, written down from the document."""
    polynomials = {4: (5, 2), 8: (11, 4), 16: (19, 4), 32: (37, 8)}[states]
    state, values, quantizers = 0, [], []
    for index in indices:
        quantizer = state % 2
        quantizers.append(quantizer)
        values.append(2 * index - (0 if quantizer == 0 or index == 0 else int(math.copysign(1, index))))
        state = (
            state // 2 ^ (polynomials[0] // 2 if quantizer else 0) ^ (polynomials[1] // 2 if index % 2 else 0)
        )
    return values, quantizers


def test_the_spec_and_the_search_know_the_same_trellises() -> None:
    assert trellis.STATES == TRELLIS_STATES


@pytest.mark.parametrize("states", trellis.STATES)
def test_two_ways_lead_into_every_state(states: int) -> None:
    assert np.bincount(trellis.transitions(states).reshape(-1)).tolist() == [2] * states


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("states", trellis.STATES)
@pytest.mark.parametrize("seed", range(4))
def test_no_path_is_better_than_the_one_that_is_found(kernels: str, states: int, seed: int) -> None:
    """Against every path of six codes whose places are from -2 to 2."""
    rng = np.random.default_rng(seed)
    steps = rng.uniform(-3, 3, (1, 6)).astype(np.float32)
    tables = rng.integers(0, 2, (1, 6)).astype(np.uint8)
    bits = np.full((2, 2, trellis.SYMBOLS), 100, np.float32)
    bits[:, :, 62:67] = rng.uniform(0, 4, (2, 2, 5))
    weight = np.array([1.5], np.float32)
    found = search(kernels, steps, states, weight=weight, tables=tables, bits=bits)

    def cost(indices: tuple[int, ...]) -> float:
        values, quantizers = follow(indices, states)
        return sum(
            1.5 * float(step - value) ** 2 + float(bits[table, quantizer, 64 + index])
            for step, value, table, quantizer, index in zip(
                steps[0], values, tables[0], quantizers, indices, strict=True
            )
        )

    symbols, _ = trellis.split(found.T, states)
    mine = tuple(int(symbol) - 64 for symbol in symbols[:, 0])
    assert follow(mine, states)[0] == (found[0].astype(int) - 128).tolist()
    assert cost(mine) == pytest.approx(min(map(cost, itertools.product(range(-2, 3), repeat=6))), abs=1e-3)


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_both_searches_find_the_same(data: st.DataObject) -> None:
    states = data.draw(st.sampled_from(trellis.STATES))
    columns, rows, number = (data.draw(st.integers(1, most)) for most in (6, 60, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    steps = rng.normal(0, data.draw(st.sampled_from([0.3, 3.0, 90.0, 1e30])), (columns, rows))
    steps = steps.astype(np.float32)
    if data.draw(st.booleans()):
        steps = np.round(steps)  # ties
    wild = data.draw(st.sampled_from([None, np.nan, np.inf, -np.inf]))
    if wild is not None:
        steps[0, 0] = wild
    parts = {
        "weight": rng.uniform(0.1, 5, columns).astype(np.float32),
        "tables": rng.integers(0, number, (columns, rows)).astype(np.uint8),
        "bits": rng.uniform(0, 8, (number, 2, trellis.SYMBOLS)).astype(np.float32),
    }
    with np.errstate(all="ignore"):
        one, other = (search(kernels, steps, states, **parts) for kernels in BOTH)
    assert np.array_equal(one, other)
    trellis.split(one.T, states)


@pytest.mark.parametrize("kernels", BOTH)
def test_columns_begin_anew_after_some_rows(kernels: str) -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 3, (trellis.ROWS + 50, 2)).astype(np.float32)
    whole = nearest(kernels, steps, 8)
    parts = [nearest(kernels, part, 8) for part in np.split(steps, [trellis.ROWS])]
    assert np.array_equal(whole, np.concatenate(parts))
    trellis.split(whole, 8)


def test_what_follows_the_trellis_is_nearest_to_itself() -> None:
    codes = nearest(BOTH[-1], np.random.default_rng(1).normal(0, 4, (300, 5)).astype(np.float32), 16)
    steps = codes.astype(np.float32) - trellis.ZERO
    assert np.array_equal(nearest(BOTH[-1], steps, 16), codes)
    codes[150, 2] += 1
    with pytest.raises(ValueError, match=r"codes of row 15[0-9] do not follow"):
        trellis.split(codes, 16)


def test_largest_weights_are_clipped() -> None:
    steps = np.array([[1e9], [-1e9], [np.inf], [126.0], [-126.0]], np.float32)
    values = nearest(BOTH[-1], steps, 8).astype(int) - trellis.ZERO
    assert (np.abs(values) >= 120).all()
    assert np.array_equal(np.sign(values[:, 0]), np.sign(steps[:, 0]))


@pytest.mark.parametrize(("states", "least"), [(4, 0.65), (8, 0.75), (32, 0.88)])
def test_the_gain_over_rounding_one_by_one(states: int, least: float) -> None:
    """In decibels at equal bits, for normally distributed weights at 2.5 bits; theory has 1.53 in all."""
    values = np.random.default_rng(2).normal(0, 1, (4000, 8)).astype(np.float32)

    def measured(step: float, states: int | None) -> tuple[float, float]:
        if states is None:
            codes = np.round(values / step).astype(int) + trellis.ZERO
        else:
            codes = nearest(BOTH[-1], values / np.float32(step), states).astype(int)
        counts = entropy.count_codes(codes.astype(np.uint8), 8, Contexts.single(*codes.shape), states)
        error = np.square((codes - trellis.ZERO) * step - values).mean()
        return entropy.entropy_of(counts), -10 * math.log10(error)

    bits, quality = measured(0.73, None)
    other_bits, other_quality = measured(0.37, states)
    assert bits == pytest.approx(2.5, abs=0.1)
    assert other_quality - quality - 6.02 * (other_bits - bits) > least


@needs_native
def test_the_native_search_compares_all_sizes() -> None:
    steps, weight = np.zeros((3, 5), np.float32), np.ones(3, np.float32)
    tables, bits = np.zeros((3, 5), np.uint8), np.zeros((2, 2, trellis.SYMBOLS), np.float32)
    for wrong in (
        {"states": 5},
        {"states": 64},
        {"weight": weight[:2]},
        {"tables": tables[:, :4]},
        {"tables": tables + 2},
        {"bits": bits[:, :, :100]},
        {"bits": bits[:0]},
        {"steps": steps.astype(np.float64)},
    ):
        arguments = {"steps": steps, "states": 8, "weight": weight, "tables": tables, "bits": bits}
        with pytest.raises(ValueError, match=r"trellis|fit|expected|table"):
            native.trellis_search(**{**arguments, **wrong})  # type: ignore[arg-type]
