"""Variational best-of-n: the policy that is nearest to best-of-n of the reference, by the backward KL alone.

Owns how best-of-n's likelihood stands to the reference's, log π_BoN/π_ref, as vBoN (arXiv:2407.06057) has it: exact,
or its lower bound; and what a sample earns by it. Does not own the log-quantile of which they are functions
(`quantiles`), nor how a return becomes a loss (`policy_gradient`).

The objective is −KL(π ‖ π_BoN); with the lower bound, and F the share of the reference strictly below,

    L(θ) = (n − 1)·E_π[log F(r(y))] − KL(π ‖ π_ref)                  (+ log n, a constant)

i.e. KL-regularised reinforcement learning with reward log F and β = 1/(n − 1). Both parts keep that ratio here; the
released code's `exact` mode weighs them 1/n and 1/(n − 1), which is no multiple of the divergence.

Rewards enter by their order alone. With F = 0 the lower bound is −∞: the policy may not emit the reference's worst
outcome, so L is −∞ for every policy that can, and its optimum π ∝ π_ref·F^{n−1} is best-of-n given that the winner
was drawn once. From few reference rewards F = 0 is common, and an estimate that is never −∞ is what to train on:
add-one as released (it hides the above), or where rewards tie `quantiles.log_quantile_harmonic_mid`, which aims at the
mid-rank and with it, for n = 2, at best-of-n itself.

Dimension key:  B prompts · N samples of the policy per prompt
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bon_algos.policy_gradient import kl_regularised_return


def log_tilt_lower_bound(log_quantile_BN: Tensor, n: int) -> Tensor:
    """log n + (n − 1)·log F(y): at most log π_BoN(y)/π_ref(y) for the true, strict F.

    From Uⁿ − Lⁿ ≥ n·L^{n−1}·(U − L); vBoN's bound L(θ). The constant log n is kept, so that it *is* a bound; under a
    baseline it is nothing. With the true mid-rank it is a bound too, nearer by the convexity of u^{n−1}, with ties or
    without, and for n = 2 it is the ratio itself; with the share at or *below* it is an upper bound.

    log_quantile_BN  (B, N)  log F by any estimator of `quantiles`; nats, at most 0

    -> (B, N); nats, at most log n; −∞ where F = 0 and n > 1. ValueError for n < 1 or a quantile that is none.
    """
    _check(log_quantile_BN, n)
    return math.log(n) + _log_power(log_quantile_BN.double(), torch.tensor(n - 1))


def log_tilt_exact(log_quantile_BN: Tensor, reference_logprob_BN: Tensor, n: int) -> Tensor:
    """log Σ_{i=1..n} C(n, i)·F^{n−i}·π_ref(y)^i − log π_ref(y), F strict: vBoN's likelihood of best-of-n.

    i draws are y and all the others are below it: the law of best-of-n where rewards are a *total order* of outcomes.
    Where outcomes tie it misses the draws that mix them and loses mass (binary rewards, n = 16: .04 is left of 1); then
    use `quantiles.log_tilt_levels`. The term i = 1 is the lower bound, and a completion of many tokens has
    π_ref(y) ≪ F, which leaves nothing of i ≥ 2; it remains finite at F = 0, where only i = n is left.

    log_quantile_BN       (B, N)  log F, strict (`quantiles.log_quantile_add_one`), −∞ allowed; nats, at most 0
    reference_logprob_BN  (B, N)  log π_ref of the completion, without its prompt; nats, at most 0

    -> (B, N); nats, at least the lower bound, and at most log n where F + π_ref is at most 1. ValueError when shapes
    differ, for n < 1, for a quantile that is none or a log-prob that is not finite.
    """
    _check(log_quantile_BN, n)
    if reference_logprob_BN.shape != log_quantile_BN.shape:
        raise ValueError(f"one quantile for each log-prob: {log_quantile_BN.shape}, {reference_logprob_BN.shape}")
    if not (reference_logprob_BN.isfinite() & (reference_logprob_BN <= 0)).all():
        raise ValueError("log-probs of the reference must be finite and at most 0")
    count = torch.arange(1, n + 1, device=log_quantile_BN.device)  # i: how often y is drawn
    others = _log_power(log_quantile_BN.double()[..., None], n - count)
    repeats = _log_power(reference_logprob_BN.double()[..., None], count - 1)
    return torch.logsumexp(_log_binomial(n, count) + others + repeats, dim=-1)


def variational_return(log_tilt_BN: Tensor, logprob_BN: Tensor, reference_logprob_BN: Tensor) -> Tensor:
    """t(y) − (log π(y) − log π_ref(y)): what a sample of the policy earns.

    Its mean over y ~ π is −KL(π ‖ π_BoN) with the exact tilt, and L(θ) + log n with the lower bound; made a loss by
    `policy_gradient`, its gradient is theirs. Held fixed.

    (B, N) each -> (B, N); nats. ValueError when shapes differ or something is not finite, a tilt of −∞ above all: L
    has no gradient there.
    """
    return kl_regularised_return(log_tilt_BN, logprob_BN, reference_logprob_BN, kl_strength=1.0)


def _log_power(log_base: Tensor, exponent: Tensor) -> Tensor:
    """log base^exponent, with 0⁰ = 1."""
    return torch.where(exponent == 0, 0.0, exponent * log_base)


def _log_binomial(n: int, count: Tensor) -> Tensor:
    """log C(n, count)."""
    chosen = count.double()
    return math.lgamma(n + 1) - torch.lgamma(chosen + 1) - torch.lgamma(n - chosen + 1)


def _check(log_quantile_BN: Tensor, n: int) -> None:
    if n < 1:
        raise ValueError(f"best-of-{n} needs n ≥ 1")
    if not (log_quantile_BN <= 0).all():
        raise ValueError("the log of a quantile is a number, and at most 0")
