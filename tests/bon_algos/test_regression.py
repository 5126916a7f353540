"""Regression, imitation and their mixture: each is least at best-of-n, and knows rewards by their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bon_algos import order, quantiles
from bon_algos.imitation import best_of_n_imitation
from bon_algos.regression import log_quantile_regression
from tests.bon_algos.vectors import REFERENCE_K, REWARDS, per_outcome, the_law_as_draws

REFERENCE = torch.tensor(REFERENCE_K)


def exact_target(vector: str, n: int) -> tuple[Tensor, Tensor]:
    """Best-of-n's law, and its log-ratio to the reference from the 210 draws that are the law. (20,), (20,)."""
    standing = quantiles.standing_among_others(the_law_as_draws(REWARDS[vector]))
    law_K = order.best_of_n_law(REFERENCE_K, REWARDS[vector], n)
    return torch.tensor(law_K), torch.tensor(per_outcome(quantiles.log_tilt_levels(standing, n)))


def minimise(loss_of_logits, logit_K: Tensor) -> Tensor:
    logit_K = logit_K.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logit_K], lr=1, max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = loss_of_logits(logit_K)
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)
    return logit_K.detach().softmax(-1)


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("huber_delta", [None, 1.0])
def test_regression_ends_at_best_of_n_whatever_law_the_data_came_from(vector, n, huber_delta):
    law_K, tilt_K = exact_target(vector, n)
    for data_K in (REFERENCE, torch.full((20,), 0.05).double(), law_K):

        def loss(logit_K: Tensor, data_K: Tensor = data_K) -> Tensor:
            # one prompt per outcome, so that each is weighted by how often the data has it
            residual_K = log_quantile_regression(
                logit_K.log_softmax(-1)[:, None],
                REFERENCE.log()[:, None],
                tilt_K[:, None],
                huber_delta=huber_delta,
            )
            return data_K @ residual_K

        torch.testing.assert_close(minimise(loss, REFERENCE.log()), law_K, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [2, 8])
def test_imitation_of_the_whole_law_ends_at_best_of_n(vector, n):
    """The 210 draws that are the reference, at weights without replacement: n is small against 210."""
    draws = the_law_as_draws(REWARDS[vector])
    weight = torch.tensor(order.best_of_n_weights(draws[0].numpy(), n))[None]
    outcome = torch.tensor(np.repeat(np.arange(20), np.rint(REFERENCE_K * 210).astype(int)))
    expected_K = torch.zeros(20).double().index_add(0, outcome, weight[0])
    policy_K = minimise(
        lambda logit_K: best_of_n_imitation(logit_K.log_softmax(-1)[outcome][None], weight).sum(),
        REFERENCE.log(),
    )
    torch.testing.assert_close(policy_K, expected_K, atol=1e-6, rtol=0)
    assert 0 < (policy_K - exact_target(vector, n)[0]).abs().max() < 0.02


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_imitation_gradient_is_unbiased_for_the_forward_kl(vector, n):
    """All ways to draw three candidates from five outcomes: mean gradient = policy − best-of-n."""
    mass_K = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]).double()
    mass_K = mass_K / mass_K.sum()
    reward_K = torch.tensor(REWARDS[vector][:5])
    draw_BN = torch.cartesian_prod(*[torch.arange(5)] * 3)
    weight_BN = torch.tensor(np.stack([order.best_of_n_weights(row, n) for row in reward_K[draw_BN].numpy()]))
    logit_K = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    loss = mass_K[draw_BN].prod(dim=-1) @ best_of_n_imitation(logit_K.log_softmax(-1)[draw_BN], weight_BN)
    expected_K = logit_K.softmax(-1) - torch.tensor(order.best_of_n_law(mass_K.numpy(), reward_K.numpy(), n))
    torch.testing.assert_close(torch.autograd.grad(loss, logit_K)[0], expected_K.detach(), atol=1e-13, rtol=0)


def test_losses_by_hand():
    """log π = −1, −3; log π_ref = −2, −2; t = .5, −.5: residuals 1 − .5 = .5 and −1 + .5 = −.5."""
    logprob_BN, reference_BN = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]])
    tilt_BN, weight_BN = torch.tensor([[0.5, -0.5]]), torch.tensor([[0.75, 0.25]])
    assert log_quantile_regression(logprob_BN, reference_BN, tilt_BN).tolist() == [0.25]
    # beyond δ = .1 nats: (2·.5 − .1)·.1 = .09
    huber = log_quantile_regression(logprob_BN, reference_BN, tilt_BN, huber_delta=0.1)
    assert huber.tolist() == pytest.approx([0.09])
    # .75·1 + .25·3
    assert best_of_n_imitation(logprob_BN, weight_BN).tolist() == [1.5]


def test_the_huber_loss_is_the_square_within_its_delta():
    residual = torch.linspace(-1, 1, 9)[None]
    zero = torch.zeros_like(residual)
    torch.testing.assert_close(
        log_quantile_regression(residual, zero, zero, huber_delta=1.0),
        log_quantile_regression(residual, zero, zero),
    )


def test_only_the_policy_carries_a_gradient():
    logprob_BN = torch.zeros(1, 2, requires_grad=True)
    reference_BN, tilt_BN = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    torch.autograd.backward(log_quantile_regression(logprob_BN, reference_BN, tilt_BN).sum())
    assert logprob_BN.grad is not None
    assert reference_BN.grad is None
    assert tilt_BN.grad is None


@given(st.integers(2, 6).flatmap(lambda n: st.permutations(range(n))), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_candidates_may_come_in_any_order(shuffle, seed):
    generator = torch.Generator().manual_seed(seed)
    logprob_BN, reference_BN, reward_BN = (
        torch.randn(1, len(shuffle), generator=generator, dtype=torch.float64) for _ in range(3)
    )
    reward_BN = (2 * reward_BN).round()  # with ties

    def losses(index: list[int]) -> Tensor:
        weight_BN = torch.tensor(order.best_of_n_weights(reward_BN[0, index].numpy(), 2))[None]
        tilt_BN = quantiles.log_tilt_tie_aware(quantiles.standing_among_others(reward_BN[:, index]), 2)
        imitated = best_of_n_imitation(logprob_BN[:, index], weight_BN)
        return torch.stack((imitated, log_quantile_regression(logprob_BN[:, index], reference_BN[:, index], tilt_BN)))

    torch.testing.assert_close(losses(list(shuffle)), losses(list(range(len(shuffle)))))


def test_shapes_and_weights_that_do_not_fit_are_refused():
    two, three = torch.zeros(1, 2), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="one shape"):
        best_of_n_imitation(two, three)
    with pytest.raises(ValueError, match="one shape"):
        log_quantile_regression(two, three, two)
