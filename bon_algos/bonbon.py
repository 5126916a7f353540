"""BoNBoN: best-of-n from the best and the worst of n draws (arXiv:2406.00832), and pair losses that end there.

Owns the published loss, a loss on all pairs of a group whose minimiser is best-of-n, and the highest win rate that a
KL can buy, against which best-of-n is judged. Does not own the choice of pairs (`preference`) nor the estimation of
log π_BoN/π_ref (`quantiles.log_tilt_…`).

The published loss asks every pair for the same log-ratio: the mean over pairs of what best-of-n has, a mean with a
deviation of 8.6 nats at n = 8. Its minimiser is therefore not best-of-n (at n = 8 it wins .814 at .88 nats, best-of-8
.889 at 1.20); training is meant to stop before it.

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from bon_algos.checks import check_finite, check_one_shape
from bon_algos.preference import log_ratio_margin

# --- as published ----------------------------------------------------------------------------------------


def pair_target(n: int) -> float:
    """(n − 1)·H_{n−1} nats: what log π_BoN/π_ref of the best of n draws exceeds that of the worst by, on average.

    Equals 1/(2β*_n) of eq. 4.3. For rewards that never tie: with ties the mean is smaller. 0 for n = 1.
    """
    if n < 1:
        raise ValueError(f"best-of-{n} needs n ≥ 1")
    return (n - 1) * math.fsum(1 / k for k in range(1, n))


def beta_star(n: int) -> float:
    """β*_n = 1/(2(n − 1)·H_{n−1}), the β at which `preference.ipo_loss` asks for `pair_target`; eq. 4.3. n ≥ 2."""
    if n < 2:
        raise ValueError(f"the best and the worst of n draws differ only for n ≥ 2, got {n}")
    return 1 / (2 * pair_target(n))


class BonbonMetrics(NamedTuple):
    """What a step looked like; scalars, means over prompts, detached."""

    imitation: Tensor
    """−log π of the best completion; nats."""
    margin: Tensor
    """Δ, to be compared with `pair_target`; nats."""
    margin_error: Tensor
    """(Δ − target)²; nats²."""


class BonbonLoss(NamedTuple):
    loss_B: Tensor
    """Of each prompt. Prompts do not interact."""
    metrics: BonbonMetrics


def bonbon_loss(
    best_logprob_B: Tensor,
    worst_logprob_B: Tensor,
    best_reference_B: Tensor,
    worst_reference_B: Tensor,
    *,
    n: int,
    imitation_weight: float = 0.005,
) -> BonbonLoss:
    """α·(−log π(best)) + (1 − α)·(Δ − (n − 1)·H_{n−1})²; eqs. 4.1 to 4.4.

    Δ = log[π(best)/π(worst)] − log[π_ref(best)/π_ref(worst)]. At α = 1 it is imitation and ends at best-of-n. At the
    published α imitation is all but inert: for n = 8 it begins 7,200 times weaker than the other term.

    best_logprob_B, worst_logprob_B      (B,)  log π, token sums; carry the gradient
    best_reference_B, worst_reference_B  (B,)  log π_ref, token sums
    n                                    how many draws the pair is the best and the worst of (`best_and_worst`)
    imitation_weight                     α in [0, 1]

    A group that is tied throughout is the same sample twice: Δ = 0, and only imitation has a gradient. ValueError when
    shapes differ, nothing is given, a log-prob of the reference is not finite, or α or n is out of range.
    """
    if not 0 <= imitation_weight <= 1:
        raise ValueError(f"need 0 ≤ α ≤ 1, got {imitation_weight}")
    margin_B = log_ratio_margin(best_logprob_B, worst_logprob_B, best_reference_B, worst_reference_B)
    error_B = (margin_B - pair_target(n)).square()
    loss_B = imitation_weight * -best_logprob_B + (1 - imitation_weight) * error_B
    metrics = BonbonMetrics(
        imitation=-best_logprob_B.detach().mean(),
        margin=margin_B.detach().mean(),
        margin_error=error_B.detach().mean(),
    )
    return BonbonLoss(loss_B, metrics)


# --- with the pair's own target --------------------------------------------------------------------------


def consistent_pair_loss(logprob_BN: Tensor, reference_logprob_BN: Tensor, log_tilt_BN: Tensor) -> Tensor:
    """Mean over the pairs of a group of ((s_i − s_j) − (t_i − t_j))², with s = log π − log π_ref; nats².

    t = log π_BoN/π_ref up to a constant of the prompt. Best-of-n has loss 0 whatever law candidates and pairs came
    from, and nothing else has where pairs link all outcomes. Computed as twice the variance of s − t over candidates.
    Two candidates are one pair: with the best and the worst of n it is BoNBoN's second term with the right target.

    t must not depend on the partner's reward. `quantiles.standing_among_others` of the very same group does: ranks
    add up to a constant, so without ties the minimiser is π_ref · exp(t·N/(N − 1)), too steep. Take t from other
    draws, or times (N − 1)/N.

    logprob_BN             (B, N)  log π of each candidate, token sum; carries the gradient
    reference_logprob_BN   (B, N)  log π_ref, token sum
    log_tilt_BN            (B, N)  t; nats

    -> (B,). ValueError when shapes differ, a group has no pair, or a tilt or a log-prob of the reference is not finite.
    """
    check_one_shape("BN", logprob_BN, reference_logprob_BN, log_tilt_BN)
    if logprob_BN.shape[-1] < 2:
        raise ValueError(f"need (B, N) with at least two candidates, got {tuple(logprob_BN.shape)}")
    check_finite("tilts and log-probs of the reference", reference_logprob_BN, log_tilt_BN)
    target_BN = log_tilt_BN.detach().to(logprob_BN.dtype)
    return 2 * (logprob_BN - reference_logprob_BN.detach() - target_BN).var(dim=-1)


# --- the highest win rate at a KL ------------------------------------------------------------------------

_SMALL = 0.1
"""Below it closed forms lose digits to cancellation; the series has all of them."""


def optimal_tilt_win_rate(c: float) -> float:
    """Win rate against the reference of the density e^{cu} over quantiles u: 1/(1 − e^{−c}) − 1/c.

    No law that depends on ranks alone wins more at the same `optimal_tilt_kl`; best-of-n comes within .01, closest to
    it at c ≈ n + 1 (arXiv:2406.00832). For rewards that never tie. c ≥ 0; in [½, 1).
    """
    _check_tilt(c)
    if c < _SMALL:
        return 0.5 + c / 12 - c**3 / 720 + c**5 / 30240 - c**7 / 1209600
    return -1 / math.expm1(-c) - 1 / c


def optimal_tilt_kl(c: float) -> float:
    """KL to the reference of the density e^{cu} over quantiles u: c·win − log[(e^c − 1)/c] nats. c ≥ 0."""
    _check_tilt(c)
    if c < _SMALL:
        return c**2 / 24 - c**4 / 960 + c**6 / 36288 - c**8 * 7 / 9676800
    miss = -math.expm1(-c)  # with e^{−c} nothing overflows, however large c is
    return c * math.exp(-c) / miss - 1 - math.log(miss / c)


def _check_tilt(c: float) -> None:
    if not 0 <= c < math.inf:
        raise ValueError(f"need a finite tilt c ≥ 0, got {c}")
