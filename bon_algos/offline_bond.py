"""BOND from logged candidates alone: the Jeffreys divergence to best-of-n without a fresh sample.

Owns the loss of one prompt. Does not own which candidates are looked at nor their tilts (`quantiles`), nor the terms of
their tokens (`token_kl`).

The backward KL(policy ‖ best-of-n) is an expectation under the policy, and the reference's candidates stand for its
samples by importance weights. They know nothing of what no candidate says: mass that is pushed off bad candidates leaks
there, unseen. So the KL to the reference is also taken token by token over the whole vocabulary, along the candidates'
prefixes, where every leak begins.

Dimension key:  N candidates of one prompt · L tokens, padded
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bon_algos.bond import compressed_below
from bon_algos.checks import check_finite, check_one_shape
from bon_algos.imitation import best_of_n_imitation
from bon_algos.importance import truncated_importance
from bon_algos.token_kl import TokenTerms


class OfflineBondMetrics(NamedTuple):
    """Of one prompt; scalars, detached."""

    imitation: Tensor
    """−log π of best-of-n's completion; nats."""
    log_tilt: Tensor
    """log π_BoN/π_ref of a sample of the policy, by self-normalised importance weights; nats."""
    kl_policy_reference: Tensor
    """KL(π ‖ π_ref) by the same weights; nats."""
    token_kl: Tensor
    """What the exact token-wise KL comes to; nats."""
    covered: Tensor
    """The policy's mass on what the log holds, by truncated weights: at most 1 in expectation; the rest is unseen."""


class OfflineBondLoss(NamedTuple):
    loss: Tensor
    metrics: OfflineBondMetrics


def offline_bond_loss(
    terms: TokenTerms,
    imitation_weight_N: Tensor,
    log_tilt_N: Tensor,
    share_N: Tensor,
    *,
    jeffreys_weight: float,
    token_kl_weight: float,
    max_importance: float = math.inf,
    return_floor: float = -math.inf,
) -> OfflineBondLoss:
    """Surrogate of (1 − β)·KL(BoN ‖ π) + β·KL(π ‖ BoN) + κ·Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)), y_<t ~ π.

    BOND (arXiv:2407.14622) eq. 15 with its expectations under π taken over the reference's candidates,

        (1 − β)·Σ_j w_j·(−log π_j) − β·Σ_j s_j·min(c, ρ_j)·(A_j − Ā)·log π_j
                                   + κ·Σ_j s_j·Σ_t min(c, ρ_j,<t)·KL_j,t

    with ρ = π/π_ref, held fixed, of a completion or of its first tokens; A = t − log ρ, and Ā its mean by the same
    weights. Without c and a floor, and over candidates that are the reference's whole law, its gradient is that of the
    first two divergences, and that of the third as far as π's law of prefixes is held fixed. Over k draws Ā leans on
    the very draws that it is taken from: in expectation the second falls short, by up to about 1/k of its length.
    For completions of one token and β = 1 it ends at π ∝ π_ref·exp(t/(1 + κ)).

    terms               of the N candidates
    imitation_weight_N  (N,)  w: estimates the weights of best-of-n; sums to 1
    log_tilt_N          (N,)  t: log π_BoN/π_ref
    share_N             (N,)  s: for how much of the reference's law each candidate stands; positive, sums to 1 in
                              expectation
    jeffreys_weight     β in [0, 1]
    token_kl_weight     κ ≥ 0
    max_importance      c ≥ 1: a weight beyond it counts as c
    return_floor        nats below which A counts by its logarithm (`bond.compressed_below`)

    ValueError when shapes differ, nothing is given, a weight, a tilt or a log-prob is not finite, shares are negative
    or all 0, or a number is out of range. Without c a ratio that the dtype cannot hold leaves a loss that is no number:
    its caller looks at it.
    """
    check_weights(jeffreys_weight, token_kl_weight, max_importance, return_floor)
    _check_data(terms, imitation_weight_N, log_tilt_N, share_N)
    logprob_N, log_ratio_NL = terms.logprob_NL.sum(dim=-1), (terms.logprob_NL - terms.reference_logprob_NL).detach()
    log_ratio_N, share_N, tilt_N = log_ratio_NL.sum(dim=-1), share_N.to(logprob_N), log_tilt_N.to(logprob_N)
    log_cap = math.log(max_importance)
    reference_N = terms.reference_logprob_NL.sum(dim=-1)
    importance_N = share_N * truncated_importance(logprob_N, reference_N, max_importance=max_importance)
    law_N = torch.softmax(share_N.log() + log_ratio_N.clamp(max=log_cap), dim=-1)  # no division by what underflows
    return_N = compressed_below(tilt_N - log_ratio_N, return_floor)
    advantage_N = importance_N * (return_N - law_N @ return_N)

    before_NL = log_ratio_NL.cumsum(dim=-1) - log_ratio_NL
    token_kl = share_N @ (before_NL.clamp(max=log_cap).exp() * terms.kl_NL).sum(dim=-1)
    imitation = best_of_n_imitation(logprob_N[None], imitation_weight_N.to(logprob_N)[None])[0]
    loss = (1 - jeffreys_weight) * imitation - jeffreys_weight * advantage_N @ logprob_N + token_kl_weight * token_kl
    metrics = OfflineBondMetrics(
        imitation=imitation.detach(),
        log_tilt=law_N @ tilt_N,
        kl_policy_reference=law_N @ log_ratio_N,
        token_kl=token_kl.detach(),
        covered=importance_N.sum(),
    )
    return OfflineBondLoss(loss, metrics)


def check_weights(jeffreys_weight: float, token_kl_weight: float, max_importance: float, return_floor: float) -> None:
    if not (0 <= jeffreys_weight <= 1 and 0 <= token_kl_weight < math.inf and max_importance >= 1):
        given = f"{jeffreys_weight}, {token_kl_weight}, {max_importance}"
        raise ValueError(f"need 0 ≤ β ≤ 1, a finite κ ≥ 0 and c ≥ 1, got {given}")
    if not return_floor < math.inf:
        raise ValueError(f"need a floor of returns that is a number below ∞, got {return_floor}")


def _check_data(terms: TokenTerms, imitation_weight_N: Tensor, log_tilt_N: Tensor, share_N: Tensor) -> None:
    check_one_shape("NL", *terms)
    check_one_shape("N", terms.logprob_NL[:, 0], imitation_weight_N, log_tilt_N, share_N)
    check_finite("weights, tilts and shares", imitation_weight_N, log_tilt_N, share_N)
    check_finite("log-probs of the reference", terms.reference_logprob_NL)
    if share_N.min() < 0 or share_N.max() == 0:
        raise ValueError("shares must not be negative, nor all 0")
