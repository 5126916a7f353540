"""Where J-BOND goes, step by step: exact expected gradients on a tabular policy, the real anchor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bon_algos import bond, order
from bon_algos.anchor import EmaAnchor
from tests.bon_algos.tabular import (
    anchor_pairs,
    best_of_two_law,
    expected_quantile_reward,
    expected_surrogate,
    gradient,
)
from tests.bon_algos.vectors import REFERENCE_K, UNIQUE_K

REWARD = torch.tensor(UNIQUE_K)
REFERENCE = torch.tensor(REFERENCE_K)
LEARNING_RATE = 0.5


class Run:
    """A tabular policy from the reference, its logits trained by J-BOND's expected gradient at β = ½."""

    def __init__(self, kl_strength: float = 0.0, *, has_printed_sign: bool = False) -> None:
        self.kl_strength, self.has_printed_sign = kl_strength, has_printed_sign
        self.logit_K = REFERENCE.log().requires_grad_()
        self.anchor = EmaAnchor({"logits": self.logit_K})
        pair_P2 = anchor_pairs(20)
        self.reward_KP = torch.stack(
            [bond.quantile_reward_strict(reward.expand(400), REWARD[pair_P2]) for reward in REWARD]
        )
        self.pair_P2 = pair_P2

    def step(self) -> None:
        anchor_law_K = self.anchor.tensors["logits"].double().softmax(-1)
        tilt_K = self.reward_KP @ anchor_law_K[self.pair_P2].prod(dim=-1)
        if self.has_printed_sign:  # +γ·d in the advantage, by a tilt that turns −γ·d around
            log_ratio_K = self.logit_K.detach().log_softmax(-1) - anchor_law_K.log()
            tilt_K = tilt_K + 2 * self.kl_strength / 0.5 * log_ratio_K
        loss = expected_surrogate(
            self.logit_K,
            anchor_law_K,
            best_of_two_law(REWARD, anchor_law_K),
            tilt_K,
            jeffreys_weight=0.5,
            kl_strength=self.kl_strength,
        )
        with torch.no_grad():
            self.logit_K -= LEARNING_RATE * gradient(loss, self.logit_K)

    def follow(self, rate: float) -> None:
        self.anchor.update({"logits": self.logit_K}, rate)

    @property
    def mean_reward_and_kl(self) -> tuple[float, float]:
        law_K = self.logit_K.detach().softmax(-1)
        return (law_K @ REWARD).item(), (law_K * (law_K / REFERENCE).log()).sum().item()


def run_ema(
    rate: float, steps: list[int], kl_strength: float = 0.0, *, has_printed_sign: bool = False
) -> list[tuple[float, float]]:
    run, seen = Run(kl_strength, has_printed_sign=has_printed_sign), []
    for step in range(1, max(steps) + 1):
        run.step()
        run.follow(rate)
        if step in steps:
            seen.append(run.mean_reward_and_kl)
    return seen


def close_to(seen: tuple[float, float], reward: float, kl: float) -> bool:
    return abs(seen[0] - reward) < 6e-4 and abs(seen[1] - kl) < 6e-5


def test_the_trajectory_of_an_averaged_anchor():
    at_50, at_100 = run_ema(0.05, [50, 100])
    assert close_to(at_50, 13.930, 0.3072)
    assert close_to(at_100, 16.828, 1.3073)


def test_a_slower_anchor_is_a_slower_drift():
    at_100, at_200 = run_ema(0.02, [100, 200])
    assert close_to(at_100, 15.066, 0.5040)
    assert close_to(at_200, 17.451, 1.4804)


def test_more_kl_strength_is_less_kl_and_not_more():
    """The sign of γ: .3072 nats after 50 steps at γ = 0; the printed minus sign would give 1.238 at γ = 1."""
    at_50, at_100 = run_ema(0.05, [50, 100], kl_strength=1.0)
    assert close_to(at_50, 12.980, 0.1613)
    assert close_to(at_100, 15.245, 0.5603)


def test_the_printed_sign_pushes_the_policy_from_its_anchor():
    """Algorithm 2 as printed, γ = 1: four times the KL of γ = 0 at 50 steps, not half."""
    at_50, at_100 = run_ema(0.05, [50, 100], kl_strength=1.0, has_printed_sign=True)
    assert close_to(at_50, 16.458, 1.2384)
    assert close_to(at_100, 17.866, 2.2883)


def test_the_trajectory_of_an_anchor_copied_every_50_steps():
    run, seen = Run(), []
    for step in range(1, 201):
        run.step()
        if step % 50 == 0:
            run.follow(1.0)
        if step in (100, 200):
            seen.append(run.mean_reward_and_kl)
    assert close_to(seen[0], 14.648, 0.3958)
    assert close_to(seen[1], 17.407, 1.3497)


# --- where it ends, per anchor ---------------------------------------------------------------------------

NUM_FINE = 180
"""Equally likely outcomes of rising reward: near enough to a continuous reward for four digits."""


@pytest.fixture(scope="module")
def fine_tilt_K() -> Tensor:
    reward_K, uniform_K = torch.arange(NUM_FINE).double(), torch.full((NUM_FINE,), 1 / NUM_FINE).double()
    return expected_quantile_reward(bond.quantile_reward_tie_aware, reward_K, uniform_K)


@pytest.mark.parametrize(
    ("jeffreys_weight", "win", "kl"),
    [
        (0.0, 0.66667, 0.19315),
        (0.25, 0.66947, 0.19745),
        (0.5, 0.67183, 0.20074),
        (1.0, 0.67635, 0.20920),
    ],
)
def test_the_fixed_point_per_anchor_without_ties(fine_tilt_K, jeffreys_weight, win, kl):
    reward_K, uniform_K = torch.arange(NUM_FINE).double(), torch.full((NUM_FINE,), 1 / NUM_FINE).double()
    winner_law_K = best_of_two_law(reward_K, uniform_K)
    logit_K = uniform_K.log().requires_grad_()
    for _ in range(200):  # dividing by the policy makes every outcome move at its own pace
        loss = expected_surrogate(logit_K, uniform_K, winner_law_K, fine_tilt_K, jeffreys_weight=jeffreys_weight)
        with torch.no_grad():
            logit_K -= 0.3 * gradient(loss, logit_K) / logit_K.softmax(-1)
    law_K = logit_K.detach().softmax(-1)
    mid_rank_K = (reward_K + 0.5) / NUM_FINE
    assert (law_K @ mid_rank_K).item() == pytest.approx(win, abs=4e-5)
    assert (law_K * (law_K / uniform_K).log()).sum().item() == pytest.approx(kl, abs=4e-5)


# --- the drift of the anchor -----------------------------------------------------------------------------


def test_the_anchor_drifts_by_its_rate_in_nats_per_step():
    """A policy that is best-of-2 of its anchor: the anchor is best-of-m with m = (1 + η)^t, so that its KL is
    log m − (m − 1)/m, near ηt − 1 + e^(−ηt). η = .02, t = 200: m = 52.5 and 2.980 nats (3.018)."""
    mass_K, reward_K, rate = np.full(400, 1 / 400), np.arange(400), 0.02
    anchor = EmaAnchor({"logits": torch.tensor(mass_K).log()})
    nats = {}
    for step in range(1, 201):
        law_K = anchor.tensors["logits"].double().softmax(-1).numpy()
        policy_K = order.best_of_n_law(law_K, reward_K, 2)
        anchor.update({"logits": torch.tensor(policy_K).log()}, rate)
        nats[step] = float((policy_K * np.log(policy_K / mass_K)).sum())
    final_K = anchor.tensors["logits"].double().softmax(-1).numpy()
    kl_anchor = float((final_K * np.log(final_K / mass_K)).sum())
    m = (1 + rate) ** 200
    assert kl_anchor == pytest.approx(math.log(m) - (m - 1) / m, abs=1e-2)
    assert kl_anchor == pytest.approx(2.980, abs=1e-2)
    assert kl_anchor == pytest.approx(rate * 200 - 1 + math.exp(-rate * 200), abs=5e-2)
    # the policy is twice as far along: 3.66 nats at 200, .87 at 50
    assert nats[200] == pytest.approx(3.66, abs=2e-2)
    assert nats[50] == pytest.approx(0.87, abs=2e-2)
