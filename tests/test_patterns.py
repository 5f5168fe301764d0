import math

import pytest
import torch

from usmlite.errors import SpecError
from usmlite.patterns import MAX_PATTERNS, LearnedPatterns
from usmlite.sparsify import nm_mask
from usmlite.spec import NM

CPU = torch.device("cpu")


@pytest.mark.parametrize("nm", [NM(2, 4), NM(1, 4), NM(3, 4), NM(2, 3), NM(1, 16), NM(2, 6)], ids=str)
@pytest.mark.parametrize("columns", [1, 2, 3, 18, 48])
def test_the_first_mask_is_the_likeliest_and_every_draw_keeps_n_of_m(nm: NM, columns: int):
    mask = nm_mask(torch.randn(7, columns), nm)
    patterns = LearnedPatterns(7, columns, nm, CPU)
    patterns.start(mask)
    assert torch.equal(patterns.likeliest(), mask)
    kept = nm_mask(torch.zeros(7, columns), nm).sum(dim=1)
    for temperature in (1.0, 0.05):
        drawn = patterns.draw(temperature)
        assert drawn.shape == mask.shape
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        # As many as any mask keeps, group by group.
        full = columns // nm.m * nm.m
        assert (drawn[:, :full].reshape(7, -1, nm.m).sum(-1) == nm.n).all()
        assert torch.equal(drawn.sum(dim=1), kept.float())
    assert (patterns.draw(1e-3) == mask).all()


def test_draws_follow_the_softmax_of_the_logits():
    patterns = LearnedPatterns(20_000, 4, NM(2, 4), CPU)
    mask = torch.tensor([[True, True, False, False]]).expand(20_000, 4)
    patterns.start(mask)
    torch.manual_seed(0)
    hit = (patterns.draw(1.0) == mask).all(dim=1).float().mean()
    others = 4 * math.exp(1.5) + 1
    assert hit == pytest.approx(math.exp(3) / (math.exp(3) + others), abs=0.01)


def test_draws_depend_on_the_seed_alone():
    patterns = LearnedPatterns(5, 16, NM(2, 4), CPU)
    torch.manual_seed(3)
    one = patterns.draw(1.0)
    torch.manual_seed(3)
    assert torch.equal(one, patterns.draw(1.0))


def test_logits_learn_which_weights_matter():
    torch.manual_seed(1)
    patterns = LearnedPatterns(8, 16, NM(1, 4), CPU)
    values = torch.randn(8, 16).abs()
    wrong = nm_mask(-values, NM(1, 4))
    patterns.start(wrong)
    optimizer = torch.optim.Adam(patterns.parameters(), lr=0.1)
    for step in range(150):
        loss = (values * (1 - patterns.draw(0.05 ** (step / 150)))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (values * patterns.likeliest()).sum()
    best = (values * nm_mask(values, NM(1, 4))).sum()
    assert found > 0.9 * best
    assert found > 2 * (values * wrong).sum()


def test_rows_are_drawn_as_asked():
    patterns = LearnedPatterns(5, 10, NM(2, 4), CPU)
    assert patterns.draw(1.0, torch.tensor([4, 4, 0])).shape == (3, 10)


def test_too_many_patterns_are_refused():
    LearnedPatterns(1, 16, NM(1, MAX_PATTERNS), CPU)
    with pytest.raises(SpecError, match=r"too many patterns to learn.*found 4:8 \(70\)"):
        LearnedPatterns(1, 16, NM(4, 8), CPU)
