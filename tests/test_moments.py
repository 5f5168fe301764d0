"""Moments of layer inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from usmlite.errors import DataError
from usmlite.moments import collect_moments, input_rows
from usmlite.student import to_matrix


def test_a_convolution_with_groups_counts_the_inputs_of_all_groups() -> None:
    convolution = nn.Conv1d(6, 4, 3, groups=2, bias=False)
    inputs = torch.randn(1, 6, 10)
    rows = input_rows(convolution, inputs).reshape(2, 8, 9)
    matrix = to_matrix(convolution.weight.detach())
    products = torch.cat([rows[0] @ matrix[:2].T, rows[1] @ matrix[2:].T], dim=1)
    assert torch.allclose(products, convolution(inputs)[0].T, atol=1e-5)


class Shared(nn.Module):
    """Two layers of the same input, one of which is not reached by every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, inputs: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.first(inputs)
        return out + self.second(inputs).sum() if bool(both) else out


def test_moments_about_the_mean_do_not_cancel() -> None:
    torch.manual_seed(0)
    inputs = [1000.0 + torch.randn(1, 400, 6) for _ in range(4)]
    on = [False, True, True, False]
    batches = [{"inputs": x, "both": torch.tensor(flag)} for x, flag in zip(inputs, on, strict=True)]
    moments, count = collect_moments(Shared(), ["first", "second"], batches)
    assert count == 4
    for name, chosen in (("first", inputs), ("second", inputs[1:3])):
        rows = torch.cat(chosen, dim=1)[0].double()
        found = moments[name]
        assert found.count == len(rows)
        assert torch.allclose(found.mean.double(), rows.mean(dim=0), rtol=1e-6)
        assert torch.allclose(found.covariance.double(), rows.T.cov(correction=0), atol=1e-3)
        assert torch.allclose(found.hessian.double(), rows.T @ rows / len(rows), rtol=1e-5)


def test_one_huge_vector_does_not_outweigh_all_others() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(1, 400, 6)
    inputs[0, 7] *= 1000.0
    batch = {"inputs": inputs, "both": torch.tensor(False)}
    moments, _ = collect_moments(Shared(), ["first"], [batch])
    found = moments["first"]
    squares = inputs[0].square().sum(dim=1)
    weights = (4.0 * squares.median() / squares).clamp(max=1.0)
    assert weights[7] < 1e-4
    assert found.count == pytest.approx(float(weights.sum()))
    mean = (weights[:, None] * inputs[0]).sum(dim=0) / weights.sum()
    assert torch.allclose(found.mean, mean, atol=1e-5)
    centred = inputs[0] - mean
    expected = (weights[:, None] * centred).T @ centred / weights.sum()
    assert torch.allclose(found.covariance, expected, atol=1e-4)
    assert float(found.covariance.diagonal().mean()) < 2.0


def test_silence_counts_like_any_input() -> None:
    inputs = torch.zeros(1, 10, 6)
    inputs[0, 0] = 1.0
    batch = {"inputs": inputs, "both": torch.tensor(False)}
    moments, _ = collect_moments(Shared(), ["first"], [batch])
    assert moments["first"].count == 10
    assert torch.allclose(moments["first"].mean, torch.full((6,), 0.1))


class Convolved(nn.Module):
    """A convolution over frames; the batch brings as many tokens as the frames have channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 3, 3)

    def forward(self, inputs: torch.Tensor, decoder_attention_mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.first(inputs)
        return out


def test_channels_are_not_taken_for_tokens() -> None:
    torch.manual_seed(2)
    inputs = torch.randn(2, 6, 20)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    model = Convolved()
    batch = {"inputs": inputs, "decoder_attention_mask": mask}
    moments, _ = collect_moments(model, ["first"], [batch])
    rows = input_rows(model.first, inputs)
    assert len(rows) == 36
    weights = (4.0 * rows.square().sum(1).median() / rows.square().sum(1)).clamp(max=1.0)
    assert moments["first"].count == pytest.approx(float(weights.sum()))


def test_without_batches_there_is_nothing_to_measure() -> None:
    with pytest.raises(DataError, match="no batch"):
        collect_moments(Shared(), ["first"], [])
