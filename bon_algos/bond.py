"""BOND and J-BOND: a policy drawn towards best-of-n of an anchor (arXiv:2407.14622).

Owns the Jeffreys divergence (1 − β)·KL(best-of-n ‖ policy) + β·KL(policy ‖ best-of-n) as a loss on log-probs,
and J-BOND's quantile reward from two anchor samples. Does not own sampling, the anchor's motion (`anchor`) or
the estimation of quantiles (`quantiles`), nor the weights of stale samples (`importance`).

The loss is a surrogate: its gradient, in expectation over samples, is the gradient of the divergence; its
value is no divergence. All log-probs are token sums of whole completions, in nats.

Dimension key:  B prompts
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bon_algos.checks import check_finite, check_one_shape
from bon_algos.importance import tapered_advantage

PENALTY = -math.log(16)
"""J-BOND's reward for a sample worse than both anchor samples: E = −log 16 · (1 − p)², which is log p at p = ½."""


def quantile_reward_strict(reward_B: Tensor, anchor_reward_B2: Tensor) -> Tensor:
    """−log 16 where the sample is strictly worse than both anchor samples, else 0; eq. 17 as printed.

    Made for rewards that never tie: with a binary reward it all but falls silent (at most 15 % of samples).

    (B,), (B, 2) -> (B,); nats.
    """
    _check_rewards(reward_B, anchor_reward_B2)
    return PENALTY * (anchor_reward_B2 > reward_B[:, None]).all(dim=-1).double()


def quantile_reward_tie_aware(reward_B: Tensor, anchor_reward_B2: Tensor) -> Tensor:
    """Eq. 17 with the penalty shared among those who tie for the last place of three.

    −log 16 times 1 if worse than both anchor samples, ½ if tied with one and below the other, ⅓ if all three
    are equal. Under policy = anchor its mean is −log 16/3 for every law of the reward, as eq. 17 has without
    ties; there the two agree.

    (B,), (B, 2) -> (B,); nats.
    """
    _check_rewards(reward_B, anchor_reward_B2)
    is_last_B = (anchor_reward_B2 >= reward_B[:, None]).all(dim=-1)
    num_sharing_B = 1 + (anchor_reward_B2 == reward_B[:, None]).sum(dim=-1)
    return PENALTY * is_last_B.double() / num_sharing_B


def best_of_two(anchor_reward_B2: Tensor) -> Tensor:
    """Which of two anchor samples best-of-2 serves: the higher reward, the first one when they tie. (B,); 0 or 1."""
    return (anchor_reward_B2[:, 1] > anchor_reward_B2[:, 0]).long()


class BondMetrics(NamedTuple):
    """What a step looked like; scalars, means over prompts, detached."""

    imitation: Tensor
    """−log π of best-of-n's completion; nats."""
    log_tilt: Tensor
    """The backward part's reward, an estimate of log π_BoN/π_anchor up to a constant; nats."""
    kl_policy_anchor: Tensor
    """Single-sample estimate from the policy's own completions; nats, at least 0 in expectation."""
    advantage_scale: Tensor
    """Root mean square of what multiplies ∇log π."""


class BondLoss(NamedTuple):
    loss: Tensor
    metrics: BondMetrics


def bond_loss(
    imitation_B: Tensor,
    logprob_B: Tensor,
    anchor_logprob_B: Tensor,
    log_tilt_B: Tensor,
    *,
    jeffreys_weight: float,
    kl_strength: float = 0.0,
    sampled_logprob_B: Tensor | None = None,
) -> BondLoss:
    """Surrogate of (1 − β)·KL(BoN ‖ π) + β·KL(π ‖ BoN) + γ·KL(π ‖ anchor), one sample of π per prompt.

    Per prompt (1 − β)·(−log π(winner)) − A·log π(y), with y ~ π and

        A = β·(t − t̄) − (β + γ)·(d − d̄),        d = log π(y) − log π_anchor(y)

    where t estimates log π_BoN/π_anchor up to a constant and a bar is the mean over the *other* prompts. With
    t = (n − 1)·log p̂ this is eq. 15 with its factor n − 1 kept and without its term (B); with
    `quantiles.log_tilt_…` it is eq. 15 whole; with `quantile_reward_…` it is J-BOND. γ is *added* to descent
    gradients, as eq. 19 says; Algorithm 2's minus sign would push the policy away from its anchor.

    imitation_B        (B,)  −log π of best-of-n, under π: of its winner, or `imitation.imitation_B` of many
    logprob_B          (B,)  log π(y), y ~ π; carries the gradient
    anchor_logprob_B   (B,)  log π_anchor(y)
    log_tilt_B         (B,)  t(y)
    jeffreys_weight    β in [0, 1]: 0 imitates, 1 is the backward KL alone
    kl_strength        γ ≥ 0
    sampled_logprob_B  (B,)  log π(y) under the policy that drew y, where that is not quite π: see `tapered_advantage`

    ValueError with fewer than two prompts, as the baseline is the others' mean; when shapes differ, a tilt or a
    log-prob of the anchor is not finite, or a weight is out of range.
    """
    check_one_shape("B", imitation_B, logprob_B, anchor_logprob_B, log_tilt_B)
    check_finite("tilts and log-probs of the anchor", anchor_logprob_B, log_tilt_B)
    log_ratio_B = (logprob_B - anchor_logprob_B).detach()
    return_B = policy_return(log_tilt_B, log_ratio_B, jeffreys_weight=jeffreys_weight, kl_strength=kl_strength)
    advantage_B = less_mean_of_others(return_B).to(logprob_B.dtype)
    if sampled_logprob_B is not None:
        advantage_B = tapered_advantage(advantage_B, logprob_B, sampled_logprob_B)
    loss_B = jeffreys_surrogate(imitation_B, logprob_B, advantage_B, jeffreys_weight=jeffreys_weight)
    metrics = BondMetrics(
        imitation=imitation_B.detach().mean(),
        log_tilt=log_tilt_B.mean(),
        kl_policy_anchor=log_ratio_B.mean(),
        advantage_scale=advantage_B.square().mean().sqrt(),
    )
    return BondLoss(loss_B.mean(), metrics)


def policy_return(log_tilt_B: Tensor, log_ratio_B: Tensor, *, jeffreys_weight: float, kl_strength: float) -> Tensor:
    """β·t − (β + γ)·d: what a sample of the policy earns, before any baseline. (B,), (B,) -> (B,)."""
    if not (0 <= jeffreys_weight <= 1 and 0 <= kl_strength < math.inf):
        raise ValueError(f"need 0 ≤ β ≤ 1 and a finite γ ≥ 0, got {jeffreys_weight} and {kl_strength}")
    return jeffreys_weight * log_tilt_B - (jeffreys_weight + kl_strength) * log_ratio_B


def less_mean_of_others(return_B: Tensor) -> Tensor:
    """Each return less the mean of the other prompts' returns: a baseline that adds no bias. (B,) -> (B,)."""
    num_prompts = len(return_B)
    if num_prompts < 2:
        raise ValueError("the leave-one-out baseline needs at least two prompts")
    return (return_B - return_B.mean()) * (num_prompts / (num_prompts - 1))


def compressed_below(return_B: Tensor, floor: float) -> Tensor:
    """Returns whose excess below a floor counts by its logarithm: one sample that is hopeless, or that the reference
    would never give, must not decide a whole step, yet a worse one stays worse. (B,) -> (B,), nats."""
    return return_B.clamp(min=floor) - (floor - return_B).clamp(min=0.0).log1p()


def jeffreys_surrogate(
    imitation_B: Tensor, logprob_B: Tensor, advantage_B: Tensor, *, jeffreys_weight: float
) -> Tensor:
    """(1 − β)·imitation − advantage · log π(y), the advantage held fixed. (B,) each -> (B,)."""
    if not imitation_B.shape == logprob_B.shape == advantage_B.shape:
        raise ValueError(f"one value for each prompt: {imitation_B.shape}, {logprob_B.shape}, {advantage_B.shape}")
    return (1 - jeffreys_weight) * imitation_B - advantage_B.detach() * logprob_B


def j_bond_loss(
    winner_logprob_B: Tensor,
    logprob_B: Tensor,
    anchor_logprob_B: Tensor,
    quantile_reward_B: Tensor,
    *,
    jeffreys_weight: float = 0.5,
    kl_strength: float = 0.0,
) -> BondLoss:
    """J-BOND (section 5, Algorithm 2): one policy sample against best-of-2 of the anchor, per prompt.

    `bond_loss` at n = 2 with `best_of_two`'s winner imitated and r_J as the tilt. The fixed point per anchor
    is slightly greedier than best-of-2: without ties, win rate .672 at .201 nats for β = ½ (best-of-2: .667,
    .193).

    winner_logprob_B    (B,)  log π of the better anchor sample; carries the gradient
    logprob_B           (B,)  log π(y), y ~ π; carries the gradient
    anchor_logprob_B    (B,)  log π_anchor(y)
    quantile_reward_B   (B,)  `quantile_reward_tie_aware`, or `…_strict` for the paper's letter
    """
    return bond_loss(
        -winner_logprob_B,
        logprob_B,
        anchor_logprob_B,
        quantile_reward_B,
        jeffreys_weight=jeffreys_weight,
        kl_strength=kl_strength,
    )


def _check_rewards(reward_B: Tensor, anchor_reward_B2: Tensor) -> None:
    if reward_B.ndim != 1 or anchor_reward_B2.shape != (len(reward_B), 2):
        raise ValueError(f"need (B,) and (B, 2), got {tuple(reward_B.shape)} and {tuple(anchor_reward_B2.shape)}")
    if not (torch.isfinite(reward_B).all() and torch.isfinite(anchor_reward_B2).all()):
        raise ValueError("rewards are not all finite")
