"""The KL of best-of-n where rewards tie: from the law's levels, and from draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bon_algos import order
from tests.bon_algos.vectors import REFERENCE_K, TIED_K

relaxed = settings(deadline=None, max_examples=60)
tying_rewards = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12)


@pytest.mark.parametrize(("n", "estimate", "exact"), [(4, 0.6185, 0.5996), (8, 1.0716, 1.0507), (16, 1.3182, 1.3124)])
def test_the_tie_aware_kl_averaged_over_winners(n, estimate, exact):
    level_mass_K = (TIED_K[:, None] == TIED_K) @ REFERENCE_K
    of_winner_K = order.kl_best_of_n_of_level(level_mass_K, n)
    assert order.best_of_n_law(REFERENCE_K, TIED_K, n) @ of_winner_K == pytest.approx(estimate, abs=6e-5)
    assert order.kl_best_of_n_reference(REFERENCE_K, TIED_K, n) == pytest.approx(exact, abs=6e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
@pytest.mark.parametrize("level_mass", [0.01, 0.3, 0.95])
def test_the_tie_aware_kl_is_exact_when_only_the_highest_reward_ties(n, level_mass):
    """20 000 outcomes without ties below one level."""
    mass_K = np.append(np.full(20_000, (1 - level_mass) / 20_000), level_mass)
    exact = order.kl_best_of_n_reference(mass_K, np.arange(20_001), n)
    assert order.kl_best_of_n_of_level(level_mass, n) == pytest.approx(exact, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), min_size=1, max_size=12), st.integers(1, 300))
@relaxed
def test_the_tie_aware_kl_lies_between_the_kl_and_its_bound(outcomes, n):
    counts, rewards = map(np.array, zip(*outcomes, strict=True))
    mass_K = counts / counts.sum()
    level_mass_K = np.minimum((rewards[:, None] == rewards) @ mass_K, 1.0)
    estimate = order.best_of_n_law(mass_K, rewards, n) @ order.kl_best_of_n_of_level(level_mass_K, n)
    assert order.kl_best_of_n_reference(mass_K, rewards, n) - 1e-9 <= estimate <= order.kl_bound(n) + 1e-9


@pytest.mark.parametrize("n", [1, 2, 8, 100])
def test_the_tie_aware_kl_falls_from_the_bound_to_nothing(n):
    kl_by_mass = order.kl_best_of_n_of_level([0, 5e-324, 1e-17, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-16, 1], n)
    assert kl_by_mass[0] == order.kl_bound(n)
    assert kl_by_mass[-1] == 0
    assert (np.diff(kl_by_mass) <= 1e-14).all()


def test_the_tie_aware_kl_of_draws_by_hand():
    """n = 2 of 4, 4, 9: weights 1/6, 1/6, 2/3; of the two others one ties with a 4 and none with the 9. At ε = ½,
    ¼·(log 2 − log 2 − ½) + ¾·log 3/2."""
    tied = -1 / 8 + 3 / 4 * np.log(3 / 2)
    estimate = order.kl_best_of_n_estimate([4, 9, 4], 2)
    assert estimate == pytest.approx(tied / 3 + 2 / 3 * order.kl_bound(2), abs=1e-14)


@given(tying_rewards.filter(lambda rewards: len(rewards) > 1), st.data())
@relaxed
def test_the_tie_aware_kl_of_draws_only_sees_order_and_ties(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    estimate = order.kl_best_of_n_estimate(rewards, n)
    assert -1e-12 <= estimate <= order.kl_bound(n) + 1e-12
    assert order.kl_best_of_n_estimate(np.exp(rewards), n) == estimate
    shuffle = data.draw(st.permutations(rewards))
    assert order.kl_best_of_n_estimate(shuffle, n) == pytest.approx(estimate, abs=1e-12)
    assert order.kl_best_of_n_estimate(np.arange(len(rewards)), n) == pytest.approx(order.kl_bound(n), abs=1e-12)


def test_the_tie_aware_kl_of_many_draws_is_that_of_the_law():
    reward_BM = TIED_K[np.random.default_rng(3).choice(20, size=(200, 512), p=REFERENCE_K)]
    estimate_B = [order.kl_best_of_n_estimate(reward_M, 8) for reward_M in reward_BM]
    # consistent, with a bias of order 1/M: a twentieth of what separates it from the exact 1.0507
    assert np.mean(estimate_B) == pytest.approx(1.0716, abs=4 * stats.sem(estimate_B) + 0.001)


@pytest.mark.parametrize("level_mass", [-0.1, 1.1, float("nan")])
def test_a_level_of_no_mass_at_all_is_refused(level_mass):
    with pytest.raises(ValueError, match=r"\[0, 1\]|finite"):
        order.kl_best_of_n_of_level([level_mass], 2)


def test_a_single_draw_ties_with_nothing():
    with pytest.raises(ValueError, match="others"):
        order.kl_best_of_n_estimate([1.0], 1)
    with pytest.raises(ValueError, match="≤ 2 draws"):
        order.kl_best_of_n_estimate([1.0, 2.0], 3)
