"""Where a reward falls among the rewards of the reference policy.

Owns counting (`Standing`), the estimators of a log-quantile, and the estimates of log π_BoN/π_ref built on
them. Does not own the exact laws (`order`) nor any loss. Each estimator is a function of its own name, by which a spec
asks for it (`log_quantile_by`, `log_tilt_by`).

Everything depends on the order of rewards alone, so a strictly increasing transform of the reward changes
nothing, bit for bit. Results are float64: ranks are exact, and a loss casts them to its own precision.

Dimension key:  B prompts · N candidates per prompt · M reference rewards per prompt
"""

from __future__ import annotations

import math
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from bon_algos.checks import check_finite
from bon_algos.contracts import CountedQuantiles


class Standing(NamedTuple):
    """How each reward stands among its prompt's reference rewards: the whole input of every estimator."""

    below: Tensor
    """Reference rewards strictly below it; int64, 0..num_reference, (B, N)."""
    tied: Tensor
    """Reference rewards equal to it; int64, below + tied is at most num_reference, (B, N)."""
    num_reference: int
    """M. The reward itself is not among them."""


def standing_against(reward_BN: Tensor, reference_BM: Tensor) -> Standing:
    """How rewards stand against independent reference rewards. (B, N), (B, M) -> Standing of (B, N).

    ValueError for other shapes, no rewards on either side (nothing is known of a quantile then), or one that is not
    finite.
    """
    if reward_BN.ndim != 2 or reference_BM.ndim != 2 or len(reward_BN) != len(reference_BM):
        raise ValueError(f"need (B, N) and (B, M), got {tuple(reward_BN.shape)}, {tuple(reference_BM.shape)}")
    if reward_BN.numel() == 0 or reference_BM.numel() == 0:
        raise ValueError(f"no rewards: {tuple(reward_BN.shape)} against {tuple(reference_BM.shape)}")
    check_finite("rewards", reward_BN, reference_BM)
    sorted_BM, wanted_BN = reference_BM.sort(dim=-1).values, reward_BN.contiguous()
    below_BN = torch.searchsorted(sorted_BM, wanted_BN)
    at_most_BN = torch.searchsorted(sorted_BM, wanted_BN, right=True)
    return Standing(below_BN, at_most_BN - below_BN, reference_BM.shape[-1])


def standing_among_others(reward_BN: Tensor) -> Standing:
    """How each candidate stands among the other candidates of its prompt, itself left out; M = N − 1.

    A reward that judges itself is never below its own quantile: leaving it out is what keeps the estimate
    independent of the candidate.

    (B, N) -> Standing of (B, N). ValueError with a single candidate.
    """
    if reward_BN.shape[-1] < 2:
        raise ValueError("a candidate has no others to stand among")
    standing = standing_against(reward_BN, reward_BN)
    return Standing(standing.below, standing.tied - 1, standing.num_reference - 1)


# --- log-quantiles ---------------------------------------------------------------------------------------


def log_quantile_monte_carlo(standing: Standing) -> Tensor:
    """log of the share of reference rewards at or below; BOND (arXiv:2407.14622) eq. 10.

    −∞ where no reference reward is at or below (probability (1 − p)^M). (B, N), nats, at most 0.
    """
    return ((standing.below + standing.tied).double() / standing.num_reference).log()


def log_quantile_mid_rank(standing: Standing) -> Tensor:
    """log of the share of reference rewards below plus half the share of ties.

    Exact for best-of-2 and second-order accurate above, with ties or without; −∞ below the whole reference.
    (B, N), nats, at most 0.
    """
    return ((standing.below + standing.tied / 2).double() / standing.num_reference).log()


def log_quantile_add_one(standing: Standing) -> Tensor:
    """log (1 + strictly below)/(M + 1): the released estimator of vBoN (arXiv:2407.06057).

    Strict, so a tied reward counts as unbeaten; never −∞, and biased upwards where the quantile is small.
    (B, N), nats, in [−log(M + 1), 0].
    """
    return ((1 + standing.below).double() / (standing.num_reference + 1)).log()


def log_quantile_harmonic(standing: Standing) -> Tensor:
    """H_s − H_M with s reference rewards at or below: the default where rewards do not tie.

    Its mean is −Σ_{k≤M} (1 − p)^k/k, the M-term series of log p, and no unbiased estimate of that series
    varies less; it needs no clipping. (B, N), nats, in [−H_M, 0].
    """
    harmonic = _harmonic_numbers(standing.num_reference, standing.below.device)
    return harmonic[standing.below + standing.tied] - harmonic[-1]


def log_quantile_harmonic_mid(standing: Standing) -> Tensor:
    """Σ_t C(T, t) 2^−T H_{s+t} − H_M with s strictly below and T tied: the default where rewards may tie.

    Half of the ties count as below, in expectation over which half; its mean is the M-term series of the log
    of the mid-rank quantile. (Averaging H_s and H_{s+T} instead would aim at a mean of logs, which diverges
    on the lowest level.) Equals `log_quantile_harmonic` without ties. (B, N), nats, in [−H_M, 0].
    """
    smoothed = _harmonic_numbers(standing.num_reference, standing.below.device)
    worst, log_quantile_BN = smoothed[-1], smoothed[standing.below]
    for num_tied in range(1, int(standing.tied.max()) + 1):
        smoothed = (smoothed[:-1] + smoothed[1:]) / 2  # one more fair coin: E H_{s + Bin(num_tied, 1/2)}
        is_here_BN = standing.tied == num_tied
        log_quantile_BN[is_here_BN] = smoothed[standing.below[is_here_BN]]
    return log_quantile_BN - worst


def _harmonic_numbers(last: int, device: torch.device) -> Tensor:
    """H_0 = 0, H_1 = 1, …, H_last. (last + 1,)."""
    reciprocal = 1 / torch.arange(1, last + 1, dtype=torch.float64, device=device)
    return torch.cat((reciprocal.new_zeros(1), reciprocal.cumsum(0)))


def log_quantile_by(quantiles: CountedQuantiles, standing: Standing) -> Tensor:
    """By the estimator of that name, and finite: what would be −∞ counts as half a draw, log 1/(2M).

    (B, N), nats, at most 0.
    """
    match quantiles:
        case "harmonic_mid":
            return log_quantile_harmonic_mid(standing)
        case "harmonic":
            return log_quantile_harmonic(standing)
        case "add_one":
            return log_quantile_add_one(standing)
        case "monte_carlo":
            log_quantile_BN = log_quantile_monte_carlo(standing)
        case "mid_rank":
            log_quantile_BN = log_quantile_mid_rank(standing)
        case _:
            assert_never(quantiles)
    return log_quantile_BN.clamp(min=-math.log(2 * standing.num_reference))


# --- log π_BoN/π_ref -------------------------------------------------------------------------------------


def log_tilt_harmonic(standing: Standing, n: int) -> Tensor:
    """log n + (n − 1) · log p̂_mid: the log-ratio of best-of-n to the reference, by the harmonic estimator.

    Up to the series' truncation unbiased for best-of-2, ties included, and for every n without ties.
    (B, N), nats, at most log n. ValueError for n < 1.
    """
    _check_n(n)
    return math.log(n) + (n - 1) * log_quantile_harmonic_mid(standing)


def log_tilt_levels(standing: Standing, n: int) -> Tensor:
    """log[(Ûⁿ − L̂ⁿ)/(Û − L̂)]: the same log-ratio from counts, right for n ≥ 3 on broad tie levels.

    The candidate counts once in its own level: with M reference rewards, L̂ = s/(M + 1) and
    Û = (s + T + 1)/(M + 1), never 0/0. (B, N), nats, in [−(n − 1) log(M + 1), log n]. ValueError for
    n < 1.
    """
    _check_n(n)
    at_most_BN = (standing.below + standing.tied + 1).double()
    share_BN = (standing.tied + 1) / at_most_BN
    log_miss_BN = n * torch.log1p(-share_BN)  # −∞ on the lowest level, where expm1 gives −1
    log_upper_BN = (at_most_BN / (standing.num_reference + 1)).log()
    return (n - 1) * log_upper_BN + (-torch.expm1(log_miss_BN)).log() - share_BN.log()


def log_tilt_tie_aware(standing: Standing, n: int) -> Tensor:
    """The better of the two estimates, candidate by candidate: harmonic where that is exact, else levels.

    Harmonic for n = 2 and where a candidate ties with no reference reward; levels where it ties and n ≥ 3
    (there the harmonic form overshoots: best-of-4 of a binary reward at P = .32 would win .778, not .733).
    (B, N), nats, at most log n. ValueError for n < 1.
    """
    harmonic_BN = log_tilt_harmonic(standing, n)
    if n == 2:
        return harmonic_BN
    return torch.where(standing.tied > 0, log_tilt_levels(standing, n), harmonic_BN)


def log_tilt_by(quantiles: CountedQuantiles, standing: Standing, n: int) -> Tensor:
    """log n + (n − 1)·log p̂ by the estimator of that name; `log_tilt_tie_aware` for harmonic_mid, which it is but for
    broad tie levels. (B, N), nats, at most log n, finite. ValueError for n < 1."""
    _check_n(n)
    if quantiles == "harmonic_mid":
        return log_tilt_tie_aware(standing, n)
    return math.log(n) + (n - 1) * log_quantile_by(quantiles, standing)


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"best-of-{n} needs n ≥ 1")
