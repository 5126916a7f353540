"""vBoN's steps by hand: of two samples, by either likelihood and either gradient."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from bon_algos.algorithms import make_step
from bon_algos.contracts import VbonSpec
from bon_algos.logprobs import TokenGroup
from bon_algos.steps import LoggedGroup, RankedGroup, SampledStep, StepLoss


def step_of(logprob_2: Tensor, reference: float = -1.0, **given: object) -> StepLoss:
    """Of samples that earn .5 and 2 among logged rewards 0 and 1, each drawn at −1 nat."""
    log = LoggedGroup(TokenGroup([0], [[7], [8]]), [0.0, 1.0], [-1.0, -1.0])
    group = RankedGroup(log, [[0], [1]], [0.5, 2.0], [-1.0, -1.0], [0.5, 2.0])
    step = make_step(VbonSpec.model_validate({"samples_per_prompt": 2, **given}))
    assert isinstance(step, SampledStep)
    return step.loss([group], lambda groups: [logprob_2], lambda groups: [torch.full((2,), reference)])


def test_by_the_bound_and_the_clipped_ratio():
    """n = 3: log p̂ = H_1 − H_2 = −.5 and 0, so returns differ by 2·.5, advantages are ∓1. π/π_old is e^.1 for both,
    within .2: loss −(−e^.1 + e^.1)/2; and e^.5 for the better one is cut to 1.2."""
    within = step_of(torch.tensor([-0.9, -0.9]), n=3)
    assert within.loss.item() == pytest.approx(0, abs=1e-6)
    assert within.metrics["clip_fraction"].item() == 0
    beyond = step_of(torch.tensor([-0.9, -0.5]), n=3)
    assert beyond.loss.item() == pytest.approx(-(-exp(0.1) + 1.2) / 2)
    assert beyond.metrics["clip_fraction"].item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("quantiles", "middle"),
    [
        (None, -1 / 2),
        ("harmonic_mid", -1 / 2),
        ("harmonic", -1 / 2),
        ("monte_carlo", log(1 / 2)),
        ("mid_rank", log(1 / 2)),
        ("add_one", log(2 / 3)),
    ],
)
def test_the_bound_by_the_estimator_that_is_asked_for(quantiles: str | None, middle: float):
    """n = 2: returns are log 2 + log F, of which the better sample's F is 1."""
    metrics = step_of(torch.full((2,), -1.0), n=2, quantiles=quantiles).metrics
    assert metrics["return"].item() == pytest.approx(log(2) + middle / 2)


def test_by_the_exact_likelihood():
    """n = 2, π_ref = 1/e for both: the add-one share strictly below is 2/3 and 1, so π_BoN/π_ref = 2·F + π_ref. At
    π = π_old the slope of a sample is its advantage, negated and halved."""
    logprob_2 = torch.full((2,), -1.0, requires_grad=True)
    (slope_2,) = torch.autograd.grad(step_of(logprob_2, n=2, likelihood="exact").loss, logprob_2)
    apart = log((2 + 1 / exp(1)) / (4 / 3 + 1 / exp(1)))
    assert slope_2.tolist() == pytest.approx([apart / 2, -apart / 2])


def test_a_log_prob_that_rounding_left_above_0_is_no_error():
    assert step_of(torch.full((2,), -1.0), reference=1e-7, n=2, likelihood="exact").loss.isfinite()


def test_by_reinforce_nothing_is_clipped():
    """n = 3 by the bound: advantages are ∓1 however far π has gone from what drew the samples."""
    loss, metrics = step_of(torch.tensor([-0.9, -0.4]), n=3, gradient="reinforce")
    assert loss.item() == pytest.approx(-(0.9 - 0.4) / 2)
    assert "clip_fraction" not in metrics
