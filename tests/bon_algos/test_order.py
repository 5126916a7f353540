"""The exact law of best-of-n, and unbiased estimates of it from candidates already drawn."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from math import comb, nextafter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from bon_algos import order
from tests.bon_algos.vectors import (
    REFERENCE_K,
    TIED_K,
    UNIQUE_K,
)

relaxed = settings(deadline=None, max_examples=60)
tying_rewards = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12)


# --- weights of candidates already drawn -----------------------------------------------------------------


def test_weights_by_hand():
    # C(j−1, 1)/C(8, 2) = (j − 1)/28
    np.testing.assert_allclose(order.best_of_n_weights(range(8), 2), np.arange(8) / 28, rtol=1e-14)
    np.testing.assert_allclose(order.best_of_n_weights(range(4), 2), [0, 1 / 6, 1 / 3, 1 / 2], rtol=1e-14)
    # C(j−1, 3)/C(8, 4) = 0 0 0 1 4 10 20 35, over 70
    expected_M = np.array([0, 0, 0, 1, 4, 10, 20, 35]) / 70
    np.testing.assert_allclose(order.best_of_n_weights(range(8), 4), expected_M, rtol=1e-14)
    # drawing order is kept, and the two in the middle share (1 + 2)/6
    np.testing.assert_allclose(order.best_of_n_weights([5, 9, 0, 5], 2), [1 / 4, 1 / 2, 0, 1 / 4])


@given(tying_rewards, st.data())
@relaxed
def test_weights_are_the_average_over_all_ways_to_pick_n(rewards, data):
    n = data.draw(st.integers(1, min(5, len(rewards))))
    weight_M = np.zeros(len(rewards))
    for picked in combinations(range(len(rewards)), n):
        best = [j for j in picked if rewards[j] == max(rewards[i] for i in picked)]
        weight_M[best] += 1 / len(best) / comb(len(rewards), n)
    # Sharing within each pick and sharing within the level are the same law by exchangeability.
    for level in set(rewards):
        tied = [j for j, reward in enumerate(rewards) if reward == level]
        weight_M[tied] = weight_M[tied].mean()
    np.testing.assert_allclose(order.best_of_n_weights(rewards, n), weight_M, atol=1e-14)


@given(tying_rewards, st.data())
@relaxed
def test_weights_follow_their_candidates(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    shuffle = data.draw(st.permutations(range(len(rewards))))
    weight_M = order.best_of_n_weights(rewards, n)
    assert weight_M.sum() == pytest.approx(1, abs=1e-13)
    assert (weight_M >= 0).all()
    np.testing.assert_array_equal(order.best_of_n_weights([rewards[j] for j in shuffle], n), weight_M[list(shuffle)])
    np.testing.assert_array_equal(order.best_of_n_weights(np.exp(rewards), n), weight_M)


@given(tying_rewards)
@relaxed
def test_best_of_one_weighs_all_alike_and_best_of_all_only_the_highest(rewards):
    num_drawn, highest = len(rewards), max(rewards)
    np.testing.assert_allclose(order.best_of_n_weights(rewards, 1), np.full(num_drawn, 1 / num_drawn))
    weight_M = order.best_of_n_weights(rewards, num_drawn)
    np.testing.assert_allclose(
        weight_M, [(reward == highest) / rewards.count(highest) for reward in rewards], atol=1e-14
    )


@pytest.mark.parametrize("n", [1, 2, 16, 2048, 4095, 4096])
def test_weights_are_exact_with_4096_draws(n):
    weight_M = order.best_of_n_weights(range(4096), n)
    for j in (1, n, (n + 4096) // 2, 4096):
        exact = float(Fraction(comb(j - 1, n - 1), comb(4096, n)))
        assert weight_M[j - 1] == pytest.approx(exact, rel=1e-11, abs=1e-300)
    assert weight_M.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_more_than_was_drawn_is_refused(n):
    with pytest.raises(ValueError, match="≤ 3 draws"):
        order.best_of_n_weights([1, 2, 3], n)


@pytest.mark.parametrize("reward_K", [[0, 1, 2], [0, 1, 1], [1, 1, 1]])
def test_weighted_candidates_are_unbiased_for_best_of_n(reward_K):
    """All 3⁴ ways to draw four, each with its probability: the weighted mean is E_BoN[f], ties or not."""
    mass_K, value_K = np.array([0.2, 0.3, 0.5]), np.array([1.0, -2.0, 0.7])
    for n in (1, 2, 3, 4):
        estimate = 0.0
        for draws in product(range(3), repeat=4):
            weight_M = order.best_of_n_weights([reward_K[k] for k in draws], n)
            estimate += np.prod(mass_K[list(draws)]) * (weight_M @ value_K[list(draws)])
        assert estimate == pytest.approx(order.best_of_n_law(mass_K, reward_K, n) @ value_K, abs=1e-14)


@pytest.mark.slow
def test_two_expectations_under_best_of_four():
    k = np.arange(20)
    unique_K = order.best_of_n_law(REFERENCE_K, UNIQUE_K, 4)
    tied_K = order.best_of_n_law(REFERENCE_K, TIED_K, 4)
    assert unique_K @ np.sin(k) == pytest.approx(-0.569317, abs=6e-7)
    assert tied_K @ np.cos(0.9 * k) == pytest.approx(-0.66599, abs=6e-6)
    # From draws: 20 000 groups of 16, so that the standard error is near .0017 and .0012.
    draw_BM = np.random.default_rng(0).choice(20, size=(20_000, 16), p=REFERENCE_K)
    for reward_K, value_K, law_K in [(UNIQUE_K, np.sin(k), unique_K), (TIED_K, np.cos(0.9 * k), tied_K)]:
        curve = order.n_curve(value_K[draw_BM], reward_K[draw_BM])
        assert abs(curve.mean[3] - law_K @ value_K) < 4 * curve.standard_error[3]
        assert curve.standard_error[3] < 0.003


# --- the n-curve -----------------------------------------------------------------------------------------


def test_the_n_curve_by_hand():
    # rewards 0, 1, 2: best of 1 → 1; best of 2: 0·0 + 1·1/3 + 2·2/3 = 5/3; best of 3 → 2
    # rewards 0, 0, 3: best of 1 → 1; best of 2: 3·2/3 = 2;                 best of 3 → 3
    curve = order.n_curve([[0, 1, 2], [3, 0, 0]], [[0, 1, 2], [3, 0, 0]])
    np.testing.assert_allclose(curve.mean, [1, 11 / 6, 5 / 2])
    # two prompts: standard error = |difference|/2
    np.testing.assert_allclose(curve.standard_error, [0, 1 / 6, 1 / 2], atol=1e-15)


def test_rows_of_one_prompt_are_one_observation():
    """Best-of-2 of the rows: 2, 4 and 9; the first and the last are of one prompt, whose mean is 5½."""
    rows = [[0, 2], [4, 4], [9, 3]]
    curve = order.n_curve(rows, rows, ["a", "b", "a"])
    np.testing.assert_allclose(curve.value_PM, [[3.5, 5.5], [4.0, 4.0]])
    np.testing.assert_allclose(curve.mean, [3.75, 4.75])
    assert [one.mean for one in curve.intervals()] == pytest.approx([3.75, 4.75])
    with pytest.raises(ValueError, match="at least two"):
        order.n_curve(rows, rows, ["a"] * 3)


def test_some_k_alone():
    rows = [[0, 1, 2, 5], [3, 0, 0, 1]]
    whole = order.best_of_k_values(rows, rows)
    np.testing.assert_array_equal(order.best_of_k_values(rows, rows, (4, 2)), whole[:, [3, 1]])
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"best-of-{k} needs"):
            order.best_of_k_values(rows, rows, (k,))


@given(
    st.integers(2, 9).flatmap(
        lambda m: st.lists(st.lists(st.integers(0, 4), min_size=m, max_size=m), min_size=2, max_size=4)
    )
)
@relaxed
def test_the_n_curve_is_the_weights_at_every_n(rewards):
    reward_BM = np.array(rewards, dtype=float)
    value_BM = np.cos(3 * np.arange(reward_BM.size)).reshape(reward_BM.shape)
    curve = order.n_curve(value_BM, reward_BM)
    for n in range(1, reward_BM.shape[1] + 1):
        value_B = [
            order.best_of_n_weights(reward_M, n) @ value_M
            for reward_M, value_M in zip(reward_BM, value_BM, strict=True)
        ]
        assert curve.mean[n - 1] == pytest.approx(np.mean(value_B), abs=1e-12)
        assert curve.standard_error[n - 1] == pytest.approx(stats.sem(value_B), abs=1e-12)


# --- intervals -------------------------------------------------------------------------------------------


def test_the_win_rate_by_hand():
    # prompt 1: 2 against 1, 2, 3 → (1 + ½ + 0)/3 = ½;   prompt 2: 9 against 0, 0, 9 → (1 + 1 + ½)/3 = 5/6
    interval = order.win_rate([[2.0], [9.0]], [[1, 2, 3], [0, 0, 9]])
    assert interval.mean == pytest.approx(2 / 3)
    assert (interval.low, interval.high) == (0, 1)  # two prompts say little: t = 12.7, cut to [0, 1]


def test_the_win_rate_of_the_reference_against_itself_is_one_half():
    reward_BM = np.random.default_rng(1).integers(0, 3, size=(50, 6))
    assert order.win_rate(reward_BM, reward_BM).mean == pytest.approx(0.5)


def test_the_interval_of_a_mean_is_students():
    value_B = np.array([0.3, -1.0, 2.2, 0.9, 0.0])
    low, high = stats.t.interval(0.95, 4, loc=value_B.mean(), scale=stats.sem(value_B))
    interval = order.mean_interval(value_B)
    assert interval.low == pytest.approx(low)
    assert interval.high == pytest.approx(high)


@pytest.mark.parametrize("num_prompts", [2, 3, 4, 11, 30, 31, 257, 4096])
def test_students_quantile_is_scipys(num_prompts):
    # values ±1 alternately: mean and spread known, so the reach shows the quantile
    value_B = np.resize([1.0, -1.0], num_prompts)
    interval = order.mean_interval(value_B)
    reach = stats.t.ppf(0.975, num_prompts - 1) * stats.sem(value_B)
    assert (interval.high - interval.low) / 2 == pytest.approx(reach, rel=1e-9)


@pytest.mark.slow
def test_the_interval_covers_the_truth_19_times_in_20():
    """1 500 experiments of 8 prompts."""
    covered = 0
    for value_B in np.random.default_rng(2).normal(size=(1500, 8)):
        interval = order.mean_interval(value_B)
        covered += interval.low <= 0 <= interval.high
    assert covered / 1500 == pytest.approx(0.95, abs=4 * (0.05 * 0.95 / 1500) ** 0.5)


@pytest.mark.parametrize("values", [[1.0], []])
def test_one_prompt_has_no_interval(values):
    with pytest.raises(ValueError, match="at least two"):
        order.mean_interval(values)


def test_rewards_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        order.best_of_n_weights([1.0, float("nan")], 1)


# --- a few candidates for all of them --------------------------------------------------------------------


def test_systematic_draws_by_hand():
    """Weights 1/2, 1/8, 3/8 and four draws at (k + u)/4: with u = 0.2 the places .05 .3 .55 .8 fall on 0 0 1 2."""
    assert order.systematic_sample([1 / 2, 1 / 8, 3 / 8], 4, 0.2).tolist() == [2, 1, 1]
    assert order.systematic_sample([1 / 2, 1 / 8, 3 / 8], 4, 0.7).tolist() == [2, 0, 2]


@example([1.0], 3, nextafter(1.0, 0.0))  # (2 + u)/3 rounds to 1
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda weights: sum(weights) > 0.1),
    st.integers(1, 60),
    st.floats(0, 1, exclude_max=True),
)
def test_systematic_draws_never_miss_their_share_by_a_whole_one(weights, count, uniform):
    share = np.array(weights) / sum(weights)
    times = order.systematic_sample(share, count, uniform)
    assert times.sum() == count
    assert np.all(np.abs(times - count * share) < 1 + 1e-9)


@pytest.mark.parametrize(("weights", "count", "uniform"), [([0.5, 0.4], 2, 0.1), ([1.0], 0, 0.1), ([1.0], 1, 1.0)])
def test_systematic_draws_refuse_what_is_no_law(weights, count, uniform):
    with pytest.raises(ValueError, match="sum to 1"):
        order.systematic_sample(weights, count, uniform)


# --- soft best-of-n --------------------------------------------------------------------------------------


def test_soft_weights_by_hand():
    weight_M = order.soft_best_of_n_weights([np.log(3), 0.0, np.log(3), 0.0], 1.0)
    np.testing.assert_allclose(weight_M, [3 / 8, 1 / 8, 3 / 8, 1 / 8], rtol=1e-13)
    np.testing.assert_allclose(order.soft_best_of_n_weights([5e3, 4e3], 1e-3), [1, 0])
    np.testing.assert_allclose(order.soft_best_of_n_weights([5e3, 4e3], 1e12), [1 / 2, 1 / 2], rtol=1e-8)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_what_soft_best_of_n_serves_comes_near_the_tilted_law(n):
    """By enumeration of all draws of n: its KL to π_ref·e^{r/λ}/Z falls with n, from n = 1's own."""
    law_K, reward_K, softness = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0]), 0.8
    served_K = np.zeros(3)
    for drawn in product(range(3), repeat=n):
        weight_n = order.soft_best_of_n_weights(reward_K[list(drawn)], softness)
        np.add.at(served_K, list(drawn), law_K[list(drawn)].prod() * weight_n)
    tilted_K = law_K * np.exp(reward_K / softness)
    tilted_K /= tilted_K.sum()
    assert served_K.sum() == pytest.approx(1)
    distance = float((tilted_K * np.log(tilted_K / served_K)).sum())
    alone = float((tilted_K * np.log(tilted_K / law_K)).sum())
    assert distance <= alone / n + 1e-12
    if n == 1:
        np.testing.assert_allclose(served_K, law_K)


@pytest.mark.parametrize("softness", [0.0, -1.0, float("nan")])
def test_a_softness_that_is_none_is_refused(softness):
    with pytest.raises(ValueError, match="positive"):
        order.soft_best_of_n_weights([0.0], softness)
