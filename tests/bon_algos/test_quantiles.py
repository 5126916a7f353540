"""Estimators of a log-quantile: what each is on average, exactly, and what none of them may do."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, multinomial

from bon_algos import order, quantiles
from bon_algos.contracts import CountedQuantiles
from bon_algos.quantiles import Standing, standing_against, standing_among_others
from tests.bon_algos.vectors import (
    REFERENCE_K,
    REWARDS,
    kl,
    per_outcome,
    the_law_as_draws,
    win_rate_against_reference,
)

relaxed = settings(deadline=None, max_examples=60)
ESTIMATORS = [
    quantiles.log_quantile_monte_carlo,
    quantiles.log_quantile_mid_rank,
    quantiles.log_quantile_add_one,
    quantiles.log_quantile_harmonic,
    quantiles.log_quantile_harmonic_mid,
]
TILTS = [quantiles.log_tilt_harmonic, quantiles.log_tilt_levels, quantiles.log_tilt_tie_aware]


def harmonic(m: int) -> float:
    return sum(1 / k for k in range(1, m + 1))


def every_standing(num_reference: int) -> Standing:
    """All (below, tied) that M reference rewards allow, as one row."""
    cells = [(s, t) for s in range(num_reference + 1) for t in range(num_reference + 1 - s)]
    below, tied = torch.tensor(cells).T
    return Standing(below[None], tied[None], num_reference)


def untied(num_reference: int) -> Standing:
    below = torch.arange(num_reference + 1)[None]
    return Standing(below, torch.zeros_like(below), num_reference)


def mean_over_draws(estimate_of_standing, num_reference, reward_K) -> NDArray[np.float64]:
    """E of an estimate for each of the 20 outcomes, M reference draws enumerated as (below, tied). (20,)."""
    standing = every_standing(num_reference)
    estimate = estimate_of_standing(standing)[0].numpy()
    below, tied = standing.below[0].numpy(), standing.tied[0].numpy()
    counts = np.stack([below, tied, num_reference - below - tied], axis=-1)
    mean_K = np.empty(20)
    for k in range(20):
        lower, level = REFERENCE_K[reward_K < reward_K[k]].sum(), REFERENCE_K[reward_K == reward_K[k]].sum()
        law = multinomial.pmf(counts, num_reference, [lower, level, max(1 - lower - level, 0)])
        mean_K[k] = np.nan_to_num(law) @ estimate
    return mean_K


# --- counting --------------------------------------------------------------------------------------------


def test_standing_by_hand():
    # against 1, 2, 2, 3 (any order):  0 → nothing;  2 → one below, two tied;  9 → four below
    standing = standing_against(torch.tensor([[0.0, 2.0, 9.0]]), torch.tensor([[2.0, 3.0, 1.0, 2.0]]))
    assert standing.below.tolist() == [[0, 1, 4]]
    assert standing.tied.tolist() == [[0, 2, 0]]
    assert standing.num_reference == 4


def test_a_candidate_does_not_stand_among_itself():
    # 5, 7, 5: each 5 has no other below and one other tied; 7 has two below
    standing = standing_among_others(torch.tensor([[5.0, 7.0, 5.0]]))
    assert standing.below.tolist() == [[0, 2, 0]]
    assert standing.tied.tolist() == [[1, 0, 1]]
    assert standing.num_reference == 2


@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=3))
@relaxed
def test_leaving_out_is_standing_against_the_others(rows):
    reward_BN = torch.tensor(rows, dtype=torch.float64)
    standing = standing_among_others(reward_BN)
    for j in range(4):
        others = torch.cat((reward_BN[:, :j], reward_BN[:, j + 1 :]), dim=1)
        alone = standing_against(reward_BN[:, j : j + 1], others)
        assert torch.equal(standing.below[:, j : j + 1], alone.below)
        assert torch.equal(standing.tied[:, j : j + 1], alone.tied)


@pytest.mark.parametrize(("reward", "reference"), [((2, 3), (3, 4)), ((3,), (3, 4))])
def test_shapes_that_would_broadcast_are_refused(reward, reference):
    with pytest.raises(ValueError, match=r"\(B, N\) and \(B, M\)"):
        standing_against(torch.zeros(reward), torch.zeros(reference))


def test_a_reward_that_is_no_number_has_no_standing():
    with pytest.raises(ValueError, match="finite"):
        standing_against(torch.tensor([[float("nan")]]), torch.tensor([[1.0]]))


def test_a_single_candidate_has_no_others():
    with pytest.raises(ValueError, match="others"):
        standing_among_others(torch.tensor([[1.0]]))


# --- what each estimator is on average -------------------------------------------------------------------


def test_estimators_by_hand():
    # s = 1 below, T = 2 tied, M = 4
    standing = Standing(torch.tensor([[1]]), torch.tensor([[2]]), 4)
    expected = {
        quantiles.log_quantile_monte_carlo: np.log(3 / 4),
        quantiles.log_quantile_mid_rank: np.log(2 / 4),
        quantiles.log_quantile_add_one: np.log(2 / 5),
        quantiles.log_quantile_harmonic: harmonic(3) - harmonic(4),
        # ¼·H₁ + ½·H₂ + ¼·H₃ − H₄
        quantiles.log_quantile_harmonic_mid: (1 + 2 * 1.5 + 11 / 6) / 4 - harmonic(4),
    }
    for estimator, value in expected.items():
        assert estimator(standing).item() == pytest.approx(value, abs=1e-15)


BY_NAME = {
    "harmonic_mid": quantiles.log_quantile_harmonic_mid,
    "harmonic": quantiles.log_quantile_harmonic,
    "monte_carlo": quantiles.log_quantile_monte_carlo,
    "mid_rank": quantiles.log_quantile_mid_rank,
    "add_one": quantiles.log_quantile_add_one,
}


@pytest.mark.parametrize("name", get_args(CountedQuantiles))
def test_an_estimator_that_is_asked_for_by_name_is_finite(name):
    """It is the function of that name, but for −∞: with 4 rewards half a draw is 1/8."""
    reward_BN, reference_BM = torch.tensor([[-1.0, 0.0, 1.0, 9.0]]), torch.tensor([[0.0, 1.0, 1.0, 2.0]])
    standing = standing_against(reward_BN, reference_BM)
    plain, asked = BY_NAME[name](standing), quantiles.log_quantile_by(name, standing)
    torch.testing.assert_close(asked, plain.nan_to_num(neginf=np.log(1 / 8)), rtol=0, atol=1e-15)
    assert quantiles.log_tilt_by(name, standing, 2).isfinite().all()


@pytest.mark.parametrize("name", sorted(set(get_args(CountedQuantiles)) - {"harmonic_mid"}))
def test_the_tilt_of_a_log_quantile_is_its_multiple(name):
    standing = standing_against(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0, 2.0]]))
    expected = np.log(5) + 4 * quantiles.log_quantile_by(name, standing)
    torch.testing.assert_close(quantiles.log_tilt_by(name, standing, 5), expected)


@pytest.mark.parametrize("n", [2, 5])
def test_the_tilt_by_the_tie_aware_harmonic_numbers_knows_how_broad_a_level_is(n):
    standing = standing_against(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0, 2.0]]))
    expected = quantiles.log_tilt_tie_aware(standing, n)
    torch.testing.assert_close(quantiles.log_tilt_by("harmonic_mid", standing, n), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("num_reference", "p"), [(2, 0.1), (5, 0.6), (16, 0.1), (16, 0.5), (64, 0.03)])
def test_harmonic_means_the_series_of_the_logarithm(num_reference, p):
    """E[H_s − H_M] over s ~ Binomial(M, p) is −Σ_{k≤M} (1 − p)^k/k, the M-term series of log p."""
    value = quantiles.log_quantile_harmonic(untied(num_reference))[0].numpy()
    series = -sum((1 - p) ** k / k for k in range(1, num_reference + 1))
    assert binom.pmf(range(num_reference + 1), num_reference, p) @ value == pytest.approx(series, abs=1e-12)


@pytest.mark.parametrize(
    ("num_reference", "p", "mean"), [(2, 0.1, -1.305), (5, 0.6, -0.5097813), (16, 0.1, -2.2320125)]
)
def test_published_means_of_the_harmonic_estimator(num_reference, p, mean):
    value = quantiles.log_quantile_harmonic(untied(num_reference))[0].numpy()
    law = binom.pmf(range(num_reference + 1), num_reference, p)
    assert law @ value == pytest.approx(mean, abs=6e-8)


@pytest.mark.parametrize(
    ("p", "add_one", "harmonic_mean"),
    [(0.05, -2.3543, -2.7100), (0.25, -1.2921, -1.3848), (0.5, -0.6628, -0.6931)],
)
def test_add_one_is_biased_where_harmonic_is_not(p, add_one, harmonic_mean):
    """16 reference rewards; log p = −2.9957, −1.3863, −.6931. Strictly below ~ Binomial without ties."""
    law = binom.pmf(range(17), 16, p)
    assert law @ quantiles.log_quantile_add_one(untied(16))[0].numpy() == pytest.approx(add_one, abs=6e-5)
    assert law @ quantiles.log_quantile_harmonic(untied(16))[0].numpy() == pytest.approx(harmonic_mean, abs=6e-5)


def test_tie_aware_harmonic_means_the_series_of_the_mid_rank():
    """P(below) = .2, P(tied) = .3, M = 8: the 8-term series of log .35 is −1.0441801."""
    standing = every_standing(8)
    below, tied = standing.below[0].numpy(), standing.tied[0].numpy()
    law = multinomial.pmf(np.stack([below, tied, 8 - below - tied], axis=-1), 8, [0.2, 0.3, 0.5])
    mean = law @ quantiles.log_quantile_harmonic_mid(standing)[0].numpy()
    assert mean == pytest.approx(-sum(0.65**k / k for k in range(1, 9)), abs=1e-12)
    assert mean == pytest.approx(-1.0441801, abs=6e-8)


def test_tie_aware_harmonic_is_exact_with_4096_ties():
    # all tied: E H_Bin(M, ½) − H_M is minus the M-term series at ½, i.e. −log 2
    standing = Standing(torch.tensor([[0]]), torch.tensor([[4096]]), 4096)
    assert quantiles.log_quantile_harmonic_mid(standing).item() == pytest.approx(-np.log(2), abs=1e-12)


@given(st.integers(1, 40), st.data())
@relaxed
def test_estimators_stay_in_range_and_never_break_the_order(num_reference, data):
    below = data.draw(st.integers(0, num_reference))
    tied = data.draw(st.integers(0, num_reference - below))
    standing = Standing(torch.tensor([[below]]), torch.tensor([[tied]]), num_reference)
    one_higher = Standing(standing.below + 1, standing.tied, num_reference)
    for estimator in ESTIMATORS:
        value = estimator(standing).item()
        assert value <= 1e-12
        if below + tied < num_reference:
            assert estimator(one_higher).item() > value or value == -np.inf
    assert quantiles.log_quantile_add_one(standing).item() >= -np.log(num_reference + 1) - 1e-12
    for estimator in (quantiles.log_quantile_harmonic, quantiles.log_quantile_harmonic_mid):
        assert estimator(standing).item() >= -harmonic(num_reference) - 1e-12
    low, high = (
        quantiles.log_quantile_harmonic(Standing(standing.below + t, standing.tied * 0, num_reference)).item()
        for t in (0, tied)
    )
    assert low - 1e-12 <= quantiles.log_quantile_harmonic_mid(standing).item() <= high + 1e-12


def test_two_reference_rewards_give_finite_estimates():
    """J11: no infinity at M = 2; harmonic values are −1.5, −.5 and 0."""
    assert quantiles.log_quantile_harmonic(untied(2))[0].tolist() == pytest.approx([-1.5, -0.5, 0])
    for tilt in TILTS:
        assert torch.isfinite(tilt(every_standing(2), 16)).all()


# --- log π_BoN/π_ref -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_levels_are_the_exact_tilt_when_the_draws_are_the_law(vector, n):
    """210 draws whose shares are the reference: leaving y out and counting it once gives U and L exactly."""
    standing = standing_among_others(the_law_as_draws(REWARDS[vector]))
    tilt_K = per_outcome(quantiles.log_tilt_levels(standing, n))
    law_K = order.best_of_n_law(REFERENCE_K, REWARDS[vector], n)
    np.testing.assert_allclose(REFERENCE_K * np.exp(tilt_K), law_K, rtol=1e-11)


APPROXIMATIONS = [  # vector, n, KL(BoN ‖ normalised reference · n p^(n−1)) for p = p_≤ and p = p_mid
    ("U", 2, 0.002147, 0.0),
    ("U", 4, 0.001823, 0.000011),
    ("U", 8, 0.004935, 0.000037),
    ("T", 2, 0.007056, 0.0),
    ("T", 4, 0.004909, 0.000331),
    ("T", 8, 0.002047, 0.000450),
]


@pytest.mark.parametrize(("vector", "n", "at_most", "mid_rank"), APPROXIMATIONS)
def test_mid_rank_is_exact_for_two_and_close_above(vector, n, at_most, mid_rank):
    draws = the_law_as_draws(REWARDS[vector])
    standing = standing_against(draws, draws)
    law_K = order.best_of_n_law(REFERENCE_K, REWARDS[vector], n)
    for estimator, expected in [
        (quantiles.log_quantile_monte_carlo, at_most),
        (quantiles.log_quantile_mid_rank, mid_rank),
    ]:
        tilted_K = REFERENCE_K * np.exp((n - 1) * per_outcome(estimator(standing)))
        assert kl(law_K, tilted_K / tilted_K.sum()) == pytest.approx(expected, abs=6e-7)


@given(st.integers(1, 30), st.integers(1, 20))
@relaxed
def test_tilts_stay_below_log_n_and_vanish_at_one(num_reference, n):
    standing = every_standing(num_reference)
    for tilt in TILTS:
        value = tilt(standing, n)
        assert torch.isfinite(value).all()
        assert value.max() <= np.log(n) + 1e-9
        torch.testing.assert_close(tilt(standing, 1), torch.zeros_like(value), atol=1e-9, rtol=0)
    least = quantiles.log_tilt_levels(standing, n).min().item()
    assert least == pytest.approx(-(n - 1) * np.log(num_reference + 1), abs=1e-9)


def test_levels_by_hand():
    # s = 1, T = 1, M = 3:  L = 1/4, U = 3/4;  n = 3:  (27 − 1)/64 : 1/2 = 13/16
    standing = Standing(torch.tensor([[1]]), torch.tensor([[1]]), 3)
    assert quantiles.log_tilt_levels(standing, 3).item() == pytest.approx(np.log(13 / 16))


def test_tie_aware_takes_levels_only_where_they_are_needed():
    standing = every_standing(5)
    for n in (2, 4):
        expected = torch.where(
            (standing.tied > 0) & (n > 2),
            quantiles.log_tilt_levels(standing, n),
            quantiles.log_tilt_harmonic(standing, n),
        )
        assert torch.equal(quantiles.log_tilt_tie_aware(standing, n), expected)


MEAN_TILTS = [  # vector, n, M, KL(BoN ‖ tilt by the harmonic estimate's mean) and its last digit, win rate
    ("U", 4, 8, 0.00025, 1e-5, 0.7975),
    ("U", 4, 16, 0.00001, 1e-5, 0.7985),
    ("U", 4, 64, 0.00001, 1e-5, 0.7986),
    ("T", 2, 8, 0.0016, 1e-4, None),
    ("T", 2, 16, 0.0001, 1e-4, None),
    ("B", 2, 8, 0.00001, 1e-5, None),
    ("U", 2, 2, 0.0317, 1e-4, 0.616),
]


@pytest.mark.parametrize(("vector", "n", "num_reference", "divergence", "digit", "win"), MEAN_TILTS)
def test_the_policy_that_a_noisy_target_leads_to(vector, n, num_reference, divergence, digit, win):
    """A regression converges to its target's mean; this is the best-of-n policy that mean describes."""
    reward_K = REWARDS[vector]
    mean_K = mean_over_draws(lambda standing: quantiles.log_tilt_harmonic(standing, n), num_reference, reward_K)
    tilted_K = REFERENCE_K * np.exp(mean_K)
    tilted_K /= tilted_K.sum()
    law_K = order.best_of_n_law(REFERENCE_K, reward_K, n)
    assert kl(law_K, tilted_K) == pytest.approx(divergence, abs=0.6 * digit)
    if win is not None:
        assert win_rate_against_reference(tilted_K, reward_K) == pytest.approx(win, abs=6e-4)


@pytest.mark.parametrize(("vector", "n", "normaliser"), [("U", 4, 0.998), ("T", 4, 0.975), ("B", 2, 1.000)])
def test_the_harmonic_target_is_nearly_normalised(vector, n, normaliser):
    mean_K = mean_over_draws(lambda standing: quantiles.log_tilt_harmonic(standing, n), 16, REWARDS[vector])
    assert REFERENCE_K @ np.exp(mean_K) == pytest.approx(normaliser, abs=6e-4)


def test_a_binary_reward_needs_the_tie_aware_target_at_n_4():
    """Best-of-4 wins .733 at .459 nats; harmonic mid-rank with unlimited draws would win .778 at .673."""
    draws = the_law_as_draws(REWARDS["B"])
    for log_tilt, win, nats in [
        ((4 - 1) * quantiles.log_quantile_mid_rank(standing_against(draws, draws)), 0.778, 0.673),
        (quantiles.log_tilt_tie_aware(standing_among_others(draws), 4), 0.733, 0.459),
    ]:
        tilted_K = REFERENCE_K * np.exp(per_outcome(log_tilt))
        tilted_K /= tilted_K.sum()
        assert win_rate_against_reference(tilted_K, REWARDS["B"]) == pytest.approx(win, abs=6e-4)
        assert kl(tilted_K, REFERENCE_K) == pytest.approx(nats, abs=6e-4)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12))
@relaxed
def test_only_the_order_of_rewards_counts(rewards):
    reward_BN = torch.tensor([rewards], dtype=torch.float64)
    for transform in (torch.exp, lambda reward: reward**3, lambda reward: 7 - torch.exp(-reward)):
        for tilt in TILTS:
            original = tilt(standing_among_others(reward_BN), 4)
            assert torch.equal(tilt(standing_among_others(transform(reward_BN)), 4), original)
