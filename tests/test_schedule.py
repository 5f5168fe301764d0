from itertools import pairwise

import pytest

from usmlite.schedule import masks_frozen, rate


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
    assert [masks_frozen(step, 10, freeze=0.7) for step in (0, 6, 7, 9)] == [False, False, True, True]
    assert masks_frozen(0, 10, freeze=0.0)
    assert not masks_frozen(9, 10, freeze=1.0)
