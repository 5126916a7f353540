"""Policy gradients: expected gradients over all samples of a finite policy, and where clipping takes them away."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bon_algos.policy_gradient import (
    kl_regularised_return,
    leave_one_out,
    ppo_clip_loss,
    reinforce_loss,
)
from tests.bon_algos.tabular import gradient
from tests.bon_algos.vectors import REFERENCE_K, TIED_K

relaxed = settings(deadline=None, max_examples=60)
finite = st.floats(-50, 50, width=32)

REFERENCE_3 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARD_3 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
LOGIT_3 = torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64)


def every_tuple(logprob_K: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """All that N samples of a prompt can be, and with what probability. (Kᴺ, N), (Kᴺ,)."""
    drawn_BN = torch.tensor(list(product(range(len(logprob_K)), repeat=num_samples)))
    return drawn_BN, logprob_K.detach()[drawn_BN].sum(dim=-1).exp()


def regularised_objective(logit_K: Tensor, kl_strength: float) -> Tensor:
    logprob_K = logit_K.log_softmax(-1)
    value: Tensor = logprob_K.exp() @ (REWARD_3 - kl_strength * (logprob_K - REFERENCE_3.log()))
    return value


# --- returns and baselines -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [2, 3, 4])
@pytest.mark.parametrize("kl_strength", [0.0, 0.7])
def test_the_baseline_of_the_other_samples_adds_no_bias(num_samples, kl_strength):
    """Every tuple of N samples: the mean gradient is that of −(E_π[r] − β·KL(π ‖ π_ref)), with and without."""
    logit_K = LOGIT_3.clone().requires_grad_()
    logprob_K = logit_K.log_softmax(-1)
    drawn_BN, probability_B = every_tuple(logprob_K, num_samples)
    return_BN = kl_regularised_return(
        REWARD_3[drawn_BN], logprob_K[drawn_BN], REFERENCE_3.log()[drawn_BN], kl_strength=kl_strength
    )
    expected_K = -gradient(regularised_objective(logit_K, kl_strength), logit_K)
    for advantage_BN in (return_BN, leave_one_out(return_BN)):
        loss = probability_B @ reinforce_loss(logit_K.log_softmax(-1)[drawn_BN], advantage_BN)
        torch.testing.assert_close(gradient(loss, logit_K), expected_K, atol=1e-14, rtol=0)


def test_a_baseline_that_looks_at_the_sample_itself_would_be_biased():
    """Less the mean of all N, the sample among them, the gradient is (N − 1)/N of what it should be."""
    logit_K = LOGIT_3.clone().requires_grad_()
    drawn_BN, probability_B = every_tuple(logit_K.log_softmax(-1), 2)
    reward_BN = REWARD_3[drawn_BN]
    loss = probability_B @ reinforce_loss(
        logit_K.log_softmax(-1)[drawn_BN], reward_BN - reward_BN.mean(dim=-1, keepdim=True)
    )
    expected_K = -gradient(regularised_objective(logit_K, 0.0), logit_K)
    torch.testing.assert_close(gradient(loss, logit_K), expected_K / 2, atol=1e-14, rtol=0)


@pytest.mark.parametrize("kl_strength", [0.5, 1.0, 3.0])
def test_the_regularised_return_ends_at_the_reference_tilted_by_its_reward(kl_strength):
    """π_ref·exp(r/β)/Z, by descent along the expected gradient (natural: it halves the distance every time)."""
    reference_K, reward_K = torch.tensor(REFERENCE_K), torch.tensor(TIED_K)
    logit_K = torch.zeros(20, dtype=torch.float64)
    for _ in range(60):
        logit_K = logit_K.detach().requires_grad_()
        logprob_K = logit_K.log_softmax(-1)
        return_K1 = kl_regularised_return(
            reward_K[:, None], logprob_K[:, None], reference_K.log()[:, None], kl_strength=kl_strength
        )
        loss = logprob_K.exp().detach() @ reinforce_loss(logprob_K[:, None], return_K1)
        logit_K = logit_K - gradient(loss, logit_K) / logprob_K.exp().detach() / (2 * kl_strength)
    tilted_K = reference_K * (reward_K / kl_strength).exp()
    torch.testing.assert_close(logit_K.detach().softmax(-1), tilted_K / tilted_K.sum(), atol=1e-13, rtol=0)


def test_returns_and_baselines_by_hand():
    # 1 − .5·(−1 + 3), 2 − .5·(−4 + 3)
    return_BN = kl_regularised_return(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, -4.0]]), torch.tensor([[-3.0, -3.0]]), kl_strength=0.5
    )
    assert return_BN.tolist() == [[0.0, 2.5]]
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2;  the other prompt does not enter
    advantage_BN = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [9.0, 9.0, 9.0]]))
    assert advantage_BN.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_a_return_is_held_fixed():
    logprob_BN = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    return_BN = kl_regularised_return(torch.ones(1, 2), logprob_BN, torch.zeros(1, 2), kl_strength=1.0)
    assert not return_BN.requires_grad
    # −A·log π, averaged over two, even where the advantage was not detached: d/d log π = −A/2
    loss_B = reinforce_loss(logprob_BN, 3 * logprob_BN)
    assert torch.autograd.grad(loss_B.sum(), logprob_BN)[0].tolist() == [[1.5, 3.0]]


def test_only_the_policy_carries_a_gradient_and_the_loss_its_precision():
    own, sampled, advantage = (torch.full((1, 2), -1.0, dtype=d) for d in (torch.float32, torch.float64, torch.float64))
    for tensor in (own, sampled, advantage):
        tensor.requires_grad_()
    for loss in (
        reinforce_loss(own, advantage).sum(),
        ppo_clip_loss(own, sampled.float(), advantage, clip_range=0.2).loss,
    ):
        assert loss.dtype == torch.float32
        given_gradients = torch.autograd.grad(loss, (own, sampled, advantage), allow_unused=True)
        assert [one is not None for one in given_gradients] == [True, False, False]


@given(st.lists(finite, min_size=2, max_size=6), st.randoms(use_true_random=False))
@relaxed
def test_each_return_is_less_the_mean_of_the_others_in_any_order(returns, random):
    advantage_N = leave_one_out(torch.tensor([returns], dtype=torch.float64))[0]
    for j, own in enumerate(returns):
        others = returns[:j] + returns[j + 1 :]
        assert advantage_N[j].item() == pytest.approx(own - sum(others) / len(others), abs=1e-12)
    shuffle = random.sample(range(len(returns)), len(returns))
    shuffled_N = leave_one_out(torch.tensor([[returns[j] for j in shuffle]], dtype=torch.float64))[0]
    torch.testing.assert_close(shuffled_N, advantage_N[shuffle])


@given(st.floats(-1e6, 1e6), st.integers(2, 7))
@relaxed
def test_equal_returns_teach_nothing_at_all(earned, num_samples):
    logprob_BN = -torch.arange(1.0, num_samples + 1)[None].requires_grad_()
    advantage_BN = leave_one_out(torch.full((1, num_samples), earned, dtype=torch.float64))
    for loss in (
        reinforce_loss(logprob_BN, advantage_BN).sum(),
        ppo_clip_loss(logprob_BN, logprob_BN.detach() - 0.3, advantage_BN, clip_range=0.2).loss,
    ):
        assert torch.autograd.grad(loss, logprob_BN)[0].tolist() == [[0.0] * num_samples]


# --- clipping --------------------------------------------------------------------------------------------


def eq_7(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """As printed."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=5))
@relaxed
def test_at_the_policy_that_drew_the_samples_it_is_reinforce(pairs):
    logprob_BN, advantage_BN = torch.tensor(pairs, dtype=torch.float64).T[:, None]
    logprob_BN.requires_grad_()
    loss, metrics = ppo_clip_loss(logprob_BN, logprob_BN.detach(), advantage_BN, clip_range=0.2)
    expected_BN = torch.autograd.grad(reinforce_loss(logprob_BN, advantage_BN).mean(), logprob_BN)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logprob_BN)[0], expected_BN)
    assert loss.item() == pytest.approx(-advantage_BN.mean().item())
    assert metrics.clip_fraction.item() == 0
    assert metrics.mean_ratio.item() == 1


def test_samples_of_an_older_policy_give_the_gradient_of_this_one_while_nothing_is_clipped():
    """Every pair of samples of π_old: the mean is −E_π[r] and its gradient, for ρ undoes the older law."""
    old_logprob_K = (LOGIT_3 + torch.tensor([0.3, -0.2, 0.0])).log_softmax(-1)
    logit_K = LOGIT_3.clone().requires_grad_()
    logprob_K = logit_K.log_softmax(-1)
    drawn_BN, probability_B = every_tuple(old_logprob_K, 2)
    rows = [
        ppo_clip_loss(
            logprob_K[row][None],
            old_logprob_K[row][None],
            leave_one_out(REWARD_3[row][None]),
            clip_range=0.9,
        )
        for row in drawn_BN
    ]
    assert all(row.metrics.clip_fraction == 0 for row in rows)
    assert (probability_B @ torch.stack([row.metrics.mean_ratio for row in rows])).item() == pytest.approx(1)
    expected_K = -gradient(regularised_objective(logit_K, 0.0), logit_K)
    total = probability_B @ torch.stack([row.loss for row in rows])
    torch.testing.assert_close(gradient(total, logit_K), expected_K, atol=1e-14, rtol=0)


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("clip_range", [0.1, 0.2, 0.5])
def test_clipping_takes_the_gradient_exactly_where_eq_7_says(advantage, clip_range):
    """∂/∂ log π of min(ρ·A, clip(ρ)·A) is ρ·A, or 0 above 1 + ε for A > 0 and below 1 − ε for A < 0.

    The 61 ratios avoid 1 ± ε, where there is no derivative.
    """
    for ratio in torch.linspace(0.05, 3, 61, dtype=torch.float64):
        log_ratio = ratio.log().view(1, 1).requires_grad_()
        loss, metrics = ppo_clip_loss(
            log_ratio, torch.zeros(1, 1), torch.full((1, 1), advantage), clip_range=clip_range
        )
        assert loss.item() == pytest.approx(-eq_7(ratio, torch.tensor(advantage), clip_range).item(), abs=1e-14)
        is_gone = (advantage > 0 and ratio > 1 + clip_range) or (advantage < 0 and ratio < 1 - clip_range)
        expected = 0.0 if is_gone else -ratio.item() * advantage
        assert torch.autograd.grad(loss, log_ratio)[0].item() == pytest.approx(expected, abs=1e-14)
        assert metrics.clip_fraction.item() == is_gone
        assert metrics.mean_ratio.item() == pytest.approx(ratio.item())


def test_clipping_by_hand():
    """ε = .2; ρ = 2, 2, ½, ½ and A = 1, −1, 1, −1: eq. 7 gives 1.2, −2, .5, −.8, and the first and last are clipped."""
    logprob_BN = torch.tensor([[2.0, 2.0], [0.5, 0.5]]).log().requires_grad_()
    loss, metrics = ppo_clip_loss(
        logprob_BN, torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [1.0, -1.0]]), clip_range=0.2
    )
    assert loss.item() == pytest.approx((-1.2 + 2 - 0.5 + 0.8) / 4)
    gradients = torch.autograd.grad(loss, logprob_BN)[0].flatten().tolist()
    assert gradients == pytest.approx([0, 2 / 4, -0.5 / 4, 0])
    assert metrics.clip_fraction.item() == 0.5
    assert metrics.mean_ratio.item() == pytest.approx(5 / 4)


def test_a_ratio_that_overflows_is_clipped_all_the_same():
    logprob_BN = torch.tensor([[0.0, -800.0]]).requires_grad_()
    loss, metrics = ppo_clip_loss(
        logprob_BN, torch.tensor([[-800.0, 0.0]]), torch.tensor([[1.0, -1.0]]), clip_range=0.2
    )
    assert loss.item() == pytest.approx((-1.2 + 0.8) / 2)
    assert torch.autograd.grad(loss, logprob_BN)[0].tolist() == [[0, 0]]
    assert metrics.clip_fraction.item() == 1


# --- refusals --------------------------------------------------------------------------------------------

TWO, OTHER = torch.zeros(1, 2), torch.zeros(1, 3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(wrong):
    bad = torch.tensor([[0.0, wrong]])
    for call in (
        lambda: leave_one_out(bad),
        lambda: kl_regularised_return(bad, TWO, TWO, kl_strength=1.0),
        lambda: kl_regularised_return(TWO, TWO, bad, kl_strength=1.0),
        lambda: reinforce_loss(TWO, bad),
        lambda: reinforce_loss(bad, TWO),
        lambda: ppo_clip_loss(TWO, TWO, bad, clip_range=0.2),
        lambda: ppo_clip_loss(TWO, bad, TWO, clip_range=0.2),
    ):
        with pytest.raises(ValueError, match="finite"):
            call()


def test_shapes_that_would_broadcast_are_refused():
    for call in (
        lambda: kl_regularised_return(TWO, TWO, TWO[:, :1], kl_strength=1.0),
        lambda: reinforce_loss(TWO, OTHER),
        lambda: reinforce_loss(torch.zeros(2), torch.zeros(2)),
        lambda: reinforce_loss(torch.zeros(1, 0), torch.zeros(1, 0)),
        lambda: leave_one_out(torch.zeros(2)),
        lambda: ppo_clip_loss(TWO, TWO, TWO[:, :1], clip_range=0.2),
    ):
        with pytest.raises(ValueError, match="one shape"):
            call()


def test_one_sample_has_no_others():
    with pytest.raises(ValueError, match="two samples"):
        leave_one_out(torch.zeros(3, 1))


@pytest.mark.parametrize("kl_strength", [-0.1, math.nan, math.inf])
def test_a_kl_strength_that_is_none_is_refused(kl_strength):
    with pytest.raises(ValueError, match="β"):
        kl_regularised_return(TWO, TWO, TWO, kl_strength=kl_strength)


@pytest.mark.parametrize("clip_range", [0.0, 1.0, -0.2, math.nan])
def test_a_clip_range_that_is_none_is_refused(clip_range):
    with pytest.raises(ValueError, match="clip range"):
        ppo_clip_loss(TWO, TWO, TWO, clip_range=clip_range)
