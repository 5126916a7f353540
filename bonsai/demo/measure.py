"""What a policy and best-of-n are worth, from pools of scored draws.

Owns the estimates behind the demo's table and its curves. Does not own how the draws are obtained (`traffic.py`)
or shown (`screen.py`, `charts.py`).

A prompt is one observation: its draws are averaged first, and every interval runs over prompts. Best-of-k of the
reference comes from one pool by Rao–Blackwell weights (`bon_algos.order`), not from k fresh draws for every k.

Dimension key:  B prompts · M draws per prompt
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bon_algos.contracts import Interval, Record
from bon_algos.order import best_of_n_weights, kl_best_of_n_reference, kl_bound, mean_interval
from bon_algos.serving_order import serving_ranks
from bonsai.generation_replies import Choice

Array = NDArray[np.float64]

LOST_AT_MOST = 0.02
"""Share of candidates that may come back without a reward before a pool is refused."""


class Pool(NamedTuple):
    """Scored draws of one policy, equally many for every prompt, in drawing order."""

    prompts: tuple[str, ...]
    reward: Array
    """(B, M); what the reward model says."""
    gold: Array
    """(B, M); what the completion is really worth."""
    is_complete: NDArray[np.bool_]
    """(B, M); neither truncated nor empty."""
    tokens: Array
    """(B, M)"""

    @property
    def order(self) -> Array:
        """(B, M); what serving compares, within this pool."""
        return serving_ranks(self.reward, self.is_complete)

    @property
    def draws(self) -> int:
        return int(self.reward.shape[1])

    def part(self, draws: slice) -> Pool:
        """The pool of some of the draws of every prompt."""
        is_complete = self.is_complete[:, draws]
        reward, gold, tokens = (array[:, draws] for array in (self.reward, self.gold, self.tokens))
        return Pool(self.prompts, reward, gold, is_complete, tokens)


def pool_of(
    prompts: Sequence[str], candidates: Sequence[Sequence[Choice]], gold_reward: Callable[[str, str], float]
) -> Pool:
    """Pool of the candidates of each prompt, cut to the prompt with the fewest scored ones.

    ValueError when a prompt has none, or when more than `LOST_AT_MOST` of all candidates carry no reward: what
    is left would no longer be draws of the policy.
    """
    scored = [[one for one in group if one.reward is not None] for group in candidates]
    drawn, kept = sum(map(len, candidates)), sum(map(len, scored))
    if drawn - kept > LOST_AT_MOST * drawn:
        raise ValueError(f"{drawn - kept} of {drawn} candidates have no reward")
    draws = min(map(len, scored))
    if draws == 0:
        raise ValueError("a prompt has no scored candidate")
    groups = [group[:draws] for group in scored]
    reward_BM = np.array([[one.reward for one in group] for group in groups], dtype=np.float64)
    gold_BM = np.array(
        [[gold_reward(prompt, one.text) for one in group] for prompt, group in zip(prompts, groups, strict=True)]
    )
    is_complete_BM = np.array([[one.is_complete for one in group] for group in groups])
    tokens_BM = np.array([[one.tokens for one in group] for group in groups], dtype=np.float64)
    return Pool(tuple(prompts), reward_BM, gold_BM.astype(np.float64), is_complete_BM, tokens_BM)


def best_of_k(value_BM: Array, order_BM: Array, k: int) -> Array:
    """Expected value of the draw that best-of-k serves, for each prompt, from M ≥ k draws. (B, M), (B, M) -> (B,)"""
    weights = [best_of_n_weights(order_M, k) for order_M in order_BM]
    return np.array([weight_M @ value_M for weight_M, value_M in zip(weights, value_BM, strict=True)])


def win_rate_of_best(pool: Pool, reference: Pool, k: int) -> Interval:
    """P(best of k draws of `pool` > one of `reference`) + half the ties; the two share no draw, only prompts.

    Won by the reward itself, which the table shows beside it: what was cut off counts with its own.
    """
    wins_B = [
        best_of_n_weights(order_M, k) @ _mid_rank(reward_M, reference_M)
        for order_M, reward_M, reference_M in zip(pool.order, pool.reward, reference.reward, strict=True)
    ]
    interval = mean_interval(np.array(wins_B))
    return Interval(mean=interval.mean, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def _mid_rank(reward_M: Array, reference_M: Array) -> Array:
    """Share of the reference below each reward, ties by half. (M,), (M′,) -> (M,)"""
    ordered = np.sort(reference_M)
    below = np.searchsorted(ordered, reward_M, side="left") + np.searchsorted(ordered, reward_M, side="right")
    return below / (2.0 * ordered.size)


def kl_best_of_k(order_BM: Array, k: int) -> Interval:
    """KL(best-of-k ‖ reference) in nats, the exact law of each prompt's pool taken as the reference.

    Below log k − (k − 1)/k by the ties of the pool and by its finite size.
    """
    mass_M = np.full(order_BM.shape[1], 1.0 / order_BM.shape[1])
    return mean_interval([kl_best_of_n_reference(mass_M, order_M, k) for order_M in order_BM])


def ratio_interval(numerator_B: Array, denominator_B: Array) -> Interval:
    """Ratio of two means over the same prompts, 95 % interval by linearisation.

    r = Σ numerator / Σ denominator; its error is that of the mean of numerator − r · denominator, divided by the
    denominator's mean. ValueError when that mean is not above 0.
    """
    scale = float(denominator_B.mean())
    if scale <= 0:
        raise ValueError(f"best-of-n gains nothing over one sample: {scale:.4g}")
    ratio = float(numerator_B.mean()) / scale
    error = mean_interval(numerator_B - ratio * denominator_B)
    return Interval(mean=ratio, low=ratio + error.low / scale, high=ratio + error.high / scale)


class Quality(Record):
    """What one arm serves on held-out prompts."""

    reward: Interval
    gold: Interval
    win_rate: Interval | None
    """Against one sample of the reference; None for that sample itself."""
    kl_policy_reference: Interval | None
    """Nats per completion; None for the reference itself."""
    tokens: Interval
    """Length of the served completion."""


def quality_of_one(pool: Pool, reference: Pool | None, kl_policy_reference: Interval | None) -> Quality:
    """One sample of a policy; `reference` is None for the reference itself."""
    return Quality(
        reward=mean_interval(pool.reward.mean(axis=1)),
        gold=mean_interval(pool.gold.mean(axis=1)),
        win_rate=None if reference is None else win_rate_of_best(pool, reference, 1),
        kl_policy_reference=kl_policy_reference,
        tokens=mean_interval(pool.tokens.mean(axis=1)),
    )


def quality_of_best(pool: Pool, n: int) -> Quality:
    """Best-of-n of the reference. Half of the pool plays the reference's single sample: M ≥ 2n."""
    half = pool.draws // 2
    drawn, rest = pool.part(slice(None, half)), pool.part(slice(half, None))
    return Quality(
        reward=mean_interval(best_of_k(pool.reward, pool.order, n)),
        gold=mean_interval(best_of_k(pool.gold, pool.order, n)),
        win_rate=win_rate_of_best(drawn, rest, n),
        kl_policy_reference=kl_best_of_k(pool.order, n),
        tokens=mean_interval(best_of_k(pool.tokens, pool.order, n)),
    )


class Comparison(Record):
    """One sample of the policy against one sample of the reference, paired by prompt."""

    reward_gain: Interval
    gold_gain: Interval
    best_of_n_gain: Interval
    best_of_n_gold_gain: Interval
    gain_share: Interval
    """Reward gain of the policy divided by that of best-of-n."""
    gold_gain_share: Interval | None
    """The same of the gold reward; None where best-of-n gains no gold."""


def compare(policy: Pool, reference: Pool, n: int) -> Comparison:
    """Both pools on the same prompts in the same order; ValueError otherwise."""
    if policy.prompts != reference.prompts:
        raise ValueError("the pools are of different prompts")
    one_reward, one_gold = reference.reward.mean(axis=1), reference.gold.mean(axis=1)
    gain, gold = policy.reward.mean(axis=1) - one_reward, policy.gold.mean(axis=1) - one_gold
    best = best_of_k(reference.reward, reference.order, n) - one_reward
    best_gold = best_of_k(reference.gold, reference.order, n) - one_gold
    return Comparison(
        reward_gain=mean_interval(gain),
        gold_gain=mean_interval(gold),
        best_of_n_gain=mean_interval(best),
        best_of_n_gold_gain=mean_interval(best_gold),
        gain_share=ratio_interval(gain, best),
        gold_gain_share=ratio_interval(gold, best_gold) if best_gold.mean() > 0 else None,
    )


class Curve(Record):
    """What best-of-k of the reference serves, for every k shown."""

    k: tuple[int, ...]
    reward: tuple[Interval, ...]
    gold: tuple[Interval, ...]
    kl: tuple[float, ...]
    """Nats; the bound log k − (k − 1)/k."""
    peak: int
    """The k with the highest gold reward."""
    fall: Interval | None
    """Gold reward at the peak less that at the largest k, paired; None where the largest k is the peak. The peak was
    chosen on the same draws, so this leans to the high side."""


class _Point(NamedTuple):
    """Best-of-k in two parts, each the mean of its prompts; their sum is the value."""

    level: Array
    """(B,); of all prompts, k no larger than their draws."""
    onward: Array
    """(b,); what larger k adds, of the prompts that have more draws."""

    def __sub__(self, other: _Point) -> _Point:
        return _Point(self.level - other.level, self.onward - other.onward)

    @property
    def interval(self) -> Interval:
        """The two errors in quadrature: the prompts with more draws are few among all."""
        level, onward = mean_interval(self.level), mean_interval(self.onward)
        mean, reach = level.mean + onward.mean, math.hypot(level.high - level.mean, onward.high - onward.mean)
        return Interval(mean=mean, low=mean - reach, high=mean + reach)


def curve_of(pool: Pool, deep: Pool) -> Curve:
    """The curve at about four k per doubling: up to the draws of `pool` from all its prompts, beyond them by what
    `deep`, more draws of some prompts, says that larger k adds."""
    ks = tuple(sorted({round(2 ** (i / 4)) for i in range(int(4 * math.log2(deep.draws)) + 1)} | {deep.draws}))
    order, deep_order = pool.order, deep.order
    reward = [_point(pool.reward, order, deep.reward, deep_order, k) for k in ks]
    gold = [_point(pool.gold, order, deep.gold, deep_order, k) for k in ks]
    peak = max(range(len(ks)), key=lambda i: gold[i].interval.mean)
    return Curve(
        k=ks,
        reward=tuple(point.interval for point in reward),
        gold=tuple(point.interval for point in gold),
        kl=tuple(kl_bound(k) for k in ks),
        peak=ks[peak],
        fall=None if peak == len(ks) - 1 else (gold[peak] - gold[-1]).interval,
    )


def _point(value_BM: Array, order_BM: Array, deep_value_bM: Array, deep_order_bM: Array, k: int) -> _Point:
    """Best-of-k of a value from two pools. (B, M), (B, M), (b, M′), (b, M′) -> _Point"""
    within = min(k, value_BM.shape[1])
    beyond = best_of_k(deep_value_bM, deep_order_bM, k) - best_of_k(deep_value_bM, deep_order_bM, within)
    return _Point(best_of_k(value_BM, order_BM, within), beyond)


class Speed(Record):
    """How fast one arm answers."""

    tokens_per_answer: float
    """Generated by the engine, candidates that were not served included."""
    p50_ms: float
    p95_ms: float
    answers: int
    """Behind the percentiles."""
    answers_per_second: float
    """With the engine saturated."""


class Row(Record):
    """One line of the measured table."""

    arm: str
    quality: Quality
    speed: Speed


class Measured(Record):
    """The demo's result: what its table and its picture show, and what its exit status rests on."""

    policy: str
    n: int
    prompts: int
    one: Row
    best: Row
    distilled: Row
    comparison: Comparison
    curve: Curve
    method: str
    training_seconds: float
    machine: dict[str, str]

    @property
    def rows(self) -> tuple[Row, Row, Row]:
        return self.one, self.best, self.distilled
