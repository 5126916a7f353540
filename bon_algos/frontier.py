"""The best-of-k frontier of a reference from its own draws, and where a policy stands beside it; without torch.

Owns the win rates of best-of-k (against one draw, and of a policy against it), the KL that a win rate costs on the
frontier, and the bootstrap over prompts for what is no mean. Does not own best-of-n's weights and laws (`order`).

Every estimate of a prompt is a U-statistic of its draws: the mean over all ways to pick k of them, ties included. So
all k come from one pool, and each is unbiased.

Dimension key:  B prompts · N draws of the policy · M draws of the reference · K sizes of best-of-k
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bon_algos.contracts import Interval
from bon_algos.order import best_of_n_weights

Array = NDArray[np.float64]

RESAMPLES = 2000
UNDEFINED_AT_MOST = 0.025
"""Share of resamples in which a statistic may be undefined before it has no interval."""


def win_rate_of_best_of_k(reward_M: ArrayLike, k: int) -> float:
    """P(best of k draws > one further draw) + half the ties, averaged over all ways to pick k + 1 of M draws.

    Σ_levels c/M · [1 − (C(A, k) + C(B, k))/(2·C(M − 1, k))] with c draws on the level, B below it and A others at most
    on it: k/(k + 1) without ties, ½ where all tie.

    (M,) -> [0, 1]. ValueError when k is not in 1..M − 1.
    """
    reward = np.asarray(reward_M, dtype=np.float64)
    if not 1 <= k < reward.size:
        raise ValueError(f"best-of-{k} against another draw needs more than {k} draws, got {reward.size}")
    _, count = np.unique(reward, return_counts=True)
    at_most = np.cumsum(count)
    below = at_most - count
    lost_or_tied = (_subsets(at_most - 1, k, reward.size - 1) + _subsets(below, k, reward.size - 1)) / 2
    return float(1 - (count / reward.size) @ lost_or_tied)


def _subsets(size: NDArray[np.intp], k: int, total: int) -> Array:
    """C(size, k)/C(total, k) as Π_{i<k} (size − i)/(total − i): nothing overflows."""
    step = np.arange(k)
    factors: Array = np.maximum(size[:, None] - step, 0) / (total - step)
    return np.asarray(np.prod(factors, axis=1), dtype=np.float64)


def win_rate_against_best_of_n(reward_N: ArrayLike, reference_M: ArrayLike, n: int) -> float:
    """P(a draw of the policy > what best-of-n of the reference serves) + half the ties, over all ways to pick n of M.

    (N,), (M,) -> [0, 1]. ValueError when n is not in 1..M.
    """
    reward, reference = np.asarray(reward_N, dtype=np.float64), np.asarray(reference_M, dtype=np.float64)
    beats_NM = (reward[:, None] > reference) + (reward[:, None] == reference) / 2
    return float((beats_NM @ best_of_n_weights(reference, n)).mean())


def shown_sizes(most: int, n: int) -> tuple[int, ...]:
    """The k that a frontier shows: all to 16, then four for each doubling, to `most`; n among them where it fits."""
    quarters = {round(2 ** (i / 4)) for i in range(16, 4 * most.bit_length())}
    return tuple(sorted(k for k in {*range(1, 17), *quarters, n, most} if 1 <= k <= most))


def kl_at_win_rate(win_K: ArrayLike, kl_K: ArrayLike, win: float) -> float:
    """The KL at which the frontier reaches a win rate; NaN where it does not, and where it costs nothing.

    Between two k: the line. Choosing one of the two at random for each request has a win rate on it and a KL on it or
    below, so the line is never less than what such a mixture needs. (K,), (K,) ascending -> nats.
    """
    win_rates, kls = np.asarray(win_K, dtype=np.float64), np.asarray(kl_K, dtype=np.float64)
    if not win_rates[0] < win <= win_rates[-1]:
        return math.nan
    kl = float(np.interp(win, win_rates, kls))
    return kl if kl > 0 else math.nan


def bootstrap_interval(statistic: Callable[[Array], float], value_BC: ArrayLike, seed: int) -> Interval | None:
    """A statistic of means over prompts with its 95 % percentile interval, by resampling whole prompts.

    statistic: of the means of the C columns; NaN where it is undefined. None when it is undefined on the prompts as
    they are, or on more than `UNDEFINED_AT_MOST` of the resamples. The same seed gives the same interval.
    (B, C). ValueError with fewer than two prompts.
    """
    values = np.asarray(value_BC, dtype=np.float64)
    num_prompts = len(values)
    if num_prompts < 2:
        raise ValueError(f"an interval across prompts needs at least two, got {num_prompts}")
    value = statistic(values.mean(axis=0))
    times_RB = np.random.default_rng(seed).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), RESAMPLES)
    drawn = np.array([statistic(mean_C) for mean_C in times_RB @ values / num_prompts])
    defined = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or defined.size < (1 - UNDEFINED_AT_MOST) * RESAMPLES:
        return None
    low, high = np.quantile(defined, (0.025, 0.975))
    return Interval(mean=value, low=float(low), high=float(high))


def ratio_of_means(numerator_B: ArrayLike, denominator_B: ArrayLike, seed: int) -> Interval | None:
    """Σ numerator / Σ denominator over prompts, with its bootstrap interval; undefined where the denominator is not
    above 0. (B,), (B,)"""

    def ratio(mean_2: Array) -> float:
        return float(mean_2[0] / mean_2[1]) if mean_2[1] > 0 else math.nan

    return bootstrap_interval(ratio, np.stack([np.asarray(one) for one in (numerator_B, denominator_B)], axis=1), seed)
