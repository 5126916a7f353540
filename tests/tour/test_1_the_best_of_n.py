"""First story: what serving the best of n does to a policy, on a policy small enough to know everything.

Three answers, drawn with probabilities 1/2, 1/3 and 1/6; the rarest one is the best.
"""

import math

import numpy as np
import pytest

from bon_algos.order import best_of_n_law, best_of_n_weights, kl_best_of_n_reference, kl_bound, win_rate_best_of_n

PROBABILITY = [1 / 2, 1 / 3, 1 / 6]
REWARD = [0.0, 1.0, 2.0]


def test_the_best_of_two_is_bad_only_when_both_draws_are():
    bad, middling, good = best_of_n_law(PROBABILITY, REWARD, n=2)
    assert bad == pytest.approx(1 / 2 * 1 / 2)
    assert middling == pytest.approx((1 / 2 + 1 / 3) ** 2 - 1 / 4)
    assert good == pytest.approx(1 - (1 / 2 + 1 / 3) ** 2)


def test_only_the_order_of_rewards_matters():
    assert best_of_n_law(PROBABILITY, [-100.0, 0.001, 0.002], n=7) == pytest.approx(
        best_of_n_law(PROBABILITY, REWARD, n=7)
    )


def test_best_of_n_moves_the_policy_by_less_than_a_known_bound():
    """KL ≤ log n − (n−1)/n nats: sixteen samples buy at most 1.835 nats."""
    assert kl_bound(16) == pytest.approx(math.log(16) - 15 / 16)
    assert 0 < kl_best_of_n_reference(PROBABILITY, REWARD, n=16) <= kl_bound(16)


def test_many_answers_make_the_bound_tight_and_the_best_of_n_wins_n_times_of_n_plus_1():
    many = np.full(10_000, 1 / 10_000)
    reward = np.arange(10_000.0)
    assert kl_best_of_n_reference(many, reward, n=16) == pytest.approx(kl_bound(16), abs=1e-2)
    assert win_rate_best_of_n(many, reward, n=16) == pytest.approx(16 / 17, abs=1e-3)


def test_the_candidates_of_one_request_tell_what_every_smaller_n_would_have_served():
    """Of four rewards 1 < 2 < 3 < 4, best-of-2 serves the lowest never, and the others 1, 2, 3 times of 6."""
    assert best_of_n_weights([3.0, 1.0, 4.0, 2.0], n=2) == pytest.approx([2 / 6, 0, 3 / 6, 1 / 6])
    assert best_of_n_weights([3.0, 1.0, 4.0, 2.0], n=4) == pytest.approx([0, 0, 1, 0])
