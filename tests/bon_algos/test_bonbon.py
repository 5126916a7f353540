"""BoNBoN as published: its constants, and where it ends, which is not best-of-n.

The law of the best and worst of n draws is exact, and itself proved against all 20ⁿ draws.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from torch import Tensor

from bon_algos import order
from bon_algos.bonbon import (
    beta_star,
    bonbon_loss,
    pair_target,
)
from bon_algos.preference import best_and_worst, ipo_loss
from tests.bon_algos.pairs import best_worst_law, exact_tilt
from tests.bon_algos.tabular import all_pairs, minimiser
from tests.bon_algos.vectors import REFERENCE_K, REWARDS, kl, win_rate_against_reference

REFERENCE = torch.tensor(REFERENCE_K)
Array = NDArray[np.float64]


def expected_bonbon(vector: str, n: int, imitation_weight: float):
    """The published loss over the exact law of its pairs, as a function of the log-probs of 20 outcomes."""
    best, worst = all_pairs(20)
    law_P = torch.tensor(best_worst_law(REFERENCE_K, REWARDS[vector], n)).flatten()
    logref_K = REFERENCE.log()

    def objective(logprob_K: Tensor) -> Tensor:
        loss_P, _ = bonbon_loss(
            logprob_K[best], logprob_K[worst], logref_K[best], logref_K[worst], n=n, imitation_weight=imitation_weight
        )
        return law_P @ loss_P

    return objective


# --- constants -------------------------------------------------------------------------------------------

CONSTANTS = [  # n, (n − 1)·H_{n−1}, β*_n, sd of Δ under best-of-n
    (2, 1, 0.5, 1),
    (3, 3, 0.1666667, 2.236),
    (4, 5.5, 0.0909091, 3.5),
    (6, 11.416667, 0.0437956, 6.049),
    (8, 18.15, 0.0275482094, 8.607),
    (16, 49.773435, 0.0100455193, 18.86),
    (32, 124.844601, 0.0040049790, 39.37),
    (64, 297.880752, 0.0016785240, 80.41),
]


@pytest.mark.parametrize(("n", "target", "beta", "deviation"), CONSTANTS)
def test_published_constants(n, target, beta, deviation):
    """Among them .0275482094 for n = 8, the `loss.beta` of the authors' command."""
    assert pair_target(n) == pytest.approx(target, abs=6e-7)
    assert beta_star(n) == pytest.approx(beta, abs=6e-8 if n in (3, 4, 6) else 6e-11)
    assert 1 / (2 * beta_star(n)) == pytest.approx(pair_target(n), rel=1e-15)


@pytest.mark.parametrize(("n", "target", "beta", "deviation"), CONSTANTS)
def test_the_target_is_the_mean_of_a_wide_law(n, target, beta, deviation):
    """−log u is exponential, and n exponentials' range is the maximum of n − 1: P(range ≤ x) = (1 − e^{−x})^{n−1}.
    Under best-of-n Δ is n − 1 times that range; its mean and deviation by integrating P(range > x)."""

    def above(x: float) -> float:
        return -math.expm1((n - 1) * math.log1p(-math.exp(-x))) if x > 0 else 1.0

    mean, _ = quad(above, 0, 60, epsabs=1e-12, limit=200)
    square, _ = quad(lambda x: 2 * x * above(x), 0, 60, epsabs=1e-12, limit=200)
    assert pair_target(n) == pytest.approx((n - 1) * mean, rel=1e-9)
    assert (n - 1) * math.sqrt(square - mean**2) == pytest.approx(deviation, abs=6e-3 if n > 8 else 6e-4)


def test_one_draw_has_no_pair():
    assert pair_target(1) == 0
    with pytest.raises(ValueError, match="n ≥ 2"):
        beta_star(1)
    with pytest.raises(ValueError, match="n ≥ 1"):
        pair_target(0)


# --- the law of pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_law_of_pairs_is_that_of_all_draws(vector, n):
    """All 20ⁿ groups, each with its probability, through the very function that picks pairs."""
    draw_GN = torch.cartesian_prod(*[torch.arange(20)] * n).reshape(-1, n)
    picked = best_and_worst(torch.tensor(REWARDS[vector])[draw_GN])
    best_G, worst_G = (draw_GN.gather(1, at[:, None])[:, 0] for at in picked)
    counted = torch.zeros(400).double().index_add(0, 20 * best_G + worst_G, REFERENCE[draw_GN].prod(dim=-1))
    law_KK = best_worst_law(REFERENCE_K, REWARDS[vector], n)
    np.testing.assert_allclose(counted.reshape(20, 20).numpy(), law_KK, atol=1e-14)
    np.testing.assert_allclose(law_KK.sum(axis=1), order.best_of_n_law(REFERENCE_K, REWARDS[vector], n), atol=1e-14)


SAME_OUTCOME = [("U", 2, 0.065079), ("T", 2, 0.207256), ("U", 4, 0.000372), ("T", 4, 0.009763)]


@pytest.mark.parametrize(("vector", "n", "same"), SAME_OUTCOME)
def test_how_often_best_and_worst_are_the_same_outcome(vector, n, same):
    assert best_worst_law(REFERENCE_K, REWARDS[vector], n).trace() == pytest.approx(same, abs=6e-7)


MARGINS = [
    ("U", 2, 0.946063),
    ("U", 4, 4.970421),
    ("U", 8, 15.181541),
    ("T", 2, 0.849015),
    ("T", 4, 4.194961),
    ("T", 8, 11.754845),
]


@pytest.mark.parametrize(("vector", "n", "mean"), MARGINS)
def test_with_ties_best_of_n_has_a_smaller_margin_than_the_target(vector, n, mean):
    tilt_K, law_KK = exact_tilt(vector, n).numpy(), best_worst_law(REFERENCE_K, REWARDS[vector], n)
    margin = (law_KK * (tilt_K[:, None] - tilt_K)).sum()
    assert margin == pytest.approx(mean, abs=6e-7)
    assert margin < pair_target(n)


# --- the published loss ----------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """log π −1, −6 and −3, −2 against −2, −4 and −2, −2: Δ = 5 − 2 = 3 and −1 − 0. n = 3: target 2·(1 + ½) = 3.
    α = ¼: ¼·1 + ¾·0 and ¼·3 + ¾·16."""
    pairs = [torch.tensor(row).double() for row in ([-1, -3], [-6, -2], [-2, -2], [-4, -2])]
    loss_B, metrics = bonbon_loss(*pairs, n=3, imitation_weight=0.25)
    assert loss_B.tolist() == [0.25, 12.75]
    assert [metric.item() for metric in metrics] == [2, 1, 8]


@pytest.mark.parametrize(("n", "loss"), [(2, 1), (4, 30.25), (8, 329.4225)])
@pytest.mark.parametrize("vector", REWARDS)
def test_at_the_reference_every_pair_misses_by_the_whole_target(n, loss, vector):
    assert expected_bonbon(vector, n, 0.0)(REFERENCE.log()).item() == pytest.approx(loss, rel=1e-13)


LOSSES = [("U", 327.7894, 28.0203, 2.0218), ("T", 327.7889, 47.4055, 3.3364)]


@pytest.mark.parametrize(("vector", "reference", "best_of_n", "least"), LOSSES)
def test_best_of_8_is_far_from_the_minimum_of_the_published_loss(vector, reference, best_of_n, least):
    """α = .005."""
    objective = expected_bonbon(vector, 8, 0.005)
    law_K = torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS[vector], 8))
    policy_K = minimiser(lambda logit_K: objective(logit_K.log_softmax(-1)), REFERENCE.log())
    losses = [objective(policy.log()).item() for policy in (REFERENCE, law_K, policy_K)]
    assert losses == pytest.approx([reference, best_of_n, least], abs=6e-5)


def test_without_imitation_it_is_ipo_at_beta_star():
    pairs = list(torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for n in (2, 8, 64):
        loss_B, _ = bonbon_loss(*pairs, n=n, imitation_weight=0.0)
        torch.testing.assert_close(loss_B, ipo_loss(*pairs, beta=beta_star(n)), atol=0, rtol=1e-13)


@pytest.mark.parametrize(("imitation_weight", "ratio"), [(0.005, 7200), (0.5, 36)])
def test_imitation_is_inert_at_the_first_step(imitation_weight, ratio):
    """B3, n = 8: on ∇log π(best), α against 2·(1 − α)·18.15 at π = π_ref; they balance α/(2(1 − α)) from the target."""

    def pull(margin: float, n: int) -> float:
        logprob, zero = torch.tensor([margin], dtype=torch.float64, requires_grad=True), torch.zeros(1).double()
        loss_B, _ = bonbon_loss(logprob, zero, zero, zero, n=n, imitation_weight=imitation_weight)
        return torch.autograd.grad(loss_B, logprob)[0].item()

    imitated = pull(0.0, n=1)  # best-of-1 asks for Δ = 0, which is where the policy is
    assert imitated == -imitation_weight
    assert (pull(0.0, n=8) - imitated) / imitated == pytest.approx(ratio, rel=0.01)
    at_rest = pair_target(8) + imitation_weight / (2 * (1 - imitation_weight))
    assert pull(at_rest, n=8) == pytest.approx(0, abs=1e-12)


MIXTURES = [  # α, win rate and its last digit, KL and its last digit: n = 8
    (0.005, 0.8148, 1e-4, 0.886, 1e-3),
    (0.5, 0.847, 1e-3, None, None),
    (1.0, 0.885486, 1e-6, 1.190480, 1e-6),
]


@pytest.mark.parametrize(("imitation_weight", "win", "win_digit", "nats", "nats_digit"), MIXTURES)
def test_imitation_alone_ends_at_best_of_8(imitation_weight, win, win_digit, nats, nats_digit):
    objective = expected_bonbon("U", 8, imitation_weight)
    policy_K = minimiser(lambda logit_K: objective(logit_K.log_softmax(-1)), REFERENCE.log()).numpy()
    assert win_rate_against_reference(policy_K, REWARDS["U"]) == pytest.approx(win, abs=0.6 * win_digit)
    if nats is not None:
        assert kl(policy_K, REFERENCE_K) == pytest.approx(nats, abs=0.6 * nats_digit)
    if imitation_weight == 1:
        np.testing.assert_allclose(policy_K, order.best_of_n_law(REFERENCE_K, REWARDS["U"], 8), atol=1e-10)


MINIMISERS = [  # n, the minimiser's win rate and KL, its loss and that of best-of-n: no ties, α = 0
    (2, 0.6565, 0.1516, 1 / 3, 1.00),
    (4, 0.8337, 0.8537, 2.522, 12.25),
    (8, 0.8137, 0.8785, 1.940, 74.1),
    (16, 0.7864, 0.8137, 0.0585, 355.6),
]


@pytest.mark.parametrize(("n", "win", "nats", "loss", "at_best_of_n"), MINIMISERS)
def test_without_ties_too_the_published_constant_does_not_end_at_best_of_n(n, win, nats, loss, at_best_of_n):
    """Quantiles in 500 cells, finer towards 0 where log u runs away; the normal equations of Σ law · (s_b − s_w − c)².

    At n = 2 the minimiser is e^{2u}, whose loss is 4·E(u_b − u_w)² − 4·E(u_b − u_w) + 1 = 4/6 − 4/3 + 1 = 1/3.
    """
    edge = np.concatenate(([0.0], np.geomspace(1e-9, 0.25, 300), np.linspace(0.25, 1, 201)[1:]))
    mass_K, mid_K = np.diff(edge), (edge[1:] + edge[:-1]) / 2
    law_KK = best_worst_law(mass_K, mid_K, n)
    laplacian_KK = np.diag(law_KK.sum(axis=0) + law_KK.sum(axis=1)) - law_KK - law_KK.T
    pull_K = pair_target(n) * (law_KK.sum(axis=1) - law_KK.sum(axis=0))
    log_ratio_K = np.zeros(len(mass_K))  # a constant is free: that of the last cell is 0
    log_ratio_K[:-1] = np.linalg.solve(laplacian_KK[:-1, :-1], pull_K[:-1])
    policy_K = mass_K * np.exp(log_ratio_K)
    policy_K /= policy_K.sum()
    assert policy_K @ mid_K == pytest.approx(win, abs=6e-5)
    assert kl(policy_K, mass_K) == pytest.approx(nats, abs=6e-5)

    def expected(log_ratio_K: Array) -> float:
        return float((law_KK * (log_ratio_K[:, None] - log_ratio_K - pair_target(n)) ** 2).sum())

    best_of_n_K = np.log(order.best_of_n_law(mass_K, mid_K, n) / mass_K)
    assert expected(log_ratio_K) == pytest.approx(loss, abs=6e-5 if n == 16 else 6e-4)
    assert expected(best_of_n_K) == pytest.approx(at_best_of_n, rel=1e-3)


def test_a_group_tied_throughout_is_only_imitated():
    best, worst = best_and_worst(torch.full((1, 4), 3.0))
    logprob_BN = torch.tensor([[-7.0, -1.0, -2.0, -3.0]], requires_grad=True)
    pair = [table.gather(1, at[:, None])[:, 0] for table in (logprob_BN, logprob_BN - 1) for at in (best, worst)]
    for imitation_weight in (0.0, 0.5):
        loss_B, metrics = bonbon_loss(*pair, n=4, imitation_weight=imitation_weight)
        (gradient,) = torch.autograd.grad(loss_B.sum(), logprob_BN, retain_graph=True)
        assert gradient.tolist() == [[-imitation_weight, 0, 0, 0]]
        assert metrics.margin.item() == 0


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imitation_weight", [-0.1, 1.1, math.nan])
def test_a_weight_out_of_range_is_refused(imitation_weight):
    with pytest.raises(ValueError, match="α"):
        bonbon_loss(*[torch.zeros(2)] * 4, n=8, imitation_weight=imitation_weight)


def test_shapes_that_would_broadcast_are_refused():
    two = torch.zeros(2)
    for place in range(4):
        pair = [two, two, two, two]
        pair[place] = torch.zeros(1)
        with pytest.raises(ValueError, match=r"\(B,\)"):
            bonbon_loss(*pair, n=8)
