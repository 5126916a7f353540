"""Completions of another policy in a loss: weights by enumeration."""

from __future__ import annotations

from itertools import product
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


# --- tokens ----------------------------------------------------------------------------------------------


def test_token_weights_by_hand_and_none_for_padding():
    # ratios 4, ½ | 1, then padding of any kind; capped at 3
    nan, is_token_NL = float("nan"), torch.tensor([[True, True], [True, False]])
    logprob_NL = torch.tensor([[-1.0, -2.0], [-0.5, nan]], requires_grad=True)
    sampled_NL = torch.tensor([[-1.0 - log(4), -2.0 + log(2)], [-0.5, -inf]])
    weight_NL = importance.truncated_token_importance(logprob_NL, sampled_NL, is_token_NL, max_importance=3.0)
    torch.testing.assert_close(weight_NL, torch.tensor([[3.0, 0.5], [1.0, 0.0]]))
    assert not weight_NL.requires_grad


def test_uncapped_tokens_multiply_to_the_weight_of_the_completion():
    logprob_NL, sampled_NL = -torch.rand(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    every = torch.ones(4, 6, dtype=torch.bool)
    of_tokens_NL = importance.truncated_token_importance(logprob_NL, sampled_NL, every, max_importance=inf)
    whole_N = importance.truncated_importance(logprob_NL.sum(-1), sampled_NL.sum(-1), max_importance=inf)
    torch.testing.assert_close(of_tokens_NL.prod(-1), whole_N)


def test_the_last_token_is_weighed_for_itself_and_the_prefix_is_taken_as_drawn():
    """All pairs of 3 × 3 tokens. An advantage of the second token alone: the expectation of its weighted gradient over
    π_b is that of the policy after prefixes that π_b drew."""
    rng = torch.Generator().manual_seed(3)
    logit_43 = torch.randn(4, 3, generator=rng, dtype=torch.float64).requires_grad_()
    sampled_43 = torch.randn(4, 3, generator=rng, dtype=torch.float64).log_softmax(-1)
    advantage_33 = torch.randn(3, 3, generator=rng, dtype=torch.float64)
    logprob_43, pairs = logit_43.log_softmax(-1), torch.tensor(list(product(range(3), repeat=2)))
    first, second = pairs.T
    logprob_NL = torch.stack([logprob_43[0, first], logprob_43[1 + first, second]], dim=-1)
    sampled_NL = torch.stack([sampled_43[0, first], sampled_43[1 + first, second]], dim=-1)
    every = torch.ones(9, 2, dtype=torch.bool)
    weight_NL = importance.truncated_token_importance(logprob_NL, sampled_NL, every, max_importance=inf)
    law_N, advantage_N = sampled_NL.sum(-1).exp(), advantage_33[first, second]
    loss = law_N @ (weight_NL[:, 1] * advantage_N * logprob_NL[:, 1])
    value = sampled_43[0].exp() @ (logprob_43[1:].exp() * advantage_33).sum(-1)
    torch.testing.assert_close(gradient(loss, logit_43), gradient(value, logit_43))


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
    with pytest.raises(ValueError, match="one boolean"):
        importance.truncated_token_importance(
            torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3).bool(), max_importance=1
        )
    with pytest.raises(ValueError, match="one boolean"):
        importance.truncated_token_importance(torch.zeros(2), torch.zeros(2), torch.ones(2), max_importance=1)
    with pytest.raises(ValueError, match="one advantage"):
        importance.tapered_advantage(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("max_importance", [0.5, 0.0, -1.0, float("nan")])
def test_a_cap_below_one_is_refused(max_importance):
    with pytest.raises(ValueError, match="at least 1"):
        importance.truncated_importance(torch.zeros(1), torch.zeros(1), max_importance=max_importance)


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        importance.tapered_advantage(torch.ones(1), torch.tensor([-inf]), torch.zeros(1))
