"""vBoN: what its likelihoods are probabilities of, which divergence it descends and where each form ends."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bon_algos import order, quantiles
from bon_algos.policy_gradient import kl_regularised_return, reinforce_loss
from bon_algos.quantiles import standing_against, standing_among_others
from bon_algos.vbon import log_tilt_exact, log_tilt_lower_bound, variational_return
from tests.bon_algos.tabular import central_differences, divergence, gradient
from tests.bon_algos.vectors import REFERENCE_K, REWARDS, per_outcome, the_law_as_draws

relaxed = settings(deadline=None, max_examples=60)
REFERENCE = torch.tensor(REFERENCE_K)
POLICY_LOGIT = 0.3 * torch.cos(1.7 * torch.arange(20).double())


def true_log_quantiles(vector: str) -> dict[str, Tensor]:
    """From 210 draws that are the reference's law: of the true shares, and two estimates of them. (20,) each."""
    draws = the_law_as_draws(REWARDS[vector])
    standing = standing_against(draws, draws)
    estimates = {
        "strict": quantiles.log_quantile_monte_carlo(standing._replace(tied=torch.zeros_like(standing.tied))),
        "mid": quantiles.log_quantile_mid_rank(standing),
        "at most": quantiles.log_quantile_monte_carlo(standing),
        "add-one": quantiles.log_quantile_add_one(standing),
        "harmonic": quantiles.log_quantile_harmonic_mid(standing),
    }
    return {name: torch.tensor(per_outcome(estimate)) for name, estimate in estimates.items()}


def exact_tilt(vector: str, n: int) -> Tensor:
    return log_tilt_exact(true_log_quantiles(vector)["strict"][None], REFERENCE.log()[None], n)[0]


def bound(log_quantile_K: Tensor, n: int) -> Tensor:
    return log_tilt_lower_bound(log_quantile_K[None], n)[0]


def every_draw(vector: str, n: int) -> dict[str, Tensor]:
    """P(this outcome is the first highest of n draws, and more), over all 20ⁿ ordered draws. (20,) each."""
    drawn = np.array(list(product(range(20), repeat=n)))
    probability, reward = REFERENCE_K[drawn].prod(axis=1), REWARDS[vector][drawn]
    is_top = reward == reward.max(axis=1, keepdims=True)
    winner = drawn[np.arange(len(drawn)), is_top.argmax(axis=1)]
    events = {
        "wins": np.ones(len(drawn), dtype=bool),
        "wins and nothing else ties with it": (~is_top | (drawn == winner[:, None])).all(axis=1),
        "wins and was drawn once": is_top.sum(axis=1) == 1,
    }
    return {
        name: torch.tensor(np.bincount(winner, weights=probability * event, minlength=20))
        for name, event in events.items()
    }


def returns(tilt_K: Tensor, law_K: Tensor, reference_K: Tensor = REFERENCE) -> Tensor:
    """What each outcome earns under a policy. (K,)."""
    return variational_return(tilt_K[None], law_K.log()[None], reference_K.log()[None])[0]


def expected_gradient(logit_K: Tensor, tilt_K: Tensor, reference_K: Tensor = REFERENCE) -> Tensor:
    """Of the surrogate without baseline, averaged over every sample of the policy. (K,)."""
    logit_K = logit_K.detach().requires_grad_()
    logprob_K = logit_K.log_softmax(-1)
    return_K = returns(tilt_K, logprob_K.exp(), reference_K)
    loss_K = reinforce_loss(logprob_K[:, None], return_K[:, None])
    return gradient(logprob_K.exp().detach() @ loss_K, logit_K)


def optimum(tilt_K: Tensor, reference_K: Tensor = REFERENCE) -> Tensor:
    """Where descent along the expected gradient ends; by its natural form, which halves the distance every time."""
    logit_K = reference_K.log()
    for _ in range(60):
        logit_K = logit_K - 0.5 * expected_gradient(logit_K, tilt_K, reference_K) / logit_K.softmax(-1)
    return logit_K.softmax(-1)


# --- the likelihoods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_both_forms_are_probabilities_of_events_among_n_draws(vector, n):
    """Exact: y is the only outcome at the top. Its term i = 1: y is alone at the top, drawn once."""
    events = every_draw(vector, n)
    exact_K = REFERENCE * exact_tilt(vector, n).exp()
    once_K = REFERENCE * bound(true_log_quantiles(vector)["strict"], n).exp()
    torch.testing.assert_close(exact_K, events["wins and nothing else ties with it"], atol=1e-14, rtol=1e-11)
    torch.testing.assert_close(once_K, events["wins and was drawn once"], atol=1e-14, rtol=1e-11)


MASS = [  # vector, n, what the binomial form sums to
    *[("U", n, 1.0) for n in (2, 4, 8, 16)],
    *[("T", n, mass) for n, mass in [(2, 0.857823), (4, 0.700702), (8, 0.418547), (16, 0.114798)]],
    *[("B", n, mass) for n, mass in [(2, 0.499592), (4, 0.469875), (8, 0.252119), (16, 0.038712)]],
]


@pytest.mark.parametrize(("vector", "n", "mass"), MASS)
def test_the_exact_form_loses_mass_where_outcomes_tie(vector, n, mass):
    assert (REFERENCE @ exact_tilt(vector, n).exp()).item() == pytest.approx(mass, abs=6e-7 if mass < 1 else 1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 64])
def test_the_exact_form_is_best_of_n_of_a_total_order(n):
    law_K = torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS["U"], n))
    torch.testing.assert_close(REFERENCE * exact_tilt("U", n).exp(), law_K, atol=0, rtol=1e-10)


@given(st.integers(1, 64), st.integers(1, 10**6), st.data())
@relaxed
def test_the_exact_form_is_the_binomial_sum_and_never_below_its_bound(n, total, data):
    """Against whole-number arithmetic: F = b/total, π_ref = a/total, a + b at most total."""
    own = data.draw(st.integers(1, total))
    below = data.draw(st.integers(0, total - own))
    p, strict = Fraction(own, total), Fraction(below, total)
    likelihood = sum(math.comb(n, i) * strict ** (n - i) * p**i for i in range(1, n + 1)) / p
    log_quantile = torch.tensor([[float(strict)]], dtype=torch.float64).log()
    logprob = torch.tensor([[own / total]], dtype=torch.float64).log()
    exact = log_tilt_exact(log_quantile, logprob, n).item()
    assert exact == pytest.approx(
        math.log(likelihood.numerator) - math.log(likelihood.denominator), rel=1e-11, abs=1e-9
    )
    at_most = torch.tensor([[(own + below) / total]], dtype=torch.float64).log()
    mid_rank = torch.tensor([[(own / 2 + below) / total]], dtype=torch.float64).log()
    least, nearer, most = (log_tilt_lower_bound(each, n).item() for each in (log_quantile, mid_rank, at_most))
    assert least <= nearer + 1e-9 <= exact + 2e-9 <= most + 3e-9
    if n <= 2:
        assert nearer == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_mid_rank_bounds_best_of_n_with_ties_too(vector, n):
    law_K = torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS[vector], n))
    log_ratio_K, log_quantiles = (law_K / REFERENCE).log(), true_log_quantiles(vector)
    assert (bound(log_quantiles["strict"], n) <= log_ratio_K + 1e-10).all()
    assert (bound(log_quantiles["mid"], n) <= log_ratio_K + 1e-10).all()
    assert (bound(log_quantiles["at most"], n) >= log_ratio_K - 1e-10).all()


def test_a_long_completion_leaves_nothing_but_the_bound():
    """log π_ref = −200, n = 64. With F = ½ the term i = 2 is 63/2 · π_ref/F of the first; with F = 0 only i = n is
    left: π_refⁿ/π_ref, log −200 · 63."""
    log_quantile = torch.tensor([[math.log(0.5), -math.inf]], dtype=torch.float64)
    exact = log_tilt_exact(log_quantile, torch.full((1, 2), -200.0), 64)[0].tolist()
    least = log_tilt_lower_bound(log_quantile, 64)[0].tolist()
    assert exact[0] == pytest.approx(math.log(64) + 63 * math.log(0.5), abs=1e-12)
    assert least == pytest.approx([exact[0], -math.inf], abs=1e-12)
    assert exact[1] == pytest.approx(-200 * 63, abs=1e-9)


def test_forms_by_hand():
    # n = 3, F = 1/2, π_ref = 1/4:  3·F² = 3/4;  3·F² + 3·F·π_ref + π_ref² = 12/16 + 6/16 + 1/16 = 19/16
    log_quantile, logprob = torch.tensor([[0.5]]).double().log(), torch.tensor([[0.25]]).double().log()
    assert log_tilt_lower_bound(log_quantile, 3).item() == pytest.approx(math.log(3 / 4))
    assert log_tilt_exact(log_quantile, logprob, 3).item() == pytest.approx(math.log(19 / 16))


def test_best_of_one_is_the_reference():
    log_quantile, logprob = torch.tensor([[-math.inf, -0.7, 0.0]]), torch.tensor([[-3.0, -200.0, 0.0]])
    assert log_tilt_lower_bound(log_quantile, 1).tolist() == [[0, 0, 0]]
    assert log_tilt_exact(log_quantile, logprob, 1).tolist() == [[0, 0, 0]]


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12), st.integers(1, 16))
@relaxed
def test_only_the_order_of_rewards_counts(rewards, n):
    reward_BN = torch.tensor([rewards], dtype=torch.float64)
    logprob_BN = -torch.arange(1.0, len(rewards) + 1)[None]

    def tilts(reward_BN: Tensor) -> Tensor:
        standing = standing_among_others(reward_BN)
        by = [quantiles.log_quantile_add_one(standing), quantiles.log_quantile_mid_rank(standing)]
        return torch.cat([log_tilt_lower_bound(q, n) for q in by] + [log_tilt_exact(q, logprob_BN, n) for q in by])

    for transform in (torch.exp, lambda reward: reward**3):
        assert torch.equal(tilts(transform(reward_BN)), tilts(reward_BN))


# --- the objective ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vector", "n", "over", "under"), [("U", 4, 0.13, -0.0025), ("T", 4, 0.40, -0.025)])
def test_what_each_quantile_makes_of_best_of_n_itself(vector, n, over, under):
    """At π = π_BoN the objective is −KL(π_BoN ‖ π_BoN) = 0; it is log n + L that is a bound."""
    law_K, log_quantiles = (
        torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS[vector], n)),
        true_log_quantiles(vector),
    )
    value = {name: (law_K @ returns(bound(log_quantiles[name], n), law_K)).item() for name in ("mid", "at most")}
    assert value["at most"] == pytest.approx(over, abs=0.005)
    assert value["mid"] == pytest.approx(under, abs=5e-4 if vector == "T" else 5e-5)
    if vector == "U":
        assert (law_K @ returns(exact_tilt(vector, n), law_K)).item() == pytest.approx(0, abs=1e-13)
    with pytest.raises(ValueError, match="finite"):
        returns(bound(log_quantiles["strict"], n), law_K)


@pytest.mark.parametrize(
    ("n", "backward", "components"),
    [(2, 0.55862275, [0.180645, -0.006562, -0.049114]), (4, 1.75511820, [0.242948, -0.009304, -0.076053])],
)
def test_with_the_exact_form_it_descends_the_divergence_to_best_of_n(n, backward, components):
    law_K, tilt_K, policy_K = (
        torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS["U"], n)),
        exact_tilt("U", n),
        POLICY_LOGIT.softmax(-1),
    )
    assert -(policy_K @ returns(tilt_K, policy_K)).item() == pytest.approx(backward, abs=6e-9)
    expected_K = central_differences(lambda x: divergence(x.softmax(-1), law_K), POLICY_LOGIT)
    actual_K = expected_gradient(POLICY_LOGIT, tilt_K)
    torch.testing.assert_close(actual_K, expected_K, atol=1e-9, rtol=0)
    assert actual_K[:3].tolist() == pytest.approx(components, abs=6e-7)


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("estimator", ["mid", "at most", "add-one", "harmonic"])
@pytest.mark.parametrize("n", [2, 4])
def test_with_the_bound_it_ascends_l(vector, estimator, n):
    """(n − 1)·E_π[log F] − KL(π ‖ π_ref), whichever finite log-quantile F is."""
    log_quantile_K = true_log_quantiles(vector)[estimator]

    def objective(x: Tensor) -> Tensor:
        policy_K = x.softmax(-1)
        value: Tensor = (n - 1) * policy_K @ log_quantile_K - divergence(policy_K, REFERENCE)
        return value

    actual_K = expected_gradient(POLICY_LOGIT, bound(log_quantile_K, n))
    torch.testing.assert_close(actual_K, -central_differences(objective, POLICY_LOGIT), atol=1e-9, rtol=0)
    policy_K = POLICY_LOGIT.softmax(-1)
    value = policy_K @ returns(bound(log_quantile_K, n), policy_K)
    assert value.item() == pytest.approx(objective(POLICY_LOGIT).item() + math.log(n))


def test_it_is_rl_with_the_log_quantile_as_reward_and_beta_one_over_n_less_one():
    n, log_quantile_K, policy_K = 5, true_log_quantiles("T")["mid"], POLICY_LOGIT.softmax(-1)
    rl = kl_regularised_return(
        log_quantile_K[None], policy_K.log()[None], REFERENCE.log()[None], kl_strength=1 / (n - 1)
    )[0]
    torch.testing.assert_close(returns(bound(log_quantile_K, n), policy_K), (n - 1) * rl + math.log(n))


# --- where it ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_exact_form_ends_at_best_of_n(n):
    law_K = torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS["U"], n))
    torch.testing.assert_close(optimum(exact_tilt("U", n)), law_K, atol=1e-12, rtol=0)


@pytest.mark.parametrize("vector", REWARDS)
def test_mid_rank_ends_at_best_of_two_whatever_ties(vector):
    law_K = torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS[vector], 2))
    torch.testing.assert_close(optimum(bound(true_log_quantiles(vector)["mid"], 2)), law_K, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_bound_ends_at_best_of_n_given_that_the_winner_was_drawn_once(n):
    """Where F = 0 no policy may be: the worst outcome is left away. π_ref·n·F^{n−1} sums to P(drawn once) = Z, the
    best L + log n is log Z, and the gap to best-of-n is the one between two laws of all 20ⁿ draws."""
    tilt_K, events = bound(true_log_quantiles("U")["strict"], n), every_draw("U", n)
    can_win = tilt_K.isfinite()
    assert int(can_win.sum()) == 19
    policy_K = optimum(tilt_K[can_win], REFERENCE[can_win])
    once_K, best_K = events["wins and was drawn once"][can_win], events["wins"][can_win]
    torch.testing.assert_close(policy_K, once_K / once_K.sum(), atol=1e-12, rtol=0)
    value = policy_K @ returns(tilt_K[can_win], policy_K, REFERENCE[can_win])
    assert value.item() == pytest.approx(once_K.sum().log().item(), abs=1e-12)

    gap = divergence(once_K / once_K.sum(), best_K).item()
    law_K = torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS["U"], n))[can_win]
    assert divergence(policy_K, law_K).item() == pytest.approx(gap, abs=1e-12)
    assert 0 < gap < -value.item()  # −KL(π ‖ π_BoN) is above its bound log n + L


# --- refusals --------------------------------------------------------------------------------------------


def test_what_has_no_meaning_is_refused():
    quantile, logprob = torch.full((1, 2), -1.0), torch.full((1, 2), -5.0)
    for n in (0, -1):
        with pytest.raises(ValueError, match="n ≥ 1"):
            log_tilt_lower_bound(quantile, n)
        with pytest.raises(ValueError, match="n ≥ 1"):
            log_tilt_exact(quantile, logprob, n)
    for wrong in (math.nan, 0.1, math.inf):
        with pytest.raises(ValueError, match="quantile"):
            log_tilt_lower_bound(torch.full((1, 2), wrong), 4)
    for wrong in (math.nan, 0.1, -math.inf):
        with pytest.raises(ValueError, match="reference"):
            log_tilt_exact(quantile, torch.full((1, 2), wrong), 4)
    with pytest.raises(ValueError, match="one quantile"):
        log_tilt_exact(quantile, logprob[:, :1], 4)
    with pytest.raises(ValueError, match="one shape"):
        variational_return(quantile, logprob, logprob[:, :1])
