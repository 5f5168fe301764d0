import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usmlite.sparsify import nm_mask
from usmlite.spec import NM


def brute_force(scores: torch.Tensor, nm: NM) -> torch.Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for low in range(0, scores.shape[1], nm.m):
            group = range(low, min(low + nm.m, scores.shape[1]))
            for column in sorted(group, key=lambda c: (-scores[row, c].item(), c))[: nm.n]:
                mask[row, column] = True
    return mask


@given(st.integers(2, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_keeps_the_n_highest_of_every_m_ties_to_the_lower_index(m: int, data: st.DataObject):
    nm = NM(data.draw(st.integers(1, m - 1)), m)
    columns = data.draw(st.integers(1, 40))
    # Few distinct values: ties are the rule.
    values = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=3 * columns, max_size=3 * columns))
    scores = torch.tensor(values).reshape(3, columns)
    assert torch.equal(nm_mask(scores, nm), brute_force(scores, nm))


@pytest.mark.parametrize("nm", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 16)])
def test_exactly_n_of_every_full_group(nm: NM):
    mask = nm_mask(torch.zeros(7, 6 * nm.m), nm)
    assert (mask.reshape(7, -1, nm.m).sum(-1) == nm.n).all()


def test_a_short_last_group_keeps_what_it_has():
    assert nm_mask(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), NM(2, 4)).tolist() == [
        [False, False, True, True, True]
    ]
