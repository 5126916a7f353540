"""Order statistics of best-of-n, without torch.

Owns the exact best-of-n law of a finite policy, what it gains and costs (win rate, KL), unbiased estimates
of it from candidates already drawn, and the intervals of a report. Does not own quantiles of training data
(`quantiles`, in torch) nor anything that is learned.

Rewards are compared, never measured: laws and weights are unchanged by a strictly increasing transform. Ties
share: mass inside a reward level is split as the reference splits it, which is what serving the first highest
draw does.

Dimension key:  B prompts · N candidates per prompt · M reference rewards per prompt · K outcomes
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bon_algos.contracts import Interval

Array = NDArray[np.float64]

# --- the exact law ---------------------------------------------------------------------------------------


class _Levels(NamedTuple):
    """The reference's law over reward levels, lowest first; `level` says which one an outcome is on."""

    mass: Array
    at_most: Array
    level: NDArray[np.intp]
    """(K,)"""


def _levels(mass_K: ArrayLike, reward_K: ArrayLike) -> _Levels:
    mass, reward = _floats(mass_K), _floats(reward_K)
    if mass.ndim != 1 or mass.shape != reward.shape:
        raise ValueError(f"one reward for each outcome: {mass.shape} masses, {reward.shape} rewards")
    if mass.min() <= 0 or not math.isclose(mass.sum(), 1.0, rel_tol=1e-6):
        raise ValueError(f"masses must be positive and sum to 1: least {mass.min()}, sum {mass.sum()}")
    _, level = np.unique(reward, return_inverse=True)
    level_mass = _floats(np.bincount(level, weights=mass))
    return _Levels(level_mass, np.minimum(np.cumsum(level_mass), 1.0), level)


def _log_tilt(levels: _Levels, n: int) -> Array:
    """log (Uⁿ − Lⁿ)/(U − L) of each level (L, U], from its mass, so that thin levels do not cancel."""
    return _log_tilt_of_share(np.minimum(levels.mass / levels.at_most, 1.0), levels.at_most, n)


def log_tilt_of_level(lower_K: ArrayLike, upper_K: ArrayLike, n: int) -> Array:
    """log (Uⁿ − Lⁿ)/(U − L): log π_BoN/π_ref of what is on a reward level (L, U] of the reference's law.

    For n = 2 log 2 plus that of the level's middle, whatever its breadth; for n ≥ 3 the breadth counts. L = U is a
    level without mass: log n·U^{n−1}. (K,), (K,) -> (K,); nats, at most log n. ValueError unless 0 ≤ L ≤ U ≤ 1 and
    0 < U, or when shapes differ.
    """
    lower, upper = _floats(lower_K), _floats(upper_K)
    if lower.shape != upper.shape or not ((lower >= 0) & (lower <= upper) & (upper > 0) & (upper <= 1)).all():
        raise ValueError(f"levels must lie within [0, 1]: {lower.shape} lower edges, {upper.shape} upper ones")
    return _log_tilt_of_share(1 - lower / upper, upper, n)


def _log_tilt_of_share(share_K: Array, at_most_K: Array, n: int) -> Array:
    """share_K: of the mass at most a level, how much is on it."""
    _check_n(n)
    is_there_K = share_K > 0
    held_K = np.where(is_there_K, share_K, 1.0)
    with np.errstate(divide="ignore"):  # the lowest level has L = 0: log1p(−1) = −∞, expm1(−∞) = −1
        log_miss_K = n * np.log1p(-held_K)
    breadth_K = np.where(is_there_K, np.log(-np.expm1(log_miss_K)) - np.log(held_K), math.log(n))
    log_tilt_K: Array = (n - 1) * np.log(at_most_K) + breadth_K
    return log_tilt_K


def best_of_n_law(mass_K: ArrayLike, reward_K: ArrayLike, n: int) -> Array:
    """The law of the highest of n draws from a finite policy, ties to the first one drawn.

    π_BoN(y) = π_ref(y) · (Uⁿ − Lⁿ)/(U − L), where (L, U] is the quantile interval of y's reward level; BOND
    (arXiv:2407.14622) eq. 4, telescoped, so that it holds with ties.

    (K,), (K,) -> (K,); probabilities. Every outcome has positive mass.
    """
    levels = _levels(mass_K, reward_K)
    law_K: Array = _floats(mass_K) * np.exp(_log_tilt(levels, n))[levels.level]
    return law_K


def kl_best_of_n_reference(mass_K: ArrayLike, reward_K: ArrayLike, n: int) -> float:
    """KL(π_BoN ‖ π_ref) of a finite policy in nats: Σ over levels (Uⁿ − Lⁿ) · log[(Uⁿ − Lⁿ)/(U − L)]."""
    levels = _levels(mass_K, reward_K)
    log_tilt = _log_tilt(levels, n)
    return float((levels.mass * np.exp(log_tilt) * log_tilt).sum())


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n nats: KL(π_BoN ‖ π_ref) without ties, and above it with them (arXiv:2401.01879)."""
    _check_n(n)
    return math.log(n) - (n - 1) / n


def win_rate_best_of_n(mass_K: ArrayLike, reward_K: ArrayLike, n: int) -> float:
    """P(best of n > one draw) + half the ties, for a finite policy: Σ over levels (Uⁿ − Lⁿ)(L + U)/2."""
    levels = _levels(mass_K, reward_K)
    mid_rank = levels.at_most - levels.mass / 2
    return float((levels.mass * np.exp(_log_tilt(levels, n)) * mid_rank).sum())


def win_rate_bound(n: int) -> float:
    """n/(n + 1): the win rate of best-of-n without ties, and above it with them."""
    _check_n(n)
    return n / (n + 1)


# --- estimates from candidates already drawn -------------------------------------------------------------


def _rank_weights(num_drawn: int, n: int) -> Array:
    """C(j−1, n−1)/C(M, n) for the j-th lowest of M draws, j = 1..M.

    From the top downwards, w_M = n/M and w_j = w_{j+1} · (j − n + 1)/j: no binomial is ever formed, so it
    neither overflows nor loses more than rounding at any M.
    """
    rank = np.arange(num_drawn - 1, 0, -1, dtype=np.float64)
    falling = np.cumprod(np.maximum(rank - n + 1, 0.0) / rank)
    return np.concatenate(([1.0], falling))[::-1] * (n / num_drawn)


def best_of_n_weights(reward_M: ArrayLike, n: int) -> Array:
    """How much of the best-of-n law each of M draws stands for, averaged over all ways to pick n of them.

    Σ_j w_j f(y_j) is unbiased for E_BoN[f] at every n ≤ M, all from the same draws (Rao–Blackwell; the
    U-statistic behind pass@k, cf. arXiv:2505.15201). Equal rewards share their weights equally.

    (M,) -> (M,), in drawing order; non-negative, sums to 1. ValueError when n is not in 1..M, for another shape, or
    rewards that are not finite.
    """
    reward = _row(reward_M)
    _check_n(n, reward.size)
    _, level_M, num_tied = np.unique(reward, return_inverse=True, return_counts=True)
    lowest_of_level = np.cumsum(num_tied) - num_tied
    level_weight = np.add.reduceat(_rank_weights(reward.size, n), lowest_of_level)
    return (level_weight / num_tied)[level_M]


def soft_best_of_n_weights(reward_M: ArrayLike, softness: float) -> Array:
    """e^{r_j/λ}/Σ e^{r/λ}: how likely soft best-of-n serves each of M draws (arXiv:2505.03156).

    λ → 0 is best-of-n and λ → ∞ a plain sample; the policy that is served comes within O(1/n) of π_ref·exp(r/λ)/Z.
    Unlike best-of-n it depends on the reward's scale.

    (M,), λ > 0 in units of the reward -> (M,), sums to 1. ValueError for another shape, no draw, or rewards that are
    not finite.
    """
    if not softness > 0:
        raise ValueError(f"softness is positive, got {softness}")
    reward = _row(reward_M)
    if reward.size == 0:
        raise ValueError("there is no draw to serve")
    weight = np.exp((reward - reward.max()) / softness)
    weights: Array = weight / weight.sum()
    return weights


def kl_best_of_n_of_level(level_mass: ArrayLike, n: int) -> Array:
    """The KL(π_BoN ‖ π_ref) to expect from the reference's mass ε on the reward level of a winner; nats.

    (1 − ε)ⁿ·[log n + (n − 1)·log(1 − ε) − (n − 1)/n] + [1 − (1 − ε)ⁿ]·log([1 − (1 − ε)ⁿ]/ε): exact were that level the
    highest and nothing else tied; `kl_bound` at ε = 0, falling to 0 at ε = 1 (Beirami et al., arXiv:2401.01879). Its
    mean over winners lies between the KL and the bound: never above the bound, and above the KL on every law tried.

    Masses of any shape, in [0, 1] -> that shape, in [0, kl_bound(n)]. ValueError outside.
    """
    _check_n(n)
    mass = _floats(level_mass)
    if mass.size and not 0 <= mass.min() <= mass.max() <= 1:
        raise ValueError(f"a level's mass is in [0, 1], got {mass.min()} to {mass.max()}")
    is_none, is_all = mass == 0, mass == 1  # 0 · log 0 is 0, at either end
    log_below = np.log1p(-np.where(is_all, 0.0, mass))
    hit = np.where(is_all, 1.0, -np.expm1(n * log_below))  # the winner is on the level
    log_tilt = np.log(np.where(is_none, 1.0, hit) / np.where(is_none, 1.0, mass))
    below = (1 - hit) * (kl_bound(n) + (n - 1) * log_below)
    kl: Array = below + hit * log_tilt
    return kl


def kl_best_of_n_estimate(reward_M: ArrayLike, n: int) -> float:
    """KL(π_BoN ‖ π_ref) from draws of the reference for one prompt, aware of their ties; nats, in [0, kl_bound(n)].

    `kl_best_of_n_of_level` averaged over all ways to pick n of M, the mass of a winner's level taken from the other
    M − 1 draws: exactly the bound while no two tie. (M,) -> nats. ValueError when n is not in 1..M, or M = 1.
    """
    reward = _floats(reward_M)
    weight_M = best_of_n_weights(reward, n)
    if reward.size < 2:
        raise ValueError("a single draw has no others to tie with")
    _, level_M, num_tied = np.unique(reward, return_inverse=True, return_counts=True)
    other_share_M = (num_tied[level_M] - 1) / (reward.size - 1)
    return float(weight_M @ kl_best_of_n_of_level(other_share_M, n))


def systematic_sample(weight_M: ArrayLike, count: int, uniform: float) -> NDArray[np.intp]:
    """How often each of M candidates is drawn when `count` draws are made by weight, evenly spaced.

    The expected number of draws of j is count · w_j, and the actual one differs by less than 1: far less variance than
    independent draws, so a few candidates stand for all (Kitagawa's systematic resampling).

    (M,) weights that sum to 1, uniform in [0, 1) -> (M,), sums to count. ValueError when they are not that.
    """
    weight = _floats(weight_M)
    if count < 1 or not 0 <= uniform < 1 or weight.min() < 0 or not math.isclose(weight.sum(), 1.0, rel_tol=1e-9):
        raise ValueError("need weights that sum to 1, a positive count and a number in [0, 1)")
    # The last edge is exactly 1 and every point below it, whatever rounding made of the sums.
    edges = np.append(np.cumsum(weight)[:-1], 1.0)
    points = np.minimum((np.arange(count) + uniform) / count, np.nextafter(1.0, 0.0))
    places = np.searchsorted(edges, points, side="right")
    return np.bincount(places, minlength=weight.size)


class NCurve(NamedTuple):
    """What best-of-k is worth for every k = 1..M, prompt by prompt; entry k − 1 belongs to best-of-k."""

    value_PM: Array
    """(prompts, M); the draws of one prompt are one observation, however often it was asked."""

    @property
    def mean(self) -> Array:
        """(M,)"""
        return np.asarray(self.value_PM.mean(axis=0))

    @property
    def standard_error(self) -> Array:
        """(M,); across prompts."""
        return np.asarray(self.value_PM.std(axis=0, ddof=1) / math.sqrt(len(self.value_PM)))

    def intervals(self) -> tuple[Interval, ...]:
        """Of every k, as `mean_interval`."""
        return tuple(mean_interval(value_P) for value_P in self.value_PM.T)


def n_curve(value_BM: ArrayLike, reward_BM: ArrayLike, prompt_B: Sequence[Hashable] | None = None) -> NCurve:
    """Expected value of the candidate that best-of-k selects by reward, for all k ≤ M from one pool of draws.

    With the reward itself as value this is the reward of best-of-k; with another quantity (a second reward
    model's, a length) it shows what selecting does to that. Rows of one prompt are averaged; without prompts each row
    is its own.

    (B, M), (B, M), (B,) -> curves of P prompts. ValueError with fewer than two prompts.
    """
    curve_BM = best_of_k_values(value_BM, reward_BM)
    curve_PM = curve_BM if prompt_B is None else _averaged(curve_BM, prompt_B)
    _check_prompts(len(curve_PM))
    return NCurve(curve_PM)


def _averaged(curve_BM: Array, prompt_B: Sequence[Hashable]) -> Array:
    """The mean of each prompt's rows, prompts as they first came. (B, M), (B,) -> (P, M)."""
    rows: dict[Hashable, list[Array]] = {}
    for prompt, row_M in zip(prompt_B, curve_BM, strict=True):
        rows.setdefault(prompt, []).append(row_M)
    return np.stack([np.mean(own, axis=0) for own in rows.values()])


def best_of_k_values(value_BM: ArrayLike, reward_BM: ArrayLike, sizes: Sequence[int] | None = None) -> Array:
    """For each row of draws the unbiased estimate of what best-of-k's candidate is worth, at k = 1..M or some of them.

    Σ_i C(i − 1, k − 1)/C(M, k)·v_(i), values by ascending reward, tied rewards sharing theirs.
    (B, M), (B, M), (K,) -> (B, K). ValueError for a k that is not in 1..M.
    """
    value, reward = _floats(value_BM), _floats(reward_BM)
    if value.ndim != 2 or value.shape != reward.shape:
        raise ValueError(f"one value for each reward: {value.shape} values, {reward.shape} rewards")
    num_drawn = reward.shape[1]
    wanted = range(1, num_drawn + 1) if sizes is None else sizes
    for k in wanted:
        _check_n(k, num_drawn)
    weight_KM = np.stack([_rank_weights(num_drawn, k) for k in wanted])
    curve_BK: Array = _tie_averaged(value, reward) @ weight_KM.T
    return curve_BK


def _tie_averaged(value_BM: Array, reward_BM: Array) -> Array:
    """Values by ascending reward, each the mean over its reward's ties. (B, M), (B, M) -> (B, M)."""
    sorted_BM = np.empty_like(value_BM)
    for row, (value_M, reward_M) in enumerate(zip(value_BM, reward_BM, strict=True)):
        _, level_M, num_tied = np.unique(reward_M, return_inverse=True, return_counts=True)
        sorted_BM[row] = np.repeat(np.bincount(level_M, weights=value_M) / num_tied, num_tied)
    return sorted_BM


# --- intervals of a report -------------------------------------------------------------------------------


def win_rate(reward_BN: ArrayLike, reference_BM: ArrayLike) -> Interval:
    """P(reward > reference reward) + half the ties, candidates against reference draws of one prompt.

    The 95 % interval takes a prompt as one observation and is cut to [0, 1].

    (B, N), (B, M) -> win rate in [0, 1]. ValueError for other shapes, no candidates or draws, values that are not
    finite, or fewer than two prompts.
    """
    reward, reference = _floats(reward_BN), _floats(reference_BM)
    if reward.ndim != 2 or reference.ndim != 2 or len(reward) != len(reference):
        raise ValueError(f"need (B, N) and (B, M), got {reward.shape} and {reference.shape}")
    if reward.size == 0 or reference.size == 0:
        raise ValueError(f"nothing to compare: {reward.shape} against {reference.shape}")
    own, other = reward[:, :, None], reference[:, None, :]
    interval = mean_interval(((own > other) + (own == other) / 2).mean(axis=(1, 2)))
    return Interval(mean=interval.mean, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def mean_interval(value_B: ArrayLike) -> Interval:
    """Mean over independent prompts with its 95 % interval by Student's t. ValueError with fewer than two."""
    value = _floats(value_B)
    _check_prompts(value.size)
    mean, standard_error = float(value.mean()), float(value.std(ddof=1)) / math.sqrt(value.size)
    reach = _student_t_975(value.size - 1) * standard_error
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


def _student_t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection; it falls from 12.71 to 1.96."""
    low, high = 1.9, 12.8
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _student_t_within(t: float, degrees: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom; Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    is_odd = degrees % 2
    step = np.arange(2 + is_odd, degrees - 1, 2, dtype=np.float64)
    factors = np.concatenate(([1.0], (step - 1) / step * math.cos(angle) ** 2))
    series = float(np.cumprod(factors).sum())
    if not is_odd:
        return math.sin(angle) * series
    tail = math.sin(angle) * math.cos(angle) * series if degrees > 1 else 0.0
    return 2 / math.pi * (angle + tail)


# --- checks ----------------------------------------------------------------------------------------------


def _floats(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("values are not all finite")
    return array


def _row(values: ArrayLike) -> Array:
    row = _floats(values)
    if row.ndim != 1:
        raise ValueError(f"need the draws of one prompt, (M,), got {row.shape}")
    return row


def _check_n(n: int, num_drawn: int | None = None) -> None:
    if n < 1 or (num_drawn is not None and n > num_drawn):
        raise ValueError(f"best-of-{n} needs 1 ≤ n" + (f" ≤ {num_drawn} draws" if num_drawn is not None else ""))


def _check_prompts(num_prompts: int) -> None:
    if num_prompts < 2:
        raise ValueError(f"an interval across prompts needs at least two, got {num_prompts}")
