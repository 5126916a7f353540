"""Completions of another policy in a loss: weights by enumeration."""

from __future__ import annotations

from math import inf, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bon_algos import importance
from bon_algos.bond import bond_loss

relaxed = settings(deadline=None, max_examples=60)


def laws(seed: int, num_outcomes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, log-probs of another, and advantages of both signs. (K,) each."""
    rng = torch.Generator().manual_seed(seed)
    policy, sampled, advantage = torch.randn(3, num_outcomes, generator=rng, dtype=torch.float64)
    return policy.requires_grad_(), sampled.log_softmax(-1), advantage - advantage.mean()


def gradient(loss: Tensor, parameters: Tensor) -> Tensor:
    """Of several losses on one graph."""
    return torch.autograd.grad(loss, parameters, retain_graph=True)[0]


# --- whole completions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_untruncated_weights_give_the_gradient_of_the_policys_own_samples(seed):
    """Σ π_b · (π/π_b) · A · ∇log π = Σ π · A · ∇log π = ∇ E_π[A]."""
    logit_K, sampled_K, advantage_K = laws(seed)
    logprob_K = logit_K.log_softmax(-1)
    weight_K = importance.truncated_importance(logprob_K[None], sampled_K[None], max_importance=inf)[0]
    of_another = (sampled_K.exp() * weight_K * advantage_K) @ logprob_K
    torch.testing.assert_close(gradient(of_another, logit_K), gradient(logit_K.softmax(-1) @ advantage_K, logit_K))


def test_truncated_weights_by_hand():
    # π/π_b = 8, 1, 1/4 capped at 2
    logprob_BN = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    sampled_BN = logprob_BN - torch.tensor([[log(8), 0.0, -log(4)]], dtype=torch.float64)
    weight_BN = importance.truncated_importance(logprob_BN, sampled_BN, max_importance=2.0)
    torch.testing.assert_close(weight_BN, torch.tensor([[2.0, 1.0, 0.25]], dtype=torch.float64))


@given(
    st.lists(st.tuples(st.floats(-300, 0), st.floats(-300, 0)), min_size=1, max_size=8),
    st.floats(1, 1e6),
    st.floats(1, 1e6),
)
@relaxed
def test_a_higher_cap_never_weighs_less(pairs, one, other):
    logprob, sampled = torch.tensor(pairs, dtype=torch.float64).T
    low, high = sorted((one, other))
    below = importance.truncated_importance(logprob, sampled, max_importance=low)
    above = importance.truncated_importance(logprob, sampled, max_importance=high)
    assert (below <= above).all()
    assert (below >= 0).all()
    assert (below <= low * (1 + 1e-12)).all()


# --- TOPR ------------------------------------------------------------------------------------------------


def test_good_samples_count_in_full_and_bad_ones_only_as_far_as_the_policy_would_give_them():
    """π/π_b = ½, 2, ½, 2 and A = +, +, −, −: only the bad one that the policy has turned from is tapered."""
    ratio_B, advantage_B = torch.tensor([0.5, 2.0, 0.5, 2.0]), torch.tensor([3.0, 3.0, -3.0, -3.0])
    logprob_B = torch.full((4,), -5.0, requires_grad=True)
    tapered_B = importance.tapered_advantage(advantage_B, logprob_B, logprob_B.detach() - ratio_B.log())
    torch.testing.assert_close(tapered_B, torch.tensor([3.0, 3.0, -1.5, -3.0]))
    assert not tapered_B.requires_grad


def test_tapered_gradient_is_that_of_a_bounded_objective():
    """E_b[−A'·log π], A' tapered, descends Σ_{A>0} −A·b·log π − Σ_{A<0} A·φ(π) with φ = π up to b and b·(1 + log π/b)
    beyond: what is bad earns at most b·|A| by vanishing, where the plain −A·b·log π would earn without end."""
    logit_K, sampled_K, advantage_K = laws(5)
    logprob_K, law_K = logit_K.log_softmax(-1), sampled_K.exp()
    tapered_K = importance.tapered_advantage(advantage_K, logprob_K, sampled_K)
    policy_K = logprob_K.exp()
    phi_K = torch.where(policy_K < law_K, policy_K, law_K * (1 + logprob_K - sampled_K))
    objective_K = torch.where(advantage_K > 0, law_K * logprob_K, phi_K)
    is_bad_K = advantage_K < 0
    assert (policy_K[is_bad_K] < law_K[is_bad_K]).any()
    assert (policy_K[is_bad_K] > law_K[is_bad_K]).any()
    actual_K = gradient(-(law_K * tapered_K) @ logprob_K, logit_K)
    torch.testing.assert_close(actual_K, gradient(-advantage_K @ objective_K, logit_K))


def test_a_fresh_sample_is_not_tapered():
    logit_K, _, advantage_K = laws(6)
    logprob_K = logit_K.log_softmax(-1)
    assert torch.equal(importance.tapered_advantage(advantage_K, logprob_K, logprob_K.detach()), advantage_K)


def test_bond_tapers_the_advantages_of_stale_samples():
    """Advantages ±A; π/π_b = ½ for the bad one. Of −A'·log π the gradients are −A and +A/2."""
    logprob_B, zero_B = torch.tensor([-1.0, -2.0], dtype=torch.float64).requires_grad_(), torch.zeros(2).double()
    stale_B = torch.tensor([-1.0, -2.0 + log(2)], dtype=torch.float64)
    loss = bond_loss(
        zero_B, logprob_B, logprob_B.detach(), torch.tensor([2.0, -2.0]), jeffreys_weight=1.0, sampled_logprob_B=stale_B
    ).loss
    # t less the other prompt's: 4 and −4; the loss is a mean over two prompts
    torch.testing.assert_close(gradient(loss, logprob_B), torch.tensor([-4.0, 4.0 / 2]).double() / 2)


# --- refusals --------------------------------------------------------------------------------------------


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="each log-prob"):
        importance.truncated_importance(torch.zeros(2, 3), torch.zeros(3), max_importance=1)
    with pytest.raises(ValueError, match="one advantage"):
        importance.tapered_advantage(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("max_importance", [0.5, 0.0, -1.0, float("nan")])
def test_a_cap_below_one_is_refused(max_importance):
    with pytest.raises(ValueError, match="at least 1"):
        importance.truncated_importance(torch.zeros(1), torch.zeros(1), max_importance=max_importance)


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        importance.tapered_advantage(torch.ones(1), torch.tensor([-inf]), torch.zeros(1))
