"""The rate of what moves in a part of a training's steps: under a gradient that stays the same AdamW moves by it."""

import pytest
import torch
from torch import nn

from worker.descent import MUON_RATE, Descent
from worker.ranks import ALONE


def moves(descent: Descent, parameter: nn.Parameter, steps: range) -> list[float]:
    made = []
    for done in steps:
        before = parameter.item()
        parameter.grad = torch.ones_like(parameter)
        descent.step(done)
        made.append(before - parameter.item())
    return made


def test_the_rate_rises_and_falls_within_its_own_steps():
    parameter = nn.Parameter(torch.zeros(()))
    descent = Descent(
        {"p": parameter}, ranks=ALONE, first=10, last=20, learning_rate=2.0, warmup_steps=2, max_grad_norm=1.0
    )
    expected = [2.0 * min(1.0, (k + 1) / 2) * (1 - 0.09 * k) for k in range(10)]
    assert moves(descent, parameter, range(10, 20)) == pytest.approx(expected, rel=1e-4)
    assert parameter.grad is None


def test_muon_moves_a_matrix_as_far_in_every_direction():
    """Singular values of 1 and of .01 alike, by .7 to 1.2 of .2 of its rate on the mean square (arXiv 2502.16982)."""
    matrix, vector = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    descent = Descent(
        {"a": matrix, "b": vector}, ranks=ALONE, last=1, learning_rate=1.0, warmup_steps=1, max_grad_norm=1.0,
        by_muon=["a"],
    )  # fmt: skip
    matrix.grad, vector.grad = torch.tensor([[1.0, 0, 0], [0, 0.01, 0]]), torch.tensor([1.0, 0.01, 0])
    descent.step(0)
    moved = -matrix.detach() / (MUON_RATE * 0.2 * 3**0.5)
    assert float(moved.abs().sum()) == pytest.approx(float(moved.diagonal().sum()), abs=1e-3)
    assert all(0.6 < by < 1.3 for by in moved.diagonal().tolist())
    torch.testing.assert_close(vector.detach(), torch.tensor([-1.0, -1.0, 0.0]), atol=1e-4, rtol=0)
    state = descent.state()
    assert {place.partition("/")[0] for place in state} == {"a", "b"}
    descent.resume(state)
    for place, tensor in descent.state().items():
        torch.testing.assert_close(tensor, state[place])


def test_a_gradient_is_clipped_to_its_norm_and_the_norm_before_is_told():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    descent = Descent(
        {"a": first, "b": second}, ranks=ALONE, last=1, learning_rate=1.0, warmup_steps=1, max_grad_norm=1.0
    )
    assert descent.clipped_norm() == pytest.approx(5.0)
    assert (first.grad[0].item(), second.grad[0].item()) == pytest.approx((0.6, 0.8), rel=1e-4)
