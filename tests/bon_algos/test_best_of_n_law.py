"""The exact law of best-of-n with ties: by enumeration, by the test vectors, and its bounds."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon_algos import order
from tests.bon_algos.vectors import (
    BINARY_K,
    REFERENCE_K,
    REWARDS,
    TIED_K,
    UNIQUE_K,
    kl,
    win_rate_against_reference,
)


@pytest.mark.parametrize("reward_K", [[0, 1, 2, 3], [0, 1, 1, 2], [1, 0, 0, 1], [2, 2, 2, 2]])
def test_the_law_is_that_of_drawing_n_and_serving_the_first_highest(reward_K):
    mass_K = [Fraction(1, 10), Fraction(2, 10), Fraction(3, 10), Fraction(4, 10)]
    for n in (1, 2, 3):
        law_K = [Fraction(0)] * 4
        for draws in product(range(4), repeat=n):  # every possible group of n, with its probability
            winner = max(draws, key=lambda k: reward_K[k])  # max keeps the first of equals
            law_K[winner] += prod((mass_K[k] for k in draws), start=Fraction(1))
        computed_K = order.best_of_n_law([float(mass) for mass in mass_K], reward_K, n)
        np.testing.assert_allclose(computed_K, [float(mass) for mass in law_K], rtol=1e-14)


def test_best_of_two_of_unique_rewards_in_exact_fractions():
    expected = [Fraction(101, 44100), Fraction(16, 525), Fraction(79, 980)]
    expected += [Fraction(16, 1225), Fraction(361, 4900)]
    law_K = order.best_of_n_law(REFERENCE_K, UNIQUE_K, 2)
    np.testing.assert_allclose(law_K[:5], [float(mass) for mass in expected], rtol=1e-14)


LAW_TABLE = [  # exact rationals, 6 digits
    # vector, n, KL(BoN ‖ ref), KL(ref ‖ BoN), win rate, mean reward, P(best of n > one draw), P(they tie)
    ("U", 2, 0.191161, 0.281871, 0.665873, 13.225079, 0.632672, 0.066403),
    ("U", 4, 0.632570, 1.476592, 0.798302, 15.799611, 0.764560, 0.067483),
    ("U", 8, 1.190480, 4.472673, 0.885486, 17.390909, 0.852192, 0.066587),
    ("U", 16, 1.787818, 11.003920, 0.935351, 18.213610, 0.904916, 0.060871),
    ("T", 2, 0.180632, 0.243875, 0.659274, 2.910295, 0.550216, 0.218116),
    ("T", 4, 0.599648, 1.257686, 0.782455, 3.543743, 0.666559, 0.231793),
    ("T", 8, 1.050744, 3.722630, 0.849749, 3.890024, 0.725841, 0.247816),
    ("T", 16, 1.312351, 8.923560, 0.869658, 3.991118, 0.741567, 0.256182),
    ("B", 2, 0.100354, 0.095964, 0.608628, 0.536304, 0.365197, 0.486861),
    ("B", 4, 0.458877, 0.497748, 0.732969, 0.784986, 0.534538, 0.396862),
    ("B", 8, 0.920100, 1.482270, 0.817361, 0.953769, 0.649471, 0.335779),
    ("B", 16, 1.125519, 3.561169, 0.839408, 0.997863, 0.679497, 0.319821),
]


@pytest.mark.parametrize(("vector", "n", "kl_forward", "kl_backward", "win", "mean_reward", "above", "tie"), LAW_TABLE)
def test_the_law_on_twenty_outcomes(vector, n, kl_forward, kl_backward, win, mean_reward, above, tie):
    reward_K = REWARDS[vector]
    law_K = order.best_of_n_law(REFERENCE_K, reward_K, n)
    assert law_K.sum() == pytest.approx(1, abs=1e-13)
    assert order.kl_best_of_n_reference(REFERENCE_K, reward_K, n) == pytest.approx(kl_forward, abs=6e-7)
    assert kl(law_K, REFERENCE_K) == pytest.approx(kl_forward, abs=6e-7)
    assert kl(REFERENCE_K, law_K) == pytest.approx(kl_backward, abs=6e-7)
    assert order.win_rate_best_of_n(REFERENCE_K, reward_K, n) == pytest.approx(win, abs=6e-7)
    assert win_rate_against_reference(law_K, reward_K) == pytest.approx(win, abs=6e-7)
    assert law_K @ reward_K == pytest.approx(mean_reward, abs=6e-7)
    assert law_K @ (reward_K[:, None] > reward_K) @ REFERENCE_K == pytest.approx(above, abs=6e-7)
    assert law_K @ (reward_K[:, None] == reward_K) @ REFERENCE_K == pytest.approx(tie, abs=6e-7)


@pytest.mark.parametrize(("n", "bound"), [(2, 0.193147), (4, 0.636294), (8, 1.204442), (16, 1.835089)])
def test_the_bound_on_the_divergence(n, bound):
    assert order.kl_bound(n) == pytest.approx(bound, abs=6e-7)
    assert order.kl_best_of_n_reference(REFERENCE_K, UNIQUE_K, n) < bound


@pytest.mark.parametrize(("vector", "jeffreys"), [("U", 1.054581), ("T", 0.928667), ("B", 0.478312)])
def test_jeffreys_divergence_of_best_of_four(vector, jeffreys):
    law_K = order.best_of_n_law(REFERENCE_K, REWARDS[vector], 4)
    assert (kl(law_K, REFERENCE_K) + kl(REFERENCE_K, law_K)) / 2 == pytest.approx(jeffreys, abs=6e-7)


def test_ties_to_the_lowest_outcome_would_be_another_law():
    first_drawn_K = order.best_of_n_law(REFERENCE_K, TIED_K, 4)
    lowest_K = order.best_of_n_law(REFERENCE_K, TIED_K - np.arange(20) / 100, 4)
    assert np.abs(lowest_K - first_drawn_K).sum() / 2 == pytest.approx(0.111691, abs=6e-7)
    assert kl(lowest_K, REFERENCE_K) == pytest.approx(0.632621, abs=6e-7)


PMF_OF_FOUR = {
    "U": ".000265 .009774 .051542 .012283 .108925 .000034 .000301 .003641 .031664 .017258 "
    ".077226 .270891 .000066 .002142 .013942 .015558 .068157 .188847 .126814 .000672",
    "T": ".000476 .018876 .035393 .011662 .115913 .000451 .000085 .004759 .040112 .023323 "
    ".064139 .231825 .000141 .005711 .009043 .014157 .075800 .257584 .090154 .000395",
    "B": ".001504 .012029 .022554 .023432 .105446 .024058 .004511 .015036 .025561 .006014 "
    ".128878 .210892 .007518 .018043 .028568 .009022 .019547 .234324 .082013 .021050",
}


@pytest.mark.parametrize("vector", PMF_OF_FOUR)
def test_best_of_four_outcome_by_outcome(vector):
    law_K = order.best_of_n_law(REFERENCE_K, REWARDS[vector], 4)
    np.testing.assert_allclose(law_K, [float(mass) for mass in PMF_OF_FOUR[vector].split()], atol=6e-7)


@pytest.mark.parametrize("reward_K", [UNIQUE_K, TIED_K, BINARY_K])
def test_best_of_four_of_best_of_two_is_best_of_eight(reward_K):
    of_two_K = order.best_of_n_law(REFERENCE_K, reward_K, 2)
    four_of_two_K = order.best_of_n_law(of_two_K, reward_K, 4)
    np.testing.assert_allclose(four_of_two_K, order.best_of_n_law(REFERENCE_K, reward_K, 8), rtol=1e-12)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), min_size=1, max_size=12), st.integers(1, 300))
@settings(deadline=None, max_examples=60)
def test_bounds_on_any_finite_policy(outcomes, n):
    counts, rewards = zip(*outcomes, strict=True)
    mass_K = np.array(counts) / sum(counts)
    law_K = order.best_of_n_law(mass_K, rewards, n)
    assert law_K.sum() == pytest.approx(1, abs=1e-12)
    assert -1e-12 <= order.kl_best_of_n_reference(mass_K, rewards, n) <= order.kl_bound(n) + 1e-12
    assert 0.5 - 1e-12 <= order.win_rate_best_of_n(mass_K, rewards, n) <= order.win_rate_bound(n) + 1e-12
    np.testing.assert_array_equal(law_K, order.best_of_n_law(mass_K, np.exp(rewards), n))
    np.testing.assert_allclose(order.best_of_n_law(mass_K, rewards, 1), mass_K, rtol=1e-14)


def test_the_bounds_are_reached_without_ties():
    # 20 000 equally likely outcomes: win 8/9, log 8 − 7/8 = 1.204442
    mass_K, reward_K = np.full(20_000, 1 / 20_000), np.arange(20_000)
    assert order.kl_best_of_n_reference(mass_K, reward_K, 8) == pytest.approx(1.204442, abs=1e-6)
    assert order.win_rate_best_of_n(mass_K, reward_K, 8) == pytest.approx(8 / 9, abs=1e-6)
    assert order.kl_bound(8) == pytest.approx(1.204442, abs=5e-7)
    assert order.win_rate_bound(8) == 8 / 9


@pytest.mark.parametrize(("mass_K", "reward_K"), [([0.5, 0.5], [1.0]), ([0.5, 0.4], [1, 2]), ([1.0, 0.0], [1, 2])])
def test_what_is_not_a_law_is_refused(mass_K, reward_K):
    with pytest.raises(ValueError, match="mass"):
        order.best_of_n_law(mass_K, reward_K, 2)
