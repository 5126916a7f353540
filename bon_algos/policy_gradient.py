"""From what samples of the policy earn to a loss on their log-probs, several samples per prompt.

Owns the KL-regularised return E_π[r] − β·KL(π ‖ π_ref), its leave-one-out baseline (RLOO, arXiv:2402.14740), the
REINFORCE surrogate and the clipped one of PPO (arXiv:1707.06347). Does not own what is earned (a reward, or a tilt of
`vbon`), nor sampling; no value function.

The losses are surrogates: their gradient, in expectation over samples, is that of the objective, negated; their value
is not. Log-probs are token sums of whole completions, in nats.

Dimension key:  B prompts · N samples per prompt
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bon_algos.checks import check_finite, check_one_shape

LARGEST_LOG_RATIO = 20.0
"""Nats of log π/π_old: a larger one counts as this. A bad sample's ratio, which PPO does not bound, stays finite."""


def kl_regularised_return(
    reward_BN: Tensor, logprob_BN: Tensor, reference_logprob_BN: Tensor, *, kl_strength: float
) -> Tensor:
    """r(y) − β·d(y), d = log π(y) − log π_ref(y): what a sample of the policy earns.

    Its mean over y ~ π is E_π[r] − β·KL(π ‖ π_ref), whose maximum is π ∝ π_ref·exp(r/β). Held fixed: d carries no
    gradient, for the score function's expectation of ∇d is zero.

    (B, N) each -> (B, N), in units of the reward. ValueError for β < 0, shapes that differ, or what is
    not finite: a reward of −∞ has no expectation under a policy that can earn it.
    """
    if not 0 <= kl_strength < math.inf:
        raise ValueError(f"need a finite β ≥ 0, got {kl_strength}")
    _check(reward_BN, logprob_BN, reference_logprob_BN)
    return (reward_BN - kl_strength * (logprob_BN - reference_logprob_BN)).detach()


def leave_one_out(return_BN: Tensor) -> Tensor:
    """Each return less the mean return of the *other* samples of its prompt: a baseline that adds no bias.

    RLOO (arXiv:2402.14740). A prompt whose samples all earn the same has advantages of exactly zero.

    (B, N) -> (B, N), in units of the return; a row sums to 0. ValueError for N < 2, or returns that are not finite.
    """
    _check(return_BN)
    num_samples = return_BN.shape[1]
    if num_samples < 2:
        raise ValueError("the leave-one-out baseline needs at least two samples of a prompt")
    # Differences before sums: equal returns leave no rounding behind, and an offset common to all costs no digits.
    return (return_BN[:, :, None] - return_BN[:, None, :]).sum(dim=-1) / (num_samples - 1)


def reinforce_loss(logprob_BN: Tensor, advantage_BN: Tensor) -> Tensor:
    """−A·log π(y), averaged over the samples of each prompt, A held fixed.

    Its expected gradient over y ~ π is −∇E_π[A] with A held fixed (REINFORCE).

    logprob_BN    (B, N)  log π of samples that π drew; carries the gradient
    advantage_BN  (B, N)  of `leave_one_out`, or returns as they are

    -> (B,). ValueError when shapes differ or something is not finite.
    """
    _check(logprob_BN, advantage_BN)
    return -(advantage_BN.detach().to(logprob_BN.dtype) * logprob_BN).mean(dim=-1)


class ClippedMetrics(NamedTuple):
    """Of one step; scalars, detached."""

    clip_fraction: Tensor
    """Share of terms that clipping leaves without a gradient; in [0, 1]."""
    mean_ratio: Tensor
    """Of π/π_old, before clipping (`LARGEST_LOG_RATIO` holds); for whole completions of π_old its expectation is 1."""


class ClippedLoss(NamedTuple):
    loss: Tensor
    """Scalar, to be minimised."""
    metrics: ClippedMetrics


def ppo_clip_loss(
    logprob_BN: Tensor, sampled_logprob_BN: Tensor, advantage_BN: Tensor, *, clip_range: float
) -> ClippedLoss:
    """−min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A), ρ = π(y)/π_old(y) of the *whole completion*; PPO eq. 7, averaged.

    The bandit's form: one action is one completion. While nothing is clipped its expectation over y ~ π_old is
    −E_π[A], and at π = π_old its gradient is that of `reinforce_loss`. ρ is a product over all tokens, so it leaves
    the range sooner the longer the completion. Bad samples (A < 0) have no upper bound on ρ, as in eq. 7, but what a
    dtype can hold: above `LARGEST_LOG_RATIO` loss and gradient are those at that ratio.

    logprob_BN          (B, N)  log π; carries the gradient
    sampled_logprob_BN  (B, N)  log π_old, of the policy that drew the samples
    advantage_BN        (B, N)  held fixed
    clip_range          ε in (0, 1)

    ValueError when shapes differ, something is not finite, or ε is out of range.
    """
    _check(logprob_BN, sampled_logprob_BN, advantage_BN)
    if not 0 < clip_range < 1:
        raise ValueError(f"the clip range must lie in (0, 1), got {clip_range}")
    log_ratio_BN = logprob_BN - sampled_logprob_BN.detach()
    advantage_BN = advantage_BN.detach().to(log_ratio_BN.dtype)
    # min(ρ·A, clip(ρ)·A) has one effective bound, by the sign of A. Applied to log ρ it is met before the exponential:
    # a ratio that would overflow is cut, where the clipped branch of the literal form leaves 0 · ∞ in the gradient.
    lowest, highest = math.log1p(-clip_range), math.log1p(clip_range)
    kept_BN = torch.where(advantage_BN < 0, log_ratio_BN.clamp(min=lowest), log_ratio_BN.clamp(max=highest))
    is_clipped_BN = (kept_BN != log_ratio_BN) & (advantage_BN != 0)
    metrics = ClippedMetrics(
        clip_fraction=is_clipped_BN.to(log_ratio_BN.dtype).mean(),
        mean_ratio=_ratio(log_ratio_BN.detach()).mean(),
    )
    return ClippedLoss(-(advantage_BN * _ratio(kept_BN)).mean(), metrics)


def _ratio(log_ratio_BN: Tensor) -> Tensor:
    """Cut in value alone: where it is cut it still has a gradient, its own."""
    return (log_ratio_BN - (log_ratio_BN.detach() - LARGEST_LOG_RATIO).clamp(min=0.0)).exp()


def _check(*given: Tensor) -> None:
    """One shape of prompts and samples, and numbers."""
    check_one_shape("BN", *given)
    check_finite("returns, advantages and log-probs", *given)
