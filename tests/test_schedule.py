from itertools import pairwise

import pytest

from usmlite.schedule import kept_of, moving_steps, precision_of, rate, temperature


def test_rate_rises_then_falls_to_the_final_share():
    rates = [rate(step, 100, warmup=0.1, final=0.05) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9] == pytest.approx(1.0)
    assert all(a <= b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rate(100, 100, warmup=0.1, final=0.05) == pytest.approx(0.05)


def test_a_run_of_one_step_has_a_rate():
    assert rate(0, 1, warmup=0.0, final=0.1) == pytest.approx(1.0)


def test_masks_freeze_after_their_share():
    assert [moving_steps(10, freeze=share) for share in (0.0, 0.65, 0.7, 1.0)] == [0, 7, 7, 10]


def test_the_temperature_falls():
    assert [round(temperature(share), 3) for share in (0.0, 0.5, 1.0)] == [1.0, 0.224, 0.05]


def test_gradual_masks_keep_all_first_and_n_last_in_equal_parts():
    assert [kept_of(step, 9, 2, 4) for step in range(11)] == [4, 4, 4, 3, 3, 3, 2, 2, 2, 2, 2]
    assert [kept_of(step, 8, 7, 8) for step in (0, 3, 4, 8)] == [8, 8, 7, 7]
    assert [kept_of(step, 2, 1, 32) for step in (0, 1, 2)] == [32, 16, 1]
    assert kept_of(0, 0, 2, 4) == 2


def test_bits_descend_to_a_weights_own_in_equal_parts():
    assert [precision_of(step, 8, 2, (8, 4, 3)) for step in range(10)] == [8, 8, 4, 4, 3, 3, 2, 2, 2, 2]
    assert [precision_of(step, 8, 4, (8, 4, 3)) for step in range(9)] == [8] * 4 + [4] * 5
    assert [precision_of(step, 4, 2.25, (6, 2)) for step in range(5)] == [6, 6, 2.25, 2.25, 2.25]
    assert precision_of(0, 0, 2, (8, 4)) == 2
    assert precision_of(0, 5, 8, (8, 4)) == 8
