"""Best-of-n of the reference from what other policies drew: by whole laws, by hand, and the published table."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bon_algos import importance, order, quantiles
from bon_algos.algorithms import make_step
from bon_algos.contracts import BonRegressionSpec
from bon_algos.logprobs import TokenGroup
from bon_algos.steps import LoggedGroup, LoggedStep
from tests.bon_algos.vectors import COUNT_K, REFERENCE_K, REWARDS, UNIQUE_K, kl

relaxed = settings(deadline=None, max_examples=60)
K = np.arange(20)

TILTED_K: NDArray[np.float64] = REFERENCE_K * np.exp(0.8 * np.sin(K))
TILTED_K /= TILTED_K.sum()
"""Another policy's law over the twenty outcomes; best-of-4 of it is far from best-of-4 of the reference."""

draws_and_log_weights = st.lists(
    st.tuples(st.integers(0, 4).map(float), st.floats(-8, 8)), min_size=1, max_size=12
).map(lambda pairs: tuple(np.array(column) for column in zip(*pairs, strict=True)))


# --- the reference, from draws of another policy ---------------------------------------------------------


def test_the_other_policy_of_the_table():
    assert kl(REFERENCE_K, TILTED_K) == pytest.approx(0.188, abs=6e-4)
    # In the limit of many draws, (E_b w)²/E_b w² with w = π_ref/π_b.
    assert 1 / (REFERENCE_K**2 / TILTED_K).sum() == pytest.approx(0.687, abs=6e-4)
    assert order.best_of_n_law(REFERENCE_K, UNIQUE_K, 4) @ UNIQUE_K == pytest.approx(15.800, abs=6e-4)


def mean_of_best_of_four(num_drawn: int, max_importance: float, num_groups: int = 50_000) -> tuple[float, float]:
    """The self-normalised estimate of best-of-4's mean reward, its mean and standard error over groups of draws.

    A group is how often each outcome was drawn, by ascending reward; the first hundred go through the functions.
    """
    ascending_K = np.argsort(UNIQUE_K)
    reward_K, weight_K = UNIQUE_K[ascending_K], np.minimum(REFERENCE_K / TILTED_K, max_importance)[ascending_K]
    count_GK = np.random.default_rng(0).multinomial(num_drawn, TILTED_K[ascending_K], size=num_groups)
    share_GK = count_GK * weight_K / (count_GK @ weight_K)[:, None]
    edge_GK = np.pad(share_GK.cumsum(axis=1), ((0, 0), (1, 0))) ** 4
    estimate_G = np.diff(edge_GK, axis=1) @ reward_K
    for count_K, estimate in zip(count_GK[:100], estimate_G[:100], strict=True):
        drawn_M = np.repeat(ascending_K, count_K)
        share_M = importance.shares_of_reference(
            np.log(REFERENCE_K[drawn_M]), np.log(TILTED_K[drawn_M]), max_importance=max_importance
        )
        weight_M = importance.best_of_n_weights_of_shares(UNIQUE_K[drawn_M], share_M, 4)
        assert weight_M @ UNIQUE_K[drawn_M] == pytest.approx(estimate, abs=1e-10)
    return float(estimate_G.mean()), float(estimate_G.std() / num_groups**0.5)


@pytest.mark.parametrize(
    ("num_drawn", "max_importance", "published"),
    [
        (8, inf, 14.06),
        (32, inf, 15.38),
        (128, inf, 15.70),
        (8, 2, 13.93),
        (32, 2, 15.10),
        (128, 2, 15.39),
        (8, 1, 13.28),
        (32, 1, 13.99),
        (128, 1, 14.17),
    ],
)
def test_best_of_four_from_draws_of_another_policy(num_drawn, max_importance, published):
    """The table is itself a Monte Carlo, to two digits: it is allowed as much noise as ours."""
    mean, standard_error = mean_of_best_of_four(num_drawn, max_importance)
    assert mean == pytest.approx(published, abs=2**0.5 * 3 * standard_error + 0.005)
    assert standard_error < 0.015


def test_without_correction_it_is_best_of_n_of_the_policy_that_drew():
    drawn_BM = np.random.default_rng(1).choice(20, size=(2000, 128), p=TILTED_K)
    equal_M = np.full(128, 1 / 128)
    mean_B = [
        importance.best_of_n_weights_of_shares(UNIQUE_K[drawn_M], equal_M, 4) @ UNIQUE_K[drawn_M]
        for drawn_M in drawn_BM
    ]
    assert np.mean(mean_B) == pytest.approx(13.38, abs=4 * np.std(mean_B) / len(mean_B) ** 0.5 + 0.005)


def drawn_in_full(reward_K: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Rewards, shares and outcomes of draws in which another policy shows its law exactly, twice what the reference has
    of even outcomes and five times of odd ones, so that each draw's weight undoes it."""
    times_K = COUNT_K * np.where(K % 2, 5, 2)
    drawn_M = np.repeat(K, times_K)
    reference_M, sampled_M = np.log(REFERENCE_K)[drawn_M], np.log(times_K / times_K.sum())[drawn_M]
    return reward_K[drawn_M], importance.shares_of_reference(reference_M, sampled_M), drawn_M


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_weights_are_best_of_n_when_the_draws_are_the_whole_law(vector, n):
    reward_M, share_M, drawn_M = drawn_in_full(REWARDS[vector])
    weight_K = np.bincount(drawn_M, weights=importance.best_of_n_weights_of_shares(reward_M, share_M, n))
    np.testing.assert_allclose(weight_K, order.best_of_n_law(REFERENCE_K, REWARDS[vector], n), rtol=1e-10)


@pytest.mark.parametrize("vector", REWARDS)
def test_each_outcome_once_with_its_mass_is_the_law_of_best_of_n(vector):
    weight_K = importance.best_of_n_weights_of_shares(REWARDS[vector], REFERENCE_K, 8)
    np.testing.assert_allclose(weight_K, order.best_of_n_law(REFERENCE_K, REWARDS[vector], 8), rtol=1e-12)


def test_weights_by_hand():
    # shares ⅛ ½ ⅛ ¼ of rewards 3, 1, 2, 2; by reward C = ½, ⅞, 1; C² = ¼, 49/64, 1; the two 2s share 33/64 by 1 : 2
    reward_M, share_M = [3.0, 1.0, 2.0, 2.0], [1 / 8, 1 / 2, 1 / 8, 1 / 4]
    weight_M = importance.best_of_n_weights_of_shares(reward_M, share_M, 2)
    np.testing.assert_allclose(weight_M, [15 / 64, 16 / 64, 11 / 64, 22 / 64], rtol=1e-13)


def test_shares_by_hand():
    # π_ref/π_b = 4, 1, 1 → ⅔ ⅙ ⅙; capped at 2 → ½ ¼ ¼
    reference_M, sampled_M = np.log([0.4, 0.1, 0.1]), np.log([0.1, 0.1, 0.1])
    np.testing.assert_allclose(importance.shares_of_reference(reference_M, sampled_M), [2 / 3, 1 / 6, 1 / 6])
    capped_M = importance.shares_of_reference(reference_M, sampled_M, max_importance=2.0)
    np.testing.assert_allclose(capped_M, [1 / 2, 1 / 4, 1 / 4])
    # long completions: no ratio can be formed, the shares can
    np.testing.assert_allclose(importance.shares_of_reference([-4e3, -4e3], [-2e3, -1e3]), [1, 0], atol=1e-300)


def test_at_equal_shares_weights_are_the_plug_in():
    # (j/8)⁴ − ((j − 1)/8)⁴
    edge = (np.arange(9) / 8) ** 4
    equal_M, reward_M = np.full(8, 1 / 8), np.arange(8.0)
    np.testing.assert_allclose(importance.best_of_n_weights_of_shares(reward_M, equal_M, 4), np.diff(edge), rtol=1e-12)


@given(draws_and_log_weights, st.data())
@relaxed
def test_weights_are_a_law_and_follow_their_draws(draws, data):
    reward_M, log_weight_M = draws
    n = data.draw(st.integers(1, len(reward_M)))
    shuffle = data.draw(st.permutations(range(len(reward_M))))
    share_M = importance.shares_of_reference(log_weight_M, np.zeros_like(log_weight_M))
    weight_M = importance.best_of_n_weights_of_shares(reward_M, share_M, n)
    assert share_M.sum() == pytest.approx(1, abs=1e-12)
    assert weight_M.sum() == pytest.approx(1, abs=1e-12)
    assert (weight_M >= 0).all()
    shuffled_M = importance.best_of_n_weights_of_shares(reward_M[shuffle], share_M[shuffle], n)
    np.testing.assert_allclose(shuffled_M, weight_M[shuffle], rtol=1e-9)
    np.testing.assert_array_equal(importance.best_of_n_weights_of_shares(np.exp(reward_M), share_M, n), weight_M)
    np.testing.assert_allclose(importance.best_of_n_weights_of_shares(reward_M, share_M, 1), share_M, rtol=1e-12)


@given(draws_and_log_weights, st.floats(1, 100))
@relaxed
def test_effective_draws_are_between_one_and_all(draws, max_importance):
    log_weight_M = draws[1]
    share_M = importance.shares_of_reference(log_weight_M, np.zeros_like(log_weight_M), max_importance=max_importance)
    effective = importance.effective_sample_size(share_M)
    assert 1 - 1e-12 <= effective <= len(share_M) * (1 + 1e-12)
    assert importance.effective_sample_size(share_M * 1e-200) == pytest.approx(effective)
    assert effective >= importance.effective_sample_size(np.exp(log_weight_M)) * (1 - 1e-12)


def test_effective_draws_by_hand():
    assert importance.effective_sample_size([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert importance.effective_sample_size([3.0, 1.0, 0.0]) == pytest.approx(16 / 10)


def test_a_draw_without_any_share_weighs_nothing():
    weight_M = importance.best_of_n_weights_of_shares([5.0, 1.0, 2.0], [0.0, 0.5, 0.5], 2)
    np.testing.assert_allclose(weight_M, [0, 1 / 4, 3 / 4])


# --- draws of several policies ---------------------------------------------------------------------------


def test_a_mixture_by_hand():
    # one draw of π_0 and three of π_1: ¼·.8 + ¾·.2 = .35, ¼·.1 + ¾·.4 = .325
    logprob_KM = np.log([[0.8, 0.1, 0.1, 0.8], [0.2, 0.4, 0.4, 0.2]])
    mixture_M = importance.mixture_logprob(logprob_KM, [1, 3])
    np.testing.assert_allclose(np.exp(mixture_M), [0.35, 0.325, 0.325, 0.35], rtol=1e-13)
    # a policy that drew nothing counts for nothing, and long completions do not underflow
    np.testing.assert_allclose(importance.mixture_logprob(logprob_KM, [0, 4]), logprob_KM[1], rtol=1e-13)
    np.testing.assert_allclose(importance.mixture_logprob(logprob_KM - 4e3, [1, 3]), mixture_M - 4e3, rtol=1e-13)


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("of_reference", [1, 5])
def test_draws_of_the_reference_and_another_show_the_references_law(vector, of_reference):
    """The reference shows its law `of_reference` times over, another policy a law of its own once: in all they are
    draws of the mixture, and its weights undo it, whoever drew which."""
    times_K = COUNT_K * np.where(K % 2, 5, 2)
    count_K = np.array([of_reference * COUNT_K.sum(), times_K.sum()])
    drawn_M = np.concatenate([np.repeat(K, of_reference * COUNT_K), np.repeat(K, times_K)])
    logprob_KM = np.log([REFERENCE_K, times_K / times_K.sum()])[:, drawn_M]
    share_M = importance.shares_of_reference(logprob_KM[0], importance.mixture_logprob(logprob_KM, count_K))
    reward_M = REWARDS[vector][drawn_M]
    weight_K = np.bincount(drawn_M, weights=importance.best_of_n_weights_of_shares(reward_M, share_M, 4))
    np.testing.assert_allclose(weight_K, order.best_of_n_law(REFERENCE_K, REWARDS[vector], 4), rtol=1e-10)
    assert share_M.max() <= 1 / count_K[0] + 1e-12  # no more than a draw of the reference alone


def test_quantiles_among_the_other_draws_by_hand():
    # shares ½ ¼ ¼ of rewards 1, 2, 2. Of the first: the others are two alike (E = 2), none below: (0, 1/3].
    # Of a 2: others ½ below, ¼ tied, of ¾; E = (3/4)²/(1/4 + 1/16) = 9/5: from E·⅔/(E + 1) = 1.2/2.8 upwards.
    level_M2 = importance.levels_of_shares([1.0, 2.0, 2.0], [1 / 2, 1 / 4, 1 / 4])
    np.testing.assert_allclose(level_M2, [[0.0, 1 / 3], [1.2 / 2.8, 1.0], [1.2 / 2.8, 1.0]], rtol=1e-13)
    # one draw stands for everything: of its own place nothing is known, the other's is a guess from one draw
    lone_M2 = importance.levels_of_shares([2.0, 1.0], [1.0, 0.0])
    np.testing.assert_allclose(lone_M2, [[0.0, 1.0], [0.0, 1 / 2]], rtol=1e-13)


@given(draws_and_log_weights, st.integers(1, 20))
@relaxed
def test_at_equal_shares_levels_tilt_as_the_counted_ones(draws, n):
    reward_M, num_draws = draws[0], len(draws[0])
    if num_draws > 1:
        level_M2 = importance.levels_of_shares(reward_M, np.full(num_draws, 1 / num_draws))
        counted = quantiles.log_tilt_levels(quantiles.standing_among_others(torch.from_numpy(reward_M)[None]), n)
        tilt_M = order.log_tilt_of_level(level_M2[:, 0], level_M2[:, 1], n)
        np.testing.assert_allclose(tilt_M, counted[0].numpy(), atol=1e-9)


@pytest.mark.parametrize("vector", REWARDS)
def test_levels_of_many_draws_are_the_references(vector):
    reward_K = REWARDS[vector]
    reward_M, share_M, drawn_M = drawn_in_full(reward_K)
    below_K, at_most_K = (reward_K[:, None] > reward_K) @ REFERENCE_K, (reward_K[:, None] >= reward_K) @ REFERENCE_K
    level_M2 = importance.levels_of_shares(reward_M, share_M)
    np.testing.assert_allclose(level_M2, np.stack([below_K, at_most_K])[:, drawn_M].T, atol=3 / len(drawn_M))


@pytest.mark.parametrize(("vector", "win_rate"), [("T", 0.782455), ("B", 0.732969)])
def test_a_regressions_targets_win_what_best_of_four_wins_with_ties(vector, win_rate):
    """The table of algorithms.md, TV1. From the middles of the levels alone best-of-4 of the binary reward would win
    .778."""
    reward_K = REWARDS[vector]
    reward_M, share_M, drawn_M = drawn_in_full(reward_K)
    tokens = TokenGroup([0], [[k] for k in drawn_M])
    rewards, shares = reward_M.tolist(), share_M.tolist()
    levels = [(low, high) for low, high in importance.levels_of_shares(rewards, shares)]
    step = make_step(BonRegressionSpec(n=4, candidates_per_prompt=len(drawn_M)))
    assert isinstance(step, LoggedStep)
    chosen = step.choose(LoggedGroup(tokens, rewards, [0.0] * len(drawn_M), levels=levels, shares=shares), 0.5)
    law_M = share_M * np.exp(chosen.verdicts)
    beats_M = ((reward_M[:, None] > reward_K) + (reward_M[:, None] == reward_K) / 2) @ REFERENCE_K
    assert law_M @ beats_M / law_M.sum() == pytest.approx(win_rate, abs=2e-3)


def test_the_tilt_of_a_level_by_hand():
    """(1 − ½⁴)/½ = 15/8; (½⁴ − ¼⁴)/¼ = 15/64; no breadth: 4·½³; the whole law: 1."""
    tilt_K = order.log_tilt_of_level([0.5, 0.25, 0.5, 0], [1, 0.5, 0.5, 1], 4)
    np.testing.assert_allclose(np.exp(tilt_K), [15 / 8, 15 / 64, 1 / 2, 1], rtol=1e-13)
    for lower, upper in (([0.5], [0.4]), ([0], [0]), ([-0.1], [0.5]), ([0.5], [1.1]), ([0.1, 0.1], [0.2])):
        with pytest.raises(ValueError, match=r"within \[0, 1\]"):
            order.log_tilt_of_level(lower, upper, 4)


# --- refusals --------------------------------------------------------------------------------------------


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="each draw"):
        importance.shares_of_reference([0.0, 0.0], [0.0])
    with pytest.raises(ValueError, match="one prompt"):
        importance.levels_of_shares([[0.0, 1.0]], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"\(K, M\)"):
        importance.mixture_logprob([0.0, 0.0], [2])


@pytest.mark.parametrize("max_importance", [0.5, float("nan")])
def test_a_cap_below_one_is_refused(max_importance):
    with pytest.raises(ValueError, match="at least 1"):
        importance.shares_of_reference([0.0], [0.0], max_importance=max_importance)


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        importance.shares_of_reference([-inf], [0.0])
    with pytest.raises(ValueError, match="finite"):
        importance.mixture_logprob([[-inf]], [1])
    with pytest.raises(ValueError, match="3 draws counted, 2 given"):
        importance.mixture_logprob([[0.0, 0.0]], [3])
    with pytest.raises(ValueError, match="no others"):
        importance.levels_of_shares([0.0], [1.0])
    with pytest.raises(ValueError, match="nor all 0"):
        importance.effective_sample_size([0.0, 0.0])


@pytest.mark.parametrize("share_M", [[0.5, 0.4], [1.5, -0.5]])
def test_shares_that_are_no_law_are_refused(share_M):
    with pytest.raises(ValueError, match="sum to 1"):
        importance.best_of_n_weights_of_shares([0.0, 1.0], share_M, 1)


@pytest.mark.parametrize("n", [0, 3])
def test_best_of_more_than_was_drawn_is_refused(n):
    with pytest.raises(ValueError, match="≤ 2 draws"):
        importance.best_of_n_weights_of_shares([0.0, 1.0], [0.5, 0.5], n)
