"""A softmax policy over a finite set of outcomes, its expected losses computed by enumeration."""

from __future__ import annotations

import torch
from torch import Tensor

from bon_algos.bond import best_of_two, jeffreys_surrogate, policy_return


def anchor_pairs(num_outcomes: int) -> Tensor:
    """All ordered pairs of outcomes that two anchor samples can be. (K², 2)."""
    outcome_K = torch.arange(num_outcomes)
    return torch.cartesian_prod(outcome_K, outcome_K)


def expected_quantile_reward(quantile_reward, reward_K: Tensor, anchor_law_K: Tensor) -> Tensor:
    """E over both anchor samples of J-BOND's reward, for each outcome the policy may emit. (K,)."""
    pair_P2 = anchor_pairs(len(reward_K))
    law_P = anchor_law_K[pair_P2].prod(dim=-1)
    return torch.stack([quantile_reward(reward.expand(len(pair_P2)), reward_K[pair_P2]) @ law_P for reward in reward_K])


def best_of_two_law(reward_K: Tensor, anchor_law_K: Tensor) -> Tensor:
    """The law of the anchor sample that is imitated. (K,)."""
    pair_P2 = anchor_pairs(len(reward_K))
    winner_P = pair_P2.gather(1, best_of_two(reward_K[pair_P2])[:, None])[:, 0]
    return torch.zeros_like(anchor_law_K).index_add(0, winner_P, anchor_law_K[pair_P2].prod(dim=-1))


def expected_surrogate(
    logit_K: Tensor,
    anchor_law_K: Tensor,
    winner_law_K: Tensor,
    log_tilt_K: Tensor,
    *,
    jeffreys_weight: float,
    kl_strength: float = 0.0,
) -> Tensor:
    """The surrogate without baseline, averaged over every sample of the policy and every winner. Scalar.

    Winner and sample are independent, so each part is averaged under its own law.
    """
    logprob_K = logit_K.log_softmax(-1)
    return_K = policy_return(
        log_tilt_K,
        (logprob_K - anchor_law_K.log()).detach(),
        jeffreys_weight=jeffreys_weight,
        kl_strength=kl_strength,
    )
    zero_K = torch.zeros_like(logprob_K)
    imitation_K = jeffreys_surrogate(-logprob_K, logprob_K, zero_K, jeffreys_weight=jeffreys_weight)
    own_K = jeffreys_surrogate(zero_K, logprob_K, return_K, jeffreys_weight=jeffreys_weight)
    return winner_law_K @ imitation_K + logprob_K.exp().detach() @ own_K


def gradient(loss: Tensor, logit_K: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logit_K)[0]


def central_differences(objective, logit_K: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of an objective of the logits, by its values. (K,)."""
    unit = torch.eye(len(logit_K), dtype=torch.float64) * step
    return torch.stack([(objective(logit_K + e) - objective(logit_K - e)) / (2 * step) for e in unit])


def divergence(law_K: Tensor, other_K: Tensor) -> Tensor:
    """KL(law ‖ other), nats. Scalar."""
    kl: Tensor = (law_K * (law_K / other_K).log()).sum()
    return kl


def minimiser(objective, logit_K: Tensor) -> Tensor:
    """The policy at which a convex objective of the logits is least, by Newton's method; exact to rounding."""
    for _ in range(40):
        logit_K = logit_K.detach().requires_grad_()
        before = objective(logit_K)
        (gradient_K,) = torch.autograd.grad(before, logit_K)
        hessian_KK = torch.autograd.functional.hessian(objective, logit_K.detach())
        step_K = torch.linalg.pinv(hessian_KK, rtol=1e-13, hermitian=True) @ gradient_K  # blind to a constant
        while objective(logit_K - step_K) > before + 1e-13:
            step_K = step_K / 2
        policy_K, logit_K = logit_K.detach().softmax(-1), logit_K.detach() - step_K
        if (logit_K.softmax(-1) - policy_K).abs().max() < 1e-13:
            return logit_K.softmax(-1)
    raise AssertionError("no minimum in 40 steps")


def all_pairs(num_outcomes: int) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), every ordered pair of outcomes. (K²,), (K²,)."""
    first, second = torch.cartesian_prod(torch.arange(num_outcomes), torch.arange(num_outcomes)).T
    return first, second
