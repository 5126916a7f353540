"""The exact best-of-n curve of the demo's reference: what any win rate and any reward must cost at least, nearly.

Owns the curve and the reading of it. Does not own the draws (`model_lab`) nor the laws (`bon_algos.order`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.papers.model_lab import Array, Draws, best_of
from bon_algos.order import kl_best_of_n_reference, win_rate_best_of_n


class Frontier(NamedTuple):
    """Best-of-n of the reference for rising n, mean over prompts: each prompt's pool of draws taken as its law."""

    n: tuple[int, ...]
    win_rate: Array
    kl: Array
    reward: Array

    def kl_at(self, win: float) -> float:
        """KL at a win rate; between two n the root of the KL is taken to be straight, as it is near ½. NaN beyond."""
        if not self.win_rate[0] <= win <= self.win_rate[-1]:
            return float("nan")
        root_kl = np.sqrt(np.maximum(self.kl, 0.0))  # at n = 1 rounding leaves it a hair below
        return float(np.interp(win, self.win_rate, root_kl) ** 2)


def frontier(reference: Draws) -> Frontier:
    """The exact tie-aware curve up to a quarter of the draws."""
    num_draws = reference.order.shape[1]
    ns = sorted({round(2 ** (i / 4)) for i in range(int(4 * np.log2(num_draws / 4)) + 1)})
    mass_M = np.full(num_draws, 1 / num_draws)
    win = [[win_rate_best_of_n(mass_M, order_M, n) for order_M in reference.order] for n in ns]
    kl = [[kl_best_of_n_reference(mass_M, order_M, n) for order_M in reference.order] for n in ns]
    reward = [best_of(reference.reward, reference.order, n) for n in ns]
    return Frontier(tuple(ns), *(np.mean(rows, axis=1) for rows in (win, kl, reward)))
