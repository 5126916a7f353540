"""The frontier's estimates against enumeration: every way to pick, every sequence of draws, ties included."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon_algos.frontier import (
    bootstrap_interval,
    kl_at_win_rate,
    ratio_of_means,
    shown_sizes,
    win_rate_against_best_of_n,
    win_rate_of_best_of_k,
)
from bon_algos.order import kl_best_of_n_reference, win_rate_best_of_n

REWARDS = st.lists(st.integers(0, 3).map(float), min_size=2, max_size=7)


def beats(reward, other):
    return (reward > other) + (reward == other) / 2


@given(REWARDS, st.data())
def test_the_win_rate_of_best_of_k_is_the_mean_over_all_ways_to_pick_k_and_one_more(rewards, data):
    k = data.draw(st.integers(1, len(rewards) - 1))
    picks = [
        beats(max(rewards[i] for i in chosen), rewards[other])
        for other in range(len(rewards))
        for chosen in combinations([i for i in range(len(rewards)) if i != other], k)
    ]
    assert win_rate_of_best_of_k(rewards, k) == pytest.approx(np.mean(picks))


@given(REWARDS, REWARDS, st.data())
def test_the_win_rate_against_best_of_n_is_the_mean_over_all_ways_to_pick_n(own, reference, data):
    n = data.draw(st.integers(1, len(reference)))
    picks = [beats(reward, max(chosen)) for reward in own for chosen in combinations(reference, n)]
    assert win_rate_against_best_of_n(own, reference, n) == pytest.approx(np.mean(picks))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_is_unbiased_for_the_exact_law_with_ties(k):
    """Over all 3⁴ sequences of four draws of P = (.5, .3, .2), rewards 0, 1, 1."""
    mass, reward = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.0])
    expected = sum(
        math.prod(mass[list(draws)]) * win_rate_of_best_of_k(reward[list(draws)], k)
        for draws in product(range(3), repeat=4)
    )
    assert expected == pytest.approx(win_rate_best_of_n(mass, reward, k))


def test_without_ties_it_is_k_in_k_plus_1_and_with_nothing_but_ties_a_half():
    for k in range(1, 40):
        assert win_rate_of_best_of_k(np.arange(40.0), k) == pytest.approx(k / (k + 1))
        assert win_rate_of_best_of_k(np.ones(40), k) == pytest.approx(0.5)


def test_thousands_of_draws_do_not_overflow():
    assert win_rate_of_best_of_k(np.arange(5000.0), 256) == pytest.approx(256 / 257)


def test_best_of_k_needs_another_draw_to_win_against():
    with pytest.raises(ValueError, match="more than 4 draws, got 4"):
        win_rate_of_best_of_k(np.arange(4.0), 4)


def test_all_small_sizes_are_shown_and_n_and_the_last():
    assert shown_sizes(7, 16) == (1, 2, 3, 4, 5, 6, 7)
    assert shown_sizes(47, 30) == (*range(1, 17), 19, 23, 27, 30, 32, 38, 45, 47)
    assert len(shown_sizes(4096, 4096)) < 60


def test_between_two_sizes_the_kl_is_that_of_choosing_one_of_them_at_random():
    """Half of the requests by best-of-2, half by best-of-4: the win rate is in the middle, and the KL is not above."""
    mass, reward = np.full(8, 1 / 8), np.arange(8.0)
    win = [win_rate_best_of_n(mass, reward, k) for k in (1, 2, 4)]
    kl = [kl_best_of_n_reference(mass, reward, k) for k in (1, 2, 4)]
    assert kl_at_win_rate(win, kl, win[1]) == pytest.approx(kl[1])
    assert kl_at_win_rate(win, kl, (win[1] + win[2]) / 2) == pytest.approx((kl[1] + kl[2]) / 2)


@pytest.mark.parametrize("win", [0.4, 0.5, 0.81])
def test_outside_the_frontier_there_is_no_kl(win):
    assert math.isnan(kl_at_win_rate([0.5, 2 / 3, 0.8], [0.0, 0.19, 0.64], win))


def test_a_frontier_of_ties_alone_costs_nothing_and_has_no_ratio():
    assert math.isnan(kl_at_win_rate([0.5, 0.5, 0.5], [0.0, 0.0, 0.0], 0.5))


# --- the bootstrap ---------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_ratio_holds_the_truth_about_as_often_as_it_says():
    """2 = E numerator / E denominator, 30 prompts. Of 80 intervals of 95 %, 76 are expected to hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(80):
        below = rng.gamma(4.0, size=30)
        interval = ratio_of_means(2 * below + rng.normal(size=30), below, seed=0)
        held += interval is not None and interval.low <= 2 <= interval.high
    assert held >= 70


def test_the_same_seed_gives_the_same_interval():
    above, below = np.arange(1.0, 9.0), np.ones(8)
    assert ratio_of_means(above, below, 5) == ratio_of_means(above, below, 5) != ratio_of_means(above, below, 6)


def test_what_is_often_undefined_has_no_interval():
    assert ratio_of_means([1.0, 1.0], [0.0, 0.0], 0) is None
    assert ratio_of_means([1.0, 1.0], [1.0, -0.9], 0) is None  # of the resamples every fourth is all −0.9


def test_one_prompt_has_no_interval():
    with pytest.raises(ValueError, match="at least two, got 1"):
        bootstrap_interval(lambda mean_C: 1.0, [[1.0]], 0)
