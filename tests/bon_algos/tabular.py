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
