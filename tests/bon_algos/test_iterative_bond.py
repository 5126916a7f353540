"""Iterative BOND: the expected gradient of a step, over every batch there can be, is its divergence's."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from bon_algos.fresh_steps import learn_iterative
from bon_algos.order import best_of_n_law
from bon_algos.steps import FreshGroup
from tests.bon_algos.tables import table
from tests.bon_algos.tabular import central_differences, divergence, gradient

ANCHOR_SAMPLES = (3, 2)
"""Of each prompt."""
REWARD_2K = [[0.0, 1.0, 1.0], [2.0, 0.0, 1.0]]
ANCHOR_2K = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
LOGIT_2K = torch.tensor([[0.2, -0.4, 0.1], [0.0, 0.5, -0.3]], dtype=torch.float64)


def series_of_log(share: Tensor, num_samples: int) -> Tensor:
    """Σ_{k ≤ M} −(1 − p)^k/k: what the harmonic estimate of log p is on average over M samples (algorithms.md 1.1)."""
    terms = [-((1 - share) ** k) / k for k in range(1, num_samples + 1)]
    return torch.stack(terms).sum(0)


def objective(logit: Tensor, *, jeffreys_weight: float, kl_strength: float) -> Tensor:
    """(1 − β)·KL(Bo2 ‖ π) + β·E_π[log π/π_a − log 2 − log p_mid, as far as its series goes] + γ·KL(π ‖ π_a), the mean
    of both prompts; of their logits in one row."""
    total = torch.zeros((), dtype=torch.float64)
    for reward_K, anchor_K, logit_K, num_samples in zip(
        REWARD_2K, ANCHOR_2K, logit.reshape(2, 3), ANCHOR_SAMPLES, strict=True
    ):
        policy_K, target_K = logit_K.softmax(-1), torch.from_numpy(best_of_n_law(anchor_K, reward_K, 2))
        reward = torch.tensor(reward_K)
        beats_KK = (reward[:, None] > reward).double() + (reward[:, None] == reward).double() / 2
        tilt_K = math.log(2) + series_of_log(beats_KK @ anchor_K, num_samples)
        backward = divergence(policy_K, anchor_K) - policy_K @ tilt_K
        total = total + (1 - jeffreys_weight) * divergence(target_K, policy_K) + jeffreys_weight * backward
        total = total + kl_strength * divergence(policy_K, anchor_K)
    return total / 2


@pytest.mark.slow
@pytest.mark.parametrize(("jeffreys_weight", "kl_strength"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 1.5)])
def test_the_expected_step_is_the_gradient_of_its_objective(jeffreys_weight, kl_strength):
    """Two prompts over three outcomes, ties among them, a sample each, and three or two of the anchor: 81 · 27 ways."""
    logit_2K = LOGIT_2K.clone().requires_grad_()
    logprob_2K = logit_2K.log_softmax(-1)
    law_2K = logprob_2K.detach().exp()
    total = torch.zeros((), dtype=torch.float64)
    for batch in product(*(product(range(3), repeat=1 + num_samples) for num_samples in ANCHOR_SAMPLES)):
        groups = [
            FreshGroup([p], [own], REWARD_2K[p][own], [[k] for k in anchors], [REWARD_2K[p][k] for k in anchors])
            for p, (own, *anchors) in enumerate(batch)
        ]
        probability = math.prod(
            float(law_2K[p, own] * ANCHOR_2K[p, anchors].prod()) for p, (own, *anchors) in enumerate(batch)
        )
        loss = learn_iterative(
            groups,
            table(logprob_2K),
            table(ANCHOR_2K.log()),
            n=2,
            jeffreys_weight=jeffreys_weight,
            kl_strength=kl_strength,
        ).loss
        total = total + probability * loss
    named = partial(objective, jeffreys_weight=jeffreys_weight, kl_strength=kl_strength)
    expected = central_differences(named, LOGIT_2K.flatten())
    torch.testing.assert_close(gradient(total, logit_2K).flatten(), expected, atol=1e-8, rtol=0)
