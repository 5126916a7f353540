"""The pair loss whose targets are the pair's own: it ends at best-of-n, whatever law its pairs came from. And what it
has in common with the published one.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bon_algos import order, quantiles
from bon_algos.algorithms import make_step
from bon_algos.bonbon import bonbon_loss, consistent_pair_loss
from bon_algos.contracts import BonbonConsistentSpec
from bon_algos.preference import best_and_worst
from bon_algos.steps import LoggedStep
from tests.bon_algos.pairs import best_worst_law, exact_tilt
from tests.bon_algos.tables import logged, table
from tests.bon_algos.tabular import all_pairs, minimiser
from tests.bon_algos.vectors import REFERENCE_K, REWARDS

REFERENCE = torch.tensor(REFERENCE_K)


@given(st.integers(2, 7), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_the_consistent_loss_is_the_mean_over_all_pairs(num_candidates, seed):
    generator = torch.Generator().manual_seed(seed)
    logprob_BN, reference_BN, tilt_BN = torch.randn(3, 2, num_candidates, generator=generator, dtype=torch.float64) * 9
    brute_force_B = torch.zeros(2, dtype=torch.float64)
    for i, j in combinations(range(num_candidates), 2):
        log_ratio_BN = logprob_BN - reference_BN
        margin_B, target_B = log_ratio_BN[:, i] - log_ratio_BN[:, j], tilt_BN[:, i] - tilt_BN[:, j]
        brute_force_B += (margin_B - target_B).square() / math.comb(num_candidates, 2)
    loss_B = consistent_pair_loss(logprob_BN, reference_BN, tilt_BN)
    torch.testing.assert_close(loss_B, brute_force_B, atol=1e-10, rtol=1e-12)
    shuffle = torch.randperm(num_candidates, generator=generator)
    shuffled_B = consistent_pair_loss(logprob_BN[:, shuffle], reference_BN[:, shuffle], tilt_BN[:, shuffle])
    torch.testing.assert_close(shuffled_B, loss_B, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(consistent_pair_loss(logprob_BN, reference_BN, tilt_BN + 5), loss_B)


def test_the_consistent_loss_by_hand():
    """s = 1, −1, 3 and t = 0, 1, 1: s − t = 1, −2, 2; pairs 3² + 1² + 4² over three."""
    logprob_BN, reference_BN = torch.tensor([[-1.0, -4.0, -2.0]]), torch.tensor([[-2.0, -3.0, -5.0]])
    assert consistent_pair_loss(logprob_BN, reference_BN, torch.tensor([[0.0, 1, 1]])).item() == pytest.approx(26 / 3)


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_consistent_loss_ends_at_best_of_n_whatever_law_the_pairs_came_from(vector, n):
    """Independent pairs of the reference, of a uniform law, of best-of-n; and the best and worst of n."""
    law_K, tilt_K = order.best_of_n_law(REFERENCE_K, REWARDS[vector], n), exact_tilt(vector, n)
    pair_P2 = torch.stack(all_pairs(20), dim=-1)
    independent = [np.outer(data_K, data_K) for data_K in (REFERENCE_K, np.full(20, 0.05), law_K)]
    for law_KK in (*independent, best_worst_law(REFERENCE_K, REWARDS[vector], n)):
        law_P = torch.tensor(law_KK).flatten()

        def objective(logit_K: Tensor, law_P: Tensor = law_P) -> Tensor:
            logprob_K = logit_K.log_softmax(-1)
            return law_P @ consistent_pair_loss(logprob_K[pair_P2], REFERENCE.log()[pair_P2], tilt_K[pair_P2])

        policy_K = minimiser(objective, REFERENCE.log())
        torch.testing.assert_close(policy_K, torch.tensor(law_K), atol=1e-9, rtol=0)
        assert objective(policy_K.log()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("vector", REWARDS)
def test_targets_from_the_very_pair_are_twice_too_steep(vector):
    """Two candidates, each other's only reference reward, n = 2: the harmonic target is p̂_mid − 1 up to log 2, the
    minimiser π_ref · exp(2·p_mid) and not π_ref · exp(p_mid). The gap that the docstring's (N − 1)/N closes."""
    reward_K, pair_P2 = torch.tensor(REWARDS[vector]), torch.stack(all_pairs(20), dim=-1)
    tilt_P2 = quantiles.log_tilt_harmonic(quantiles.standing_among_others(reward_K[pair_P2]), 2)
    law_P = REFERENCE[pair_P2].prod(dim=-1)
    mid_rank_K = ((reward_K[:, None] > reward_K).double() + (reward_K[:, None] == reward_K).double() / 2) @ REFERENCE
    for shrink, slope in ((1.0, 2.0), (0.5, 1.0)):

        def objective(logit_K: Tensor, shrink: float = shrink) -> Tensor:
            logprob_K = logit_K.log_softmax(-1)
            return law_P @ consistent_pair_loss(logprob_K[pair_P2], REFERENCE.log()[pair_P2], shrink * tilt_P2)

        expected_K = (REFERENCE.log() + slope * mid_rank_K).softmax(-1)
        torch.testing.assert_close(minimiser(objective, REFERENCE.log()), expected_K, atol=1e-10, rtol=0)


@given(st.integers(2, 9).flatmap(lambda size: st.permutations(range(size))), st.integers(2, 5))
@settings(deadline=None, max_examples=40)
def test_without_ties_the_targets_of_a_group_add_up_to_a_constant(rewards, n):
    """Which is why they lean on each other: the mean target of the others falls as one's own rises."""
    tilt_BN = quantiles.log_tilt_harmonic(quantiles.standing_among_others(torch.tensor([rewards])), n)
    ordered_BN = quantiles.log_tilt_harmonic(quantiles.standing_among_others(torch.tensor([sorted(rewards)])), n)
    assert tilt_BN.sum().item() == pytest.approx(ordered_BN.sum().item(), abs=1e-9)


def test_all_pairs_of_a_group_meet_and_none_more_often_than_another():
    """4 of 16 candidates: 6 of 120 pairs a step, so 1/20 of 4,000 steps each, with a deviation of 14."""
    step = make_step(BonbonConsistentSpec(n=4))
    assert isinstance(step, LoggedStep)
    group = logged(0, range(16), [float(7 * k % 16) for k in range(16)], torch.zeros(16))
    met = Counter(
        pair
        for place in range(4000)
        for pair in combinations(
            [outcome for (outcome,) in step.choose(group, (place + 0.5) / 4000).tokens.completion_ids], 2
        )
    )
    assert len(met) == math.comb(16, 2)
    assert 200 - 5 * 14 < min(met.values()) <= max(met.values()) < 200 + 5 * 14


def test_four_candidates_at_a_time_end_where_all_sixteen_would():
    """One candidate of each of 16 outcomes: at the targets every pair's loss is 0, so steps on a few end there too,
    M/(M − 1) short of best-of-n's log-ratio as the docstring says. Outcomes that never met would keep their masses."""
    step = make_step(BonbonConsistentSpec(n=4))
    assert isinstance(step, LoggedStep)
    reward_K = torch.tensor([float(7 * k % 16) for k in range(16)], dtype=torch.float64)
    reference_K = torch.linspace(0, 1, 16, dtype=torch.float64).log_softmax(-1)
    group = logged(0, range(16), reward_K.tolist(), reference_K)
    logit_1K = reference_K[None].clone().requires_grad_()
    for place in np.random.default_rng(0).random(300):
        loss = step.loss([step.choose(group, place)], table(logit_1K.log_softmax(-1))).loss
        with torch.no_grad():
            logit_1K -= 0.7 * torch.autograd.grad(loss, logit_1K)[0]
    tilt_K = quantiles.log_tilt_tie_aware(quantiles.standing_among_others(reward_K[None]), 4)[0]
    expected_K = (reference_K + 15 / 16 * tilt_K).softmax(-1)
    torch.testing.assert_close(logit_1K.detach()[0].softmax(-1), expected_K, atol=1e-6, rtol=0)


# --- gradients and invariances of both -------------------------------------------------------------------


def group_losses(logit_BN: Tensor, reward_BN: Tensor) -> Tensor:
    """Both losses of groups whose candidates are all outcomes of a softmax, from rewards to loss. (2, B)."""
    logprob_BN = logit_BN.log_softmax(-1)
    reference_BN = torch.linspace(-2, 1, logit_BN.numel(), dtype=torch.float64).reshape_as(logit_BN).log_softmax(-1)
    picked = best_and_worst(reward_BN)
    pair = [table.gather(1, at[:, None])[:, 0] for table in (logprob_BN, reference_BN) for at in picked]
    tilt_BN = quantiles.log_tilt_tie_aware(quantiles.standing_among_others(reward_BN), 4)
    published = bonbon_loss(*pair, n=4, imitation_weight=0.3).loss_B
    return torch.stack((published, consistent_pair_loss(logprob_BN, reference_BN, tilt_BN)))


def test_gradients_are_those_of_central_differences():
    """Three prompts: rewards without ties, with some, and tied throughout."""
    reward_BN = torch.tensor([[1.0, 5, 3, 2], [1, 2, 2, 1], [4, 4, 4, 4]])
    logit_BN = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_losses(x, reward_BN), (logit_BN,), eps=1e-6, atol=1e-7)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9))
@settings(deadline=None, max_examples=60)
def test_only_the_order_of_rewards_counts(rewards):
    reward_BN = torch.tensor([rewards], dtype=torch.float64)
    logit_BN = torch.linspace(0, 3, len(rewards), dtype=torch.float64).sin()[None]
    original = group_losses(logit_BN, reward_BN)
    for transform in (torch.exp, lambda reward: reward**3, lambda reward: 7 - torch.exp(-reward)):
        assert torch.equal(group_losses(logit_BN, transform(reward_BN)), original)


def test_only_the_policy_carries_a_gradient():
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(4)]
    torch.autograd.backward(bonbon_loss(*tensors, n=8).loss_B.sum())
    assert [tensor.grad is None for tensor in tensors] == [False, False, True, True]
    logprob_BN, reference_BN, tilt_BN = (torch.ones(1, 2, requires_grad=True) for _ in range(3))
    torch.autograd.backward(consistent_pair_loss(logprob_BN, reference_BN, tilt_BN).sum())
    assert [tensor.grad is None for tensor in (logprob_BN, reference_BN, tilt_BN)] == [False, True, True]


# --- refusals --------------------------------------------------------------------------------------------


def test_shapes_that_would_broadcast_are_refused():
    three = torch.zeros(2, 3)
    for wrong in (torch.zeros(1, 3), torch.zeros(3), torch.zeros(2, 1)):
        for place in range(3):
            group = [three, three, three]
            group[place] = wrong
            with pytest.raises(ValueError, match="one shape"):
                consistent_pair_loss(*group)


@pytest.mark.parametrize("lonely", [torch.zeros(2, 1), torch.zeros(2), torch.zeros(1, 2, 3)])
def test_a_group_without_pairs_is_refused(lonely):
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        consistent_pair_loss(lonely, lonely, lonely)
