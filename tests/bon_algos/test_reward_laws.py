"""What further draws may earn: against quadrature, enumeration and simulation, and what is learned from groups."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from bon_algos import reward_laws
from bon_algos.reward_laws import LevelledLaw, ShapedLaw, expected_gain, learned_law, posterior

relaxed = settings(deadline=None, max_examples=40)
Z = reward_laws._Z


def normal_law(place_P, spread_P, ceiling=math.inf) -> ShapedLaw:
    return ShapedLaw(np.array(place_P), np.array(spread_P), stats.norm.logpdf(Z), stats.norm.cdf(Z), ceiling)


def prompts(rng, count, draws, spread_of_places=1.5, spread_of_logs=0.4, together=0.0):
    """Normal rewards of prompts with places and log-spreads of their own."""
    first, second = rng.normal(size=(2, count))
    place = 2.0 + spread_of_places * first
    spread = np.exp(-0.5 + spread_of_logs * (together * first + math.sqrt(1 - together**2) * second))
    return place[:, None] + spread[:, None] * rng.normal(size=(count, draws))


# --- rewards on a scale ----------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [-20.0, -1.0, 0.5, 2.0, 5.0, 40.0])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_the_gain_is_the_integral_of_what_the_best_exceeds(best, count):
    """E (max − b)⁺ = ∫_b^∞ 1 − Fᵐ, at any place and spread."""
    law = normal_law([0.0, 1.0, -3.0], [1.0, 0.25, 2.0])
    for particle in range(3):
        of = stats.norm(law.place_P[particle], law.spread_P[particle])
        top = of.ppf(1 - 1e-12)
        points = [x for x in (of.ppf(1e-9), of.mean()) if best < x < top]
        expected = 0.0 if best >= top else integrate.quad(lambda r: 1 - of.cdf(r) ** count, best, top, points=points)[0]  # noqa: B023
        assert law.gain(best, count)[particle] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_beyond_a_ceiling_there_is_nothing():
    law, capped = normal_law([0.0], [1.0]), normal_law([0.0], [1.0], ceiling=2.0)
    expected, _ = integrate.quad(lambda r: 1 - stats.norm.cdf(r) ** 3, 1.0, 2.0)
    assert capped.gain(1.0, 3)[0] == pytest.approx(expected, rel=1e-4)
    assert capped.gain(2.0, 3)[0] == capped.gain(3.0, 3)[0] == 0.0
    assert law.gain(2.0, 3)[0] > 0


def test_the_posterior_is_bayes_rule():
    law = normal_law([0.0, 1.0, 1.0], [1.0, 1.0, 0.5])
    seen = [0.2, 1.4]
    likelihood = [
        np.prod(stats.norm.pdf(seen, place, spread)) for place, spread in zip(law.place_P, law.spread_P, strict=True)
    ]
    np.testing.assert_allclose(posterior(law, seen), np.array(likelihood) / sum(likelihood), rtol=1e-4)


@pytest.mark.parametrize("seen", [[2.0], [1.0, 1.1, 0.9, 1.05], [4.0, 5.5, 3.0, 4.5, 5.0, 2.5, 6.0, 4.0]])
def test_what_is_learned_of_normal_prompts_is_the_integral_over_their_law(seen):
    """The gain of four more by quadrature over place and log-spread, both of the law that the groups came from."""
    law = learned_law(list(prompts(np.random.default_rng(3), 3000, 16)))
    place, log_spread = np.meshgrid(np.linspace(-5, 9, 561), np.linspace(-2.3, 1.3, 145))
    spread = np.exp(log_spread)
    log_weight = stats.norm.logpdf(place, 2.0, 1.5) + stats.norm.logpdf(log_spread, -0.5, 0.4)
    for reward in seen:
        log_weight += stats.norm.logpdf(reward, place, spread)
    weight = np.exp(log_weight - log_weight.max())
    exact = normal_law(place.ravel(), spread.ravel()).gain(max(seen), 4).reshape(place.shape)
    # Residuals from a mean and deviation of sixteen draws have a tail shorter than the law's.
    assert expected_gain(law, seen, 4) == pytest.approx(float((weight * exact).sum() / weight.sum()), rel=0.2)


scores = st.lists(st.floats(-4, 8), min_size=1, max_size=10)
LEARNED = learned_law(list(prompts(np.random.default_rng(4), 200, 8)))


@given(scores, st.integers(1, 20), st.randoms(use_true_random=False))
@relaxed
def test_the_gain_rises_with_the_draws_each_of_which_is_worth_less(rewards, count, random):
    gain, more = expected_gain(LEARNED, rewards, count), expected_gain(LEARNED, rewards, count + 1)
    assert 0 <= gain <= more + 1e-12
    assert more / (count + 1) <= gain / count + 1e-12
    shuffled = random.sample(rewards, len(rewards))
    assert expected_gain(LEARNED, shuffled, count) == pytest.approx(gain, rel=1e-9, abs=1e-12)


def test_in_other_units_it_is_the_same_law():
    rewards = prompts(np.random.default_rng(4), 200, 8)
    tenfold = learned_law(list(10 * rewards + 7))
    for seen in ([1.0], [2.0, 2.5, 1.0]):
        in_tens = expected_gain(tenfold, [10 * one + 7 for one in seen], 4)
        assert in_tens == pytest.approx(10 * expected_gain(LEARNED, seen, 4), rel=1e-6)


def test_place_spread_and_how_they_go_together_are_learned():
    law = learned_law(list(prompts(np.random.default_rng(5), 4000, 8, together=0.7)))
    assert isinstance(law, ShapedLaw)
    log_spread = np.log(law.spread_P)
    assert law.place_P.mean() == pytest.approx(2.0, abs=0.1)
    assert law.place_P.std() == pytest.approx(1.5, rel=0.05)
    assert log_spread.mean() == pytest.approx(-0.5, abs=0.03)
    assert log_spread.std() == pytest.approx(0.4, rel=0.1)
    # The noise of s is in the covariance's scale, not in the covariance: .7 · 1.5 · .4
    assert np.cov(law.place_P, log_spread)[0, 1] == pytest.approx(0.42, rel=0.1)


def test_one_law_for_all_is_not_taken_for_many():
    """Means of four draws of one law have a deviation of ½, log-deviations one of about .4: none of it is prompts'."""
    law = learned_law(list(np.random.default_rng(9).normal(size=(2000, 4))))
    assert isinstance(law, ShapedLaw)
    assert law.place_P.std() < 0.1
    assert np.log(law.spread_P).std() < 0.2
    assert law.spread_P.mean() == pytest.approx(1.0, abs=0.1)


def test_the_shape_is_the_routes_own():
    """Exponential rewards: nothing below the place less one spread, and a tail of e⁻ᶻ above."""
    rng = np.random.default_rng(6)
    law = learned_law(list(rng.exponential(size=(500, 32))))
    assert isinstance(law, ShapedLaw)
    for z in (0.0, 1.0, 2.0, 3.0):
        assert 1 - np.interp(z, Z, law.cdf_Z) == pytest.approx(math.exp(-1 - z), abs=0.015)
    assert np.interp(-2.0, Z, law.cdf_Z) < 0.02


def test_draws_follow_the_posterior():
    """The mean of the best of four further draws, by drawing them."""
    rng, seen = np.random.default_rng(7), [2.0, 3.0, 1.5]
    weight = posterior(LEARNED, seen)
    drawn = np.array([LEARNED.draw(weight, 4, rng).max() for _ in range(20_000)])
    gains = np.maximum(drawn - 3.0, 0)
    error = gains.std() / math.sqrt(gains.size)
    assert gains.mean() == pytest.approx(expected_gain(LEARNED, seen, 4), abs=4 * error)


def test_a_scorer_with_a_ceiling_has_one():
    rng = np.random.default_rng(8)
    rewards = np.minimum(prompts(rng, 200, 16), 2.5)
    law = learned_law(list(rewards))
    assert isinstance(law, ShapedLaw)
    assert law.ceiling == 2.5
    assert expected_gain(law, [2.5, 1.0], 8) == 0.0
    assert max(law.draw(posterior(law, [2.5, 2.4]), 100, rng)) <= 2.5
    free = learned_law(list(prompts(rng, 200, 16)))
    assert isinstance(free, ShapedLaw)
    assert free.ceiling == math.inf


# --- rewards with few levels -----------------------------------------------------------------------------


def test_levels_by_enumeration():
    law = LevelledLaw(np.array([0.0, 1.0, 3.0]), np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    for particle, best, count in product((0, 1), (-2.0, 0.0, 1.0, 2.0, 3.0, 4.0), (1, 2, 3)):
        expected = sum(
            np.prod([law.mass_PV[particle, v] for v in drawn]) * max(max(law.level_V[list(drawn)]) - best, 0.0)
            for drawn in product(range(3), repeat=count)
        )
        assert law.gain(best, count)[particle] == pytest.approx(expected, abs=1e-12)
    # Of 1 and 3: .3 · .2 against .1 · .8
    np.testing.assert_allclose(posterior(law, [1.0, 3.0]), [0.06 / 0.14, 0.08 / 0.14])


def test_right_or_wrong_is_taken_level_by_level():
    """Half of the prompts had 0 of 8 right, half 7 of 8; a draw of the whole, 7/16 right, is added to each: a wrong
    one has mass .951 in the one half and .174 in the other."""
    law = learned_law([[0.0] * 8] * 20 + [[1.0] * 7 + [0.0]] * 20)
    assert isinstance(law, LevelledLaw)
    assert expected_gain(law, [1.0, 0.0], 8) == 0.0
    hard, easy = (8 + 9 / 16) / 9, (1 + 9 / 16) / 9
    for count in (1, 3):
        easy_share = easy**count / (easy**count + hard**count)
        expected = easy_share * (1 - easy**4) + (1 - easy_share) * (1 - hard**4)
        assert expected_gain(law, [0.0] * count, 4) == pytest.approx(expected)


def test_a_level_that_was_never_seen_counts_as_the_nearest():
    law = learned_law([[0.0, 1.0], [1.0, 0.0]])
    assert expected_gain(law, [0.9], 1) == pytest.approx(0.1 * 0.5)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[1.0, 2.0]], "two groups"),
        ([[1.0, 2.0], [1.0]], "at least two rewards"),
        ([[1.0, math.nan], [1.0, 2.0]], "finite"),
        ([[1.0, 1.0], [2.0, 2.0]], "differ"),
    ],
)
def test_groups_that_tell_nothing_are_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        learned_law(groups)


@pytest.mark.parametrize(("rewards", "count"), [([], 1), ([math.inf], 1), ([0.0], 0)])
def test_what_is_no_question_is_refused(rewards, count):
    with pytest.raises(ValueError, match=r"finite|at least one"):
        expected_gain(LEARNED, rewards, count)
