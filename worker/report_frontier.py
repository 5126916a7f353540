"""A report's frontier: best-of-k of the reference on the held-out prompts, and where the policy stands beside it.

Owns which k there are and what of which draws is their value. Does not own the estimators (`bon_algos.frontier`).

Dimension key:  B prompts · M draws of the reference · K sizes of best-of-k
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bon_algos.contracts import FrontierPoint, Interval, Standing
from bon_algos.frontier import (
    Array,
    bootstrap_interval,
    kl_at_win_rate,
    shown_sizes,
    win_rate_against_best_of_n,
    win_rate_of_best_of_k,
)
from bon_algos.order import best_of_k_values, kl_best_of_n_estimate, kl_bound, mean_interval
from worker.evaluate import Judged, share_interval
from worker.judge import NoOpinion, Opinion
from worker.report_rewards import second_of_chosen

MOST_K = 256
"""The frontier's last point at most."""


class Curve(NamedTuple):
    """Best-of-k of the reference, prompt by prompt."""

    sizes: tuple[int, ...]
    reward: Array
    win: Array
    kl: Array
    """(B, K) each."""

    @classmethod
    def of(cls, judged: Sequence[Judged], n: int) -> Curve:
        """For every k that leaves each prompt another draw to win against."""
        sizes = shown_sizes(min(min(row.order_reference.size for row in judged) - 1, MOST_K), n)
        of_prompts: list[list[Array]] = [[], [], []]
        for row in judged:
            order_M, reward_M = row.order_reference, row.reward_reference
            of_prompts[0].append(best_of_k_values(reward_M[None], order_M[None], sizes)[0])
            of_prompts[1].append(np.array([win_rate_of_best_of_k(order_M, k) for k in sizes]))
            of_prompts[2].append(np.array([kl_best_of_n_estimate(order_M, k) for k in sizes]))
        return cls(sizes, *(np.stack(rows) for rows in of_prompts))

    def points(self, opinion: Opinion | NoOpinion, judged: Sequence[Judged]) -> tuple[FrontierPoint, ...]:
        return tuple(
            FrontierPoint(
                k=k,
                reward=mean_interval(self.reward[:, place]),
                win_rate=share_interval(self.win[:, place].tolist()),
                kl=float(self.kl[:, place].mean()),
                kl_bound=kl_bound(k),
                judge=_judge_at(k, opinion, judged),
            )
            for place, k in enumerate(self.sizes)
        )

    def standing(self, judged: Sequence[Judged], kl_B: Array, seed: int) -> Standing:
        """Of the policy: all three means of the same prompts, resampled together."""
        win_B = np.array([win_rate_against_best_of_n(row.order_policy, row.order_reference, 1) for row in judged])
        num_sizes = len(self.sizes)

        def frontier_kl(mean: Array) -> float:
            return kl_at_win_rate(mean[2 : 2 + num_sizes], mean[2 + num_sizes :], float(mean[0]))

        together = np.column_stack((win_B, kl_B, self.win, self.kl))
        at_equal_win = bootstrap_interval(frontier_kl, together, seed)
        ratio = bootstrap_interval(lambda mean: float(mean[1]) / frontier_kl(mean), together, seed)
        note = "" if at_equal_win and ratio else self._why_not(float(win_B.mean()))
        return Standing(frontier_kl=at_equal_win, kl_ratio=ratio, note=note)

    def _why_not(self, win: float) -> str:
        last = float(self.win[:, -1].mean())
        if win > last:
            return (
                f"The policy wins {win:.1%}, more than best-of-{self.sizes[-1]} ({last:.1%}): the frontier ends there."
            )
        if win <= self.win[:, 0].mean() or not self.kl.mean(axis=0)[-1] > 0:
            return f"The policy wins {win:.1%}: what costs no KL on the frontier, there is no ratio to."
        return "The win rate of too many resamples lies beyond the frontier's ends: there are too few prompts."


def _judge_at(k: int, opinion: Opinion | NoOpinion, judged: Sequence[Judged]) -> Interval | None:
    if isinstance(opinion, NoOpinion) or k > min(len(row.reference) for row in judged):
        return None
    said = [second_of_chosen(row, rewards, k) for row, rewards in zip(judged, opinion.reference, strict=True)]
    known = [value for value in said if math.isfinite(value)]
    return mean_interval(known) if len(known) > 1 else None
